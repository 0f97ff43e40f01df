//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
)

// onePodEach runs a pod on each device and returns them by device.
func onePodEach(t *testing.T, ns, name string) map[device]corev1.Pod {
	t.Helper()
	found := map[device]corev1.Pod{}
	for _, d := range bothDevices(t) {
		apply(t, podManifest(ns, name+"-"+d.name, d, forever, ""))
	}
	for _, d := range bothDevices(t) {
		found[d] = running(t, ns, "app="+name+"-"+d.name, 1)[0]
	}
	return found
}

// TestDeliveryWays checks that a standalone device gets its bundle inline, and
// a device of a fleet by the fleet's reference and its own revision label.
func TestDeliveryWays(t *testing.T) {
	ns := namespace(t)
	standalone, inFleet := devices(t)
	onePodEach(t, ns, "way")
	type resource struct {
		Metadata struct {
			Name   string
			Owner  string
			Labels map[string]string
		}
		Spec struct {
			Config   []map[string]any
			Template struct {
				Spec struct{ Config []map[string]any }
			}
		}
	}
	read := func(kind, name string) (r resource) {
		require.NoError(t, json.Unmarshal([]byte(flightctl(t, "get", kind+"/"+name, "-o", "json")), &r))
		return r
	}
	entry := func(config []map[string]any) map[string]any {
		for _, c := range config {
			if c["name"] == "jetbridge" {
				return c
			}
		}
		return nil
	}
	name := func(d device) string {
		return mustGet[corev1.Node](t, "node", d.node).Labels["jetbridge.dev/device"]
	}
	alone := read("device", name(standalone))
	assert.Empty(t, alone.Metadata.Owner)
	assert.Contains(t, entry(alone.Spec.Config), "inline")

	owned := read("device", name(inFleet))
	assert.Equal(t, "Fleet/edge", owned.Metadata.Owner)
	assert.NotEmpty(t, owned.Metadata.Labels["jetbridge-rev"])
	assert.Contains(t, entry(read("fleet", "edge").Spec.Template.Spec.Config), "httpRef")
}

// TestAgentStoppedAndKilled checks that systemd, not the agent, keeps pods
// running, and that the agent catches up with what happened meanwhile.
func TestAgentStoppedAndKilled(t *testing.T) {
	ns := namespace(t)
	found := onePodEach(t, ns, "agent")
	for d, p := range found {
		before := process(t, d, &p)
		on(t, d, "systemctl", "stop", "jetbridge-agent")
		assert.Equal(t, before, process(t, d, &p), "after a stop of the agent")
		on(t, d, "systemctl", "start", "jetbridge-agent")
		on(t, d, "systemctl", "kill", "-s", "KILL", "jetbridge-agent")
		assert.Equal(t, before, process(t, d, &p), "after the agent's death")
		eventually(t, "the agent is back", time.Minute, func() error {
			_, err := tryOn(d, "systemctl", "is-active", "jetbridge-agent")
			return err
		})

		// A container that dies while the agent is away is started by systemd,
		// and counted by the recorder.
		on(t, d, "systemctl", "stop", "jetbridge-agent")
		on(t, d, "podman", "kill", containerID(t, &p))
		eventually(t, "systemd started the container again", time.Minute, func() error {
			out, err := tryOn(d, "podman", "ps", "--filter", "label=jetbridge.dev/uid="+string(p.UID), "--format", "{{.ID}} {{.Names}}")
			if err == nil && out == "" {
				err = fmt.Errorf("not running")
			}
			return err
		})
		on(t, d, "systemctl", "start", "jetbridge-agent")
		eventually(t, "the restart is counted", time.Minute, func() error {
			now, err := get[corev1.Pod]("-n", ns, "pod", p.Name)
			if err != nil {
				return err
			}
			cs := now.Status.ContainerStatuses[0]
			if cs.RestartCount != 1 || cs.State.Running == nil || cs.LastTerminationState.Terminated == nil || cs.LastTerminationState.Terminated.ExitCode != 137 {
				return fmt.Errorf("status is %+v", cs)
			}
			return nil
		})
	}
}

// TestShimKilled checks that a death of the shim touches nothing on the
// devices, and that what was asked for meanwhile happens after its return.
func TestShimKilled(t *testing.T) {
	ns := namespace(t)
	found := onePodEach(t, ns, "shim")
	before := map[device]string{}
	generations := map[device]string{}
	observed := func(d device) string {
		return on(t, d, "sh", "-c", "sha256sum /var/lib/jetbridge/bundle/desired")
	}
	for d, p := range found {
		before[d] = process(t, d, &p)
	}
	during(t, 5*time.Second, func() error { return nil }) // let the last delivery settle
	for d := range found {
		generations[d] = observed(d)
	}
	lab(t, "kill", "jetbridge-shim")
	lab(t, "restart", "jetbridge-shim")
	for d := range found {
		nodeReady(t, d, corev1.ConditionTrue, time.Minute)
	}
	during(t, 10*time.Second, func() error {
		for d, p := range found {
			if now := process(t, d, &p); now != before[d] {
				return fmt.Errorf("%s: %s became %s", d.name, before[d], now)
			}
		}
		return nil
	})
	for d := range found {
		assert.Equal(t, generations[d], observed(d), "a restart mints nothing")
	}

	// Deleted while the shim is away: stopped and confirmed after its return.
	lab(t, "stop", "jetbridge-shim")
	d, _ := devices(t)
	p := found[d]
	kubectl(t, "-n", ns, "delete", "pod", p.Name, "--wait=false")
	during(t, 5*time.Second, func() error {
		_, err := get[corev1.Pod]("-n", ns, "pod", p.Name)
		return err
	})
	lab(t, "start", "jetbridge-shim")
	gone(t, 90*time.Second, "-n", ns, "pod", p.Name)
	assertNothingLeft(t, d, p.Name, string(p.UID))
}

