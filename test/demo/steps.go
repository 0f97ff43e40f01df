package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

const (
	namespace  = "jetbridge-examples"
	standalone = "edge-1"
	inFleet    = "edge-2"
)

// step is one thing that is shown; do returns what was seen, for the table.
type step struct {
	title string
	do    func(ctx context.Context) (seen string, err error)
}

type demo struct{ *shell }

func (d *demo) steps() []step {
	return []step{
		{"Bring the lab up", d.up},
		{"Enroll two devices with flightctl", d.enroll},
		{"Devices become nodes", d.nodes},
		{"kubectl apply: a Deployment on both devices", d.deploy},
		{"The same pods, seen on the devices", d.look},
		{"A DaemonSet and a Job", d.more},
		{"A ConfigMap change reaches running pods", d.configChange},
		{"Update: stop, then start", d.update},
		{"A killed container heals", d.heal},
		{"Delete", d.remove},
	}
}

func (d *demo) up(ctx context.Context) (string, error) {
	d.say("A real control plane, a real Flightctl, and no device yet.")
	if _, err := d.quiet(ctx, d.lab, "down", "--name", d.name); err != nil {
		return "", err
	}
	if _, err := d.show(ctx, d.lab, "up", "--name", d.name, "--devices", "0"); err != nil {
		return "", err
	}
	if err := d.loadEnv(ctx); err != nil {
		return "", err
	}
	out, err := d.show(ctx, "kubectl", "version")
	return "Kubernetes " + field(out, "Server Version:"), err
}

func (d *demo) enroll(ctx context.Context) (string, error) {
	d.say("Two machines boot: %s will stand alone, %s joins fleet edge.", standalone, inFleet)
	for _, name := range []string{standalone, inFleet} {
		if _, err := d.show(ctx, d.lab, "device", "add", "--name", d.name, "--no-enroll", name); err != nil {
			return "", err
		}
	}
	requests := map[string]string{}
	err := poll(ctx, 2*time.Minute, func() error {
		out, err := d.quiet(ctx, "flightctl", "get", "enrollmentrequests", "-o", "json")
		if err != nil {
			return err
		}
		requests, err = requestsByHost(out)
		if err == nil && (requests[standalone] == "" || requests[inFleet] == "") {
			err = fmt.Errorf("enrollment requests so far: %v", requests)
		}
		return err
	})
	if err != nil {
		return "", err
	}
	if _, err := d.show(ctx, "flightctl", "get", "enrollmentrequests"); err != nil {
		return "", err
	}
	labels := map[string][]string{
		standalone: {"alias=" + standalone, "site=berlin"},
		inFleet:    {"alias=" + inFleet, "fleet=edge"},
	}
	for _, name := range []string{standalone, inFleet} {
		args := []string{"approve", "enrollmentrequest/" + requests[name]}
		for _, l := range labels[name] {
			args = append(args, "-l", l)
		}
		if _, err := d.show(ctx, "flightctl", args...); err != nil {
			return "", err
		}
	}
	_, err = d.show(ctx, "flightctl", "get", "devices")
	return "1 standalone, 1 in fleet edge", err
}

// requestsByHost maps the host name that a request's device told to the request.
func requestsByHost(text string) (map[string]string, error) {
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Spec     struct {
				DeviceStatus struct {
					SystemInfo map[string]any
				}
			}
		}
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		return nil, fmt.Errorf("cannot read enrollment requests: %w", err)
	}
	found := map[string]string{}
	for _, i := range list.Items {
		if host, ok := i.Spec.DeviceStatus.SystemInfo["hostname"].(string); ok {
			found[host] = i.Metadata.Name
		}
	}
	return found, nil
}

func (d *demo) nodes(ctx context.Context) (string, error) {
	err := poll(ctx, 2*time.Minute, func() error {
		_, err := d.quiet(ctx, "kubectl", "get", "node", standalone, inFleet)
		return err
	})
	if err != nil {
		return "", err
	}
	if _, err := d.show(ctx, "kubectl", "wait", "--for=condition=Ready", "node", "-l", "jetbridge.dev/managed=true", "--timeout=120s"); err != nil {
		return "", err
	}
	_, err = d.show(ctx, "kubectl", "get", "nodes", "-o", "wide", "-L", "jetbridge.dev/fleet")
	return "2 nodes Ready", err
}

