package device

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// identity is what a device keeps for its life; its file is written last, so a
// device folder without it is one whose creation was interrupted.
type identity struct {
	Tree      string `json:"tree"`
	MachineID string `json:"machineID"`
}

func identityFile(dir string) string { return filepath.Join(dir, "identity.json") }

// Create makes the device's state folder, unless it is there. Boot and
// Provision call it, so there is no need to.
func Create(ctx context.Context, o Options) error {
	if err := o.validate(); err != nil {
		return err
	}
	b, err := os.ReadFile(identityFile(o.Dir))
	if err == nil {
		var id identity
		if err := json.Unmarshal(b, &id); err != nil {
			return fmt.Errorf("cannot read identity of device %s: %w", o.Name, err)
		}
		if id.Tree != o.Tree {
			return fmt.Errorf("cannot use device %s on tree %s: it was made from %s", o.Name, o.Tree, id.Tree)
		}
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot read identity of device %s: %w", o.Name, err)
	}
	id := identity{Tree: o.Tree, MachineID: randomID()}
	if err := create(ctx, o, id); err != nil {
		return fmt.Errorf("cannot create device %s: %w", o.Name, err)
	}
	return nil
}

func create(ctx context.Context, o Options, id identity) error {
	if err := os.MkdirAll(o.Dir, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"upper", "work", "var", "root"} {
		path := filepath.Join(o.Dir, name)
		if err := os.RemoveAll(path); err != nil {
			return err
		}
		if name == "var" {
			continue
		}
		if err := os.Mkdir(path, 0o755); err != nil {
			return err
		}
	}
	cp := exec.CommandContext(ctx, "cp", "-a", "--reflink=auto", filepath.Join(o.Tree, "var"), filepath.Join(o.Dir, "var"))
	if out, err := cp.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot copy /var: %w: %s", err, bytes.TrimSpace(out))
	}
	if err := insideOff(ctx, o, func() error { return settings(o, id).write() }); err != nil {
		return err
	}
	b, err := json.Marshal(id)
	if err != nil {
		return err
	}
	return writeAtomically(identityFile(o.Dir), append(b, '\n'))
}

// files is a set of files to write into a root.
type files struct {
	Regular  map[string]string // path to content; mode 0644
	Symlinks map[string]string // path to target
}

// settings are the files that make the base tree this device.
func settings(o Options, id identity) files {
	f := files{
		Regular: map[string]string{
			"/etc/hostname":    o.Name + "\n",
			"/etc/hosts":       "127.0.0.1 localhost " + o.Name + "\n::1 localhost\n",
			"/etc/machine-id":  id.MachineID + "\n",
			"/etc/resolv.conf": "# there is no DNS server in the lab\n",
			// Tests read the journal over reboots.
			"/etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=persistent\nSystemMaxUse=500M\n",
			"/etc/systemd/system.conf.d/lab.conf":   "[Manager]\nDefaultEnvironment=PODMAN_IGNORE_CGROUPSV1_WARNING=1\n",
		},
		Symlinks: map[string]string{
			"/etc/systemd/system/sockets.target.wants/podman.socket": "/usr/lib/systemd/system/podman.socket",
		},
	}
	if o.Registry != "" {
		f.Regular["/etc/containers/registries.conf.d/lab.conf"] = registries(o.Registry)
	}
	for _, unit := range masked {
		f.Symlinks["/etc/systemd/system/"+unit] = "/dev/null"
	}
	return f
}

// registries lets podman pull from the lab's registry by plain HTTP. It also
// stands for Docker Hub, which a lab does not reach, so that manifests name
// the images that they would name elsewhere.
func registries(lab string) string {
	return fmt.Sprintf(`[[registry]]
location = %[1]q
insecure = true

[[registry]]
prefix = "docker.io"
location = %[1]q
insecure = true
`, lab)
}

