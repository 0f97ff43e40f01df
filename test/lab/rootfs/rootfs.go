// Package rootfs makes the Debian trees that the lab's devices and services
// run from, and caches them.
//
// A tree is the result of debootstrap for a [Spec]. It is kept in the cache
// folder under a name that contains a hash of everything that it was made
// from, so a changed spec is a new tree, and an old one is never altered: any
// number of labs may use it as a read-only overlay layer at the same time. A
// tree is built beside its final place and renamed when it is complete and on
// disk, so an interrupted build never counts.
//
// debootstrap runs in mount and PID namespaces of its own. Whatever it mounts
// or starts is gone when it ends, however it ends.
package rootfs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Spec says what a tree is made from. All of it is part of the cache key.
type Spec struct {
	// Name is a short word for people; it begins the tree's folder name.
	Name string `json:"name"`
	// Suite is the Debian release, for instance "trixie".
	Suite string `json:"suite"`
	// Mirror is the archive to install from; empty means debootstrap's default.
	Mirror string `json:"mirror,omitempty"`
	// Packages are installed besides the minimal base, with their dependencies.
	Packages []string `json:"packages"`
	// Files are written before any package is configured: absolute path to
	// content. Their mode is 0644, or 0755 if the content begins with "#!".
	Files map[string]string `json:"files,omitempty"`
	// Setup is a shell script that runs inside the finished tree.
	Setup string `json:"setup,omitempty"`
}

// Device is the tree of an edge device: systemd, podman and what flightctl-agent needs.
func Device() Spec {
	return Spec{
		Name:  "device",
		Suite: "trixie",
		Packages: []string{
			"systemd", "systemd-sysv", "dbus", "podman", "crun", "conmon", "netavark", "aardvark-dns", "nftables",
			"passt", "catatonit", "iproute2", "iputils-ping", "ca-certificates", "procps", "sudo",
		},
	}
}

// Services is the tree that the lab's own helpers come from: PostgreSQL, Redis
// and a static busybox. None of their services is ever started by it.
func Services() Spec {
	return Spec{
		Name:     "services",
		Suite:    "trixie",
		Packages: []string{"postgresql", "redis-server", "busybox-static"},
		Files: map[string]string{
			"/etc/postgresql-common/createcluster.conf": "create_main_cluster = false\n",
		},
	}
}

// heartbeat is how often a build says that it still goes on.
const heartbeat = 10 * time.Second

// denyServices keeps package scripts from starting services in the tree.
const denyServices = "#!/bin/sh\nexit 101\n"

// buildScript makes the tree in "$1" for suite "$2", with debootstrap's
// arguments after those. It is PID 1 of the build's namespaces.
const buildScript = `set -eu
tree=$1 suite=$2 mirror=$3 files=$4 setup=$5
shift 5
umask 022
mount -t proc proc /proc
debootstrap --foreign "$@" "$suite" "$tree" $mirror
cp -rp "$files/." "$tree/"
chroot "$tree" /debootstrap/debootstrap --second-stage
if [ -n "$setup" ]; then
	echo "I: Running the setup script"
	chroot "$tree" /bin/sh -euc "$setup"
fi
echo "I: Removing what is not needed"
chroot "$tree" apt-get clean
cd "$tree"
rm -rf var/lib/apt/lists/* var/cache/apt/*.bin var/cache/debconf/*-old var/log/*.log var/log/apt \
	usr/share/doc/* usr/share/man/* usr/share/info/* usr/share/locale/* usr/share/lintian \
	etc/hostname etc/machine-id var/lib/dbus/machine-id usr/sbin/policy-rc.d
rm -f etc/resolv.conf
: >etc/resolv.conf
: >etc/machine-id
`

// Ensure returns the folder of the spec's tree below cacheDir, and makes the
// tree first if it is not there. Progress goes to progress, a line at a time.
//
// It needs root and the program debootstrap. Callers at the same time, also in
// other processes, wait for each other. If ctx ends, the build is killed.
func Ensure(ctx context.Context, spec Spec, cacheDir string, progress io.Writer) (string, error) {
	cacheDir, err := filepath.Abs(cacheDir)
	if err != nil {
		return "", fmt.Errorf("cannot find cache folder: %w", err)
	}
	arch, err := debianArch(runtime.GOARCH)
	if err != nil {
		return "", err
	}
	final := filepath.Join(cacheDir, folderName(spec, arch))
	if found, err := isDir(final); err != nil || found {
		return final, err
	}
	debs := filepath.Join(cacheDir, "debs")
	if err := os.MkdirAll(debs, 0o755); err != nil {
		return "", fmt.Errorf("cannot make cache folder: %w", err)
	}
	// One lock for all specs: they share the downloaded packages.
	unlock, err := lock(ctx, filepath.Join(cacheDir, "lock"), func() {
		fmt.Fprintf(progress, "tree %s: waiting for another build in %s\n", spec.Name, cacheDir)
	})
	if err != nil {
		return "", err
	}
	defer unlock()
	if found, err := isDir(final); err != nil || found {
		return final, err
	}
	if _, err := exec.LookPath("debootstrap"); err != nil {
		return "", errors.New("cannot find the program debootstrap: install debootstrap with your package manager")
	}
	if err := removeUnfinished(cacheDir); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(cacheDir, unfinished)
	if err != nil {
		return "", fmt.Errorf("cannot make folder for tree %s: %w", spec.Name, err)
	}
	if err := build(ctx, spec, arch, tmp, debs, progress); err != nil {
		if rmErr := os.RemoveAll(tmp); rmErr != nil {
			err = errors.Join(err, fmt.Errorf("cannot remove unfinished tree: %w", rmErr))
		}
		return "", err
	}
	if err := publish(filepath.Join(tmp, "tree"), final); err != nil {
		return "", err
	}
	if err := os.RemoveAll(tmp); err != nil {
		return "", fmt.Errorf("cannot clean up after tree %s: %w", spec.Name, err)
	}
	return final, nil
}

