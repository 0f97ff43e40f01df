package report

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/jetbridge/jetbridge/device-agent/journal"
	"github.com/jetbridge/jetbridge/shared/report"
)

type flightctl struct {
	status  atomic.Value
	reloads atomic.Int32
	fails   atomic.Bool
}

func (f *flightctl) StatusText(context.Context, string) (string, error) {
	return f.status.Load().(string), nil
}
func (f *flightctl) Reload(context.Context, string) error {
	if f.fails.Load() {
		return errors.New("no")
	}
	f.reloads.Add(1)
	return nil
}

// pass lets the test's fake time go on, and what is due then be done.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func TestWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		store, err := journal.Open(filepath.Join(dir, "state"), filepath.Join(dir, "run"))
		require.NoError(t, err)
		f := &flightctl{}
		f.status.Store("Waiting for enrolment")
		var mu sync.Mutex // guards phase and applied
		phase := corev1.PodPending
		applied := int64(0)
		set := func(p corev1.PodPhase, a int64) {
			mu.Lock()
			defer mu.Unlock()
			phase, applied = p, a
		}
		o := Options{
			Store: store, Path: filepath.Join(dir, "run", "report"), Base: report.Report{FormatVersion: 1, Device: "dev", BootID: "b", KeyID: "k"},
			Pods: func(context.Context, map[types.UID]*corev1.PodStatus) ([]report.Pod, error) {
				mu.Lock()
				defer mu.Unlock()
				return []report.Pod{{Namespace: "n", Name: "p", UID: "u", Status: corev1.PodStatus{Phase: phase}}}, nil
			},
			Applied: func() int64 { mu.Lock(); defer mu.Unlock(); return applied }, Flightctl: f, Unit: "x.service", ReloadInterval: 5 * time.Second, Interval: time.Minute,
			Log: slog.New(slog.DiscardHandler), Now: time.Now,
		}
		read := func() *report.Report {
			text, err := os.ReadFile(o.Path)
			require.NoError(t, err)
			r, err := report.Decode(string(text), "dev")
			require.NoError(t, err)
			return r
		}
		start := func() (*Writer, func()) {
			w := New(o)
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- w.Run(ctx) }()
			synctest.Wait()
			return w, func() { cancel(); require.NoError(t, <-done) }
		}
		w, stop := start()
		assert.EqualValues(t, 1, read().Sequence)
		assert.Zero(t, f.reloads.Load(), "before it is connected, a reload would end Flightctl's agent")

		f.status.Store("Connected")
		set(corev1.PodRunning, 4)
		for range 50 {
			w.Bundle(4, nil)
		}
		pass(time.Second)
		r := read()
		assert.EqualValues(t, 2, r.Sequence, "many changes, one report")
		assert.Equal(t, corev1.PodRunning, r.Pods[0].Status.Phase)
		assert.EqualValues(t, 4, r.Observed)
		pass(10 * time.Second)
		assert.EqualValues(t, 1, f.reloads.Load())
		for range 5 {
			w.Changed()
			pass(time.Second)
		}
		assert.EqualValues(t, 2, read().Sequence, "nothing changed")
		assert.EqualValues(t, 1, f.reloads.Load())
		stop()

		// The agent starts again: the same content is the same report.
		set(corev1.PodRunning, 0)
		w, stop = start()
		pass(time.Second)
		assert.EqualValues(t, 2, read().Sequence)
		assert.True(t, w.Written())
		w.Bundle(4, &report.Error{Reason: "InvalidBundle", Message: "m"})
		pass(time.Second)
		assert.EqualValues(t, 3, read().Sequence)
		assert.Equal(t, "InvalidBundle", read().LastError.Reason)
		stop()

		// A boot: the report is gone, its number is not.
		require.NoError(t, os.Remove(o.Path))
		_, stop = start()
		assert.EqualValues(t, 4, read().Sequence)
		stop()
	})
}

