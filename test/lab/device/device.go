// Package device runs the lab's edge devices: a Debian with systemd as PID 1,
// podman and flightctl-agent, as a process tree in namespaces and cgroups of
// its own.
//
// # Life
//
// [Boot] starts a device and returns when its systemd is up. [Device.Shutdown]
// is a clean poweroff, [Device.Kill] a power cut, and a reboot is one of these
// and another Boot. A device may also end by itself (systemctl poweroff or
// reboot inside): [Device.Wait] returns, and [Device.WantsReboot] tells which.
//
// # Files
//
// The root is an overlay: a tree from package rootfs below, shared by all
// devices and never written, and the device's changes in its state folder. /var
// is a copy of the tree's in the state folder, and no overlay, because podman's
// own storage is one. Everything persists over reboots.
//
// # Network
//
// A device has one link, eth0, to the lab's bridge. It can be pulled
// ([Device.Link]) or made bad ([Device.Loss], [Device.Delay]), and stays so over
// reboots.
//
// The caller is the lab's own first process: the bridge is in its network
// namespace, devices are its children, and the devices' cgroups are made below
// its own. It must not reap children that it did not start itself by wait4(-1)
// while a device runs, or Wait cannot tell how the device ended.
package device

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Options describe a device.
type Options struct {
	// Name is the host name: a DNS label.
	Name string
	// Tree is the base tree from package rootfs. It is never written.
	Tree string
	// Dir is the folder for the device's state, on a file system that can carry overlays.
	Dir string
	// Bridge is the bridge that the device is plugged into, in the current network namespace.
	Bridge string
	// Address is the device's address and its network.
	Address netip.Prefix
	// Gateway is the device's default route.
	Gateway netip.Addr
	// Cgroup is the name of the device's cgroup, made below the current one in every hierarchy.
	Cgroup string
	// Registry is a registry that podman reaches without TLS, as host:port; may be empty.
	Registry string
	// Log gets what the device writes to its console.
	Log io.Writer
	// Exec is the program to run again with the hidden subcommands device-init
	// (see Init) and device-exec (see ExecInit).
	Exec string
}

// What a name may be: it is a host name, and part of paths and cgroups.
var validName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

func (o Options) validate() error {
	switch {
	case !validName.MatchString(o.Name):
		return fmt.Errorf("invalid device name %q: must be a DNS label", o.Name)
	case !o.Address.IsValid() || !o.Gateway.IsValid():
		return fmt.Errorf("cannot use device %s without address and gateway", o.Name)
	case o.Bridge == "" || o.Exec == "":
		return fmt.Errorf("cannot use device %s without bridge and program", o.Name)
	case o.Cgroup == "" || strings.ContainsRune(o.Cgroup, '/'):
		return fmt.Errorf("invalid cgroup %q of device %s: must be one name", o.Cgroup, o.Name)
	}
	for _, path := range []string{o.Tree, o.Dir} {
		// The kernel takes these paths as part of a list of mount options.
		if !filepath.IsAbs(path) || strings.ContainsAny(path, ":,\\") {
			return fmt.Errorf("invalid path %q for device %s: must be absolute, without colon, comma and backslash", path, o.Name)
		}
	}
	return nil
}

// Device is a device that was booted.
type Device struct {
	o       Options
	cmd     *exec.Cmd
	pidfdMu sync.Mutex // guards pidfd
	pidfd   *os.File   // nil when the device is off
	cgroups []hierarchy
	link    *link
	console *console

	done     chan struct{} // closed when the device has ended and all of it is gone
	err      error         // why it ended; set before done is closed
	reboot   bool          // set before done is closed
	killOnce sync.Once
	killed   bool // set by Kill before the signal
}

// Boot starts the device, creates it if it is new, and returns when its systemd
// answers over D-Bus; services may still be starting. When ctx ends before
// that, the device is killed. Later ctx has no meaning.
func Boot(ctx context.Context, o Options) (*Device, error) {
	if err := Create(ctx, o); err != nil {
		return nil, err
	}
	d, err := start(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("cannot boot device %s: %w", o.Name, err)
	}
	if err := d.waitForSystemd(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot boot device %s: %w", o.Name, err), d.Kill())
	}
	return d, nil
}

// cleanupTime is how long the kernel may take to let go of a dead device.
const cleanupTime = 30 * time.Second