// unfinished begins the names of folders that builds work in.
const unfinished = ".unfinished-"

func removeUnfinished(cacheDir string) error {
	old, err := filepath.Glob(filepath.Join(cacheDir, unfinished+"*"))
	if err != nil {
		return fmt.Errorf("cannot list unfinished trees: %w", err)
	}
	for _, dir := range old {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("cannot remove unfinished tree: %w", err)
		}
	}
	return nil
}

// build fills dir/tree.
func build(ctx context.Context, spec Spec, arch, dir, debs string, progress io.Writer) error {
	// MkdirTemp's 0700 would keep the tree's users from their own root.
	if err := os.Chmod(dir, 0o755); err != nil {
		return fmt.Errorf("cannot make folder for tree %s: %w", spec.Name, err)
	}
	files := filepath.Join(dir, "files")
	if err := writeFiles(files, spec.Files); err != nil {
		return fmt.Errorf("cannot write files of tree %s: %w", spec.Name, err)
	}
	args := []string{
		"-c", buildScript, "build", filepath.Join(dir, "tree"), spec.Suite, spec.Mirror, files, spec.Setup,
		"--variant=minbase", "--arch=" + arch, "--cache-dir=" + debs,
	}
	if len(spec.Packages) > 0 {
		args = append(args, "--include="+strings.Join(spec.Packages, ","))
	}
	cmd := exec.CommandContext(ctx, "/bin/sh", args...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:   syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC,
		Unshareflags: syscall.CLONE_NEWNS, // also makes every mount private
	}
	out := newTracker(spec.Name, progress, time.Now())
	cmd.Stdout, cmd.Stderr = out, out
	stop := out.beat(heartbeat)
	defer stop()
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return fmt.Errorf("cannot make tree %s: %w; its last lines were:\n%s", spec.Name, err, out.tail())
	}
	out.done(time.Now())
	return nil
}

func writeFiles(root string, files map[string]string) error {
	all := map[string]string{"/usr/sbin/policy-rc.d": denyServices}
	for path, content := range files {
		all[path] = content
	}
	for path, content := range all {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("path %q is not absolute", path)
		}
		mode := os.FileMode(0o644)
		if strings.HasPrefix(content, "#!") {
			mode = 0o755
		}
		target := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(target, []byte(content), mode); err != nil {
			return err
		}
	}
	return nil
}

// publish puts a complete tree to its final place.
func publish(tree, final string) error {
	f, err := os.Open(tree)
	if err != nil {
		return fmt.Errorf("cannot open finished tree: %w", err)
	}
	defer f.Close()
	// Without this a power cut soon after the rename could leave empty files
	// in a tree that counts as complete.
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("cannot write finished tree to disk: %w", err)
	}
	if err := os.Rename(tree, final); err != nil {
		return fmt.Errorf("cannot move finished tree to its place: %w", err)
	}
	return nil
}

// folderName is unique for everything that decides what is in the tree.
func folderName(spec Spec, arch string) string {
	b, err := json.Marshal(struct {
		Spec   Spec
		Arch   string
		Script string
	}{spec, arch, buildScript})
	if err != nil {
		panic(err) // strings only
	}
	sum := sha256.Sum256(b)
	return spec.Name + "-" + hex.EncodeToString(sum[:6])
}

func debianArch(goarch string) (string, error) {
	switch goarch {
	case "amd64", "arm64":
		return goarch, nil
	}
	return "", fmt.Errorf("cannot make Debian trees on %s: only amd64 and arm64 are supported", goarch)
}

func isDir(path string) (bool, error) {
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("cannot look for tree: %w", err)
	case !fi.IsDir():
		return false, fmt.Errorf("cannot use tree %s: not a folder", path)
	}
	return true, nil
}

// lock takes an exclusive lock on the file, and calls waiting once if that does
// not succeed at once. The lock ends with the returned function, or with the process.
func lock(ctx context.Context, path string, waiting func()) (func(), error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, fmt.Errorf("cannot open lock: %w", err)
	}
	retry := time.NewTicker(100 * time.Millisecond)
	defer retry.Stop()
	for first := true; ; first = false {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("cannot lock %s: %w", path, err)
		}
		if first {
			waiting()
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("cannot lock %s: %w", path, ctx.Err())
		case <-retry.C:
		}
	}
}

// lines calls f for every complete line that is written to it.
type lines struct {
	rest []byte
	f    func(string)
}

func (l *lines) Write(p []byte) (int, error) {
	l.rest = append(l.rest, p...)
	for {
		line, rest, ok := bytes.Cut(l.rest, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		l.rest = rest
		l.f(strings.TrimRight(string(line), "\r"))
	}
}
