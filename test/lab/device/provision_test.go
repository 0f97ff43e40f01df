package device

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"sigs.k8s.io/yaml"
)

func TestMergeAgentConfig(t *testing.T) {
	out, err := mergeAgentConfig([]byte("enrollment-service:\n  service:\n    server: https://10.77.0.1:7443\nstatus-update-interval: 1m\n"))
	require.NoError(t, err)
	var c map[string]any
	require.NoError(t, yaml.Unmarshal(out, &c))
	assert.Equal(t, "2s", c["spec-fetch-interval"])
	assert.Equal(t, "2s", c["status-update-interval"], "the lab's value counts")
	assert.Equal(t, []any{"jetbridge"}, c["system-info-custom"])
	assert.Contains(t, c["system-info"], "memoryTotalKb")
	assert.Equal(t, map[string]any{"service": map[string]any{"server": "https://10.77.0.1:7443"}}, c["enrollment-service"])
	_, err = mergeAgentConfig([]byte("error: no such signer\n"))
	require.ErrorContains(t, err, "no enrollment-service")
	_, err = mergeAgentConfig([]byte("\tnot yaml"))
	assert.Error(t, err)
}

func TestUnitsOfOverlay(t *testing.T) {
	for path, want := range map[string]bool{
		"/usr/lib/systemd/system/jetbridge-agent.service": true,
		"/lib/systemd/system/jetbridge-agent.path":        true,
		"/etc/systemd/system/jetbridge-boot.service":      true,
		"/usr/lib/systemd/system/jetbridge-pod@.service":  false,
		"/usr/lib/systemd/system/other.service":           false,
		"/usr/lib/systemd/user/jetbridge-agent.service":   false,
		"/usr/lib/systemd/system/jetbridge-agent.conf":    false,
	} {
		assert.Equal(t, want, isUnitOfOverlay(path), path)
	}
	assert.True(t, hasInstallSection([]byte("[Unit]\n[Install]\nWantedBy=x\n")))
	assert.False(t, hasInstallSection([]byte("[Unit]\n# [Install]\n")))
	assert.True(t, hasInstallSection([]byte(agentUnit)))
}

func TestInstallFileReplacesAtomically(t *testing.T) {
	target := filepath.Join(t.TempDir(), "new", "program")
	write := func(content string, mode fs.FileMode) {
		in, err := os.CreateTemp(t.TempDir(), "")
		require.NoError(t, err)
		defer in.Close()
		require.NoError(t, os.WriteFile(in.Name(), []byte(content), 0o600))
		require.NoError(t, installFile(target, in, mode))
	}
	write("old", 0o755)
	old, err := os.Open(target)
	require.NoError(t, err)
	defer old.Close()
	write("new", 0o640)
	b, err := os.ReadFile(target)
	require.NoError(t, err)
	assert.Equal(t, "new", string(b))
	fi, err := os.Stat(target)
	require.NoError(t, err)
	assert.Equal(t, fs.FileMode(0o640), fi.Mode().Perm())
	was, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d", old.Fd()))
	require.NoError(t, err)
	assert.Equal(t, "old", string(was), "whoever has the old file open keeps it")
	left, err := os.ReadDir(filepath.Dir(target))
	require.NoError(t, err)
	assert.Len(t, left, 1)
}

func TestOpenRefusesBadInput(t *testing.T) {
	for what, p := range map[string]ProvisionOptions{
		"no agent":   {FlightctlAgent: "/no/such/file"},
		"no overlay": {Overlay: "/no/such/folder"},
		"bad config": {FlightctlConfig: []byte("x: y")},
	} {
		_, err := p.open()
		assert.Error(t, err, what)
	}
}
