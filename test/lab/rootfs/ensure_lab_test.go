//go:build lab

package rootfs

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// labCache is where these tests build: LAB_CACHE, else the user's cache folder.
func labCache(t *testing.T) string {
	if dir := os.Getenv("LAB_CACHE"); dir != "" {
		return dir
	}
	dir, err := os.UserCacheDir()
	require.NoError(t, err)
	return filepath.Join(dir, "jetbridge", "rootfs")
}

func TestEnsureReal(t *testing.T) {
	require.Zero(t, os.Geteuid(), "tests with the tag lab need root")
	before, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	for _, test := range []struct {
		spec  Spec
		files []string
	}{
		{Device(), []string{"usr/lib/systemd/systemd", "usr/bin/podman", "usr/sbin/nft", "usr/bin/ping", "usr/bin/catatonit"}},
		{Services(), []string{"usr/lib/postgresql/17/bin/initdb", "usr/bin/redis-server", "usr/bin/busybox"}},
	} {
		t.Run(test.spec.Name, func(t *testing.T) {
			dir, err := Ensure(t.Context(), test.spec, labCache(t), os.Stderr)
			require.NoError(t, err)
			for _, file := range test.files {
				assert.FileExists(t, filepath.Join(dir, file))
			}
			assert.NoFileExists(t, filepath.Join(dir, "usr/sbin/policy-rc.d"))
			assert.NoDirExists(t, filepath.Join(dir, "var/lib/postgresql/17/main"), "no database cluster was made")
			start := time.Now()
			again, err := Ensure(t.Context(), test.spec, labCache(t), os.Stderr)
			require.NoError(t, err)
			assert.Equal(t, dir, again)
			t.Logf("from the cache in %s", time.Since(start))
		})
	}
	after, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	assert.Equal(t, string(before), string(after), "a build leaves no mount")
}

// A build that is interrupted leaves nothing that counts, and no process or mount.
func TestEnsureInterrupted(t *testing.T) {
	require.Zero(t, os.Geteuid(), "tests with the tag lab need root")
	cache := t.TempDir()
	before, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	// Enough to be in the middle of it; far from enough to finish.
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err = Ensure(ctx, Spec{Name: "interrupted", Suite: "trixie", Setup: "sleep 1000"}, cache, io.Discard)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	after, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	assert.Equal(t, string(before), string(after))
	left, err := filepath.Glob(filepath.Join(cache, "*"))
	require.NoError(t, err)
	assert.ElementsMatch(t, []string{filepath.Join(cache, "debs"), filepath.Join(cache, "lock")}, left)
}
