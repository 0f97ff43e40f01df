// Package nsinit is the first process of a lab's namespaces.
//
// The lab's launcher starts it with PID, mount, network, UTS and IPC namespaces
// of its own. It waits until it was put into the lab's cgroups, makes the
// cgroup namespace, the mounts and the bridge, and starts the supervisor as its
// only child. From then on it only reaps. When it dies, the kernel kills
// everything that runs in the lab, devices included.
package nsinit

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/jetbridge/jetbridge/test/lab/internal/layout"
)

// Files that the first process inherits: a pipe from which it reads a byte when
// it is in its cgroups, and the host's listeners.
const (
	goFD            = 3
	firstListenerFD = 4
)

// SupervisorListenerFD is the first of the host's listeners in the supervisor.
const SupervisorListenerFD = 3

// Run is the body of the hidden subcommand init; it returns when the supervisor
// ended. dir is the lab's folder.
func Run(dir string) error {
	// cgroup namespaces belong to threads: this one makes the mounts and starts
	// the supervisor, which inherits from it.
	runtime.LockOSThread()
	goPipe := os.NewFile(goFD, "go")
	if b, err := io.ReadAll(goPipe); err != nil || len(b) == 0 {
		return fmt.Errorf("cannot start: the launcher gave up: %w", err)
	}
	if err := goPipe.Close(); err != nil {
		return fmt.Errorf("cannot close pipe: %w", err)
	}
	lab := layout.Lab{Name: filepath.Base(dir), Dir: dir}
	c, err := lab.Load()
	if err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("cannot make cgroup namespace: %w", err)
	}
	if err := unix.Sethostname([]byte("lab-" + c.Name)); err != nil {
		return fmt.Errorf("cannot set host name: %w", err)
	}
	if err := mounts(c); err != nil {
		return err
	}
	if err := network(); err != nil {
		return err
	}
	return superviseAndReap(lab)
}

func mount(source, target, fstype string, flags uintptr, options string) error {
	if err := unix.Mount(source, target, fstype, flags, options); err != nil {
		return fmt.Errorf("cannot mount %s: %w", target, err)
	}
	return nil
}

const hardened = unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV

func mounts(c layout.Config) error {
	if err := mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := mount("proc", "/proc", "proc", hardened, ""); err != nil {
		return err
	}
	if err := mount("sysfs", "/sys", "sysfs", hardened, ""); err != nil {
		return err
	}
	if err := mountCgroups(c); err != nil {
		return err
	}
	return servicesRoot(c)
}

// mountCgroups mounts the hierarchies afresh: seen from the new namespace, the
// lab's own cgroups are their roots.
func mountCgroups(c layout.Config) error {
	const top = "/sys/fs/cgroup"
	if len(c.Cgroups) == 1 && c.Cgroups[0].Controllers == "" {
		return mount("cgroup2", top, "cgroup2", hardened, "")
	}
	if err := mount("tmpfs", top, "tmpfs", hardened, "mode=755"); err != nil {
		return err
	}
	for _, h := range c.Cgroups {
		dir, fstype, options := filepath.Join(top, h.Controllers), "cgroup", h.Controllers
		switch name, named := strings.CutPrefix(h.Controllers, "name="); {
		case h.Controllers == "":
			dir, fstype = filepath.Join(top, "unified"), "cgroup2"
		case named:
			dir, options = filepath.Join(top, name), "none,"+h.Controllers
		}
		if err := os.Mkdir(dir, 0o755); err != nil {
			return fmt.Errorf("cannot make folder for cgroups: %w", err)
		}
		if err := mount(fstype, dir, fstype, hardened, options); err != nil {
			return err
		}
	}
	return nil
}