func (d *demo) deploy(ctx context.Context) (string, error) {
	d.say("By fleet and by label: fleet edge, or site=berlin.")
	if _, err := d.show(ctx, "kubectl", "apply", "-f", "examples/namespace.yaml", "-f", "examples/config.yaml", "-f", "examples/deployment.yaml"); err != nil {
		return "", err
	}
	if _, err := d.show(ctx, "kubectl", "-n", namespace, "rollout", "status", "deployment/web", "--timeout=180s"); err != nil {
		return "", err
	}
	out, err := d.show(ctx, "kubectl", "-n", namespace, "get", "pods", "-o", "wide")
	if err != nil {
		return "", err
	}
	if !strings.Contains(out, standalone) || !strings.Contains(out, inFleet) {
		return "", errors.New("the pods are not on both devices")
	}
	return "1 pod Running on each", nil
}

func (d *demo) look(ctx context.Context) (string, error) {
	for _, name := range []string{standalone, inFleet} {
		d.say("%s: systemd runs podman", name)
		if _, err := d.onDevice(ctx, name, "systemctl", "list-units", "--plain", "--no-legend", "jb*.service"); err != nil {
			return "", err
		}
		if _, err := d.onDevice(ctx, name, "podman", "ps", "--format", "table {{.Names}} {{.Image}} {{.Status}}"); err != nil {
			return "", err
		}
		page, err := d.onDevice(ctx, name, "sh", "-c", "podman exec "+d.container(ctx, name)+" wget -qO- http://127.0.0.1:8080/")
		if err != nil {
			return "", err
		}
		if !strings.Contains(page, "Hello from the edge") {
			return "", fmt.Errorf("%s serves %q", name, page)
		}
	}
	return "systemd units, podman containers, the page", nil
}

// container is podman's ID of the web container on a device, as kubectl knows it.
func (d *demo) container(ctx context.Context, device string) string {
	out, err := d.quiet(ctx, "kubectl", "-n", namespace, "get", "pods", "-l", "app=web", "--field-selector", "spec.nodeName="+device,
		"-o", "jsonpath={.items[0].status.containerStatuses[0].containerID}")
	if err != nil {
		return "unknown"
	}
	return strings.TrimPrefix(out, "podman://")
}

func (d *demo) more(ctx context.Context) (string, error) {
	if _, err := d.show(ctx, "kubectl", "apply", "-f", "examples/daemonset.yaml", "-f", "examples/job.yaml"); err != nil {
		return "", err
	}
	if _, err := d.show(ctx, "kubectl", "-n", namespace, "rollout", "status", "daemonset/heartbeat", "--timeout=120s"); err != nil {
		return "", err
	}
	if _, err := d.show(ctx, "kubectl", "-n", namespace, "wait", "--for=condition=Complete", "job/inventory", "--timeout=120s"); err != nil {
		return "", err
	}
	_, err := d.show(ctx, "kubectl", "-n", namespace, "get", "daemonsets,jobs,pods", "-o", "wide")
	return "DaemonSet 2/2, Job Complete", err
}

func (d *demo) configChange(ctx context.Context) (string, error) {
	if _, err := d.show(ctx, "kubectl", "-n", namespace, "patch", "configmap", "web", "--type=merge", "-p", `{"data":{"index.html":"Changed from the cluster\n"}}`); err != nil {
		return "", err
	}
	for _, name := range []string{standalone, inFleet} {
		id := d.container(ctx, name)
		err := poll(ctx, 90*time.Second, func() error {
			page, err := d.quiet(ctx, d.lab, "exec", "--name", d.name, name, "--", "podman", "exec", id, "wget", "-qO-", "http://127.0.0.1:8080/")
			if err == nil && !strings.Contains(page, "Changed from the cluster") {
				err = fmt.Errorf("%s still serves %q", name, page)
			}
			return err
		})
		if err != nil {
			return "", err
		}
		if _, err := d.onDevice(ctx, name, "podman", "exec", id, "wget", "-qO-", "http://127.0.0.1:8080/"); err != nil {
			return "", err
		}
	}
	_, err := d.show(ctx, "kubectl", "-n", namespace, "get", "pods", "-l", "app=web")
	return "new page, no restart", err
}