// A reload that could not be done is made up for, without another change.
func TestReloadIsRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		store, err := journal.Open(filepath.Join(dir, "state"), filepath.Join(dir, "run"))
		require.NoError(t, err)
		f := &flightctl{}
		f.status.Store("Waiting for enrolment")
		f.fails.Store(true)
		o := Options{
			Store: store, Path: filepath.Join(dir, "run", "report"), Base: report.Report{FormatVersion: 1, Device: "dev", BootID: "b", KeyID: "k"},
			Pods:    func(context.Context, map[types.UID]*corev1.PodStatus) ([]report.Pod, error) { return nil, nil },
			Applied: func() int64 { return 1 }, Flightctl: f, Unit: "x.service", ReloadInterval: 5 * time.Second, Interval: time.Hour,
			Log: slog.New(slog.DiscardHandler), Now: time.Now,
		}
		start := func() func() {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- New(o).Run(ctx) }()
			synctest.Wait()
			return func() { cancel(); require.NoError(t, <-done) }
		}
		stop := start()
		pass(time.Minute)
		f.status.Store("Connected")
		pass(time.Minute)
		assert.Zero(t, f.reloads.Load(), "the reload fails")
		f.fails.Store(false)
		pass(6 * time.Second)
		assert.EqualValues(t, 1, f.reloads.Load())
		pass(time.Minute)
		assert.EqualValues(t, 1, f.reloads.Load(), "once is enough")
		stop()

		stop = start()
		pass(time.Minute)
		assert.EqualValues(t, 2, f.reloads.Load(), "the agent may have ended before it could reload")
		stop()
	})
}

func TestTooLargeReport(t *testing.T) {
	noise := rand.New(rand.NewPCG(1, 2))
	message := func() string {
		var b strings.Builder
		for range 4096 {
			b.WriteByte(byte(' ' + noise.IntN(95)))
		}
		return b.String()
	}
	// build returns a report with that many messages of last and present ends.
	build := func(last, present int) *report.Report {
		r := &report.Report{FormatVersion: report.FormatVersion, Device: "dev", BootID: "b"}
		for i := range max(last, present) {
			s := corev1.ContainerStatus{Name: "c"}
			s.State.Terminated = &corev1.ContainerStateTerminated{ExitCode: 3}
			s.LastTerminationState.Terminated = &corev1.ContainerStateTerminated{ExitCode: 4}
			if i < present {
				s.State.Terminated.Message = message()
			}
			if i < last {
				s.LastTerminationState.Terminated.Message = message()
			}
			r.Pods = append(r.Pods, report.Pod{UID: types.UID("u" + strconv.Itoa(i)), Stopped: true, Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{s}}})
		}
		return r
	}
	w := New(Options{Path: filepath.Join(t.TempDir(), "report"), Log: slog.New(slog.DiscardHandler)})
	for name, c := range map[string]struct {
		full          *report.Report
		last, present bool
	}{
		"small":                  {build(2, 2), true, true},
		"large last messages":    {build(200, 2), false, true},
		"large present messages": {build(2, 200), false, false},
	} {
		t.Run(name, func(t *testing.T) {
			text, err := w.encode(c.full)
			require.NoError(t, err)
			got, err := report.Decode(text, "dev")
			require.NoError(t, err)
			assert.Len(t, got.Pods, len(c.full.Pods))
			assert.True(t, got.Confirmed("u1"))
			s := got.Pods[0].Status.ContainerStatuses[0]
			assert.Equal(t, c.last, s.LastTerminationState.Terminated.Message != "")
			assert.Equal(t, c.present, s.State.Terminated.Message != "")
			assert.EqualValues(t, 3, s.State.Terminated.ExitCode)
			assert.NotEmpty(t, c.full.Pods[0].Status.ContainerStatuses[0].State.Terminated.Message, "the full report stays as it was")
		})
	}
}
