package device

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// bootConfig goes from Boot to Init through a pipe.
type bootConfig struct {
	Name    string   `json:"name"`
	Tree    string   `json:"tree"`
	Dir     string   `json:"dir"`
	Console string   `json:"console"` // a terminal
	BootID  string   `json:"bootID"`
	Cgroups []string `json:"cgroups"` // hierarchy.Controllers of each hierarchy
}

// What Boot hands to Init as open files.
const (
	initConfigFD = 3 // bootConfig as JSON; its end says that cgroups and network are there
	initErrorFD  = 4 // why the device cannot boot; closed by the exec
)

// Init is the device's first process until it becomes the device's systemd: it
// makes the root file system from what Boot tells it, and executes systemd in
// it. It runs in the namespaces that Boot made, and does not return on success.
//
// It is the body of the hidden subcommand device-init; no argument is defined.
func Init(args []string) error {
	// Namespaces belong to threads; the one that executes systemd keeps its own.
	runtime.LockOSThread()
	syscall.CloseOnExec(initErrorFD)
	report := os.NewFile(initErrorFD, "error pipe")
	err := boot(args)
	if _, werr := fmt.Fprint(report, err); werr != nil {
		return fmt.Errorf("%w (and cannot report it: %w)", err, werr)
	}
	return err
}

func boot(args []string) error {
	if len(args) != 0 {
		return fmt.Errorf("unexpected arguments %q", args)
	}
	in := os.NewFile(initConfigFD, "config pipe")
	var c bootConfig
	if err := json.NewDecoder(in).Decode(&c); err != nil {
		return fmt.Errorf("cannot read boot configuration: %w", err)
	}
	if err := in.Close(); err != nil {
		return fmt.Errorf("cannot close boot configuration: %w", err)
	}
	// Only now, for the cgroups that it is in become the roots that it sees.
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("cannot make cgroup namespace: %w", err)
	}
	if err := unix.Sethostname([]byte(c.Name)); err != nil {
		return fmt.Errorf("cannot set host name: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("cannot make mounts private: %w", err)
	}
	if err := mountRoot(c.Tree, c.Dir); err != nil {
		return err
	}
	if err := os.Chdir(rootDir(c.Dir)); err != nil {
		return fmt.Errorf("cannot enter root: %w", err)
	}
	for _, step := range []func(bootConfig) error{mountAPI, mountDev, mountCgroups, pivot, dropCapabilities} {
		if err := step(c); err != nil {
			return err
		}
	}
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "container=lab", "TERM=dumb", "SYSTEMD_COLORS=0"}
	if len(c.Cgroups) > 1 {
		// systemd 257 wants to be told twice that these cgroups are still meant.
		env = append(env, "SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1",
			"SYSTEMD_PROC_CMDLINE=systemd.unified_cgroup_hierarchy=0 SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1")
	} else {
		env = append(env, "SYSTEMD_PROC_CMDLINE=systemd.unified_cgroup_hierarchy=1")
	}
	const systemd = "/lib/systemd/systemd"
	return fmt.Errorf("cannot execute %s: %w", systemd, unix.Exec(systemd, []string{systemd}, env))
}

// mount mounts and names the target in its error.
func mount(source, target, fstype string, flags uintptr, options string) error {
	if err := unix.Mount(source, target, fstype, flags, options); err != nil {
		return fmt.Errorf("cannot mount %s: %w", target, err)
	}
	return nil
}

