//go:build lab

package device

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// fakeAgent is ready at once, as systemd sees it, and does nothing.
const fakeAgent = "#!/bin/sh\nsystemd-notify --ready\nexec sleep infinity\n"

func testProvisionOptions(t *testing.T, version string) ProvisionOptions {
	t.Helper()
	dir := t.TempDir()
	agent := filepath.Join(dir, "flightctl-agent")
	require.NoError(t, os.WriteFile(agent, []byte(fakeAgent), 0o644))
	overlay := filepath.Join(dir, "overlay")
	write := func(name, content string, mode os.FileMode) {
		target := filepath.Join(overlay, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(target), 0o755))
		require.NoError(t, os.WriteFile(target, []byte(content), mode))
		require.NoError(t, os.Chown(target, 1234, 1234))
	}
	write("usr/bin/jetbridge-agent", "#!/bin/sh\necho version "+version+"\nexec sleep infinity\n", 0o755)
	write("usr/lib/systemd/system/jetbridge-agent.service", "[Service]\nExecStart=/usr/bin/jetbridge-agent\n[Install]\nWantedBy=multi-user.target\n", 0o644)
	write("usr/lib/systemd/system/jetbridge-pod@.service", "[Service]\nExecStart=/bin/true\n", 0o644)
	write("etc/jetbridge/agent.yaml", "version: "+version+"\n", 0o640)
	// A path through one of the tree's own symlinks.
	write("lib/jetbridge/file", "through /lib\n", 0o644)
	require.NoError(t, os.Symlink("jetbridge-agent", filepath.Join(overlay, "usr/bin/jb")))
	return ProvisionOptions{
		FlightctlAgent:  agent,
		FlightctlConfig: []byte("enrollment-service: {service: {server: \"https://10.77.0.1:7443\"}}\n"),
		Overlay:         overlay,
	}
}

func TestProvision(t *testing.T) {
	o := testOptions(t, "dev-prov", 16)
	require.NoError(t, Provision(t.Context(), o, testProvisionOptions(t, "one")))
	d := bootTest(t, o)
	out, _ := run(t, d, "systemctl is-system-running --wait")
	assert.Equal(t, "running", out)
	assert.Equal(t, "active\nactive\nactive", mustRun(t, d, "systemctl is-active flightctl-agent jetbridge-agent podman.socket"))
	assert.Equal(t, "enabled\nenabled\nenabled", mustRun(t, d, "systemctl is-enabled flightctl-agent jetbridge-agent podman.socket"))
	assert.Equal(t, "root 755", mustRun(t, d, "stat -c '%U %a' /usr/bin/jetbridge-agent"))
	assert.Equal(t, "root 640", mustRun(t, d, "stat -c '%U %a' /etc/jetbridge/agent.yaml"))
	assert.Equal(t, "root 600", mustRun(t, d, "stat -c '%U %a' /etc/flightctl/config.yaml"))
	assert.Equal(t, "usr/lib", mustRun(t, d, "readlink /lib"))
	assert.Equal(t, "through /lib", mustRun(t, d, "cat /usr/lib/jetbridge/file"))
	assert.Equal(t, "jetbridge-agent", mustRun(t, d, "readlink /usr/bin/jb"))
	// As flightctl-agent's console does it, and at once.
	assert.Equal(t, "root", mustRun(t, d, "timeout 5 sudo -u flightctl-console --non-interactive -- sudo -n id -un"))
	assert.Contains(t, mustRun(t, d, "systemctl show flightctl-agent -p Environment -p Type -p Restart; cat /proc/$(systemctl show -P MainPID flightctl-agent)/environ | tr '\\0' '\\n'"),
		"PODMAN_IGNORE_CGROUPSV1_WARNING=1")

	require.NoError(t, d.Provision(t.Context(), testProvisionOptions(t, "two")))
	require.Eventually(t, func() bool {
		out, _ := run(t, d, "journalctl -q --no-pager -u jetbridge-agent -o cat | grep version | tail -n 1")
		return out == "version two"
	}, 20*time.Second, 100*time.Millisecond)
	assert.Equal(t, "version: two", mustRun(t, d, "cat /etc/jetbridge/agent.yaml"))

	require.NoError(t, d.Kill())
	require.NoError(t, Provision(t.Context(), o, testProvisionOptions(t, "three")))
	d = bootTest(t, o)
	require.Eventually(t, func() bool {
		out, _ := run(t, d, "journalctl -q --no-pager -b -u jetbridge-agent -o cat | grep version")
		return out == "version three"
	}, 20*time.Second, 100*time.Millisecond)
}
