package supervise

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/jetbridge/jetbridge/test/lab/internal/control"
)

// States of a component.
const (
	stateStarting = "starting"
	stateRunning  = "running"
	stateStopped  = "stopped"
	stateKilled   = "killed"
	stateFailed   = "failed" // ended by itself; it is started again soon
)

// Spec says how a component runs.
type Spec struct {
	Name string
	Path string // inside Chroot
	Args []string
	Env  []string
	// Chroot is the root that it runs in.
	Chroot string
	// UID and GID that it runs as.
	UID, GID uint32
	// Before prepares each start; may be nil.
	Before func(ctx context.Context, log *os.File) error
	// Ready tells whether it serves; asked until it gives no error.
	Ready func(ctx context.Context) error
}

// Limits of patience.
const (
	readyPoll    = 100 * time.Millisecond
	readyTimeout = 2 * time.Minute
	stopGrace    = 10 * time.Second
	firstBackoff = time.Second
	lastBackoff  = 10 * time.Second
)

// component supervises one process: once started, it is started again whenever
// it ends, until it is stopped.
type component struct {
	spec Spec
	log  string // file
	out  *slog.Logger

	op  sync.Mutex // one start or stop at a time; guards run
	run *run       // nil: not started

	mu     sync.Mutex // guards what follows
	status control.Component
}

// run is the time from a start to a stop.
type run struct {
	cancel context.CancelFunc // asks the process to end
	kill   context.CancelFunc // ends it at once
	done   chan struct{}
}

func newComponent(spec Spec, log string, out *slog.Logger) *component {
	c := &component{spec: spec, log: log, out: out}
	c.status = control.Component{Name: spec.Name, State: stateStopped, Since: time.Now()}
	return c
}

func (c *component) get() control.Component {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.status
}

func (c *component) set(state string, pid int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status.State != state {
		c.status.State, c.status.Since = state, time.Now()
	}
	c.status.PID = pid
	c.out.Info("component", "name", c.spec.Name, "state", state, "pid", pid)
}

// start returns when the component is ready. The run that it begins ends with
// base, or by stop.
func (c *component) start(ctx, base context.Context) error {
	c.op.Lock()
	if c.run == nil {
		soft, cancel := context.WithCancel(base)
		hard, kill := context.WithCancel(base)
		r := &run{cancel: cancel, kill: kill, done: make(chan struct{})}
		c.run = r
		go func() {
			defer close(r.done)
			defer kill()
			defer cancel()
			c.keep(soft, hard)
		}()
	}
	r := c.run
	c.op.Unlock()
	return c.waitReady(ctx, r)
}

func (c *component) waitReady(ctx context.Context, r *run) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
	var last error
	for {
		err := c.ready(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil {
			last = err // and not that time is up
		}
		select {
		case <-r.done:
			return fmt.Errorf("%s was stopped before it was ready", c.spec.Name)
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready (see its log %s): %w", c.spec.Name, c.log, cmp.Or(last, err))
		case <-tick.C:
		}
	}
}

func (c *component) ready(ctx context.Context) error {
	if s := c.get(); s.PID == 0 {
		return fmt.Errorf("it is %s", s.State)
	}
	if c.spec.Ready != nil {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		if err := c.spec.Ready(ctx); err != nil {
			return err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status.State == stateStarting {
		c.status.State, c.status.Since = stateRunning, time.Now()
	}
	return nil
}

// stop ends the component, at once if killed is set, and returns when it ended.
func (c *component) stop(killed bool) {
	c.op.Lock()
	defer c.op.Unlock()
	state := stateStopped
	if killed {
		state = stateKilled
	}
	if c.run == nil {
		return
	}
	if killed {
		c.run.kill()
	}
	c.run.cancel()
	<-c.run.done
	c.run = nil
	c.set(state, 0)
}

// keep runs the process again and again until soft ends.
func (c *component) keep(soft, hard context.Context) {
	backoff := firstBackoff
	for {
		begun := time.Now()
		err := c.once(soft, hard)
		if soft.Err() != nil || hard.Err() != nil {
			return
		}
		c.set(stateFailed, 0)
		c.out.Error("component ended", "name", c.spec.Name, "error", err)
		c.mu.Lock()
		c.status.Restarts++
		c.mu.Unlock()
		if time.Since(begun) > time.Minute {
			backoff = firstBackoff
		}
		timer := time.NewTimer(backoff)
		select {
		case <-soft.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		backoff = min(2*backoff, lastBackoff)
	}
}

// once runs the process until it ends.
func (c *component) once(soft, hard context.Context) error {
	log, err := os.OpenFile(c.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("cannot open log: %w", err)
	}
	defer log.Close()
	c.set(stateStarting, 0)
	if c.spec.Before != nil {
		if err := c.spec.Before(soft, log); err != nil {
			fmt.Fprintln(log, "cannot prepare:", err)
			return fmt.Errorf("cannot prepare: %w", err)
		}
	}
	cmd := c.spec.command(hard, log)
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(log, "cannot start:", err)
		return fmt.Errorf("cannot start: %w", err)
	}
	c.set(stateStarting, cmd.Process.Pid)
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		return fmt.Errorf("ended by itself: %w", err)
	case <-soft.Done():
	}
	// Not the group: PostgreSQL wants to end its own children.
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		c.out.Error("cannot stop component", "name", c.spec.Name, "error", err)
	}
	timer := time.NewTimer(stopGrace)
	defer timer.Stop()
	select {
	case err := <-ended:
		return err
	case <-timer.C:
		if err := cmd.Cancel(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			c.out.Error("cannot kill component", "name", c.spec.Name, "error", err)
		}
		return <-ended
	}
}

// command is the process, not yet started; it and its children are killed when ctx ends.
func (s Spec) command(ctx context.Context, log *os.File) *exec.Cmd {
	cmd := exec.CommandContext(ctx, s.Path, s.Args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	cmd.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "HOME=/root"}, s.Env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: s.Chroot, Setpgid: true}
	if s.UID != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: s.UID, Gid: s.GID}
	}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	return cmd
}
