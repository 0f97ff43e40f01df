// Package wellknown holds the names that both halves of Jetbridge and the
// cluster's users agree on: labels, annotations, taints, finalizers, reasons
// and the places of files on a device.
package wellknown

// Labels of a virtual node.
const (
	// LabelManaged marks every node that stands for a device.
	LabelManaged = "jetbridge.dev/managed"
	// LabelFleet is the Flightctl fleet that owns the device.
	LabelFleet = "jetbridge.dev/fleet"
	// LabelDevice is the device's name in Flightctl.
	LabelDevice = "jetbridge.dev/device"
	// LabelDevicePrefix precedes each label that the device has in Flightctl.
	LabelDevicePrefix = "label.jetbridge.dev/"
	// LabelType has the value TypeVirtualKubelet, by which blanket
	// DaemonSets (network plugins, kube-proxy) keep off virtual nodes.
	LabelType = "type"
	// TypeVirtualKubelet is the value of LabelType.
	TypeVirtualKubelet = "virtual-kubelet"
)

// The taint of every virtual node.
const (
	TaintProvider      = "virtual-kubelet.io/provider"
	TaintProviderValue = "flightctl"
)

// Keys on pods.
const (
	// FinalizerStopConfirmed keeps a pod's object until its device confirmed
	// that the pod stopped, so that not even a forced delete makes two writers.
	FinalizerStopConfirmed = "jetbridge.dev/stop-confirmed"
	// AnnotationDevice names the device (Flightctl's name) that a pod was
	// bound to when its node stood for it; the pod goes to no other.
	AnnotationDevice = "jetbridge.dev/device"
)

// Keys in Flightctl.
const (
	// DeviceLabelRevision is the label that makes Flightctl render a
	// fleet-owned device again; its value is the bundle's generation,
	// with a suffix for each retry.
	DeviceLabelRevision = "jetbridge-rev"
	// DeviceLabelAlias is the label that Flightctl shows as a device's alias.
	DeviceLabelAlias = "alias"
	// ConfigEntry names our entry in a device's or a fleet's configuration.
	ConfigEntry = "jetbridge"
	// CustomInfoKey is the key of the report in systemInfo.customInfo.
	CustomInfoKey = "jetbridge"
	// RepositoryName is the Flightctl Repository that serves bundles.
	RepositoryName = "jetbridge"
)

// Places on a device.
const (
	// StateDir holds all that must survive a reboot. Mode 0700.
	StateDir = "/var/lib/jetbridge"
	// BundlePath is where Flightctl puts the desired state.
	BundlePath = StateDir + "/bundle/desired"
	// RunDir holds what a reboot may forget.
	RunDir = "/run/jetbridge"
	// ReportPath is the encoded report that the custom-info script prints.
	ReportPath = RunDir + "/report"
	// SocketPath is the agent's local control socket, root only.
	SocketPath = RunDir + "/agent.sock"
)

// Reasons in conditions, statuses and events.
const (
	ReasonUnsupportedField   = "UnsupportedField"
	ReasonDeviceDisconnected = "DeviceDisconnected"
	ReasonDeviceReporting    = "DeviceReporting"
	ReasonDeviceNotReporting = "DeviceNotReporting"
	ReasonBundleTooLarge     = "BundleTooLarge"
	ReasonInvalidBundle      = "InvalidBundle"
	ReasonNoSealingKey       = "NoSealingKey"
	ReasonDeliveryFailed     = "DeliveryFailed"
	ReasonFleetNotManaged    = "FleetNotManaged"
)