func (d *demo) update(ctx context.Context) (string, error) {
	old, err := d.pod(ctx, standalone)
	if err != nil {
		return "", err
	}
	if _, err := d.show(ctx, "kubectl", "-n", namespace, "set", "env", "deployment/web", "GREETING=again"); err != nil {
		return "", err
	}
	if _, err := d.show(ctx, "kubectl", "-n", namespace, "rollout", "status", "deployment/web", "--timeout=180s"); err != nil {
		return "", err
	}
	if _, err := d.show(ctx, "kubectl", "-n", namespace, "get", "pods", "-l", "app=web", "-o", "wide"); err != nil {
		return "", err
	}
	fresh, err := d.pod(ctx, standalone)
	if err != nil {
		return "", err
	}
	d.say("The device's journal: %s ended before %s began.", old, fresh)
	journal, err := d.onDevice(ctx, standalone, "sh", "-c", fmt.Sprintf("journalctl -b -o short-precise _PID=1 | grep -E 'Stopped|Starting' | grep -E '%s|%s'", old, fresh))
	if err != nil {
		return "", err
	}
	lines := strings.Split(strings.TrimSpace(journal), "\n")
	stopped := lastIndex(lines, func(l string) bool { return strings.Contains(l, "Stopped") && strings.Contains(l, old) })
	started := slices.IndexFunc(lines, func(l string) bool { return strings.Contains(l, "Starting") && strings.Contains(l, fresh) })
	if stopped < 0 || started < 0 || stopped > started {
		return "", fmt.Errorf("the journal does not show the stop of %s before the start of %s", old, fresh)
	}
	return "old ended, then new began (journal)", nil
}

func lastIndex(lines []string, match func(string) bool) int {
	for i := len(lines) - 1; i >= 0; i-- {
		if match(lines[i]) {
			return i
		}
	}
	return -1
}

func (d *demo) pod(ctx context.Context, node string) (string, error) {
	return d.quiet(ctx, "kubectl", "-n", namespace, "get", "pods", "-l", "app=web", "--field-selector", "spec.nodeName="+node, "-o", "jsonpath={.items[0].metadata.name}")
}

func (d *demo) heal(ctx context.Context) (string, error) {
	pod, err := d.pod(ctx, inFleet)
	if err != nil {
		return "", err
	}
	if _, err := d.onDevice(ctx, inFleet, "podman", "kill", d.container(ctx, inFleet)); err != nil {
		return "", err
	}
	err = poll(ctx, 90*time.Second, func() error {
		out, err := d.quiet(ctx, "kubectl", "-n", namespace, "get", "pod", pod, "-o", "jsonpath={.status.containerStatuses[0].restartCount} {.status.containerStatuses[0].ready}")
		if err == nil && out != "1 true" {
			err = fmt.Errorf("restarts and readiness are %q", out)
		}
		return err
	})
	if err != nil {
		return "", err
	}
	_, err = d.show(ctx, "kubectl", "-n", namespace, "get", "pods", "-l", "app=web", "-o", "wide")
	return "restarted by systemd, counted in kubectl", err
}

func (d *demo) remove(ctx context.Context) (string, error) {
	if _, err := d.show(ctx, "kubectl", "delete", "-f", "examples/", "--timeout=180s"); err != nil {
		return "", err
	}
	for _, name := range []string{standalone, inFleet} {
		err := poll(ctx, time.Minute, func() error {
			out, err := d.quiet(ctx, d.lab, "exec", "--name", d.name, name, "--", "podman", "ps", "-aq")
			if err == nil && strings.TrimSpace(out) != "" {
				err = fmt.Errorf("containers left on %s: %s", name, out)
			}
			return err
		})
		if err != nil {
			return "", err
		}
		if _, err := d.onDevice(ctx, name, "podman", "ps", "-a"); err != nil {
			return "", err
		}
	}
	return "confirmed by both devices, nothing left", nil
}

// field is the word after a label in a command's output.
func field(out, label string) string {
	_, rest, _ := strings.Cut(out, label)
	words := strings.Fields(rest)
	if len(words) == 0 {
		return "unknown"
	}
	return words[0]
}