// masked units belong to the hardware or the whole kernel, or would do
// something by themselves in the middle of a test.
var masked = [...]string{
	"console-getty.service", "getty.target", "getty@.service", "serial-getty@.service",
	"apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
	"fstrim.timer", "podman-auto-update.timer",
	"systemd-networkd-wait-online.service", "systemd-udevd.service", "systemd-udevd-control.socket",
	"systemd-udevd-kernel.socket", "systemd-udev-trigger.service", "systemd-modules-load.service",
	"systemd-binfmt.service", "proc-sys-fs-binfmt_misc.automount", "proc-sys-fs-binfmt_misc.mount",
	"sys-kernel-config.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount", "sys-fs-fuse-connections.mount",
	"dev-hugepages.mount", "dev-mqueue.mount",
}

// write puts the files below the current root, and replaces what is there.
func (f files) write() error {
	for path, content := range f.Regular {
		if err := replace(path, func() error { return os.WriteFile(path, []byte(content), 0o644) }); err != nil {
			return err
		}
	}
	for path, target := range f.Symlinks {
		if err := replace(path, func() error { return os.Symlink(target, path) }); err != nil {
			return err
		}
	}
	return nil
}

func replace(path string, write func() error) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("cannot make folder: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot replace file: %w", err)
	}
	if err := write(); err != nil {
		return fmt.Errorf("cannot write file: %w", err)
	}
	return nil
}

// insideOff calls f with the root of a device that is off as its root. Only the
// goroutine that f runs on is inside.
func insideOff(ctx context.Context, o Options, f func() error) error {
	return onOwnThread(func() (err error) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
			return fmt.Errorf("cannot make mount namespace: %w", err)
		}
		if err := mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return err
		}
		if err := mountRoot(o.Tree, o.Dir); err != nil {
			return err
		}
		outside, err := os.Open("/")
		if err != nil {
			return fmt.Errorf("cannot open root: %w", err)
		}
		defer outside.Close()
		root := rootDir(o.Dir)
		if err := mount("proc", filepath.Join(root, "proc"), "proc", unix.MS_NOSUID|unix.MS_NOEXEC|unix.MS_NODEV, ""); err != nil {
			return err
		}
		if err := chroot(root); err != nil {
			return err
		}
		err = f()
		// Unmounted here and not when the thread dies: two mounts of one
		// overlay must not overlap in time.
		return errors.Join(err, leaveOff(outside, root))
	})
}

func leaveOff(outside *os.File, root string) error {
	if err := unix.Fchdir(int(outside.Fd())); err != nil {
		return fmt.Errorf("cannot leave device's root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("cannot leave device's root: %w", err)
	}
	for _, dir := range []string{"proc", "var", "."} {
		if err := unix.Unmount(filepath.Join(root, dir), 0); err != nil {
			return fmt.Errorf("cannot unmount device's root: %w", err)
		}
	}
	return nil
}

func chroot(root string) error {
	if err := unix.Chroot(root); err != nil {
		return fmt.Errorf("cannot enter device's root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("cannot enter device's root: %w", err)
	}
	return nil
}

// insideOn calls f with the root of a running device as its root. Only the
// goroutine that f runs on is inside.
func (d *Device) insideOn(ctx context.Context, f func() error) error {
	handle, err := d.handle()
	if err != nil {
		return err
	}
	defer handle.Close()
	return onOwnThread(func() error {
		if err := ctx.Err(); err != nil {
			return err
		}
		// A thread that shares its root with others may not change its mount namespace.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("cannot separate thread: %w", err)
		}
		if err := unix.Setns(int(handle.Fd()), unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("cannot enter device %s: %w", d.o.Name, err)
		}
		return f()
	})
}

// onOwnThread calls f on a thread that ends with it, whatever f does to it.
func onOwnThread(f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		result <- f()
	}()
	return <-result
}

func writeAtomically(path string, content []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, content, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// randomID is 128 random bits in the form of a machine ID.
func randomID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return hex.EncodeToString(b[:])
}

// randomUUID is 128 random bits in the form of a boot ID.
func randomUUID() string {
	s := randomID()
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}
