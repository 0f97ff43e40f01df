// Package virtualnode keeps one Kubernetes Node for each device, through
// Virtual Kubelet's NodeController: the object, its lease, its status, and by
// a patch of our own its labels and taints.
//
// # Names
//
// A node is named by the device's alias if that is a valid name that nobody
// else has, else by the device's name in Flightctl. The name stays for the
// node's life, whatever becomes of the alias: the label jetbridge.dev/device
// of the node decides.
package virtualnode

import (
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/jetbridge/jetbridge/cluster-shim/device"
	"github.com/jetbridge/jetbridge/shared/wellknown"
)

const (
	// labelExcludeDisruption keeps edge nodes out of the node lifecycle
	// controller's judgement of a whole zone.
	labelExcludeDisruption = "node.kubernetes.io/exclude-disruption"
	valueTrue              = "true"
)

// Settings are the same for all nodes.
type Settings struct {
	// Version is the shim's, part of the kubelet version.
	Version string
	// KubernetesVersion is the API that we behave like, such as v1.37.2.
	KubernetesVersion string
	// Reserve is kept back from what devices have.
	Reserve corev1.ResourceList
	// Taints are added to the one that every node has.
	Taints []corev1.Taint
}

// Build makes the node of a device. Previous are the conditions that the node
// has, whose transition times stay while their status does.
func (s Settings) Build(name string, d device.State, previous []corev1.NodeCondition, now metav1.Time) *corev1.Node {
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: s.labels(name, d)},
		Spec:       corev1.NodeSpec{Taints: s.taints()},
	}
	st := &node.Status
	st.Capacity = corev1.ResourceList{}
	if d.Report != nil {
		st.Capacity = capacity(d.Report.Capacity)
		st.NodeInfo = d.Report.System
	}
	st.Allocatable = s.Allocatable(d)
	st.NodeInfo.KubeletVersion = s.KubernetesVersion + "-jetbridge-" + versionWord(s.Version)
	if st.NodeInfo.OperatingSystem == "" {
		st.NodeInfo.OperatingSystem = "linux"
	}
	st.Addresses = []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: name}}
	st.Conditions = conditions(d, previous, now)
	return node
}

// Allocatable is what pods may use of a device: nothing before its first report.
func (s Settings) Allocatable(d device.State) corev1.ResourceList {
	out := corev1.ResourceList{}
	if d.Report == nil {
		return out
	}
	for name, q := range capacity(d.Report.Capacity) {
		if r, ok := s.Reserve[name]; ok {
			q.Sub(r)
			if q.Sign() < 0 {
				q = *resource.NewQuantity(0, q.Format)
			}
		}
		out[name] = q
	}
	return out
}

// capacity is the part of a device's word that becomes a node's.
func capacity(got corev1.ResourceList) corev1.ResourceList {
	out := corev1.ResourceList{}
	for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory, corev1.ResourceEphemeralStorage, corev1.ResourcePods} {
		if q, ok := got[name]; ok {
			out[name] = q.DeepCopy()
		}
	}
	return out
}

func (s Settings) labels(name string, d device.State) map[string]string {
	arch := "amd64"
	if d.Report != nil && d.Report.System.Architecture != "" {
		arch = d.Report.System.Architecture
	}
	out := map[string]string{
		corev1.LabelHostname:             name,
		corev1.LabelOSStable:             "linux",
		corev1.LabelArchStable:           arch,
		corev1.LabelTopologyZone:         "edge-" + name,
		corev1.LabelNodeExcludeBalancers: valueTrue,
		labelExcludeDisruption:           valueTrue,
		wellknown.LabelType:              wellknown.TypeVirtualKubelet,
		wellknown.LabelManaged:           valueTrue,
	}
	put := func(key, value string) {
		if len(validation.IsQualifiedName(key)) == 0 && len(validation.IsValidLabelValue(value)) == 0 {
			out[key] = value
		}
	}
	put(wellknown.LabelDevice, d.Name)
	if d.Fleet != "" {
		put(wellknown.LabelFleet, d.Fleet)
	}
	for _, key := range slices.Sorted(maps.Keys(d.Labels)) {
		if key == wellknown.DeviceLabelRevision || strings.Contains(key, "/") {
			continue // ours, or a prefix that cannot follow another
		}
		put(wellknown.LabelDevicePrefix+key, d.Labels[key])
	}
	if len(out[corev1.LabelTopologyZone]) > validation.LabelValueMaxLength {
		out[corev1.LabelTopologyZone] = strings.TrimRight(out[corev1.LabelTopologyZone][:validation.LabelValueMaxLength], "-_.")
	}
	return out
}

// taints are those of every node.
func (s Settings) taints() []corev1.Taint {
	return append([]corev1.Taint{{
		Key: wellknown.TaintProvider, Value: wellknown.TaintProviderValue, Effect: corev1.TaintEffectNoSchedule,
	}}, s.Taints...)
}

func conditions(d device.State, previous []corev1.NodeCondition, now metav1.Time) []corev1.NodeCondition {
	ready := corev1.NodeCondition{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: wellknown.ReasonDeviceReporting, Message: "The device reports."}
	switch {
	case d.Connection == device.Disconnected:
		ready.Status, ready.Reason, ready.Message = corev1.ConditionUnknown, wellknown.ReasonDeviceDisconnected, "The device has no contact with Flight Control."
	case d.Report == nil:
		ready.Status, ready.Reason, ready.Message = corev1.ConditionFalse, wellknown.ReasonDeviceNotReporting, "The device is enrolled, but its device-agent has reported nothing yet."
	case d.Connection == device.Unheard:
		ready.Status, ready.Reason, ready.Message = corev1.ConditionUnknown, wellknown.ReasonDeviceDisconnected, "The device was not in contact since this was looked at."
	}
	out := []corev1.NodeCondition{
		ready,
		{Type: corev1.NodeMemoryPressure, Status: corev1.ConditionFalse, Reason: "DeviceHasSufficientMemory"},
		{Type: corev1.NodeDiskPressure, Status: corev1.ConditionFalse, Reason: "DeviceHasNoDiskPressure"},
		{Type: corev1.NodePIDPressure, Status: corev1.ConditionFalse, Reason: "DeviceHasSufficientPID"},
		{Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionFalse, Reason: "DeviceNetwork"},
	}
	for i := range out {
		out[i].LastTransitionTime, out[i].LastHeartbeatTime = now, now
		for _, p := range previous {
			if p.Type == out[i].Type && p.Status == out[i].Status && !p.LastTransitionTime.IsZero() {
				out[i].LastTransitionTime = p.LastTransitionTime
			}
		}
	}
	return out
}

// versionWord makes a version fit into a semantic version's pre-release part.
func versionWord(v string) string {
	v = strings.Map(func(r rune) rune {
		switch {
		case r >= '0' && r <= '9', r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r == '-', r == '.':
			return r
		}
		return '-'
	}, v)
	if v = strings.Trim(v, ".-"); v == "" {
		return "unknown"
	}
	return v
}

// Name chooses the name of a device's node: its alias if valid and free, else
// the device's own name.
func Name(d device.State, free func(name string) bool) string {
	if d.Alias != "" && len(validation.IsDNS1123Subdomain(d.Alias)) == 0 &&
		len(validation.IsValidLabelValue(d.Alias)) == 0 && free(d.Alias) {
		return d.Alias
	}
	return d.Name
}