// servicesRoot makes the root that all components run in: the services' tree
// with the lab's and the cache's folders at their own places. Nothing that a
// component writes to a fixed place reaches the host.
func servicesRoot(c layout.Config) error {
	lab := c.Lab()
	root := lab.Root()
	for _, dir := range []string{root, lab.Path("services", "upper"), lab.Path("services", "work"), lab.Path("postgres")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("cannot make folder: %w", err)
		}
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", c.ServicesTree, lab.Path("services", "upper"), lab.Path("services", "work"))
	if err := mount("overlay", root, "overlay", 0, options); err != nil {
		return err
	}
	in := func(path string) string { return filepath.Join(root, path) }
	if err := os.MkdirAll(in("/var/flightctl/k8s"), 0o755); err != nil {
		return fmt.Errorf("cannot make folder: %w", err)
	}
	for _, m := range []struct {
		source, target, fstype string
		flags                  uintptr
		options                string
	}{
		{"proc", "/proc", "proc", hardened, ""},
		{"/dev", "/dev", "", unix.MS_BIND, ""},
		// PostgreSQL's shared memory must not show up on the host.
		{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
		{"tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{lab.Dir, lab.Dir, "", unix.MS_BIND, ""},
		{c.CacheDir, c.CacheDir, "", unix.MS_BIND, ""},
		{c.CacheDir, c.CacheDir, "", unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY, ""},
		{lab.Path("postgres"), "/var/lib/postgresql", "", unix.MS_BIND, ""},
	} {
		// Only now: the state and the cache may lie below a folder that was
		// just mounted over, such as /tmp.
		if err := os.MkdirAll(in(m.target), 0o755); err != nil {
			return fmt.Errorf("cannot make folder: %w", err)
		}
		if err := mount(m.source, in(m.target), m.fstype, m.flags, m.options); err != nil {
			return err
		}
	}
	if err := os.WriteFile(in("/etc/hosts"), []byte("127.0.0.1 localhost lab-"+c.Name+"\n"), 0o644); err != nil {
		return fmt.Errorf("cannot write hosts: %w", err)
	}
	if err := os.MkdirAll(in("/run/secrets/kubernetes.io/serviceaccount"), 0o755); err != nil {
		return fmt.Errorf("cannot make folder: %w", err)
	}
	uid, gid, err := User(root, "postgres")
	if err != nil {
		return err
	}
	for _, dir := range []string{"/run/postgresql", "/var/lib/postgresql"} {
		if err := os.MkdirAll(in(dir), 0o755); err != nil {
			return fmt.Errorf("cannot make folder: %w", err)
		}
		if err := os.Chown(in(dir), uid, gid); err != nil {
			return fmt.Errorf("cannot give folder to postgres: %w", err)
		}
	}
	return nil
}

// User finds a user's numbers in the passwd file of a root.
func User(root, name string) (uid, gid int, err error) {
	b, err := os.ReadFile(filepath.Join(root, "etc/passwd"))
	if err != nil {
		return 0, 0, fmt.Errorf("cannot find user %s: %w", name, err)
	}
	for line := range strings.Lines(string(b)) {
		fields := strings.Split(line, ":")
		if len(fields) < 4 || fields[0] != name {
			continue
		}
		uid, err := strconv.Atoi(fields[2])
		if err != nil {
			return 0, 0, fmt.Errorf("cannot find user %s: %w", name, err)
		}
		gid, err := strconv.Atoi(fields[3])
		if err != nil {
			return 0, 0, fmt.Errorf("cannot find user %s: %w", name, err)
		}
		return uid, gid, nil
	}
	return 0, 0, fmt.Errorf("cannot find user %s: %w", name, fs.ErrNotExist)
}

func network() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("cannot find loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("cannot bring loopback up: %w", err)
	}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: layout.Bridge}}
	if err := netlink.LinkAdd(bridge); err != nil {
		return fmt.Errorf("cannot make bridge %s: %w", layout.Bridge, err)
	}
	address := &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(layout.Gateway), Mask: net.CIDRMask(24, 32)}}
	if err := netlink.AddrAdd(bridge, address); err != nil {
		return fmt.Errorf("cannot give bridge %s its address: %w", layout.Bridge, err)
	}
	if err := netlink.LinkSetUp(bridge); err != nil {
		return fmt.Errorf("cannot bring bridge %s up: %w", layout.Bridge, err)
	}
	return nil
}

// superviseAndReap starts the supervisor with the host's listeners, and returns
// when it ended. It reaps whatever else becomes its child.
func superviseAndReap(lab layout.Lab) error {
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("cannot find own program: %w", err)
	}
	files := []uintptr{0, 1, 2}
	for i := range layout.Relays() {
		files = append(files, uintptr(firstListenerFD+i))
	}
	supervisor, err := syscall.ForkExec(exe, []string{exe, "supervise", lab.Dir}, &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"},
		Files: files,
	})
	if err != nil {
		return fmt.Errorf("cannot start supervisor: %w", err)
	}
	for _, fd := range files[3:] {
		if err := unix.Close(int(fd)); err != nil {
			return fmt.Errorf("cannot close listener: %w", err)
		}
	}
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return fmt.Errorf("cannot wait for supervisor: %w", err)
		case pid == supervisor:
			return fmt.Errorf("supervisor ended: status %d, signal %v", status.ExitStatus(), status.Signal())
		}
	}
}
