//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
)

// device is one of the lab's devices.
type device struct {
	name string // in the lab
	node string // in the cluster
}

// TestMain refuses to run without a lab, so that no test passes for want of one.
func TestMain(m *testing.M) {
	for _, key := range []string{"LAB_BIN", "LAB_NAME", "KUBECONFIG", "LAB_DEVICES", "LAB_IMAGE_BUSYBOX", "LAB_IMAGE_TESTER"} {
		if os.Getenv(key) == "" {
			fmt.Fprintf(os.Stderr, "%s is not set: run test/e2e/run, which brings a lab up\n", key)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// devices are those that the lab came up with: the first stands alone, the
// second belongs to fleet edge.
func devices(t *testing.T) (standalone, inFleet device) {
	t.Helper()
	var all []device
	for _, word := range strings.Fields(os.Getenv("LAB_DEVICES")) {
		name, node, ok := strings.Cut(word, "=")
		require.Truef(t, ok, "LAB_DEVICES has the word %q", word)
		all = append(all, device{name: name, node: node})
	}
	require.Len(t, all, 2, "LAB_DEVICES")
	return all[0], all[1]
}

func bothDevices(t *testing.T) []device {
	a, b := devices(t)
	return []device{a, b}
}

func try(stdin string, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, errs.String())
	}
	return out.String(), nil
}

func must(t *testing.T, stdin string, name string, args ...string) string {
	t.Helper()
	out, err := try(stdin, name, args...)
	require.NoError(t, err)
	return out
}

func kubectl(t *testing.T, args ...string) string {
	t.Helper()
	return must(t, "", "kubectl", args...)
}

func flightctl(t *testing.T, args ...string) string {
	t.Helper()
	return must(t, "", "flightctl", args...)
}

// lab runs the lab's own command on this lab.
func lab(t *testing.T, command string, args ...string) string {
	t.Helper()
	return must(t, "", os.Getenv("LAB_BIN"), append([]string{command, "--name", os.Getenv("LAB_NAME")}, args...)...)
}

// on runs a command on a device.
func on(t *testing.T, d device, args ...string) string {
	t.Helper()
	out, err := tryOn(d, args...)
	require.NoError(t, err)
	return out
}

func tryOn(d device, args ...string) (string, error) {
	return try("", os.Getenv("LAB_BIN"), append([]string{"exec", "--name", os.Getenv("LAB_NAME"), d.name, "--"}, args...)...)
}

func apply(t *testing.T, manifest string) {
	t.Helper()
	must(t, manifest, "kubectl", "apply", "-f", "-")
}

// get reads an object with kubectl.
func get[T any](args ...string) (T, error) {
	var v T
	out, err := try("", "kubectl", append([]string{"get", "-o", "json"}, args...)...)
	if err != nil {
		return v, err
	}
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		return v, fmt.Errorf("kubectl get %s: %w", strings.Join(args, " "), err)
	}
	return v, nil
}

func mustGet[T any](t *testing.T, args ...string) T {
	t.Helper()
	v, err := get[T](args...)
	require.NoError(t, err)
	return v
}

// eventually waits until check gives no error. The limit is generous: it ends
// a test that hangs, it measures nothing.
func eventually(t *testing.T, what string, limit time.Duration, check func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	tick := time.NewTicker(300 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			require.NoErrorf(t, err, "after %s, still not: %s", limit, what)
		case <-tick.C:
		}
	}
}

// during checks that a thing holds again and again for some time.
func during(t *testing.T, span time.Duration, check func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), span)
	defer cancel()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		require.NoError(t, check())
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// namespace makes a namespace for a test, and deletes it with all that is in
// it at the test's end. If the test failed, it first prints what one would
// look at.
func namespace(t *testing.T) string {
	t.Helper()
	ns := "e2e-" + strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(strings.TrimPrefix(t.Name(), "Test")))
	kubectl(t, "create", "namespace", ns)
	t.Cleanup(func() {
		if t.Failed() {
			dump(t, ns)
		}
		kubectl(t, "delete", "namespace", ns, "--timeout=150s")
	})
	eventually(t, "the default service account", time.Minute, func() error {
		_, err := try("", "kubectl", "-n", ns, "get", "serviceaccount", "default")
		return err
	})
	return ns
}

func dump(t *testing.T, ns string) {
	t.Helper()
	show := func(title string, out string, err error) {
		t.Logf("=== %s (%v)\n%s", title, err, out)
	}
	out, err := try("", "kubectl", "-n", ns, "get", "pods", "-o", "yaml")
	show("pods", out, err)
	out, err = try("", "kubectl", "-n", ns, "get", "events", "--sort-by=.lastTimestamp")
	show("events", out, err)
	out, err = try("", "kubectl", "get", "nodes", "-o", "wide")
	show("nodes", out, err)
	out, err = try("", os.Getenv("LAB_BIN"), "logs", "--name", os.Getenv("LAB_NAME"), "jetbridge-shim")
	show("shim", tail(out, 60), err)
	for _, d := range bothDevices(t) {
		out, err = tryOn(d, "journalctl", "-u", "jetbridge-agent", "-n", "60", "--no-pager", "-o", "cat")
		show(d.name+" agent", out, err)
		out, err = tryOn(d, "sh", "-c", "podman ps -a; systemctl list-units --all 'jb*' --no-pager; jetbridge-agent status")
		show(d.name+" units", out, err)
	}
}

