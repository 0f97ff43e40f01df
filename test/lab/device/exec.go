package device

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// ExecOptions say what to run in a device. An *os.File is handed to the command
// itself; other readers and writers are copied. A Stdin that is neither nil nor
// a file should come to its end when the command does.
type ExecOptions struct {
	Args   []string
	Env    []string // besides the clean environment that every command gets
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
}

// enterConfig is what Exec tells ExecInit.
type enterConfig struct {
	Cgroups []hierarchy `json:"cgroups"`
	Env     []string    `json:"env"`
}

// enterFD is the device's pidfd in ExecInit.
const enterFD = 3

// cancelSignal makes ExecInit kill the command. A parent-death signal would be
// simpler, but the command has no parent in its PID namespace.
const cancelSignal = syscall.SIGUSR1

// Exit codes of a command that could not be run, as shells use them.
const (
	codeCannotEnter = 125
	codeCannotRun   = 126
	codeNotFound    = 127
)

// execEnv is the environment of every command.
func execEnv() []string {
	return []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/root", "TERM=xterm", "LANG=C.UTF-8", "PODMAN_IGNORE_CGROUPSV1_WARNING=1",
	}
}

// Exec runs a command as root in all of the device's namespaces and in its
// cgroups, and returns its exit code: 128 plus the signal's number if a signal
// ended it, 127 if there is no such command. When ctx ends, the command is killed.
func (d *Device) Exec(ctx context.Context, e ExecOptions) (exitCode int, err error) {
	if len(e.Args) == 0 {
		return 0, errors.New("cannot run a command without a name")
	}
	handle, err := d.handle()
	if err != nil {
		return 0, fmt.Errorf("cannot run %s: %w", e.Args[0], err)
	}
	defer handle.Close()
	config, err := json.Marshal(enterConfig{Cgroups: d.cgroups, Env: append(execEnv(), e.Env...)})
	if err != nil {
		return 0, fmt.Errorf("cannot run %s: %w", e.Args[0], err)
	}
	cmd := exec.CommandContext(ctx, d.o.Exec, append([]string{"device-exec", string(config)}, e.Args...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = e.Stdin, e.Stdout, e.Stderr
	cmd.Env = execEnv()
	cmd.ExtraFiles = []*os.File{handle}
	cmd.Cancel = func() error { return cmd.Process.Signal(cancelSignal) }
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil && err != nil:
		return 0, fmt.Errorf("cannot run %s on device %s: %w", e.Args[0], d.o.Name, ctx.Err())
	case errors.As(err, &exit) && exit.Exited():
		return exit.ExitCode(), nil
	case errors.As(err, &exit):
		// The helper itself was killed: with the device, whose cgroups it is in.
		return 128 + int(exit.Sys().(syscall.WaitStatus).Signal()), nil
	case err != nil:
		return 0, fmt.Errorf("cannot run %s on device %s: %w", e.Args[0], d.o.Name, err)
	}
	return 0, nil
}

// ExecInit is the body of the hidden subcommand device-exec, by which Exec
// enters a device; args are those after the subcommand's name. It returns the
// exit code for the process.
func ExecInit(args []string) int {
	code, err := enter(args)
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab device-exec:", err)
	}
	return code
}

func enter(args []string) (int, error) {
	if len(args) < 2 {
		return codeCannotEnter, errors.New("a configuration and a command are needed")
	}
	var c enterConfig
	if err := json.Unmarshal([]byte(args[0]), &c); err != nil {
		return codeCannotEnter, fmt.Errorf("cannot read configuration: %w", err)
	}
	// The command is forked from this thread, which alone enters the device.
	runtime.LockOSThread()
	for _, h := range c.Cgroups {
		if err := joinExecCgroup(h, os.Getpid()); err != nil {
			return codeCannotEnter, err
		}
	}
	if err := dropCapabilities(bootConfig{}); err != nil {
		return codeCannotEnter, err
	}
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return codeCannotEnter, fmt.Errorf("cannot separate thread: %w", err)
	}
	const all = unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWCGROUP
	if err := unix.Setns(enterFD, all); err != nil {
		return codeCannotEnter, fmt.Errorf("cannot enter namespaces: %w", err)
	}
	if err := unix.Close(enterFD); err != nil {
		return codeCannotEnter, fmt.Errorf("cannot close device: %w", err)
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, cancelSignal)
	defer signal.Stop(signals)
	// Looked up in the device, by the PATH of Exec's clean environment.
	cmd := exec.CommandContext(context.Background(), args[1], args[2:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env, cmd.Dir = c.Env, "/"
	if err := cmd.Start(); err != nil {
		if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
			return codeNotFound, err
		}
		return codeCannotRun, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			if s == cancelSignal {
				s = syscall.SIGKILL
			}
			if err := cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
				return codeCannotRun, fmt.Errorf("cannot pass on signal: %w", err)
			}
		case err := <-ended:
			status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
			switch {
			case ok && status.Signaled():
				return 128 + int(status.Signal()), nil
			case ok && status.Exited():
				return status.ExitStatus(), nil
			}
			return codeCannotRun, err
		}
	}
}
