package support

import (
	"reflect"

	corev1 "k8s.io/api/core/v1"
)

func yes(note ...string) rule     { return rule{class: Supported, note: first(note)} }
func only(values ...string) rule  { return rule{class: Supported, values: values} }
func cluster(note ...string) rule { return rule{class: Cluster, note: first(note)} }
func no(note string, harmless ...string) rule {
	return rule{class: Refused, values: harmless, note: note}
}

func (r rule) because(note string) rule {
	r.note = note
	return r
}

func first(notes []string) string {
	if len(notes) == 0 {
		return ""
	}
	return notes[0]
}

// Reasons that several fields share.
const (
	noProbes      = "probes are not supported on devices yet; let the program exit when it fails, so that restartPolicy restarts it"
	noSELinux     = "SELinux options are not supported on devices yet; remove the field"
	noSeccomp     = "seccomp profiles are not supported on devices yet; remove the field: podman's default profile applies to all unprivileged containers"
	noAppArmor    = "AppArmor profiles are not supported on devices yet; remove the field"
	noWindows     = "devices run Linux; remove the field"
	noNonRoot     = "runAsNonRoot is not supported on devices yet; set runAsUser instead"
	noFileOwner   = "owners of files in volumes are not supported on devices yet; remove the field and use modes"
	noStdin       = "standard input and terminals are not supported on devices yet; remove the field"
	noSubPath     = "subPath is not supported on devices yet; mount the volume as a whole, or select files with items"
	noNetworkDisk = "this kind of volume needs the cluster's storage, which devices do not reach; use hostPath, or emptyDir for what may be lost"
	noDRA         = "resource claims are not supported on devices; remove the field"
	noRules       = "restart policies of single containers are not supported on devices yet; use the pod's restartPolicy"
)