// bindReadOnly makes a path of the root read-only, and keeps the other flags.
func bindReadOnly(path string, flags uintptr) error {
	if err := mount(path, path, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return mount("", path, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|flags, "")
}

// mountAPI mounts proc, sysfs, /run and /tmp. What belongs to the whole kernel
// is read-only: a device is root, but the host is not its own.
func mountAPI(c bootConfig) error {
	const hardened = unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV
	const bootID = "run/boot-id"
	steps := []func() error{
		func() error { return mount("proc", "proc", "proc", hardened, "") },
		func() error { return bindReadOnly("proc/sys", hardened) },
		// The network's part is the device's own.
		func() error { return mount("proc/sys/net", "proc/sys/net", "", unix.MS_BIND, "") },
		func() error {
			return mount("", "proc/sys/net", "", unix.MS_BIND|unix.MS_REMOUNT|hardened, "")
		},
		func() error {
			err := bindReadOnly("proc/sysrq-trigger", hardened)
			if errors.Is(err, fs.ErrNotExist) {
				return nil // a kernel without it
			}
			return err
		},
		func() error { return mount("sysfs", "sys", "sysfs", hardened|unix.MS_RDONLY, "") },
		func() error { return mount("tmpfs", "run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755") },
		func() error { return mount("tmpfs", "tmp", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777") },
		// All devices share the kernel and so its boot ID; each boot of a device must have its own.
		func() error { return os.WriteFile(bootID, []byte(c.BootID+"\n"), 0o444) },
		func() error { return mount(bootID, "proc/sys/kernel/random/boot_id", "", unix.MS_BIND, "") },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func mountDev(c bootConfig) error {
	if err := mount("tmpfs", "dev", "tmpfs", unix.MS_NOSUID, "mode=755"); err != nil {
		return err
	}
	for _, dir := range []string{"dev/pts", "dev/shm", "dev/net", "dev/mqueue"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return fmt.Errorf("cannot make /%s: %w", dir, err)
		}
	}
	for _, node := range []string{"null", "zero", "full", "random", "urandom", "tty", "fuse", "net/tun"} {
		source := filepath.Join("/dev", node)
		if _, err := os.Stat(source); err != nil {
			if os.IsNotExist(err) {
				continue // fuse and tun are not on every host
			}
			return fmt.Errorf("cannot look for device node: %w", err)
		}
		if err := bindFile(source, filepath.Join("dev", node)); err != nil {
			return err
		}
	}
	if err := bindFile(c.Console, "dev/console"); err != nil {
		return err
	}
	for link, target := range map[string]string{
		"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1",
		"stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, filepath.Join("dev", link)); err != nil {
			return fmt.Errorf("cannot make /dev/%s: %w", link, err)
		}
	}
	const hardened = unix.MS_NOSUID | unix.MS_NOEXEC
	if err := mount("devpts", "dev/pts", "devpts", hardened, "newinstance,ptmxmode=0666,mode=620,gid=5"); err != nil {
		return err
	}
	if err := mount("mqueue", "dev/mqueue", "mqueue", hardened|unix.MS_NODEV, ""); err != nil {
		return err
	}
	return mount("tmpfs", "dev/shm", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777")
}

func bindFile(source, target string) error {
	if err := os.WriteFile(target, nil, 0o666); err != nil {
		return fmt.Errorf("cannot make /%s: %w", target, err)
	}
	return mount(source, target, "", unix.MS_BIND, "")
}

// mountCgroups mounts the cgroup trees afresh, so that the device sees its own
// cgroups as their roots.
func mountCgroups(c bootConfig) error {
	const flags = unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV
	const top = "sys/fs/cgroup"
	if len(c.Cgroups) == 1 && c.Cgroups[0] == "" {
		return mount("cgroup2", top, "cgroup2", flags, "")
	}
	if err := mount("tmpfs", top, "tmpfs", flags, "mode=755"); err != nil {
		return err
	}
	for _, controllers := range c.Cgroups {
		dir, fstype, options := filepath.Join(top, controllers), "cgroup", controllers
		switch name, named := strings.CutPrefix(controllers, "name="); {
		case controllers == "":
			dir, fstype = filepath.Join(top, "unified"), "cgroup2"
		case named:
			dir, options = filepath.Join(top, name), "none,"+controllers
		}
		if err := os.Mkdir(dir, 0o755); err != nil {
			return fmt.Errorf("cannot make folder for cgroups: %w", err)
		}
		if err := mount(fstype, dir, fstype, flags, options); err != nil {
			return err
		}
		if parts := strings.Split(controllers, ","); len(parts) > 1 {
			for _, part := range parts {
				if err := os.Symlink(controllers, filepath.Join(top, part)); err != nil {
					return fmt.Errorf("cannot name cgroup controller: %w", err)
				}
			}
		}
	}
	return nil
}

// pivot makes the current folder the root, and forgets the lab's.
func pivot(bootConfig) error {
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("cannot pivot root: %w", err)
	}
	// The old root is now stacked on the new one.
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("cannot leave old root: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return fmt.Errorf("cannot enter new root: %w", err)
	}
	// Containers with mount propagation need what a booted system has: a shared root.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("cannot share root: %w", err)
	}
	return nil
}

// dropCapabilities takes what would reach beyond the device: the host's clock and its kernel modules.
func dropCapabilities(bootConfig) error {
	for _, capability := range []uintptr{unix.CAP_SYS_TIME, unix.CAP_SYS_MODULE} {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0); err != nil {
			return fmt.Errorf("cannot drop capability %d: %w", capability, err)
		}
	}
	return nil
}

// rootDir is where the device's root is mounted, in its own mount namespace.
func rootDir(dir string) string { return filepath.Join(dir, "root") }

// mountRoot puts the root together: the shared tree below, what the device
// changed above. /var is a plain folder, for podman's overlays cannot be on one.
func mountRoot(tree, dir string) error {
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", tree, filepath.Join(dir, "upper"), filepath.Join(dir, "work"))
	if err := mount("overlay", rootDir(dir), "overlay", 0, options); err != nil {
		return err
	}
	return mount(filepath.Join(dir, "var"), filepath.Join(rootDir(dir), "var"), "", unix.MS_BIND, "")
}
