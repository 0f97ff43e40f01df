//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
)

// TestImagePush pushes images as `podman save` writes them, both as a docker
// archive and as an OCI layout, and runs them.
func TestImagePush(t *testing.T) {
	ns := namespace(t)
	d, _ := devices(t)
	image := os.Getenv("LAB_IMAGE_BUSYBOX")
	on(t, d, "podman", "pull", "--quiet", image)

	archive := filepath.Join(t.TempDir(), "image.tar")
	on(t, d, "sh", "-c", "rm -rf /var/tmp/saved && mkdir /var/tmp/saved && podman save --quiet --format docker-archive -o /var/tmp/saved/image.tar "+image+" && podman save --quiet --format oci-dir -o /var/tmp/saved/layout "+image)
	require.NoError(t, os.WriteFile(archive, []byte(on(t, d, "cat", "/var/tmp/saved/image.tar")), 0o600))
	layout := t.TempDir()
	must(t, on(t, d, "tar", "-C", "/var/tmp/saved/layout", "-c", "."), "tar", "-C", layout, "-x")

	lab(t, "image", "push", "pushed/archive:1", archive)
	lab(t, "image", "push", os.Getenv("LAB_REGISTRY")+"/pushed/layout:1", layout)
	for _, name := range []string{"archive", "layout"} {
		manifest := podManifest(ns, name, d, forever, "")
		apply(t, strings.Replace(manifest, image, os.Getenv("LAB_REGISTRY")+"/pushed/"+name+":1", 1))
	}
	running(t, ns, "app=archive", 1)
	running(t, ns, "app=layout", 1)
}

// TestDeviceAddAndRemove checks that a device that joins becomes a node with
// its labels and runs a fleet's pods, and what impairments of its link do.
func TestDeviceAddAndRemove(t *testing.T) {
	ns := namespace(t)
	d := device{name: "extra", node: "extra"}
	lab(t, "device", "add", d.name, "--fleet", "edge", "--label", "site=paris")
	removed := false
	t.Cleanup(func() {
		if !removed {
			lab(t, "device", "remove", d.name)
		}
	})
	nodeReady(t, d, corev1.ConditionTrue, 2*time.Minute)
	n := mustGet[corev1.Node](t, "node", d.node)
	assert.Equal(t, "paris", n.Labels["label.jetbridge.dev/site"])
	assert.Equal(t, "edge", n.Labels["jetbridge.dev/fleet"])

	apply(t, podManifest(ns, "joined", d, forever, ""))
	running(t, ns, "app=joined", 1)
	kubectl(t, "-n", ns, "delete", "pod", "joined", "--timeout=90s")

	lab(t, "net", d.name, "loss", "100%")
	_, err := tryOn(d, "ping", "-c", "2", "-W", "1", "10.77.0.1")
	require.Error(t, err, "all packets are lost")
	lab(t, "net", d.name, "delay", "1ms")
	lab(t, "net", d.name, "loss", "0%")
	on(t, d, "ping", "-c", "2", "-W", "2", "10.77.0.1")
	lab(t, "net", d.name, "up")

	lab(t, "device", "remove", d.name)
	removed = true
	forgotten(t, d)
	nodeReady(t, d, corev1.ConditionUnknown, 3*time.Minute)
	kubectl(t, "delete", "node", d.node)

	// Another device may have the name once the node is gone.
	lab(t, "device", "add", d.name)
	removed = false
	nodeReady(t, d, corev1.ConditionTrue, 2*time.Minute)
	assert.NotEqual(t, n.Labels["jetbridge.dev/device"], mustGet[corev1.Node](t, "node", d.node).Labels["jetbridge.dev/device"])
	lab(t, "device", "remove", d.name)
	removed = true
	forgotten(t, d)
	nodeReady(t, d, corev1.ConditionUnknown, 3*time.Minute)
	kubectl(t, "delete", "node", d.node)
}

// forgotten waits until Flightctl lists no device of this name.
func forgotten(t *testing.T, d device) {
	t.Helper()
	eventually(t, "Flightctl forgot the device", time.Minute, func() error {
		out, err := try("", "flightctl", "get", "devices")
		if err == nil && strings.Contains(out, d.name) {
			err = fmt.Errorf("still listed:\n%s", out)
		}
		return err
	})
}