// start makes the device's parts and its first process.
func start(ctx context.Context, o Options) (_ *Device, err error) {
	ctx = context.WithoutCancel(ctx) // the device outlives it
	d := &Device{o: o, done: make(chan struct{})}
	started := false
	defer func() {
		if err != nil && !started {
			err = errors.Join(err, d.cleanUp(ctx))
		}
	}()
	if d.cgroups, err = makeCgroups(o.Cgroup); err != nil {
		return nil, err
	}
	if d.console, err = openConsole(o.Log); err != nil {
		return nil, err
	}
	config := bootConfig{Name: o.Name, Tree: o.Tree, Dir: o.Dir, Console: d.console.path, BootID: randomUUID()}
	for _, h := range d.cgroups {
		config.Cgroups = append(config.Cgroups, h.Controllers)
	}
	configRead, configWrite, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("cannot make pipe: %w", err)
	}
	defer configWrite.Close()
	errorRead, errorWrite, err := os.Pipe()
	if err != nil {
		configRead.Close()
		return nil, fmt.Errorf("cannot make pipe: %w", err)
	}
	defer errorRead.Close()

	d.cmd = exec.CommandContext(ctx, o.Exec, "device-init")
	d.cmd.Env, d.cmd.Dir = []string{}, "/"
	d.cmd.ExtraFiles = []*os.File{configRead, errorWrite} // initConfigFD, initErrorFD
	pidfd := -1
	d.cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true,
		PidFD:  &pidfd,
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC |
			syscall.CLONE_NEWNET | syscall.CLONE_NEWPID,
	}
	err = d.cmd.Start()
	configRead.Close()
	errorWrite.Close()
	if err != nil {
		return nil, fmt.Errorf("cannot start first process: %w", err)
	}
	if pidfd >= 0 {
		d.pidfd = os.NewFile(uintptr(pidfd), "device")
	}
	started = true
	noPidfd := d.pidfd == nil
	go d.reap(ctx)
	if noPidfd {
		return nil, errors.Join(errors.New("cannot get a pidfd: Linux 5.8 or newer is needed"), d.Kill())
	}
	if err := d.equip(ctx, config, configWrite, errorRead); err != nil {
		return nil, errors.Join(err, d.Kill())
	}
	return d, nil
}

// equip gives the new process what it needs to become a device, and waits until it has become systemd.
func (d *Device) equip(ctx context.Context, config bootConfig, configWrite, errorRead *os.File) error {
	for _, h := range d.cgroups {
		if err := join(h, d.PID()); err != nil {
			return err
		}
	}
	var err error
	if d.link, err = plug(ctx, d.o, d.PID()); err != nil {
		return err
	}
	if err := json.NewEncoder(configWrite).Encode(config); err != nil {
		return fmt.Errorf("cannot configure first process: %w", err)
	}
	if err := configWrite.Close(); err != nil {
		return fmt.Errorf("cannot configure first process: %w", err)
	}
	problem, err := io.ReadAll(errorRead)
	if err != nil {
		return fmt.Errorf("cannot hear from first process: %w", err)
	}
	if len(problem) > 0 {
		return errors.New(string(problem))
	}
	return nil
}

// waitForSystemd polls until systemd is up and D-Bus answers.
func (d *Device) waitForSystemd(ctx context.Context) error {
	const interval = 50 * time.Millisecond
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	state := "not reached"
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("cannot reach systemd (it is %s): %w", state, ctx.Err())
		case <-d.done:
			return fmt.Errorf("it ended: %w", cmpErr(d.err, errors.New("by itself")))
		case <-ticker.C:
		}
		// A look at two sockets costs nothing; a command in the device does.
		if !d.hasFile("/run/dbus/system_bus_socket") || !d.hasFile("/run/systemd/private") {
			continue
		}
		// busctl needs D-Bus itself; systemctl alone would be content with systemd's own socket.
		var out, problem strings.Builder
		code, err := d.Exec(ctx, ExecOptions{
			Args: []string{"/bin/sh", "-c", `busctl --quiet --timeout=5 call org.freedesktop.systemd1 /org/freedesktop/systemd1 ` +
				`org.freedesktop.DBus.Peer Ping && systemctl --quiet is-active basic.target && exec systemctl is-system-running`},
			Stdout: &out, Stderr: &problem,
		})
		if ctx.Err() != nil {
			continue // to say what it was waiting for
		}
		if err != nil {
			return err
		}
		state = strings.TrimSpace(out.String())
		switch state {
		case "running", "degraded", "starting":
			return nil
		case "":
			state = fmt.Sprintf("not ready, exit code %d: %s", code, strings.TrimSpace(problem.String()))
		}
	}
}

