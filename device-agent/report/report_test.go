package report

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
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
}

func (f *flightctl) StatusText(context.Context, string) (string, error) {
	return f.status.Load().(string), nil
}
func (f *flightctl) Reload(context.Context, string) error { f.reloads.Add(1); return nil }

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
