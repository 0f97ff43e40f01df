package host

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/jetbridge/jetbridge/test/lab/internal/control"
	"github.com/jetbridge/jetbridge/test/lab/internal/layout"
)

// Node is the node of a device, by the rule of the shim: the device's alias
// names it, and the lab's aliases are unique names.
func node(d control.Device, nodes map[string]string) string {
	if n, ok := nodes[d.ID]; ok && d.ID != "" {
		return n
	}
	return d.Labels["alias"]
}

// nodesByDevice reads from the cluster which node belongs to which device.
func nodesByDevice(ctx context.Context, c layout.Config) (map[string]string, error) {
	u := upper{UpOptions: UpOptions{Lab: c.Lab()}, config: c}
	out, err := u.run(ctx, nil, "kubectl", "get", "nodes", "-o", "json", "--request-timeout=5s")
	if err != nil {
		return nil, err
	}
	return parseNodes(out)
}

func parseNodes(list []byte) (map[string]string, error) {
	var nodes struct {
		Items []struct {
			Metadata struct {
				Name   string            `json:"name"`
				Labels map[string]string `json:"labels"`
			} `json:"metadata"`
		} `json:"items"`
	}
	if err := json.Unmarshal(list, &nodes); err != nil {
		return nil, fmt.Errorf("cannot read nodes: %w", err)
	}
	found := map[string]string{}
	for _, n := range nodes.Items {
		if device := n.Metadata.Labels["jetbridge.dev/device"]; device != "" {
			found[device] = n.Metadata.Name
		}
	}
	return found, nil
}

// Env prints the exports for a shell.
func Env(ctx context.Context, lab layout.Lab, out io.Writer) error {
	c, err := lab.Load()
	if err != nil {
		return err
	}
	status, err := control.NewClient(lab).Status(ctx)
	if err != nil {
		return err
	}
	nodes, err := nodesByDevice(ctx, c)
	if err != nil {
		nodes = nil // the cluster may be stopped; the rule still holds
	}
	path := withoutOldLabs(os.Getenv("PATH"), filepath.Dir(lab.Dir))
	for _, line := range exports(c, status.Devices, nodes, path) {
		fmt.Fprintln(out, line)
	}
	return nil
}

// withoutOldLabs takes other labs' folders out of a PATH.
func withoutOldLabs(path, state string) string {
	list := slices.DeleteFunc(filepath.SplitList(path), func(dir string) bool {
		return strings.HasPrefix(dir, state+"/") && filepath.Base(dir) == "bin"
	})
	return strings.Join(list, string(os.PathListSeparator))
}

func exports(c layout.Config, devices []control.Device, nodes map[string]string, path string) []string {
	lab := c.Lab()
	words := make([]string, 0, len(devices))
	for _, d := range devices {
		words = append(words, d.Name+"="+node(d, nodes))
	}
	host := func(relay, scheme string) string { return fmt.Sprintf("%s://127.0.0.1:%d", scheme, c.Ports[relay]) }
	pairs := [][2]string{
		{"LAB_NAME", c.Name},
		{"KUBECONFIG", lab.Kubeconfig()},
		{"PATH", lab.Bin() + string(os.PathListSeparator) + path},
		{"LAB_REGISTRY", layout.RegistryAddress},
		{"LAB_REGISTRY_USER", c.RegistryUser},
		{"LAB_REGISTRY_PASSWORD", c.RegistryPassword},
		{"LAB_IMAGE_BUSYBOX", c.ImageBusybox},
		{"LAB_IMAGE_TESTER", c.ImageTester},
		{"LAB_DEVICES", strings.Join(words, " ")},
		{"LAB_SHIM_URL", host(layout.RelayShim, "http")},
		{"LAB_FLIGHTCTL_URL", host(layout.RelayFlightctl, "https")},
	}
	lines := make([]string, 0, len(pairs))
	for _, p := range pairs {
		lines = append(lines, "export "+p[0]+"="+quote(p[1]))
	}
	return lines
}

// ShowStatus prints what a lab has and how it does.
func ShowStatus(ctx context.Context, lab layout.Lab, out io.Writer) error {
	c, err := lab.Load()
	if err != nil {
		return err
	}
	status, err := control.NewClient(lab).Status(ctx)
	if err != nil {
		return err
	}
	nodes, err := nodesByDevice(ctx, c)
	if err != nil {
		nodes = nil
	}
	return table(out, c, status, nodes, time.Now())
}

func table(out io.Writer, c layout.Config, status control.Status, nodes map[string]string, now time.Time) error {
	fmt.Fprintf(out, "lab %s in %s, first process %d\n", c.Name, c.Dir, c.Init.PID)
	for _, r := range layout.Relays() {
		fmt.Fprintf(out, "  127.0.0.1:%d leads to %s\n", c.Ports[r.Name], r.Name)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nCOMPONENT\tSTATE\tPID\tRESTARTS\tSINCE")
	for _, s := range status.Components {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\n", s.Name, s.State, number(s.PID), s.Restarts, age(now, s.Since))
	}
	fmt.Fprintln(w, "\nDEVICE\tNODE\tADDRESS\tSTATE\tFLEET\tLINK\tPID\tSINCE")
	for _, d := range status.Devices {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", d.Name, dash(node(d, nodes)), d.Address, d.State, dash(d.Fleet), d.Link, number(d.PID), age(now, d.Since))
	}
	return w.Flush()
}

func number(pid int) string {
	if pid == 0 {
		return "-"
	}
	return fmt.Sprint(pid)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func age(now, since time.Time) string { return now.Sub(since).Round(time.Second).String() }
