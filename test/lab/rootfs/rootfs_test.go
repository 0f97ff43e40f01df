package rootfs

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestFolderNameDependsOnEverything(t *testing.T) {
	base := Device()
	seen := map[string]string{folderName(base, "amd64"): "base"}
	assert.Equal(t, folderName(base, "amd64"), folderName(Device(), "amd64"), "the same spec is the same tree")
	changes := map[string]func(*Spec){
		"suite":    func(s *Spec) { s.Suite = "forky" },
		"mirror":   func(s *Spec) { s.Mirror = "http://mirror.example/debian" },
		"packages": func(s *Spec) { s.Packages = append(s.Packages, "skopeo") },
		"files":    func(s *Spec) { s.Files = map[string]string{"/a": "b"} },
		"setup":    func(s *Spec) { s.Setup = "true" },
	}
	for what, change := range changes {
		spec := Device()
		change(&spec)
		name := folderName(spec, "amd64")
		assert.NotContains(t, seen, name, what)
		seen[name] = what
	}
	assert.NotContains(t, seen, folderName(base, "arm64"))
	assert.True(t, strings.HasPrefix(folderName(base, "arm64"), "device-"))
}

func TestEnsureReturnsCachedTree(t *testing.T) {
	cache := t.TempDir()
	arch, err := debianArch("amd64")
	require.NoError(t, err)
	want := filepath.Join(cache, folderName(Services(), arch))
	require.NoError(t, os.Mkdir(want, 0o755))
	t.Setenv("PATH", t.TempDir()) // it must not need debootstrap
	var progress bytes.Buffer
	got, err := Ensure(t.Context(), Services(), cache, &progress)
	require.NoError(t, err)
	assert.Equal(t, want, got)
	assert.Empty(t, progress.String())
}

func TestEnsureWithoutDebootstrap(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := Ensure(t.Context(), Device(), t.TempDir(), &bytes.Buffer{})
	assert.ErrorContains(t, err, "install debootstrap with your package manager")
}

func TestEnsureWaitsForTheLock(t *testing.T) {
	cache := t.TempDir()
	unlock, err := lock(t.Context(), filepath.Join(cache, "lock"), func() { t.Error("nobody holds the lock") })
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	progress := writerFunc(func(p []byte) (int, error) {
		assert.Contains(t, string(p), "waiting for another build")
		cancel()
		return len(p), nil
	})
	_, err = Ensure(ctx, Device(), cache, progress)
	require.ErrorIs(t, err, context.Canceled)
	unlock()
	unlock, err = lock(t.Context(), filepath.Join(cache, "lock"), func() { t.Error("the lock was not released") })
	require.NoError(t, err)
	unlock()
}

func TestWriteFiles(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, writeFiles(dir, map[string]string{"/etc/a": "x", "/usr/bin/b": "#!/bin/sh\n"}))
	for path, mode := range map[string]os.FileMode{"etc/a": 0o644, "usr/bin/b": 0o755, "usr/sbin/policy-rc.d": 0o755} {
		fi, err := os.Stat(filepath.Join(dir, path))
		require.NoError(t, err)
		assert.Equal(t, mode, fi.Mode().Perm(), path)
	}
	assert.ErrorContains(t, writeFiles(dir, map[string]string{"etc/a": "x"}), "not absolute")
}

func TestTracker(t *testing.T) {
	var progress bytes.Buffer
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	tr := newTracker("device", &progress, start)
	after := func(d time.Duration) string { return tr.summary(start.Add(d)) }
	feed := func(s string) {
		n, err := tr.Write([]byte(s))
		require.NoError(t, err)
		require.Equal(t, len(s), n)
	}
	assert.Equal(t, "tree device: 0s: starting", after(0))
	feed("I: Retrieving libc6 2.41-1\nI: Valid")
	assert.Equal(t, "tree device: 2s: Retrieving libc6 2.41-1 (1 of 3: 0 packages so far)", after(2*time.Second))
	feed("ating libc6 2.41-1\nI: Retrieving dash 1\r\nI: Validating dash 1\n")
	assert.Equal(t, "tree device: 4s: Validating dash 1 (1 of 3: 2 packages so far)", after(4*time.Second))
	feed("I: Unpacking libc6:amd64...\nI: Configuring libc6:amd64...\nnoise\n")
	assert.Equal(t, "tree device: 1m5s: Configuring libc6:amd64... (3 of 3: package 1 of about 2)", after(65*time.Second))
	assert.Equal(t, "noise", tr.tail()[strings.LastIndex(tr.tail(), "\n")+1:])
	tr.done(start.Add(time.Minute))
	assert.Contains(t, progress.String(), "tree device: ready after 1m0s\n")
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
