//go:build e2e

package e2e

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	batchv1 "k8s.io/api/batch/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/jetbridge/jetbridge/shared/bundle"
	"github.com/jetbridge/jetbridge/shared/wellknown"
)

const forever = "trap 'exit 0' TERM; while true; do sleep 1; done"

func TestNodes(t *testing.T) {
	standalone, inFleet := devices(t)
	for _, d := range bothDevices(t) {
		nodeReady(t, d, corev1.ConditionTrue, time.Minute)
		n := mustGet[corev1.Node](t, "node", d.node)
		assert.Equal(t, "true", n.Labels["jetbridge.dev/managed"])
		assert.NotEmpty(t, n.Labels["jetbridge.dev/device"])
		assert.Equal(t, d.node, n.Labels["label.jetbridge.dev/alias"], "a device label")
		assert.Contains(t, n.Spec.Taints, corev1.Taint{Key: "virtual-kubelet.io/provider", Value: "flightctl", Effect: corev1.TaintEffectNoSchedule})
		cpu := strings.TrimSpace(on(t, d, "nproc"))
		assert.Equal(t, cpu, n.Status.Capacity.Cpu().String())
		assert.Positive(t, n.Status.Allocatable.Memory().Value())
		assert.LessOrEqual(t, n.Status.Allocatable.Memory().Cmp(n.Status.Capacity[corev1.ResourceMemory]), 0)
		assert.Contains(t, n.Status.NodeInfo.ContainerRuntimeVersion, "podman://5")
		assert.Equal(t, strings.TrimSpace(on(t, d, "cat", "/proc/sys/kernel/random/boot_id")), n.Status.NodeInfo.BootID)
		lease := mustGet[coordinationv1.Lease](t, "-n", "kube-node-lease", "lease", d.node)
		assert.Equal(t, d.node, *lease.Spec.HolderIdentity)
	}
	assert.Empty(t, mustGet[corev1.Node](t, "node", standalone.node).Labels["jetbridge.dev/fleet"])
	assert.Equal(t, "edge", mustGet[corev1.Node](t, "node", inFleet.node).Labels["jetbridge.dev/fleet"])
}

// TestDeployment applies, looks, updates and deletes, on both devices.
func TestDeployment(t *testing.T) {
	ns := namespace(t)
	manifest := func(word string) string {
		return fmt.Sprintf(`apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: %s}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  strategy: {rollingUpdate: {maxSurge: 0, maxUnavailable: 1}}
  template:
    metadata: {labels: {app: web}}
    spec:
      nodeSelector: {jetbridge.dev/managed: "true"}
      tolerations: [{key: virtual-kubelet.io/provider, operator: Exists}]
      terminationGracePeriodSeconds: 5
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: web}}}
      containers:
      - name: main
        image: %s
        command: [sh, -c, %q]
        env: [{name: WORD, value: %s}]
        resources: {requests: {cpu: 10m, memory: 16Mi}}
`, ns, os.Getenv("LAB_IMAGE_BUSYBOX"), forever, word)
	}
	apply(t, manifest("one"))
	old := running(t, ns, "app=web", 2)
	assert.ElementsMatch(t, []string{bothDevices(t)[0].node, bothDevices(t)[1].node}, []string{old[0].Spec.NodeName, old[1].Spec.NodeName})
	for i := range old {
		p := &old[i]
		d := deviceOf(t, p)
		cs := p.Status.ContainerStatuses[0]
		assert.NotNil(t, cs.State.Running)
		assert.Zero(t, cs.RestartCount)
		assert.NotEmpty(t, cs.ImageID)
		assert.Contains(t, process(t, d, p), " running")
		assert.Equal(t, "one", strings.TrimSpace(on(t, d, "podman", "exec", containerID(t, p), "sh", "-c", `echo "$WORD"`)))
		assert.Contains(t, p.Finalizers, "jetbridge.dev/stop-confirmed")
		assert.Contains(t, kubectl(t, "-n", ns, "get", "pod", p.Name, "-o", "wide"), "1/1     Running")
		// The container is the systemd service's, not the agent's.
		unit := on(t, d, "sh", "-c", "cat /proc/"+strings.TrimSpace(on(t, d, "podman", "inspect", "--format", "{{.State.Pid}}", containerID(t, p)))+"/cgroup")
		assert.Contains(t, unit, ".service")
		assert.NotContains(t, unit, "jetbridge-agent.service")
	}

	apply(t, manifest("two"))
	kubectl(t, "-n", ns, "rollout", "status", "deployment/web", "--timeout=150s")
	fresh := running(t, ns, "app=web", 2)
	for i := range fresh {
		p := &fresh[i]
		d := deviceOf(t, p)
		assert.Equal(t, "two", strings.TrimSpace(on(t, d, "podman", "exec", containerID(t, p), "sh", "-c", `echo "$WORD"`)))
		before := old[slices.IndexFunc(old, func(o corev1.Pod) bool { return o.Spec.NodeName == p.Spec.NodeName })]
		require.NotEqual(t, before.UID, p.UID)
		ended, began := lastStopped(t, d, before.Name), firstStarting(t, d, p.Name)
		assert.Less(t, ended, began, "on %s, %s must have ended before %s began", d.name, before.Name, p.Name)
	}

	kubectl(t, "-n", ns, "delete", "deployment", "web", "--cascade=foreground", "--timeout=120s")
	gone(t, 2*time.Minute, "-n", ns, "pods", "-l", "app=web")
	for i := range fresh {
		d := deviceOf(t, &fresh[i])
		out, err := tryOn(d, "podman", "container", "exists", containerID(t, &fresh[i]))
		require.Error(t, err, "the container is still there: %s", out)
		assertNothingLeft(t, d, fresh[i].Name, string(fresh[i].UID))
	}
}

