// Package binaries builds the third-party programs of the lab from Go modules,
// and caches them by everything that they are made from.
package binaries

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Set is one or more programs of one module that are built together.
type Set struct {
	// Name begins the name of the set's folder in the cache.
	Name string
	// Module is the folder of the module's go.mod.
	Module string
	// Packages are what to build; each program is named by its package's last element.
	Packages []string
	Tags     []string
	LDFlags  string
}

// heartbeat is how often a build says how far it is.
const heartbeat = 10 * time.Second

// unfinished begins the names of folders that builds work in.
const unfinished = ".unfinished-"

// Ensure returns the folder of the set's programs, and builds them first if
// they are not in the cache. Progress is told in lines.
func (s Set) Ensure(ctx context.Context, cacheDir string, progress io.Writer) (string, error) {
	key, err := s.key(ctx)
	if err != nil {
		return "", err
	}
	final := filepath.Join(cacheDir, s.Name+"-"+key)
	if exists(final) {
		return final, nil
	}
	if err := os.MkdirAll(cacheDir, 0o755); err != nil {
		return "", fmt.Errorf("cannot make cache folder: %w", err)
	}
	unlock, err := Lock(ctx, filepath.Join(cacheDir, s.Name+".lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	if exists(final) {
		return final, nil // another lab was quicker
	}
	old, err := filepath.Glob(filepath.Join(cacheDir, unfinished+s.Name+"-*"))
	if err != nil {
		return "", fmt.Errorf("cannot list unfinished builds: %w", err)
	}
	for _, dir := range old {
		if err := os.RemoveAll(dir); err != nil {
			return "", fmt.Errorf("cannot remove unfinished build: %w", err)
		}
	}
	tmp, err := os.MkdirTemp(cacheDir, unfinished+s.Name+"-")
	if err != nil {
		return "", fmt.Errorf("cannot make folder for %s: %w", s.Name, err)
	}
	if err := s.build(ctx, tmp, progress); err != nil {
		return "", errors.Join(err, os.RemoveAll(tmp))
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", fmt.Errorf("cannot open %s to all: %w", s.Name, err)
	}
	if err := syncFolder(tmp); err != nil {
		return "", err
	}
	if err := os.Rename(tmp, final); err != nil {
		return "", fmt.Errorf("cannot put %s into the cache: %w", s.Name, err)
	}
	return final, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// syncFolder writes what is in the folder to disk: a power cut after the rename
// must not leave empty programs that count as complete.
func syncFolder(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("cannot open %s: %w", dir, err)
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("cannot write %s to disk: %w", dir, err)
	}
	return nil
}

// key is a hash of what decides how the programs turn out.
func (s Set) key(ctx context.Context) (string, error) {
	version, err := exec.CommandContext(ctx, "go", "env", "GOVERSION", "GOARCH").Output()
	if err != nil {
		return "", fmt.Errorf("cannot ask go for its version: %w", err)
	}
	sources, err := readSources(s.Module)
	if err != nil {
		return "", err
	}
	return s.hash(string(version), sources), nil
}

// source is a file of the module.
type source struct {
	name    string
	content []byte
}

func readSources(dir string) ([]source, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot read module: %w", err)
	}
	var all []source
	for _, e := range entries {
		if name := e.Name(); name == "go.mod" || name == "go.sum" || strings.HasSuffix(name, ".go") {
			b, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				return nil, fmt.Errorf("cannot read module: %w", err)
			}
			all = append(all, source{name, b})
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("cannot find a module in %s: %w", dir, fs.ErrNotExist)
	}
	return all, nil
}

