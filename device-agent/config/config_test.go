package config

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func load(t *testing.T, file string, environ []string, args ...string) (*Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent.yaml")
	require.NoError(t, os.WriteFile(path, []byte(file), 0o600))
	f := pflag.NewFlagSet("", pflag.ContinueOnError)
	Flags(f)
	require.NoError(t, f.Parse(append(args, "--config="+path)))
	return Load(f, environ)
}

func TestPrecedence(t *testing.T) {
	c, err := load(t, "max-pods: 1\nlisten: \"\"\nresync-interval: 10s\n", []string{"JETBRIDGE_MAX_PODS=2", "JETBRIDGE_LOG_LEVEL=debug", "HOME=/"}, "--max-pods=3")
	require.NoError(t, err)
	assert.EqualValues(t, 3, c.MaxPods)
	assert.Empty(t, c.Listen)
	assert.Equal(t, 10*time.Second, c.ResyncInterval)
	assert.Equal(t, "DEBUG", c.LogLevel.String())
	assert.Equal(t, "/var/lib/jetbridge", c.StateDir)
}

func TestAllErrorsAreNamed(t *testing.T) {
	_, err := load(t, "nonsense: 1\nmax-pods: 0\n", []string{"JETBRIDGE_TYPO=1"}, "--state-dir=relative", "--reserve-cpu=-1", "--log-level=loud", "--resync-interval=1ms", "--listen=x")
	require.Error(t, err)
	for _, key := range []string{"nonsense", "max-pods", "JETBRIDGE_TYPO", "state-dir", "reserve-cpu", "log-level", "resync-interval", "listen"} {
		assert.ErrorContains(t, err, key)
	}
}

func TestMissingFile(t *testing.T) {
	f := pflag.NewFlagSet("", pflag.ContinueOnError)
	Flags(f)
	require.NoError(t, f.Parse([]string{"--config=/no/such/file"}))
	_, err := Load(f, nil)
	require.Error(t, err, "a file that was asked for must be there")
}