// assertNothingLeft checks that a device has no unit, container, process or
// file of a pod, except for its tombstone.
func assertNothingLeft(t *testing.T, d device, pod, uid string) {
	t.Helper()
	eventually(t, "nothing left of "+pod, time.Minute, func() error {
		script := fmt.Sprintf(`systemctl list-units --all --no-legend --plain 'jb*' | grep -F %[1]s
ls /run/systemd/system | grep -F %[1]s
find /var/lib/jetbridge /run/jetbridge -name '*%[1]s*' -o -name '*%[2]s*'
podman ps -a --format '{{.Names}}' | grep -F %[1]s
podman pod ps --format '{{.Name}}' | grep -F %[1]s
true`, pod, uid)
		out, err := tryOn(d, "sh", "-c", script)
		if err != nil {
			return err
		}
		if strings.TrimSpace(out) != "" {
			return fmt.Errorf("left over:\n%s", out)
		}
		return nil
	})
}

// Message IDs of systemd's journal entries about units (systemd's
// catalog/systemd.catalog).
const (
	messageUnitStarting = "7d4958e842da4a758f6c1cdc7b36dcc5"
	messageUnitStopped  = "9d1aaa27d60140bd96365438aad20286"
)

func lastStopped(t *testing.T, d device, pod string) int64 {
	times := journalTimes(t, d, messageUnitStopped, pod)
	return times[len(times)-1]
}

func firstStarting(t *testing.T, d device, pod string) int64 {
	return journalTimes(t, d, messageUnitStarting, pod)[0]
}

// journalTimes are the times (microseconds, of one boot's clock) at which
// systemd said something about the services of a pod.
func journalTimes(t *testing.T, d device, messageID, pod string) []int64 {
	t.Helper()
	out := on(t, d, "journalctl", "-b", "-o", "json", "--output-fields=UNIT,MESSAGE", "MESSAGE_ID="+messageID)
	var times []int64
	for line := range strings.Lines(out) {
		var e struct {
			Unit string `json:"UNIT"`
			At   string `json:"__MONOTONIC_TIMESTAMP"`
		}
		require.NoError(t, json.Unmarshal([]byte(line), &e))
		if strings.Contains(e.Unit, pod) && strings.HasSuffix(e.Unit, ".service") {
			at, err := strconv.ParseInt(e.At, 10, 64)
			require.NoError(t, err)
			times = append(times, at)
		}
	}
	require.NotEmptyf(t, times, "journal of %s has no entry %s about %s", d.name, messageID, pod)
	return times
}

