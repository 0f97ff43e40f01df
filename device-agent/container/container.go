// Package container is what the units of a container run besides podman: the
// wait before a restart, the record of each end, init containers and the stop
// with the right grace period. It works with the agent's daemon stopped.
package container

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/jetbridge/jetbridge/device-agent/journal"
	"github.com/jetbridge/jetbridge/device-agent/lifecycle"
	"github.com/jetbridge/jetbridge/device-agent/podenv"
	"github.com/jetbridge/jetbridge/device-agent/unit"
	"github.com/jetbridge/jetbridge/shared/report"
)

const (
	firstDelay = 10 * time.Second
	maxDelay   = 5 * time.Minute
	// stable is how long a container runs until its back-off begins anew.
	stable = 10 * time.Minute
	// maxMessage is the kubelet's limit of a termination message, in bytes.
	maxMessage = 4096
)

// Helper serves one container.
type Helper struct {
	Store *journal.Store
	// Podman is the program's path.
	Podman string
	BootID string
	Now    func() time.Time
	// After is time.After.
	After func(time.Duration) <-chan time.Time
	UID   types.UID
	// Container is its name in the pod, Name its name in podman.
	Container, Name string
}

// NextDelay is the back-off after a run of this length; the first restart is
// at once, as the kubelet's.
func NextDelay(previous time.Duration, attempts int32, ran time.Duration) time.Duration {
	switch {
	case ran >= stable || attempts <= 1 && previous == 0 && ran > 0:
		return 0
	case previous == 0:
		return firstDelay
	default:
		return min(2*previous, maxDelay)
	}
}

// Backoff waits until the container may start, counts the start, and writes
// the files that the start reads. It returns an error only after the first
// delay, so that a unit that is restarted for ever does not spin.
func (h *Helper) Backoff(ctx context.Context) error {
	err := h.backoff(ctx)
	if err != nil {
		select {
		case <-h.After(firstDelay):
		case <-ctx.Done():
		}
	}
	return err
}

func (h *Helper) backoff(ctx context.Context) error {
	r, err := h.Store.Record(h.UID, h.Container)
	if err != nil {
		return err
	}
	// A boot ends the wait too: what failed may be gone.
	if wait := r.Until.Sub(h.Now()); wait > 0 && r.BootID == h.BootID {
		select {
		case <-h.After(min(wait, maxDelay)):
		case <-ctx.Done():
			return fmt.Errorf("interrupted while waiting for the back-off: %w", ctx.Err())
		}
	}
	return h.begin(ctx, r)
}

