// Package report writes the device's report for Flightctl's agent to collect:
// soon after a change, but not at each of many, and only if its content is new.
package report

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/jetbridge/jetbridge/device-agent/journal"
	"github.com/jetbridge/jetbridge/shared/report"
)

// Pods observes all pods; previous are their statuses of the last time.
type Pods func(ctx context.Context, previous map[types.UID]*corev1.PodStatus) ([]report.Pod, error)

// Flightctl is what the writer needs of systemd, to have the report collected.
type Flightctl interface {
	StatusText(ctx context.Context, unit string) (string, error)
	Reload(ctx context.Context, unit string) error
}

// Options are what a writer works with.
type Options struct {
	Store *journal.Store
	// Path is the report's file.
	Path string
	// Base is the report without what changes while the agent runs.
	Base report.Report
	Pods Pods
	// Applied is the generation that was carried out.
	Applied func() int64
	// Flightctl reloads Unit after a change, at most once in ReloadInterval.
	Flightctl      Flightctl
	Unit           string
	ReloadInterval time.Duration
	// Interval is the longest time between two looks at the pods.
	Interval time.Duration
	Log      *slog.Logger
	Now      func() time.Time
}

// Coalesce is how long changes are collected before a report is written.
const Coalesce = 300 * time.Millisecond

// Writer writes reports until Run's context ends.
type Writer struct {
	o    Options
	wake chan struct{}

	// mu guards everything that follows.
	mu        sync.Mutex
	observed  int64
	lastError *report.Error
	current   *report.Report
	written   bool
}

// New returns a writer. It goes on from the report that is there, if it can be
// read: the times of conditions are in it.
func New(o Options) *Writer {
	w := &Writer{o: o, wake: make(chan struct{}, 1)}
	if data, err := os.ReadFile(o.Path); err == nil {
		if r, err := report.Decode(string(data), o.Base.Device); err == nil && r.BootID == o.Base.BootID {
			w.current, w.observed, w.lastError = r, r.Observed, r.LastError
		}
	}
	return w
}

// Changed says that something to report may have changed.
func (w *Writer) Changed() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Bundle records what became of the newest bundle: its generation if it was
// taken in, or why it was not.
func (w *Writer) Bundle(generation int64, failure *report.Error) {
	w.mu.Lock()
	w.observed, w.lastError = max(w.observed, generation), failure
	w.mu.Unlock()
	w.Changed()
}

// Written says whether a report was written since the start.
func (w *Writer) Written() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.written
}

// Run writes reports until ctx ends.
func (w *Writer) Run(ctx context.Context) error {
	tick := time.NewTicker(w.o.Interval)
	defer tick.Stop()
	var reloaded time.Time
	// A report of before this start may not have been collected.
	reloadDue := true
	for {
		changed, err := w.write(ctx)
		if err != nil && ctx.Err() == nil {
			w.o.Log.Error("cannot report", "error", err)
		}
		reloadDue = reloadDue || changed
		if reloadDue && w.o.Now().Sub(reloaded) >= w.o.ReloadInterval {
			reloaded = w.o.Now()
			reloadDue = !w.reload(ctx)
		}
		var due <-chan time.Time
		if reloadDue {
			due = time.After(w.o.ReloadInterval)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-due:
		case <-w.wake:
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(Coalesce):
			}
		}
	}
}

// write writes a report if its content differs from the last one.
func (w *Writer) write(ctx context.Context) (bool, error) {
	w.mu.Lock()
	current, observed, lastError := w.current, w.observed, w.lastError
	w.mu.Unlock()
	previous := map[types.UID]*corev1.PodStatus{}
	if current != nil {
		for i := range current.Pods {
			previous[current.Pods[i].UID] = &current.Pods[i].Status
		}
	}
	next := w.o.Base
	// Read before the pods: what is called applied must be seen in them.
	next.Observed, next.Applied, next.LastError = observed, w.o.Applied(), lastError
	var err error
	if next.Pods, err = w.o.Pods(ctx, previous); err != nil {
		return false, err
	}
	if next.Tombstones, err = w.o.Store.Tombstones(); err != nil {
		return false, err
	}
	if current != nil && next.Applied == 0 {
		next.Applied = current.Applied // the agent has just started
	}
	if current != nil {
		next.Sequence = current.Sequence
		same, err := equal(current, &next)
		if err != nil {
			return false, err
		}
		if same && w.exists() {
			w.mu.Lock()
			w.written = true
			w.mu.Unlock()
			return false, nil
		}
	}
	if next.Sequence, err = w.o.Store.Number("sequence"); err != nil {
		return false, err
	}
	next.Sequence++
	text, err := w.encode(&next)
	if err != nil {
		return false, err
	}
	if err := w.o.Store.SetNumber("sequence", next.Sequence); err != nil {
		return false, err
	}
	if err := journal.WriteFile(w.o.Path, []byte(text), 0o644); err != nil {
		return false, err
	}
	w.mu.Lock()
	w.current, w.written = &next, true
	w.mu.Unlock()
	w.o.Log.Info("report written", "sequence", next.Sequence, "observed", next.Observed, "applied", next.Applied, "pods", len(next.Pods))
	return true, nil
}

// encode encodes a report. From one that is too large it leaves out messages
// of terminated containers, the older ones first: confirmations must arrive.
func (w *Writer) encode(full *report.Report) (string, error) {
	text, err := full.Encode()
	for _, all := range []bool{false, true} {
		if !errors.Is(err, report.ErrTooLarge) {
			break
		}
		w.o.Log.Warn("report is too large, leaving out termination messages", "all", all, "error", err)
		short := withoutMessages(full, all)
		text, err = short.Encode()
	}
	return text, err
}

// withoutMessages returns a copy of r without the messages of its containers'
// last terminations or, if all is true, of the present ones too.
func withoutMessages(r *report.Report, all bool) *report.Report {
	out := *r
	out.Pods = slices.Clone(r.Pods)
	for i := range out.Pods {
		status := out.Pods[i].Status.DeepCopy()
		for _, list := range [][]corev1.ContainerStatus{status.InitContainerStatuses, status.ContainerStatuses} {
			for j := range list {
				if t := list[j].LastTerminationState.Terminated; t != nil {
					t.Message = ""
				}
				if t := list[j].State.Terminated; t != nil && all {
					t.Message = ""
				}
			}
		}
		out.Pods[i].Status = *status
	}
	return &out
}

func (w *Writer) exists() bool {
	_, err := os.Stat(w.o.Path)
	return !errors.Is(err, fs.ErrNotExist)
}

func equal(a, b *report.Report) (bool, error) {
	x, err := json.Marshal(a)
	if err != nil {
		return false, fmt.Errorf("cannot compare reports: %w", err)
	}
	y, err := json.Marshal(b)
	if err != nil {
		return false, fmt.Errorf("cannot compare reports: %w", err)
	}
	return string(x) == string(y), nil
}

// reload has Flightctl's agent collect the report. Before the agent is
// connected, a reload would end it. It says whether the reload was asked for.
func (w *Writer) reload(ctx context.Context) bool {
	text, err := w.o.Flightctl.StatusText(ctx, w.o.Unit)
	switch {
	case err != nil:
		w.o.Log.Debug("Flightctl's agent cannot be asked", "error", err)
	case text != "Connected":
		w.o.Log.Debug("Flightctl's agent is not connected", "status", text)
	default:
		if err := w.o.Flightctl.Reload(ctx, w.o.Unit); err != nil {
			w.o.Log.Warn("cannot have the report collected", "error", err)
			return false
		}
		return true
	}
	return false
}