func TestDaemonSet(t *testing.T) {
	ns := namespace(t)
	apply(t, fmt.Sprintf(`apiVersion: apps/v1
kind: DaemonSet
metadata: {name: ds, namespace: %s}
spec:
  selector: {matchLabels: {app: ds}}
  template:
    metadata: {labels: {app: ds}}
    spec:
      nodeSelector: {jetbridge.dev/managed: "true"}
      tolerations: [{key: virtual-kubelet.io/provider, operator: Exists}]
      containers: [{name: main, image: %s, command: [sh, -c, %q]}]
`, ns, os.Getenv("LAB_IMAGE_BUSYBOX"), forever))
	found := running(t, ns, "app=ds", 2)
	assert.NotEqual(t, found[0].Spec.NodeName, found[1].Spec.NodeName)
	kubectl(t, "-n", ns, "rollout", "status", "daemonset/ds", "--timeout=60s")
}

func TestJobs(t *testing.T) {
	ns := namespace(t)
	standalone, inFleet := devices(t)
	job := func(name string, d device, command string) string {
		return fmt.Sprintf(`apiVersion: batch/v1
kind: Job
metadata: {name: %s, namespace: %s}
spec:
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      nodeSelector: {kubernetes.io/hostname: %s}
      tolerations: [{key: virtual-kubelet.io/provider, operator: Exists}]
      containers: [{name: main, image: %s, command: [sh, -c, %q]}]
`, name, ns, d.node, os.Getenv("LAB_IMAGE_BUSYBOX"), command)
	}
	apply(t, job("good", standalone, "echo done > /dev/termination-log"))
	apply(t, job("bad", inFleet, "exit 7"))
	kubectl(t, "-n", ns, "wait", "job/good", "--for=condition=Complete", "--timeout=120s")
	kubectl(t, "-n", ns, "wait", "job/bad", "--for=condition=Failed", "--timeout=120s")

	good := mustGet[corev1.PodList](t, "-n", ns, "pods", "-l", "job-name=good").Items
	require.Len(t, good, 1)
	require.NotNil(t, good[0].Status.ContainerStatuses[0].State.Terminated)
	end := good[0].Status.ContainerStatuses[0].State.Terminated
	assert.Equal(t, corev1.PodSucceeded, good[0].Status.Phase)
	assert.Equal(t, "Completed", end.Reason)
	assert.Equal(t, "done\n", end.Message)

	bad := mustGet[corev1.PodList](t, "-n", ns, "pods", "-l", "job-name=bad").Items
	require.Len(t, bad, 1, "a Job with backoffLimit 0 tries once")
	end = bad[0].Status.ContainerStatuses[0].State.Terminated
	require.NotNil(t, end)
	assert.Equal(t, int32(7), end.ExitCode)
	assert.Equal(t, "Error", end.Reason)
	assert.Equal(t, int32(1), mustGet[batchv1.Job](t, "-n", ns, "job", "bad").Status.Failed)
}

// TestCrashLoop checks counts and reasons of a container that ends again and again.
func TestCrashLoop(t *testing.T) {
	ns := namespace(t)
	standalone, _ := devices(t)
	apply(t, podManifest(ns, "crash", standalone, "exit 3", ""))
	eventually(t, "CrashLoopBackOff after a restart", 2*time.Minute, func() error {
		p, err := get[corev1.Pod]("-n", ns, "pod", "crash")
		if err != nil {
			return err
		}
		if len(p.Status.ContainerStatuses) == 0 {
			return fmt.Errorf("no container status")
		}
		cs := p.Status.ContainerStatuses[0]
		if cs.RestartCount < 1 || cs.State.Waiting == nil || cs.State.Waiting.Reason != "CrashLoopBackOff" || cs.LastTerminationState.Terminated == nil {
			return fmt.Errorf("status is %+v", cs)
		}
		if code := cs.LastTerminationState.Terminated.ExitCode; code != 3 {
			return fmt.Errorf("last exit code is %d", code)
		}
		return nil
	})
}

