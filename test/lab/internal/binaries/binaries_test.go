package binaries

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestHash(t *testing.T) {
	set := Set{Name: "x", Packages: []string{"a", "b"}, Tags: []string{"t"}, LDFlags: "-X a=b"}
	sources := []source{{"go.mod", []byte("module x")}, {"main.go", []byte("package main")}}
	base := set.hash("go1", sources)
	assert.Equal(t, base, set.hash("go1", sources))
	assert.NotEqual(t, base, set.hash("go2", sources))
	for name, change := range map[string]func(*Set){
		"packages": func(s *Set) { s.Packages = []string{"ab"} },
		"tags":     func(s *Set) { s.Tags = nil },
		"ldflags":  func(s *Set) { s.LDFlags = "" },
	} {
		changed := set
		change(&changed)
		assert.NotEqual(t, base, changed.hash("go1", sources), name)
	}
	assert.NotEqual(t, base, set.hash("go1", []source{{"go.mod", []byte("module y")}, sources[1]}))
}

// module writes a module that prints text.
func module(t *testing.T, text string) Set {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "go.mod"), []byte("module example.com/hello\n\ngo 1.26.0\n"), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "main.go"), []byte("package main\n\nfunc main() { println(\""+text+"\") }\n"), 0o600))
	return Set{Name: "hello", Module: dir, Packages: []string{"."}}
}

func TestEnsure(t *testing.T) {
	cache := t.TempDir()
	set := module(t, "hello")
	// What a killed build left must not count.
	require.NoError(t, os.Mkdir(filepath.Join(cache, unfinished+"hello-1"), 0o700))
	var progress bytes.Buffer
	dir, err := set.Ensure(t.Context(), cache, &progress)
	require.NoError(t, err)
	assert.Contains(t, progress.String(), "hello: built in")
	assert.NoDirExists(t, filepath.Join(cache, unfinished+"hello-1"))
	out, err := exec.CommandContext(t.Context(), filepath.Join(dir, "hello")).CombinedOutput()
	require.NoError(t, err)
	assert.Equal(t, "hello\n", string(out))

	progress.Reset()
	again, err := set.Ensure(t.Context(), cache, &progress)
	require.NoError(t, err)
	assert.Equal(t, dir, again)
	assert.Empty(t, progress.String())

	other, err := module(t, "changed").Ensure(t.Context(), cache, &progress)
	require.NoError(t, err)
	assert.NotEqual(t, dir, other)
}

func TestEnsureFailure(t *testing.T) {
	cache := t.TempDir()
	set := module(t, "hello")
	require.NoError(t, os.WriteFile(filepath.Join(set.Module, "bad.go"), []byte("package main\n\nvar x int = \"\"\n"), 0o600))
	_, err := set.Ensure(t.Context(), cache, &bytes.Buffer{})
	require.ErrorContains(t, err, "bad.go")
	left, err := filepath.Glob(filepath.Join(cache, "*hello-*"))
	require.NoError(t, err)
	assert.Empty(t, left, "a failed build leaves nothing")
}

func TestLockExcludes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := Lock(t.Context(), path)
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = Lock(ctx, path)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	unlock()
	unlock, err = Lock(t.Context(), path)
	require.NoError(t, err)
	unlock()
}

// TestLock_removed: a lock whose file its holder removed excludes nobody any more,
// and whoever waited for it holds a file that others find.
func TestLock_removed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "labs", "lock")
	unlock, err := Lock(t.Context(), path)
	require.NoError(t, err)

	type result struct {
		unlock func()
		err    error
	}
	second := make(chan result)
	go func() {
		unlock, err := Lock(t.Context(), path)
		second <- result{unlock, err}
	}()
	require.NoError(t, os.Remove(path))
	unlock()
	r := <-second
	require.NoError(t, r.err)
	defer r.unlock()
	assert.FileExists(t, path)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = Lock(ctx, path)
	require.ErrorIs(t, err, context.Canceled)
}