// table has a rule for each JSON field of each struct type that a supported
// field of v1.PodSpec leads to; what is inside of other fields is not looked at.
var table = map[reflect.Type]map[string]rule{
	reflect.TypeFor[corev1.PodSpec](): {
		"volumes":             yes(),
		"initContainers":      yes("the same fields as in containers"),
		"containers":          yes(),
		"ephemeralContainers": no("ephemeral containers are not supported on devices yet; add the tool to the image"),

		"restartPolicy":                 only("Always", "OnFailure", "Never"),
		"terminationGracePeriodSeconds": yes("at least 1 second"),
		"activeDeadlineSeconds":         no("activeDeadlineSeconds is not supported on devices yet; use the Job's activeDeadlineSeconds"),

		"dnsPolicy":   only("ClusterFirst", "ClusterFirstWithHostNet", "Default").because("names are resolved by the device's own resolver: devices do not reach the cluster's DNS"),
		"dnsConfig":   no("dnsConfig is not supported on devices yet; configure the device's resolver"),
		"hostAliases": no("hostAliases is not supported on devices yet; use addresses or names that the device's resolver knows"),

		"hostname":          yes(),
		"subdomain":         cluster("devices are in no cluster domain"),
		"setHostnameAsFQDN": no("devices are in no cluster domain, so there is no full name; remove the field", "false"),
		"hostnameOverride":  no("hostnameOverride is not supported on devices yet; use hostname"),

		"serviceAccountName":           cluster("tokens of projected volumes belong to it"),
		"serviceAccount":               cluster(),
		"automountServiceAccountToken": cluster("the API server adds the volume, which is supported"),
		"enableServiceLinks":           cluster("devices do not reach Services, so there are no variables for them"),
		"imagePullSecrets":             yes(),

		"hostNetwork":           no("host namespaces are not supported on devices yet; publish ports with hostPort", "false"),
		"hostPID":               no("host namespaces are not supported on devices yet; remove the field", "false"),
		"hostIPC":               no("host namespaces are not supported on devices yet; remove the field", "false"),
		"hostUsers":             no("user namespaces are not supported on devices yet; remove the field", "true"),
		"shareProcessNamespace": no("a shared process namespace is not supported on devices yet; remove the field", "false"),
		"securityContext":       yes(),

		"nodeName":                  cluster(),
		"nodeSelector":              cluster(),
		"affinity":                  cluster(),
		"tolerations":               cluster(),
		"topologySpreadConstraints": cluster(),
		"schedulerName":             cluster(),
		"schedulingGates":           cluster(),
		"schedulingGroup":           cluster(),
		"priorityClassName":         cluster("among pods of one device it decides whom the scheduler preempts, nothing more"),
		"priority":                  cluster(),
		"preemptionPolicy":          cluster(),
		"evictionResponders":        cluster(),

		"readinessGates":   no("readiness gates are not supported on devices yet; remove the field"),
		"runtimeClassName": no("devices have one container runtime; remove the field"),
		"overhead":         no("overhead belongs to a runtime class, and devices have one container runtime; remove the field"),
		"os":               no("devices run Linux; choose another node", "linux"),
		"resourceClaims":   no(noDRA),
		"resources":        no("resources of the pod as a whole are not supported on devices yet; set them on its containers"),
	},
	reflect.TypeFor[corev1.PodSecurityContext](): {
		"runAsUser":                yes(),
		"runAsGroup":               yes(),
		"runAsNonRoot":             no(noNonRoot, "false"),
		"fsGroup":                  no("fsGroup is not supported on devices yet; use runAsUser and runAsGroup, and defaultMode for files of ConfigMaps and Secrets"),
		"fsGroupChangePolicy":      no("fsGroup is not supported on devices yet, and fsGroupChangePolicy neither; remove both"),
		"supplementalGroups":       no("supplementalGroups is not supported on devices yet; use runAsGroup"),
		"supplementalGroupsPolicy": no("supplementalGroupsPolicy is not supported on devices yet; remove the field", "Merge"),
		"sysctls":                  no("sysctls are not supported on devices yet; set them on the device by its Flightctl configuration"),
		"seLinuxOptions":           no(noSELinux),
		"seLinuxChangePolicy":      no(noSELinux),
		"seccompProfile":           no(noSeccomp),
		"appArmorProfile":          no(noAppArmor),
		"windowsOptions":           no(noWindows),
	},
	reflect.TypeFor[corev1.LocalObjectReference](): {
		"name": yes(),
	},

	reflect.TypeFor[corev1.Container](): {
		"name":                     yes(),
		"image":                    yes(),
		"imagePullPolicy":          only("Always", "IfNotPresent", "Never"),
		"command":                  yes(),
		"args":                     yes(),
		"workingDir":               yes(),
		"ports":                    yes(),
		"env":                      yes(),
		"envFrom":                  yes(),
		"resources":                yes(),
		"resizePolicy":             cluster("the API server may fill it in"),
		"restartPolicy":            no("restart policies of single containers, and with them sidecars, are not supported on devices yet; use the pod's restartPolicy, and a sidecar as an ordinary container"),
		"restartPolicyRules":       no(noRules),
		"volumeMounts":             yes(),
		"volumeDevices":            no("block devices are not supported on devices yet; mount the device with hostPath into a privileged container"),
		"livenessProbe":            no(noProbes),
		"readinessProbe":           no(noProbes),
		"startupProbe":             no(noProbes),
		"lifecycle":                no("lifecycle hooks are not supported on devices yet; let the program handle SIGTERM, or start it by a script"),
		"terminationMessagePath":   yes(),
		"terminationMessagePolicy": only("File"),
		"securityContext":          yes(),
		"stdin":                    no(noStdin),
		"stdinOnce":                no(noStdin),
		"tty":                      no(noStdin),
	},
	reflect.TypeFor[corev1.ContainerPort](): {
		"name":          yes(),
		"hostPort":      yes(),
		"containerPort": yes("reachable from outside of the pod only with hostPort"),
		"protocol":      only("TCP", "UDP", "SCTP"),
		"hostIP":        yes(),
	},
	reflect.TypeFor[corev1.EnvVar](): {
		"name":      yes(),
		"value":     yes("with $(VAR) of variables before it"),
		"valueFrom": yes(),
	},
	reflect.TypeFor[corev1.EnvVarSource](): {
		"fieldRef":         yes(),
		"resourceFieldRef": yes(),
		"configMapKeyRef":  yes(),
		"secretKeyRef":     yes(),
		"fileKeyRef":       no("variables from files are not supported on devices yet; use a ConfigMap or a Secret"),
	},
	reflect.TypeFor[corev1.ObjectFieldSelector](): {
		"apiVersion": only("v1"),
		"fieldPath":  yes(),
	},
	reflect.TypeFor[corev1.ResourceFieldSelector](): {
		"containerName": yes(),
		"resource":      only("limits.cpu", "limits.memory", "limits.ephemeral-storage", "requests.cpu", "requests.memory", "requests.ephemeral-storage"),
		"divisor":       yes(),
	},
	reflect.TypeFor[corev1.ConfigMapKeySelector](): {
		"key":      yes(),
		"optional": yes(),
	},
	reflect.TypeFor[corev1.SecretKeySelector](): {
		"key":      yes(),
		"optional": yes(),
	},
	reflect.TypeFor[corev1.EnvFromSource](): {
		"prefix":       yes(),
		"configMapRef": yes(),
		"secretRef":    yes(),
	},
	reflect.TypeFor[corev1.ConfigMapEnvSource](): {
		"optional": yes(),
	},
	reflect.TypeFor[corev1.SecretEnvSource](): {
		"optional": yes(),
	},
	reflect.TypeFor[corev1.ResourceRequirements](): {
		"limits":   only("cpu", "memory"),
		"requests": only("cpu", "memory", "ephemeral-storage"),
		"claims":   no(noDRA),
	},
	reflect.TypeFor[corev1.VolumeMount](): {
		"name":              yes(),
		"readOnly":          yes(),
		"mountPath":         yes(),
		"recursiveReadOnly": no("recursive read-only mounts are not supported on devices yet; use readOnly", "Disabled"),
		"subPath":           no(noSubPath),
		"subPathExpr":       no(noSubPath),
		"mountPropagation":  no("mount propagation is not supported on devices yet; remove the field", "None"),
		"bindMountOptions":  no("mount options are not supported on devices yet; remove the field"),
	},
	reflect.TypeFor[corev1.SecurityContext](): {
		"runAsUser":                yes(),
		"runAsGroup":               yes(),
		"runAsNonRoot":             no(noNonRoot, "false"),
		"privileged":               yes(),
		"readOnlyRootFilesystem":   yes(),
		"allowPrivilegeEscalation": yes(),
		"capabilities":             yes(),
		"procMount":                no("procMount is not supported on devices yet; remove the field", "Default"),
		"seLinuxOptions":           no(noSELinux),
		"seccompProfile":           no(noSeccomp),
		"appArmorProfile":          no(noAppArmor),
		"windowsOptions":           no(noWindows),
	},
	reflect.TypeFor[corev1.Capabilities](): {
		"add":  yes(),
		"drop": yes(),
	},

	reflect.TypeFor[corev1.Volume](): {
		"name": yes(),
	},
	reflect.TypeFor[corev1.VolumeSource](): {
		"hostPath":    yes(),
		"emptyDir":    yes(),
		"configMap":   yes(),
		"secret":      yes(),
		"downwardAPI": yes(),
		"projected":   yes(),

		"persistentVolumeClaim": no("persistent volume claims are not supported on devices yet; use hostPath"),
		"ephemeral":             no("generic ephemeral volumes are not supported on devices yet; use emptyDir"),
		"image":                 no("image volumes are not supported on devices yet; copy the files by an init container into an emptyDir"),
		"csi":                   no("CSI volumes are not supported on devices; use hostPath or emptyDir"),
		"gitRepo":               no("gitRepo volumes are a security risk; clone by an init container into an emptyDir"),
		"flexVolume":            no("flex volumes are not supported on devices; use hostPath or emptyDir"),

		"awsElasticBlockStore": no(noNetworkDisk),
		"azureDisk":            no(noNetworkDisk),
		"azureFile":            no(noNetworkDisk),
		"cephfs":               no(noNetworkDisk),
		"cinder":               no(noNetworkDisk),
		"fc":                   no(noNetworkDisk),
		"flocker":              no(noNetworkDisk),
		"gcePersistentDisk":    no(noNetworkDisk),
		"glusterfs":            no(noNetworkDisk),
		"iscsi":                no(noNetworkDisk),
		"nfs":                  no("NFS volumes are not supported on devices yet; mount the share by the device's Flightctl configuration and use hostPath"),
		"photonPersistentDisk": no(noNetworkDisk),
		"portworxVolume":       no(noNetworkDisk),
		"quobyte":              no(noNetworkDisk),
		"rbd":                  no(noNetworkDisk),
		"scaleIO":              no(noNetworkDisk),
		"storageos":            no(noNetworkDisk),
		"vsphereVolume":        no(noNetworkDisk),
	},
	reflect.TypeFor[corev1.HostPathVolumeSource](): {
		"path": yes(),
		"type": only("DirectoryOrCreate", "Directory", "FileOrCreate", "File", "Socket", "CharDevice", "BlockDevice"),
	},
	reflect.TypeFor[corev1.EmptyDirVolumeSource](): {
		"medium":    no("emptyDir in memory or huge pages is not supported on devices yet; remove the field"),
		"sizeLimit": no("size limits of emptyDir are not supported on devices yet; remove the field"),
		"mode":      no("modes of emptyDir are not supported on devices yet; remove the field"),
	},
	reflect.TypeFor[corev1.ConfigMapVolumeSource](): {
		"items":       yes(),
		"defaultMode": yes(),
		"optional":    yes(),
		"defaultUser": no(noFileOwner),
	},
	reflect.TypeFor[corev1.SecretVolumeSource](): {
		"secretName":  yes(),
		"items":       yes(),
		"defaultMode": yes(),
		"optional":    yes(),
		"defaultUser": no(noFileOwner),
	},
	reflect.TypeFor[corev1.KeyToPath](): {
		"key":  yes(),
		"path": yes(),
		"mode": yes(),
		"user": no(noFileOwner),
	},
	reflect.TypeFor[corev1.DownwardAPIVolumeSource](): {
		"items":       yes(),
		"defaultMode": yes(),
		"defaultUser": no(noFileOwner),
	},
	reflect.TypeFor[corev1.DownwardAPIVolumeFile](): {
		"path":             yes(),
		"fieldRef":         yes(),
		"resourceFieldRef": yes(),
		"mode":             yes(),
		"user":             no(noFileOwner),
	},
	reflect.TypeFor[corev1.ProjectedVolumeSource](): {
		"sources":     yes(),
		"defaultMode": yes(),
		"defaultUser": no(noFileOwner),
	},
	reflect.TypeFor[corev1.VolumeProjection](): {
		"secret":              yes(),
		"downwardAPI":         yes(),
		"configMap":           yes(),
		"serviceAccountToken": yes(),
		"clusterTrustBundle":  no("cluster trust bundles are not supported on devices yet; use a ConfigMap"),
		"podCertificate":      no("pod certificates are not supported on devices yet; use a Secret"),
	},
	reflect.TypeFor[corev1.SecretProjection](): {
		"items":    yes(),
		"optional": yes(),
	},
	reflect.TypeFor[corev1.ConfigMapProjection](): {
		"items":    yes(),
		"optional": yes(),
	},
	reflect.TypeFor[corev1.DownwardAPIProjection](): {
		"items": yes(),
	},
	reflect.TypeFor[corev1.ServiceAccountTokenProjection](): {
		"audience":          yes(),
		"expirationSeconds": yes(),
		"path":              yes(),
		"user":              no(noFileOwner),
	},
}