// TestEnvAndVolumes checks every kind of input of a pod on both ways of
// delivery, the owner and mode of what is secret, and live updates.
func TestEnvAndVolumes(t *testing.T) {
	ns := namespace(t)
	for _, d := range bothDevices(t) {
		t.Run(d.name, func(t *testing.T) {
			name := "inputs-" + d.name
			apply(t, fmt.Sprintf(`apiVersion: v1
kind: ConfigMap
metadata: {name: %[1]s, namespace: %[2]s}
data: {plain: "first", odd: "100%% $HOME \"quoted\" \\ back\nnext line"}
---
apiVersion: v1
kind: Secret
metadata: {name: %[1]s, namespace: %[2]s}
stringData: {password: "s3cr3t-of-%[1]s"}
`, name, ns))
			apply(t, podManifest(ns, name, d, forever, fmt.Sprintf(`  volumes:
  - {name: config, configMap: {name: %[1]s}}
  - {name: secret, secret: {secretName: %[1]s, defaultMode: 0400}}
  - {name: scratch, emptyDir: {}}
  - {name: host, hostPath: {path: /var/tmp/%[1]s, type: DirectoryOrCreate}}
  - name: down
    downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}
`, name))+fmt.Sprintf(`    envFrom: [{prefix: CFG_, configMapRef: {name: %[1]s}}]
    env:
    - {name: ODD, valueFrom: {configMapKeyRef: {name: %[1]s, key: odd}}}
    - {name: PASSWORD, valueFrom: {secretKeyRef: {name: %[1]s, key: password}}}
    - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
    - {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    - {name: EXPANDED, value: "node $(NODE), cost $$(NODE)"}
    - {name: CPU, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1Mi}}}
    resources: {limits: {memory: 64Mi}}
    volumeMounts:
    - {name: config, mountPath: /config}
    - {name: secret, mountPath: /secret}
    - {name: scratch, mountPath: /scratch}
    - {name: host, mountPath: /host}
    - {name: down, mountPath: /down}
`, name))
			p := running(t, ns, "app="+name, 1)[0]
			in := func(args ...string) string {
				return on(t, d, append([]string{"podman", "exec", containerID(t, &p)}, args...)...)
			}
			assert.Equal(t, "first", in("cat", "/config/plain"))
			assert.Equal(t, "100% $HOME \"quoted\" \\ back\nnext line", in("cat", "/config/odd"))
			assert.Equal(t, "100% $HOME \"quoted\" \\ back\nnext line\n", in("sh", "-c", `echo "$ODD"`))
			assert.Equal(t, "first\n", in("sh", "-c", `echo "$CFG_plain"`))
			assert.Equal(t, "s3cr3t-of-"+name, in("cat", "/secret/password"))
			assert.Equal(t, "400\n", in("stat", "-L", "-c", "%a", "/secret/password"))
			assert.Equal(t, "s3cr3t-of-"+name+"\n", in("sh", "-c", `echo "$PASSWORD"`))
			assert.Equal(t, d.node+"\n", in("sh", "-c", `echo "$NODE"`))
			assert.Equal(t, "node "+d.node+", cost $(NODE)\n", in("sh", "-c", `echo "$EXPANDED"`))
			assert.Equal(t, "64\n", in("sh", "-c", `echo "$CPU"`))
			assert.Contains(t, in("ip", "-4", "addr"), strings.TrimSpace(in("sh", "-c", `echo "$IP"`))+"/")
			assert.Contains(t, in("cat", "/down/labels"), `app="`+name+`"`)
			in("sh", "-c", "echo kept > /host/file && echo gone > /scratch/file")
			assert.Equal(t, "kept\n", on(t, d, "cat", "/var/tmp/"+name+"/file"))
			// The default service account's volume, without which no client in a pod works.
			assert.Equal(t, ns, in("cat", "/var/run/secrets/kubernetes.io/serviceaccount/namespace"))
			assert.Contains(t, in("cat", "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"), "BEGIN CERTIFICATE")
			assert.Len(t, strings.Split(in("cat", "/var/run/secrets/kubernetes.io/serviceaccount/token"), "."), 3, "a JWT")
			before := process(t, d, &p)

			kubectl(t, "-n", ns, "patch", "configmap", name, "-p", `{"data":{"plain":"second"}}`)
			kubectl(t, "-n", ns, "patch", "secret", name, "-p", `{"stringData":{"password":"changed"}}`)
			eventually(t, "the volumes' new content", 90*time.Second, func() error {
				out, err := tryOn(d, "podman", "exec", containerID(t, &p), "cat", "/config/plain", "/secret/password")
				if err == nil && out != "secondchanged" {
					err = fmt.Errorf("content is %q", out)
				}
				return err
			})
			assert.Equal(t, before, process(t, d, &p), "a new content of a volume restarts nothing")

			// What is secret is sealed on its way: the document that Flightctl
			// carried, stored and logged does not have it, nor does the disk.
			carried, err := bundle.Decode([]byte(on(t, d, "cat", wellknown.BundlePath)), mustGet[corev1.Node](t, "node", d.node).Labels[wellknown.LabelDevice])
			require.NoError(t, err)
			assert.NotEmpty(t, carried.Sealed)
			carried.Sealed = nil
			plain, err := json.Marshal(carried)
			require.NoError(t, err)
			assert.Contains(t, string(plain), name)
			for _, secret := range []string{"s3cr3t-of-" + name, "changed"} {
				assert.NotContains(t, string(plain), secret)
				assert.NotContains(t, string(plain), base64.StdEncoding.EncodeToString([]byte(secret)))
			}
			stored := on(t, d, "sh", "-c", "grep -rlaF s3cr3t-of-"+name+" /var/lib/flightctl /var/lib/jetbridge /run/systemd/system || true")
			assert.Empty(t, stored, "plaintext of a Secret on the device's disk")
			kubectl(t, "-n", ns, "delete", "pod", name, "--timeout=90s")
			assert.Equal(t, "kept\n", on(t, d, "cat", "/var/tmp/"+name+"/file"), "hostPath outlives the pod")
			assertNothingLeft(t, d, name, string(p.UID))
		})
	}
}

