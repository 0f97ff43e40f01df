package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jetbridge/jetbridge/test/lab/internal/cgroup"
	"github.com/jetbridge/jetbridge/test/lab/internal/control"
	"github.com/jetbridge/jetbridge/test/lab/internal/layout"
)

// launchTimeout is how long the namespaces and the supervisor may take.
const launchTimeout = 30 * time.Second

// launch starts the lab's first process and returns when its supervisor listens.
// The process outlives the caller.
func launch(ctx context.Context, c *layout.Config, listeners []*os.File) (err error) {
	lab := c.Lab()
	if c.Cgroups, err = cgroup.Plan("jetbridge-lab-" + c.Name); err != nil {
		return err
	}
	// Saved before anything is made, so that it can be cleaned whatever happens.
	if err := c.Save(); err != nil {
		return err
	}
	if err := cgroup.Make(c.Cgroups); err != nil {
		return err
	}
	program := filepath.Join(lab.Bin(), "lab")
	if err := copySelf(program); err != nil {
		return err
	}
	log, err := os.OpenFile(lab.Log("lab"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("cannot open log: %w", err)
	}
	defer log.Close()
	goRead, goWrite, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("cannot make pipe: %w", err)
	}
	defer goWrite.Close()
	// It outlives the caller and its ctx.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), program, "init", lab.Dir)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	cmd.ExtraFiles = append([]*os.File{goRead}, listeners...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true,
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET |
			syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
	}
	err = cmd.Start()
	goRead.Close()
	if err != nil {
		return fmt.Errorf("cannot start the lab's first process: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	if err := handOver(c, cmd.Process.Pid, goWrite); err != nil {
		return errors.Join(err, cmd.Process.Kill())
	}
	ctx, cancel := context.WithTimeout(ctx, launchTimeout)
	defer cancel()
	client := control.NewClient(lab)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err = client.Status(ctx); err == nil {
			return nil
		}
		select {
		case err := <-ended:
			return errors.Join(fmt.Errorf("the lab's first process ended:\n%s", tail(lab.Log("lab"), 5)), err)
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("the lab's supervisor does not answer: %w", err), cmd.Process.Kill())
		case <-tick.C:
		}
	}
}

// handOver puts the process into the cgroups, writes down who it is, and lets it go on.
func handOver(c *layout.Config, pid int, goWrite io.Writer) error {
	if err := cgroup.Join(c.Cgroups, pid); err != nil {
		return err
	}
	start, err := startTime(pid)
	if err != nil {
		return err
	}
	c.Init = layout.Process{PID: pid, Start: start}
	if err := c.Save(); err != nil {
		return err
	}
	if _, err := goWrite.Write([]byte{1}); err != nil {
		return fmt.Errorf("cannot start the lab's first process: %w", err)
	}
	if closer, ok := goWrite.(io.Closer); ok {
		if err := closer.Close(); err != nil {
			return fmt.Errorf("cannot start the lab's first process: %w", err)
		}
	}
	return nil
}

// copySelf keeps the running program for the lab: the one in the checkout may be
// built anew while the lab runs.
func copySelf(to string) error {
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("cannot find own program: %w", err)
	}
	b, err := os.ReadFile(exe)
	if err != nil {
		return fmt.Errorf("cannot read own program: %w", err)
	}
	return layout.WriteFile(to, b, 0o755)
}

// listen opens the host's loopback listeners, on free ports, and notes them.
func listen(ctx context.Context, c *layout.Config) ([]*os.File, error) {
	c.Ports = map[string]int{}
	var files []*os.File
	for _, r := range layout.Relays() {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
		if err != nil {
			return files, fmt.Errorf("cannot listen for %s: %w", r.Name, err)
		}
		tcp, ok := l.(*net.TCPListener)
		if !ok {
			return files, fmt.Errorf("cannot hand over a %T", l)
		}
		file, err := tcp.File()
		if err != nil {
			return files, fmt.Errorf("cannot hand over listener of %s: %w", r.Name, err)
		}
		files = append(files, file)
		address, ok := tcp.Addr().(*net.TCPAddr)
		if !ok {
			return files, fmt.Errorf("cannot read address %s", tcp.Addr())
		}
		c.Ports[r.Name] = address.Port
		if err := l.Close(); err != nil { // the file is the listener from now on
			return files, fmt.Errorf("cannot hand over listener of %s: %w", r.Name, err)
		}
	}
	return files, nil
}

// startTime is when a process started, in clock ticks after the kernel's boot.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, fmt.Errorf("cannot look at process %d: %w", pid, err)
	}
	return parseStartTime(string(b))
}

// parseStartTime reads the 22nd field of /proc/PID/stat; the second may contain anything.
func parseStartTime(stat string) (uint64, error) {
	end := strings.LastIndexByte(stat, ')')
	fields := strings.Fields(stat[end+1:])
	if end < 0 || len(fields) < 20 {
		return 0, fmt.Errorf("cannot read process status %q", stat)
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("cannot read process status: %w", err)
	}
	return start, nil
}

// isZombie tells from /proc/PID/stat whether a process has ended, and only
// waits for its parent to take note.
func isZombie(stat string) bool {
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	return len(fields) > 0 && fields[0] == "Z"
}

// alive tells whether that very process runs.
func alive(p layout.Process) bool {
	if p.PID == 0 {
		return false
	}
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(p.PID) + "/stat")
	if err != nil || isZombie(string(stat)) {
		return false
	}
	start, err := parseStartTime(string(stat))
	return err == nil && start == p.Start
}

// tail is the end of a log.
func tail(path string, lines int) string {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