func (h *Helper) begin(ctx context.Context, r lifecycle.Record) error {
	if r.Attempts > 0 && !r.Ended() {
		r.Interrupt(h.Now())
	}
	r.Attempts++
	r.BootID, r.Started, r.Until = h.BootID, h.Now().UTC(), time.Time{}
	if err := h.writeEnv(ctx); err != nil {
		return err
	}
	path := unit.TerminationFile(h.Store.PodDir(h.UID), h.Container)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("cannot make the termination message: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot make the termination message: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o666)
	if err != nil {
		return fmt.Errorf("cannot make the termination message: %w", err)
	}
	if err := errors.Join(f.Chmod(0o666), f.Close()); err != nil { // any user of the container may write it
		return fmt.Errorf("cannot make the termination message: %w", err)
	}
	log := filepath.Join(h.Store.PodDir(h.UID), "log", h.Container+".log")
	if err := os.Rename(log, log+".previous"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot keep the previous log: %w", err)
	}
	return h.Store.PutRecord(h.UID, h.Container, r)
}

// EnvFile is where the agent leaves a container's variables, as JSON.
func EnvFile(runDir, container string) string {
	return filepath.Join(runDir, "env", container+".json")
}

func (h *Helper) writeEnv(ctx context.Context) error {
	dir := h.Store.RunDir(h.UID)
	data, err := os.ReadFile(EnvFile(dir, h.Container))
	if err != nil {
		return fmt.Errorf("cannot read variables: %w", err)
	}
	var vars []podenv.Var
	if err := json.Unmarshal(data, &vars); err != nil {
		return fmt.Errorf("cannot read variables: %w", err)
	}
	var ip string
	for i := range vars {
		if !vars[i].Runtime {
			continue
		}
		if ip == "" {
			if ip, err = h.podIP(ctx); err != nil {
				return err
			}
		}
		vars[i].Value = strings.ReplaceAll(vars[i].Value, PodIPPlaceholder, ip)
	}
	podman, service, err := podenv.Files(vars)
	if err != nil {
		return err
	}
	for name, text := range map[string]string{".podman": podman, ".service": service} {
		if err := journal.WriteFile(filepath.Join(dir, "env", h.Container+name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// PodIPPlaceholder stands for the pod's address in the variables that the
// agent leaves.
const PodIPPlaceholder = "\x01podIP\x01"

func (h *Helper) podIP(ctx context.Context) (string, error) {
	instance, err := h.Store.Instance(h.UID)
	if err != nil {
		return "", err
	}
	if instance == nil {
		return "", fmt.Errorf("pod %s is not on this device", h.UID)
	}
	out, err := exec.CommandContext(ctx, h.Podman, "container", "inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}", instance.Units.PodmanPod()+"-infra").Output()
	if err != nil {
		return "", fmt.Errorf("cannot find the pod's address: %w", err)
	}
	words := strings.Fields(string(out))
	if len(words) == 0 {
		return "", errors.New("the pod has no address")
	}
	return words[0], nil
}

// inspected is the part of podman's answer that matters here.
type inspected struct {
	ID    string
	Image string
	State struct {
		Status     string
		OOMKilled  bool
		ExitCode   int32
		Error      string
		StartedAt  time.Time
		FinishedAt time.Time
	}
}

var errNoContainer = errors.New("no such container")

// inspect returns what podman says of the container; errNoContainer if podman
// has none.
func (h *Helper) inspect(ctx context.Context) (*inspected, error) {
	out, err := exec.CommandContext(ctx, h.Podman, "container", "inspect", h.Name).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && strings.Contains(strings.ToLower(string(exit.Stderr)), errNoContainer.Error()) {
			return nil, fmt.Errorf("cannot inspect container %s: %w", h.Name, errNoContainer)
		}
		return nil, fmt.Errorf("cannot inspect container %s: %w", h.Name, err)
	}
	var list []inspected
	if err := json.Unmarshal(out, &list); err != nil || len(list) != 1 {
		return nil, fmt.Errorf("cannot read podman's answer about %s: %w", h.Name, err)
	}
	return &list[0], nil
}

// Ending is what systemd tells ExecStopPost.
type Ending struct {
	ServiceResult, ExitCode, ExitStatus string
}

// EndingFromEnv reads systemd's variables.
func EndingFromEnv() Ending {
	return Ending{ServiceResult: os.Getenv("SERVICE_RESULT"), ExitCode: os.Getenv("EXIT_CODE"), ExitStatus: os.Getenv("EXIT_STATUS")}
}

// Record writes down how the container ended.
func (h *Helper) Record(ctx context.Context, e Ending) error {
	r, err := h.Store.Record(h.UID, h.Container)
	if err != nil {
		return err
	}
	if r.Attempts == 0 || r.Ended() {
		return nil // it never started, or ended during the wait
	}
	in, inspectErr := h.inspect(ctx)
	end := h.judge(e, in, inspectErr)
	if end.Started.IsZero() {
		end.Started = r.Started
	}
	if message, err := h.message(); err != nil {
		end.Message = "cannot read the termination message: " + err.Error()
	} else if message != "" {
		end.Message = message
	}
	h.finish(&r, end)
	if err := h.Store.PutRecord(h.UID, h.Container, r); err != nil {
		return err
	}
	if in == nil && end.Reason != "StartError" {
		return inspectErr
	}
	return nil
}

func (h *Helper) finish(r *lifecycle.Record, end lifecycle.End) {
	if end.Finished.Before(r.Started) { // the clock was set back, or inspect is of an older one
		end.Finished = r.Started
	}
	r.End(end)
	r.Delay = NextDelay(r.Delay, r.Attempts, end.Finished.Sub(end.Started))
	r.Until = end.Finished.Add(r.Delay)
}

// judge is Judge if podman answered. If it failed to, systemd's word is all
// there is: the container may well have run.
func (h *Helper) judge(e Ending, in *inspected, inspectErr error) lifecycle.End {
	if inspectErr == nil || errors.Is(inspectErr, errNoContainer) {
		return Judge(e, in, h.Now().UTC())
	}
	end := fromSystemd(e, h.Now().UTC())
	if end.ExitCode == 0 {
		end.Reason = "Completed"
	}
	return end
}

// fromSystemd is the end that systemd's variables tell of.
func fromSystemd(e Ending, now time.Time) lifecycle.End {
	end := lifecycle.End{Finished: now, Reason: "Error"}
	switch status, err := strconv.Atoi(e.ExitStatus); {
	case e.ExitCode == "exited" && err == nil:
		end.ExitCode = int32(status)
	case e.ServiceResult == "success":
		end.ExitCode = 0
	default: // conmon was killed, or something timed out
		end.ExitCode = 137
	}
	return end
}

// Judge turns what systemd and podman say into an end. in is nil if podman
// has no such container.
func Judge(e Ending, in *inspected, now time.Time) lifecycle.End {
	end := fromSystemd(e, now)
	switch {
	case in == nil || in.State.Status == "created" || in.State.Status == "initialized" || in.State.StartedAt.Year() < 1970:
		if in != nil {
			end.ContainerID, end.ImageID, end.Message = in.ID, in.Image, in.State.Error
		}
		if end.Message == "" {
			end.Message = "podman could not start the container: see the journal of its unit"
		}
		end.ExitCode, end.Reason = 128, "StartError"
		return end
	default:
		end.ContainerID, end.ImageID = in.ID, in.Image
		end.Started = in.State.StartedAt.UTC()
		if in.State.Status == "exited" || in.State.Status == "stopped" {
			end.ExitCode = in.State.ExitCode
			if in.State.FinishedAt.After(in.State.StartedAt) {
				end.Finished = in.State.FinishedAt.UTC()
			}
		}
		if in.State.OOMKilled {
			end.Reason = "OOMKilled"
			return end
		}
	}
	if end.ExitCode == 0 {
		end.Reason = "Completed"
	}
	return end
}

func (h *Helper) message() (string, error) {
	f, err := os.OpenFile(unit.TerminationFile(h.Store.PodDir(h.UID), h.Container), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxMessage))
	if err = errors.Join(err, f.Close()); err != nil {
		return "", err
	}
	return report.SanitizeText(string(data), maxMessage), nil
}

// Stop stops the container within the pod's grace period: that of its
// deletion, or else the given one, in seconds.
func (h *Helper) Stop(ctx context.Context, grace int64) error {
	instance, err := h.Store.Instance(h.UID)
	if err != nil {
		return err
	}
	if instance != nil && instance.Phase == lifecycle.Stopping && instance.Grace > 0 {
		grace = instance.Grace
	}
	// The unit's own limit is for the grace period of the pod's spec.
	if _, err := daemon.SdNotify(false, fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", (grace+30)*1_000_000)); err != nil {
		return fmt.Errorf("cannot ask systemd for time: %w", err)
	}
	return run(ctx, h.Podman, "stop", "--ignore", fmt.Sprintf("--time=%d", grace), h.Name)
}

func run(ctx context.Context, argv ...string) error {
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("podman %s failed: %w: %s", argv[1], err, report.SanitizeText(strings.TrimSpace(stderr.String()), 1000))
	}
	return nil
}

// RunInit runs an init container until it succeeded, or once if the pod is
// never restarted. An init container that already succeeded in this boot is
// not run again.
func (h *Helper) RunInit(ctx context.Context, policy corev1.RestartPolicy, grace int64, argv []string) error {
	for {
		if err := h.Backoff(ctx); err != nil {
			return err
		}
		runErr := run(ctx, argv...)
		if runErr == nil {
			runErr = h.wait(ctx, grace)
		}
		in, inspectErr := h.inspect(context.WithoutCancel(ctx))
		r, err := h.Store.Record(h.UID, h.Container)
		if err != nil {
			return err
		}
		end := h.judge(Ending{}, in, inspectErr)
		if end.Started.IsZero() {
			end.Started = r.Started
		}
		if end.Reason == "StartError" && runErr != nil {
			end.Message = runErr.Error()
		}
		if message, err := h.message(); err == nil && message != "" {
			end.Message = message
		}
		h.finish(&r, end)
		if in != nil && end.ExitCode == 0 { // when the pod starts anew, it runs again at once
			r.Delay, r.Until = 0, time.Time{}
		}
		if err := h.Store.PutRecord(h.UID, h.Container, r); err != nil {
			return err
		}
		switch {
		case ctx.Err() != nil:
			return fmt.Errorf("init container %s was stopped: %w", h.Container, ctx.Err())
		case in != nil && end.ExitCode == 0:
			return nil
		case policy == corev1.RestartPolicyNever:
			return errors.Join(fmt.Errorf("init container %s ended with exit code %d", h.Container, end.ExitCode), runErr, inspectErr)
		}
	}
}

// wait returns when the container has ended; a cancelled context ends it.
func (h *Helper) wait(ctx context.Context, grace int64) error {
	err := run(ctx, h.Podman, "wait", h.Name)
	if ctx.Err() != nil {
		stopCtx := context.WithoutCancel(ctx)
		return errors.Join(err, h.Stop(stopCtx, grace))
	}
	return err
}