func TestInitContainers(t *testing.T) {
	ns := namespace(t)
	_, d := devices(t)
	apply(t, podManifest(ns, "init", d, "cat /data/order; "+forever, fmt.Sprintf(`  volumes: [{name: data, emptyDir: {}}]
  initContainers:
  - {name: first, image: %[1]s, command: [sh, -c, "echo first >> /data/order"], volumeMounts: [{name: data, mountPath: /data}]}
  - {name: second, image: %[1]s, command: [sh, -c, "echo second >> /data/order"], volumeMounts: [{name: data, mountPath: /data}]}
`, os.Getenv("LAB_IMAGE_BUSYBOX")))+"    volumeMounts: [{name: data, mountPath: /data}]\n")
	p := running(t, ns, "app=init", 1)[0]
	assert.Equal(t, "first\nsecond\n", on(t, d, "podman", "exec", containerID(t, &p), "cat", "/data/order"))
	require.Len(t, p.Status.InitContainerStatuses, 2)
	for _, cs := range p.Status.InitContainerStatuses {
		require.NotNil(t, cs.State.Terminated, cs.Name)
		assert.Zero(t, cs.State.Terminated.ExitCode)
		assert.Equal(t, "Completed", cs.State.Terminated.Reason)
	}
	assert.Equal(t, corev1.ConditionTrue, condition(&p, corev1.PodInitialized))
}

