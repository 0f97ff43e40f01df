package config_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"github.com/jetbridge/jetbridge/cluster-shim/config"
)

func load(t *testing.T, file string, args ...string) (*config.Config, error) {
	t.Helper()
	f := pflag.NewFlagSet("shim", pflag.ContinueOnError)
	config.AddFlags(f)
	if file != "" {
		path := filepath.Join(t.TempDir(), "config.yaml")
		require.NoError(t, os.WriteFile(path, []byte(file), 0o600))
		args = append(args, "--config="+path)
	}
	require.NoError(t, f.Parse(args))
	return config.Load(f)
}

func TestPrecedence(t *testing.T) {
	t.Setenv("JETBRIDGE_FLIGHTCTL_URL", "https://env:1")
	t.Setenv("JETBRIDGE_POLL_INTERVAL", "7s")
	t.Setenv("JETBRIDGE_SHIM_SERVICE_HOST", "10.0.0.1") // what Kubernetes sets is no key
	c, err := load(t, "flightctl: {url: 'https://file:1', ca-file: /ca}\npoll-interval: 5s\nnode: {taints: ['a=b:NoExecute']}\n", "--poll-interval=9s")
	require.NoError(t, err)
	assert.Equal(t, "https://env:1", c.Flightctl.URL)
	assert.Equal(t, "/ca", c.Flightctl.CAFile)
	assert.Equal(t, 9*time.Second, c.PollInterval)
	assert.True(t, c.ManageFleets)
	taints, err := c.Node.ParsedTaints()
	require.NoError(t, err)
	assert.Equal(t, []corev1.Taint{{Key: "a", Value: "b", Effect: corev1.TaintEffectNoExecute}}, taints)
	reserve := c.Reserve.Resources()
	assert.Equal(t, "128Mi", reserve.Memory().String())
}

func TestWhatIsWrongIsSaid(t *testing.T) {
	const url = "flightctl: {url: 'https://x'}\n"
	for text, want := range map[string]string{
		"":                                    "flightctl.url",
		url + "polinterval: 3s\n":             "polinterval",
		url + "flightctl.x: 3\n":              "x",
		url + "poll-interval: 10ms\n":         "poll-interval",
		url + "disconnect-after: 1s\n":        "disconnect-after",
		url + "bundle-server: {url: nowhere}": "bundle-server.url",
		url + "bundle-server: {cert-file: x}": "bundle-server.key-file",
		url + "selector: '='\n":               "selector",
		url + "log-level: loud\n":             "log-level",
		url + "reserve: {cpu: -1}\n":          "reserve.cpu",
		url + "node: {taints: ['x']}\n":       "node.taints",
		url + "listen: nowhere\n":             "listen",
		url + "namespace: 'A b'\n":            "namespace",
	} {
		_, err := load(t, text)
		assert.ErrorContains(t, err, want, text)
	}
}
