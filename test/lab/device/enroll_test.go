package device

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// testKey is a key that was made only for this test, and testKeyName the name that
// Flight Control 1.2.0 gives to a device with it. One coordinate of its point
// begins with a zero, which does not count in the name.
const (
	testKey = `-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIIrSpbc3K3vByKZXDIctPwELgvKu5vdCEcsNtijukwv7oAoGCCqGSM49
AwEHoUQDQgAEAFi18Fsk9GFTLwKNjhNy6N5aRMBKxzHGuxsNFhRI3jhiiZAcJN0V
kG0ulR6sBbloZoeVVIJe/Fc7tdwQ95kC2g==
-----END EC PRIVATE KEY-----
`
	testKeyName = "ahdj47cbei1tqbvpa7qe83f098cuglqe4stdc8tgflvfth3e1aig"
)

func TestNameFromKey(t *testing.T) {
	name, err := nameFromKey([]byte(testKey))
	require.NoError(t, err)
	assert.Equal(t, testKeyName, name)

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	sec1, err := x509.MarshalECPrivateKey(key)
	require.NoError(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	one, err := nameFromKey(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1}))
	require.NoError(t, err)
	other, err := nameFromKey(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
	require.NoError(t, err)
	assert.Equal(t, one, other, "the form of the key does not matter")
	assert.Len(t, one, 52)

	for _, bad := range []string{"", "no PEM", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"} {
		_, err := nameFromKey([]byte(bad))
		assert.Error(t, err, bad)
	}
}

func TestApproveArgs(t *testing.T) {
	assert.Equal(t, []string{"approve", "enrollmentrequest/x", "-l", "alias=edge-1", "-l", "fleet=a", "-l", "site=b"},
		approveArgs("x", "edge-1", map[string]string{"site": "b", "fleet": "a"}))
	assert.Equal(t, []string{"approve", "enrollmentrequest/x", "-l", "alias=other"},
		approveArgs("x", "edge-1", map[string]string{"alias": "other"}))
}

// fakeCLI is a Flight Control in which everything happens one question late.
type fakeCLI struct {
	requests, approved, onlineIn int
	calls                        []string
}

func (f *fakeCLI) run(_ context.Context, args ...string) ([]byte, error) {
	f.calls = append(f.calls, strings.Join(args, " "))
	kind, _, _ := strings.Cut(args[1], "/")
	switch {
	case args[0] == "approve":
		f.approved++
		return nil, nil
	case kind == "enrollmentrequest" && f.requests > 0:
		f.requests--
		return nil, errors.New("404 Not Found")
	case kind == "enrollmentrequest" && f.approved > 0:
		return []byte(`{"status":{"approval":{"approved":true}}}`), nil
	case kind == "enrollmentrequest":
		return []byte(`{"status":{}}`), nil
	case f.approved == 0:
		return nil, errors.New("404 Not Found")
	case f.onlineIn > 0:
		f.onlineIn--
		return []byte(`{"status":{"summary":{"status":"Unknown"}}}`), nil
	}
	return []byte(`{"status":{"summary":{"status":"Online"}}}`), nil
}

func enrollTestDevice(t *testing.T) *Device {
	t.Helper()
	o := validOptions()
	o.Dir = t.TempDir()
	certs := filepath.Join(o.Dir, "var/lib/flightctl/certs")
	require.NoError(t, os.MkdirAll(certs, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(certs, "agent.key"), []byte(testKey), 0o600))
	return &Device{o: o}
}

func TestEnroll(t *testing.T) {
	d := enrollTestDevice(t)
	synctest.Test(t, func(t *testing.T) {
		f := &fakeCLI{requests: 2, onlineIn: 3}
		name, err := Enroll(t.Context(), EnrollOptions{CLI: f.run, Device: d, Labels: map[string]string{"site": "b"}})
		require.NoError(t, err)
		assert.Equal(t, testKeyName, name)
		assert.Equal(t, 1, f.approved)
		assert.Contains(t, f.calls, "approve enrollmentrequest/"+testKeyName+" -l alias=edge-1 -l site=b")

		name, err = Enroll(t.Context(), EnrollOptions{CLI: f.run, Device: d})
		require.NoError(t, err)
		assert.Equal(t, testKeyName, name)
		assert.Equal(t, 1, f.approved, "approved once only")
	})
}

func TestEnrollGivesUp(t *testing.T) {
	d := enrollTestDevice(t)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err := Enroll(ctx, EnrollOptions{CLI: (&fakeCLI{onlineIn: 1000}).run, Device: d})
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.ErrorContains(t, err, "it is Unknown")
	})
	require.NoError(t, os.Remove(filepath.Join(d.o.Dir, "var/lib/flightctl/certs/agent.key")))
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err := Enroll(ctx, EnrollOptions{CLI: (&fakeCLI{}).run, Device: d})
		assert.ErrorContains(t, err, "flightctl-agent has not made its key")
	})
}

func TestRemove(t *testing.T) {
	lifecycle := []string{"Enrolled", "Decommissioning", "Decommissioned"}
	var calls []string
	cli := func(_ context.Context, args ...string) ([]byte, error) {
		calls = append(calls, strings.Join(args, " "))
		if args[0] != "get" {
			return nil, nil
		}
		now := lifecycle[0]
		lifecycle = lifecycle[1:]
		return []byte(`{"status":{"lifecycle":{"status":"` + now + `"}}}`), nil
	}
	synctest.Test(t, func(t *testing.T) {
		require.NoError(t, Remove(t.Context(), RemoveOptions{CLI: cli, Name: "x", Decommission: true}))
	})
	assert.Equal(t, []string{
		"decommission device/x", "get device/x -o json", "get device/x -o json", "get device/x -o json",
		"delete device/x", "delete enrollmentrequest/x",
	}, calls)

	gone := func(context.Context, ...string) ([]byte, error) { return nil, errors.New("device not found (404)") }
	require.NoError(t, Remove(t.Context(), RemoveOptions{CLI: gone, Name: "x", Decommission: true}))
	broken := func(context.Context, ...string) ([]byte, error) { return nil, errors.New("503") }
	assert.ErrorContains(t, Remove(t.Context(), RemoveOptions{CLI: broken, Name: "x"}), "503")
}