// TestUnsupportedField checks that what no device does is refused by name.
func TestUnsupportedField(t *testing.T) {
	ns := namespace(t)
	d, _ := devices(t)
	apply(t, podManifest(ns, "probe", d, forever, "")+"    livenessProbe: {tcpSocket: {port: 80}}\n")
	eventually(t, "the pod is refused", time.Minute, func() error {
		p, err := get[corev1.Pod]("-n", ns, "pod", "probe")
		if err != nil {
			return err
		}
		if p.Status.Phase != corev1.PodFailed || p.Status.Reason != "UnsupportedField" || !strings.Contains(p.Status.Message, "spec.containers[0].livenessProbe") {
			return fmt.Errorf("phase %s, reason %q, message %q", p.Status.Phase, p.Status.Reason, p.Status.Message)
		}
		return nil
	})
	eventually(t, "an event that names the field", time.Minute, func() error {
		out, err := try("", "kubectl", "-n", ns, "events", "--for", "pod/probe")
		if err == nil && !strings.Contains(out, "spec.containers[0].livenessProbe") {
			err = fmt.Errorf("events: %s", out)
		}
		return err
	})
	kubectl(t, "-n", ns, "delete", "pod", "probe", "--timeout=60s")
}

// TestDoesNotFit checks both gates: the scheduler's, and the shim's for pods
// that go around the scheduler.
func TestDoesNotFit(t *testing.T) {
	ns := namespace(t)
	d, _ := devices(t)
	huge := "    resources: {requests: {cpu: 1k}}\n"
	apply(t, podManifest(ns, "pending", d, forever, "")+huge)
	apply(t, podManifest(ns, "bound", d, forever, "  nodeName: "+d.node)+huge)
	eventually(t, "OutOfcpu", time.Minute, func() error {
		p, err := get[corev1.Pod]("-n", ns, "pod", "bound")
		if err == nil && (p.Status.Phase != corev1.PodFailed || p.Status.Reason != "OutOfcpu") {
			err = fmt.Errorf("phase %s, reason %q", p.Status.Phase, p.Status.Reason)
		}
		return err
	})
	p := mustGet[corev1.Pod](t, "-n", ns, "pod", "pending")
	assert.Equal(t, corev1.PodPending, p.Status.Phase)
	assert.Empty(t, p.Spec.NodeName)
}

func TestImages(t *testing.T) {
	ns := namespace(t)
	d, _ := devices(t)
	private := os.Getenv("LAB_REGISTRY") + "/private/tester:1"
	image := func(name, ref, extra string) string {
		return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s, labels: {app: %s}}
spec:
  nodeSelector: {kubernetes.io/hostname: %s}
  tolerations: [{key: virtual-kubelet.io/provider, operator: Exists}]
%s
  containers: [{name: main, image: "%s", args: [forever]}]
`, name, ns, name, d.node, extra, ref)
	}
	waiting := func(name string, reasons ...string) {
		eventually(t, fmt.Sprintf("%s waits with one of %v", name, reasons), 90*time.Second, func() error {
			p, err := get[corev1.Pod]("-n", ns, "pod", name)
			if err != nil {
				return err
			}
			if len(p.Status.ContainerStatuses) == 0 || p.Status.ContainerStatuses[0].State.Waiting == nil ||
				!slices.Contains(reasons, p.Status.ContainerStatuses[0].State.Waiting.Reason) {
				return fmt.Errorf("statuses are %+v", p.Status.ContainerStatuses)
			}
			return nil
		})
	}
	kubectl(t, "-n", ns, "create", "secret", "docker-registry", "pull", "--docker-server="+os.Getenv("LAB_REGISTRY"),
		"--docker-username="+os.Getenv("LAB_REGISTRY_USER"), "--docker-password="+os.Getenv("LAB_REGISTRY_PASSWORD"))
	apply(t, image("denied", private, ""))
	waiting("denied", "ErrImagePull", "ImagePullBackOff")
	apply(t, image("missing", os.Getenv("LAB_REGISTRY")+"/no-such-image:1", ""))
	waiting("missing", "ErrImagePull", "ImagePullBackOff")
	apply(t, image("invalid", "UPPER/case::", ""))
	waiting("invalid", "InvalidImageName")
	apply(t, image("allowed", private, "  imagePullSecrets: [{name: pull}]"))
	running(t, ns, "app=allowed", 1)
}