func (s Set) hash(goVersion string, sources []source) string {
	h := sha256.New()
	for _, field := range slices.Concat([]string{goVersion, s.LDFlags}, s.Packages, s.Tags) {
		fmt.Fprintf(h, "%d:%s\n", len(field), field)
	}
	for _, f := range sources {
		fmt.Fprintf(h, "%s %d\n", f.name, len(f.content))
		h.Write(f.content)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

func (s Set) flags() []string {
	return []string{"-trimpath", "-ldflags", strings.TrimSpace("-s -w " + s.LDFlags), "-tags", strings.Join(s.Tags, " ")}
}

func (s Set) build(ctx context.Context, out string, progress io.Writer) error {
	start := time.Now()
	fmt.Fprintf(progress, "%s: building (once; the result is cached)\n", s.Name)
	env := append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=readonly", "GOWORK=off")
	list := exec.CommandContext(ctx, "go", append([]string{"list", "-deps", "-tags", strings.Join(s.Tags, " ")}, s.Packages...)...)
	list.Dir, list.Env, list.Stderr = s.Module, env, progress
	deps, err := list.Output()
	if err != nil {
		return fmt.Errorf("cannot list packages of %s: %w", s.Name, err)
	}
	total := bytes.Count(deps, []byte("\n"))

	// -v names each package as it is compiled; those that Go has cached stay silent.
	cmd := exec.CommandContext(ctx, "go", slices.Concat([]string{"build", "-v"}, s.flags(), []string{"-o", out + "/"}, s.Packages)...)
	cmd.Dir, cmd.Env = s.Module, env
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return fmt.Errorf("cannot build %s: %w", s.Name, err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("cannot build %s: %w", s.Name, err)
	}
	var compiled atomic.Int64
	stop := every(heartbeat, func() {
		fmt.Fprintf(progress, "%s: %s: compiled %d of at most %d packages\n", s.Name, time.Since(start).Round(time.Second), compiled.Load(), total)
	})
	var last []string
	lines := bufio.NewScanner(stderr)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		compiled.Add(1)
		last = append(last, lines.Text())
		last = last[max(0, len(last)-30):]
	}
	err = cmd.Wait()
	stop()
	if ctx.Err() != nil {
		return fmt.Errorf("cannot build %s: %w", s.Name, ctx.Err())
	}
	if err != nil {
		return fmt.Errorf("cannot build %s: %w\n%s", s.Name, err, strings.Join(last, "\n"))
	}
	fmt.Fprintf(progress, "%s: built in %s\n", s.Name, time.Since(start).Round(time.Second))
	return nil
}

// every calls f again and again until the returned function is called, which
// waits for the last call.
func every(d time.Duration, f func()) (stop func()) {
	done := make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() {
		tick := time.NewTicker(d)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				f()
			}
		}
	})
	return func() { close(done); running.Wait() }
}

// Lock takes an exclusive lock on the file and waits for it if need be. The lock
// ends with the returned function, or with the process. Who holds the lock may
// remove the file.
func Lock(ctx context.Context, path string) (unlock func(), err error) {
	for {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, fmt.Errorf("cannot make folder for lock: %w", err)
		}
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if errors.Is(err, os.ErrNotExist) {
			continue // somebody removed the folder just now
		}
		if err != nil {
			return nil, fmt.Errorf("cannot open lock: %w", err)
		}
		if err := flock(ctx, f); err != nil {
			f.Close()
			return nil, fmt.Errorf("cannot lock %s: %w", path, err)
		}
		// The one before may have removed the file that we waited for.
		locked, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("cannot look at lock: %w", err)
		}
		if current, err := os.Stat(path); err == nil && os.SameFile(locked, current) {
			return func() { f.Close() }, nil
		}
		f.Close()
	}
}

// flock waits for an exclusive lock.
func flock(ctx context.Context, f *os.File) error {
	retry := time.NewTicker(100 * time.Millisecond)
	defer retry.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-retry.C:
		}
	}
}

// Kube is etcd, the control plane and kubectl as one program named kube.
func Kube(checkout string) Set {
	const version = "k8s.io/component-base/version"
	return Set{
		Name:     "kube-1.37.2",
		Module:   filepath.Join(checkout, "test/lab/thirdparty/kube"),
		Packages: []string{"."},
		LDFlags:  "-X " + version + ".gitVersion=v1.37.2 -X " + version + ".gitMajor=1 -X " + version + ".gitMinor=37",
	}
}

// Flightctl is Flight Control's services, agent and CLI.
func Flightctl(checkout string) Set {
	const cmd = "github.com/flightctl/flightctl/cmd/"
	return Set{
		Name:   "flightctl-1.2.0",
		Module: filepath.Join(checkout, "test/lab/thirdparty/flightctl"),
		Packages: []string{
			cmd + "flightctl", cmd + "flightctl-agent", cmd + "flightctl-api", cmd + "flightctl-db-migrate",
			cmd + "flightctl-periodic", cmd + "flightctl-worker",
		},
		Tags: []string{"containers_image_openpgp", "exclude_graphdriver_btrfs", "exclude_graphdriver_devicemapper"},
	}
}

// Registry is the image registry.
func Registry(checkout string) Set {
	return Set{
		Name:     "registry-3",
		Module:   filepath.Join(checkout, "test/lab/thirdparty/registry"),
		Packages: []string{"."},
	}
}
