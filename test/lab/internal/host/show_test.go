package host

import (
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/jetbridge/jetbridge/test/lab/internal/control"
	"github.com/jetbridge/jetbridge/test/lab/internal/layout"
)

func testConfig() layout.Config {
	return layout.Config{
		Name: "x", Dir: "/state/x", RegistryUser: "lab", RegistryPassword: "it's",
		Ports: map[string]int{layout.RelayAPI: 1, layout.RelayFlightctl: 2, layout.RelayRegistry: 3, layout.RelayShim: 4},
	}
}

func testDevices() []control.Device {
	return []control.Device{
		{Name: "edge-1", ID: "aaa", State: "on", PID: 7, Address: "10.77.0.11", Link: "up", Labels: map[string]string{"alias": "edge-1"}},
		{Name: "edge-2", State: "off", Address: "10.77.0.12", Fleet: "edge", Link: "down", Labels: map[string]string{"alias": "edge-2"}},
	}
}

func TestExportsAreShell(t *testing.T) {
	lines := exports(testConfig(), testDevices(), map[string]string{"aaa": "node-a"}, "/usr/bin")
	script := strings.Join(lines, "\n") + "\nprintf '%s|' \"$LAB_NAME\" \"$KUBECONFIG\" \"$PATH\" \"$LAB_REGISTRY_PASSWORD\" \"$LAB_DEVICES\" \"$LAB_SHIM_URL\""
	out, err := exec.CommandContext(t.Context(), "sh", "-c", script).Output()
	require.NoError(t, err)
	assert.Equal(t, "x|/state/x/kubeconfig|/state/x/bin:/usr/bin|it's|edge-1=node-a edge-2=edge-2|http://127.0.0.1:4|", string(out))
}

func TestWithoutOldLabs(t *testing.T) {
	assert.Equal(t, "/usr/bin:/state2/a/bin", withoutOldLabs("/state/a/bin:/usr/bin:/state2/a/bin:/state/b/bin", "/state"))
}

func TestTable(t *testing.T) {
	now := time.Unix(1000, 0)
	devices := testDevices()
	for i := range devices {
		devices[i].Since = now.Add(-time.Minute)
	}
	status := control.Status{Devices: devices, Components: []control.Component{{Name: "etcd", State: "running", PID: 5, Restarts: 1, Since: now.Add(-time.Second)}}}
	var out strings.Builder
	require.NoError(t, table(&out, testConfig(), status, nil, now))
	assert.Contains(t, out.String(), "etcd       running  5    1         1s\n")
	assert.Contains(t, out.String(), "edge-2  edge-2  10.77.0.12  off    edge   down  -    1m0s\n")
}

func TestParseStartTime(t *testing.T) {
	start, err := parseStartTime("5 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21")
	require.NoError(t, err)
	assert.Equal(t, uint64(4242), start)
	_, err = parseStartTime("garbage")
	require.Error(t, err)
	assert.True(t, isZombie("5 (a) b) Z 1 2"))
	assert.False(t, isZombie("5 (Z) S 1 2"))
}

func TestIsDeployment(t *testing.T) {
	assert.True(t, isDeployment([]byte("apiVersion: apps/v1\nkind: Deployment\nmetadata: {}\n")))
	assert.False(t, isDeployment([]byte("kind: Role\n# kind: Deployment\n")))
}