// hasFile tells whether a path without symlinks exists in the device.
func (d *Device) hasFile(path string) bool {
	_, err := os.Lstat(fmt.Sprintf("/proc/%d/root%s", d.PID(), path))
	return err == nil
}

func cmpErr(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// handle returns a copy of the device's pidfd, which the caller closes: the
// original goes with the device, at any moment.
func (d *Device) handle() (*os.File, error) {
	d.pidfdMu.Lock()
	defer d.pidfdMu.Unlock()
	if d.pidfd == nil {
		return nil, fmt.Errorf("device %s is off", d.o.Name)
	}
	fd, err := unix.FcntlInt(d.pidfd.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot refer to device %s: %w", d.o.Name, err)
	}
	return os.NewFile(uintptr(fd), "device"), nil
}

// Name is the device's name.
func (d *Device) Name() string { return d.o.Name }

// PID is the process ID of the device's systemd, seen from the caller.
func (d *Device) PID() int { return d.cmd.Process.Pid }

// Done is closed when the device has ended.
func (d *Device) Done() <-chan struct{} { return d.done }

func (d *Device) ended() bool {
	select {
	case <-d.done:
		return true
	default:
		return false
	}
}

// Wait returns when the device has ended and its processes, cgroups and link
// are gone. The error is nil after a poweroff, a reboot and a Kill. Any number
// of callers may wait.
func (d *Device) Wait() error {
	<-d.done
	return d.err
}

// WantsReboot tells, once Wait has returned, whether the device ended to be
// booted again, as by systemctl reboot.
func (d *Device) WantsReboot() bool {
	return d.ended() && d.reboot
}

// Shutdown powers the device off through its systemd, and returns when it is
// off. When ctx ends before that, the device goes on shutting down; Kill ends it.
func (d *Device) Shutdown(ctx context.Context) error {
	// systemd's signal for poweroff.target, SIGRTMIN+4 in the numbering of the C library.
	const poweroff = syscall.Signal(34 + 4)
	if err := d.cmd.Process.Signal(poweroff); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("cannot shut down device %s: %w", d.o.Name, err)
	}
	select {
	case <-d.done:
		return d.err
	case <-ctx.Done():
		return fmt.Errorf("cannot shut down device %s: %w", d.o.Name, ctx.Err())
	}
}

// Kill is a power cut, and returns when the device is off. What the device had
// written without a sync is still there afterwards: the kernel is the host's.
func (d *Device) Kill() error {
	var err error
	d.killOnce.Do(func() {
		d.killed = true
		// The kernel kills all processes of a PID namespace with its first one.
		err = d.cmd.Process.Kill()
	})
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("cannot kill device %s: %w", d.o.Name, err)
	}
	return d.Wait()
}

// reap waits for the device's end, and removes what is left of it.
func (d *Device) reap(ctx context.Context) {
	defer close(d.done)
	waitErr := d.cmd.Wait()
	// Settles whether Kill came first, and keeps it from signalling later.
	d.killOnce.Do(func() {})
	var exit *exec.ExitError
	if errors.As(waitErr, &exit) {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			// reboot(2) in a PID namespace ends its first process by one of two signals.
			switch status.Signal() {
			case syscall.SIGHUP:
				d.reboot, waitErr = true, nil
			case syscall.SIGINT:
				waitErr = nil
			case syscall.SIGKILL:
				if d.killed {
					waitErr = nil
				}
			}
		}
	}
	if waitErr != nil {
		waitErr = fmt.Errorf("device %s ended: %w", d.o.Name, waitErr)
	}
	d.err = errors.Join(waitErr, d.cleanUp(ctx))
}

// cleanUp removes all of the device but its state folder.
func (d *Device) cleanUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, cleanupTime)
	defer cancel()
	err := removeCgroups(ctx, d.cgroups)
	if d.link != nil {
		err = errors.Join(err, d.link.unplug())
	}
	if d.console != nil {
		err = errors.Join(err, d.console.close())
	}
	d.pidfdMu.Lock()
	defer d.pidfdMu.Unlock()
	if d.pidfd != nil {
		err = errors.Join(err, d.pidfd.Close())
		d.pidfd = nil
	}
	if err != nil {
		return fmt.Errorf("cannot clean up after device %s: %w", d.o.Name, err)
	}
	return nil
}