// TestRebootWithoutNetwork checks that pods come back by themselves, with
// their Secrets.
func TestRebootWithoutNetwork(t *testing.T) {
	ns := namespace(t)
	_, d := devices(t)
	kubectl(t, "-n", ns, "create", "secret", "generic", "s", "--from-literal=key=sealed-and-kept")
	apply(t, podManifest(ns, "boot", d, forever, "  volumes: [{name: s, secret: {secretName: s}}]")+"    volumeMounts: [{name: s, mountPath: /s}]\n")
	p := running(t, ns, "app=boot", 1)[0]

	lab(t, "net", d.name, "down")
	t.Cleanup(func() { lab(t, "net", d.name, "up") })
	lab(t, "power", d.name, "reboot")
	eventually(t, "the pod runs again without network", 2*time.Minute, func() error {
		out, err := tryOn(d, "sh", "-c", "podman exec $(podman ps -q --filter label=jetbridge.dev/uid="+string(p.UID)+" --filter label=jetbridge.dev/container=main) cat /s/key")
		if err == nil && out != "sealed-and-kept" {
			err = fmt.Errorf("the Secret's file holds %q", out)
		}
		return err
	})
	lab(t, "net", d.name, "up")
	nodeReady(t, d, corev1.ConditionTrue, 2*time.Minute)
	eventually(t, "the pod is reported running, restarted once", 2*time.Minute, func() error {
		now, err := get[corev1.Pod]("-n", ns, "pod", "boot")
		if err != nil {
			return err
		}
		cs := now.Status.ContainerStatuses[0]
		if now.UID != p.UID || now.Status.Phase != corev1.PodRunning || cs.RestartCount != 1 || condition(&now, corev1.PodReady) != corev1.ConditionTrue {
			return fmt.Errorf("uid %s, phase %s, restarts %d, ready %s", now.UID, now.Status.Phase, cs.RestartCount, condition(&now, corev1.PodReady))
		}
		return nil
	})
}

// TestPowerOff checks what the cluster says of a device that is off, that not
// even a forced delete makes a second writer, and that all ends well when the
// device returns.
func TestPowerOff(t *testing.T) {
	ns := namespace(t)
	d, _ := devices(t)
	apply(t, fmt.Sprintf(`apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: %s}
spec:
  serviceName: db
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      terminationGracePeriodSeconds: 2
      nodeSelector: {jetbridge.dev/managed: "true"}
      affinity:
        nodeAffinity:
          preferredDuringSchedulingIgnoredDuringExecution:
          - {weight: 100, preference: {matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [%s]}]}}
      tolerations: [{key: virtual-kubelet.io/provider, operator: Exists}]
      containers: [{name: main, image: %s, command: [sh, -c, %q]}]
`, ns, d.node, os.Getenv("LAB_IMAGE_BUSYBOX"), forever))
	p := running(t, ns, "app=db", 1)[0]
	require.Equal(t, d.node, p.Spec.NodeName)

	lab(t, "power", d.name, "kill")
	restored := false
	t.Cleanup(func() {
		if !restored {
			lab(t, "power", d.name, "on")
			nodeReady(t, d, corev1.ConditionTrue, 2*time.Minute)
		}
	})
	cond := nodeReady(t, d, corev1.ConditionUnknown, 8*time.Minute)
	assert.Equal(t, "DeviceDisconnected", cond.Reason)
	eventually(t, "the pod is not ready, its last state kept", time.Minute, func() error {
		now, err := get[corev1.Pod]("-n", ns, "pod", "db-0")
		if err != nil {
			return err
		}
		if now.UID != p.UID || condition(&now, corev1.PodReady) != corev1.ConditionFalse || now.Status.ContainerStatuses[0].ContainerID != p.Status.ContainerStatuses[0].ContainerID {
			return fmt.Errorf("uid %s, ready %s, statuses %+v", now.UID, condition(&now, corev1.PodReady), now.Status.ContainerStatuses)
		}
		return nil
	})

	kubectl(t, "-n", ns, "delete", "pod", "db-0", "--force", "--grace-period=0", "--wait=false")
	during(t, 20*time.Second, func() error {
		now, err := get[corev1.PodList]("-n", ns, "pods", "-l", "app=db")
		if err != nil {
			return err
		}
		if len(now.Items) != 1 || now.Items[0].UID != p.UID {
			return fmt.Errorf("a second writer: %+v", now.Items)
		}
		return nil
	})

	lab(t, "power", d.name, "on")
	restored = true
	nodeReady(t, d, corev1.ConditionTrue, 3*time.Minute)
	eventually(t, "the old pod is confirmed stopped and a new one runs", 3*time.Minute, func() error {
		now, err := get[corev1.Pod]("-n", ns, "pod", "db-0")
		if err != nil {
			return err
		}
		if now.UID == p.UID || now.Status.Phase != corev1.PodRunning {
			return fmt.Errorf("uid %s, phase %s", now.UID, now.Status.Phase)
		}
		return nil
	})
	assertStopped(t, d, string(p.UID))
}

// assertStopped checks that no container of a pod runs on the device.
func assertStopped(t *testing.T, d device, uid string) {
	t.Helper()
	out := on(t, d, "podman", "ps", "-q", "--filter", "label=jetbridge.dev/uid="+uid)
	assert.Empty(t, out)
}