func tail(s string, lines int) string {
	all := strings.Split(s, "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

func pods(ns, selector string) ([]corev1.Pod, error) {
	list, err := get[corev1.PodList]("-n", ns, "pods", "-l", selector)
	return list.Items, err
}

// running waits until exactly count pods of the selector exist, none of them
// terminating, all Running and Ready, and returns them.
func running(t *testing.T, ns, selector string, count int) []corev1.Pod {
	t.Helper()
	var found []corev1.Pod
	eventually(t, fmt.Sprintf("%d running pods with %s", count, selector), 2*time.Minute, func() error {
		var err error
		if found, err = pods(ns, selector); err != nil {
			return err
		}
		if len(found) != count {
			return fmt.Errorf("%d pods", len(found))
		}
		for i := range found {
			p := &found[i]
			if p.DeletionTimestamp != nil || p.Status.Phase != corev1.PodRunning || condition(p, corev1.PodReady) != corev1.ConditionTrue {
				return fmt.Errorf("pod %s: phase %s, ready %s, deleted %v", p.Name, p.Status.Phase, condition(p, corev1.PodReady), p.DeletionTimestamp)
			}
		}
		return nil
	})
	return found
}

func condition(p *corev1.Pod, kind corev1.PodConditionType) corev1.ConditionStatus {
	for _, c := range p.Status.Conditions {
		if c.Type == kind {
			return c.Status
		}
	}
	return "missing"
}

func nodeCondition(n *corev1.Node, kind corev1.NodeConditionType) corev1.NodeCondition {
	for _, c := range n.Status.Conditions {
		if c.Type == kind {
			return c
		}
	}
	return corev1.NodeCondition{Status: "missing"}
}

// nodeReady waits until the node's Ready condition has this status.
func nodeReady(t *testing.T, d device, want corev1.ConditionStatus, limit time.Duration) corev1.NodeCondition {
	t.Helper()
	var got corev1.NodeCondition
	eventually(t, fmt.Sprintf("node %s Ready=%s", d.node, want), limit, func() error {
		n, err := get[corev1.Node]("node", d.node)
		if err != nil {
			return err
		}
		if got = nodeCondition(&n, corev1.NodeReady); got.Status != want {
			return fmt.Errorf("Ready=%s (%s: %s)", got.Status, got.Reason, got.Message)
		}
		return nil
	})
	return got
}

// containerID is podman's ID of a pod's first container.
func containerID(t *testing.T, p *corev1.Pod) string {
	t.Helper()
	require.NotEmpty(t, p.Status.ContainerStatuses, "container statuses of %s", p.Name)
	id, ok := strings.CutPrefix(p.Status.ContainerStatuses[0].ContainerID, "podman://")
	require.Truef(t, ok, "container ID %q", p.Status.ContainerStatuses[0].ContainerID)
	return id
}

// process identifies a running container's process: its ID, start and PID.
func process(t *testing.T, d device, p *corev1.Pod) string {
	t.Helper()
	return strings.TrimSpace(on(t, d, "podman", "inspect", "--format", "{{.Id}} {{.State.StartedAt}} {{.State.Pid}} {{.State.Status}}", containerID(t, p)))
}

func deviceOf(t *testing.T, p *corev1.Pod) device {
	t.Helper()
	for _, d := range bothDevices(t) {
		if d.node == p.Spec.NodeName {
			return d
		}
	}
	require.Failf(t, "no device", "pod %s is on node %q", p.Name, p.Spec.NodeName)
	return device{}
}

// gone waits until no object of this name is left.
func gone(t *testing.T, limit time.Duration, args ...string) {
	t.Helper()
	eventually(t, strings.Join(args, " ")+" gone", limit, func() error {
		out, err := try("", "kubectl", append([]string{"get", "--ignore-not-found", "-o", "name"}, args...)...)
		if err != nil {
			return err
		}
		if out != "" {
			return fmt.Errorf("still there: %s", out)
		}
		return nil
	})
}

// podManifest is a pod of one busybox container on the device's node.
func podManifest(ns, name string, d device, command string, extra string) string {
	script, err := json.Marshal(command)
	if err != nil {
		panic(err) // a string always encodes
	}
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s, labels: {app: %s}}
spec:
  nodeSelector: {kubernetes.io/hostname: %s}
  tolerations: [{key: virtual-kubelet.io/provider, operator: Exists}]
  terminationGracePeriodSeconds: 2
%s
  containers:
  - name: main
    image: %s
    command: [sh, -c, %s]
`, name, ns, name, d.node, extra, os.Getenv("LAB_IMAGE_BUSYBOX"), script)
}
