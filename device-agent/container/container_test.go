package container

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/jetbridge/jetbridge/device-agent/journal"
	"github.com/jetbridge/jetbridge/device-agent/lifecycle"
	"github.com/jetbridge/jetbridge/device-agent/podenv"
	"github.com/jetbridge/jetbridge/device-agent/unit"
	"github.com/jetbridge/jetbridge/shared/bundle"
)

func TestNextDelay(t *testing.T) {
	var got []time.Duration
	var d time.Duration
	for attempt := int32(1); attempt <= 8; attempt++ {
		d = NextDelay(d, attempt, time.Second)
		got = append(got, d)
	}
	s := time.Second
	assert.Equal(t, []time.Duration{0, 10 * s, 20 * s, 40 * s, 80 * s, 160 * s, 300 * s, 300 * s}, got)
	assert.Zero(t, NextDelay(300*s, 9, 10*time.Minute))
}

func TestJudge(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	ran := func(status string, code int32) *inspected {
		in := &inspected{ID: "id", Image: "img"}
		in.State.Status, in.State.ExitCode = status, code
		in.State.StartedAt, in.State.FinishedAt = now.Add(-time.Minute), now.Add(-time.Second)
		return in
	}
	oom := ran("exited", 137)
	oom.State.OOMKilled = true
	created := &inspected{ID: "id"}
	created.State.Status, created.State.Error = "created", "no such file"
	for name, c := range map[string]struct {
		e      Ending
		in     *inspected
		code   int32
		reason string
	}{
		"exit 0":                {Ending{"success", "exited", "0"}, ran("exited", 0), 0, "Completed"},
		"exit 3":                {Ending{"exit-code", "exited", "3"}, ran("exited", 3), 3, "Error"},
		"out of memory":         {Ending{"exit-code", "exited", "137"}, oom, 137, "OOMKilled"},
		"conmon was killed":     {Ending{"signal", "killed", "KILL"}, ran("running", 0), 137, "Error"},
		"command was not found": {Ending{"exit-code", "exited", "127"}, created, 128, "StartError"},
		"podman failed":         {Ending{"exit-code", "exited", "125"}, nil, 128, "StartError"},
	} {
		t.Run(name, func(t *testing.T) {
			end := Judge(c.e, c.in, now)
			assert.Equal(t, c.code, end.ExitCode)
			assert.Equal(t, c.reason, end.Reason)
			assert.False(t, end.Finished.After(now))
		})
	}
	assert.Equal(t, "no such file", Judge(Ending{}, created, now).Message)
}

// helper returns a helper whose podman is a script.
func helper(t *testing.T, script string) (*Helper, *time.Time) {
	t.Helper()
	dir := t.TempDir()
	store, err := journal.Open(filepath.Join(dir, "state"), filepath.Join(dir, "run"))
	require.NoError(t, err)
	pod := bundle.Pod{Metadata: metav1.ObjectMeta{Namespace: "default", Name: "p", UID: "u"}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c"}}}}
	require.NoError(t, store.Put(&lifecycle.Instance{Phase: lifecycle.Running, Pod: pod, Units: unit.NamesFor(&corev1.Pod{ObjectMeta: pod.Metadata, Spec: pod.Spec})}))
	podman := filepath.Join(dir, "podman")
	require.NoError(t, os.WriteFile(podman, []byte("#!/bin/sh\n"+script), 0o755))
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	h := &Helper{Store: store, Podman: podman, BootID: "boot", Now: func() time.Time { return now }, After: time.After, UID: "u", Container: "c", Name: "n"}
	env := EnvFile(store.RunDir("u"), "c")
	require.NoError(t, os.MkdirAll(filepath.Dir(env), 0o700))
	data, err := json.Marshal([]podenv.Var{{Name: "A", Value: "b"}, {Name: "IP", Value: "is " + PodIPPlaceholder, Runtime: true}})
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(env, data, 0o600))
	return h, &now
}

func TestLife(t *testing.T) {
	h, now := helper(t, `
case "$*" in
*-infra) echo "10.88.0.9 " ;;
*) echo '[{"ID":"id1","Image":"img1","State":{"Status":"exited","ExitCode":5,"StartedAt":"2026-01-02T03:04:05Z","FinishedAt":"2026-01-02T03:04:06Z"}}]' ;;
esac`)
	ctx := context.Background()
	require.NoError(t, h.Backoff(ctx))
	env, err := os.ReadFile(filepath.Join(h.Store.RunDir("u"), "env", "c.podman"))
	require.NoError(t, err)
	assert.Equal(t, "A=b\nIP=is 10.88.0.9\n", string(env))

	require.NoError(t, os.WriteFile(unit.TerminationFile(h.Store.PodDir("u"), "c"), []byte("bye\x1b[31m"), 0o600))
	*now = now.Add(2 * time.Second)
	require.NoError(t, h.Record(ctx, Ending{"exit-code", "exited", "5"}))
	r, err := h.Store.Record("u", "c")
	require.NoError(t, err)
	assert.EqualValues(t, 1, r.Attempts)
	assert.True(t, r.Ended())
	assert.EqualValues(t, 5, r.Last.ExitCode)
	assert.Equal(t, "bye[31m", r.Last.Message)
	assert.Zero(t, r.Delay, "the first restart is at once")

	// A second record of the same end changes nothing.
	require.NoError(t, h.Record(ctx, Ending{"exit-code", "exited", "9"}))
	again, err := h.Store.Record("u", "c")
	require.NoError(t, err)
	assert.Equal(t, r, again)

	// A power cut: nobody wrote the end down.
	*now = now.Add(time.Second)
	require.NoError(t, h.Backoff(ctx))
	h.BootID = "another"
	*now = now.Add(time.Second)
	require.NoError(t, h.Backoff(ctx))
	r, err = h.Store.Record("u", "c")
	require.NoError(t, err)
	assert.EqualValues(t, 3, r.Attempts)
	assert.Equal(t, "Unknown", r.Last.Reason)
	assert.EqualValues(t, 5, r.Before.ExitCode)
	message, err := os.ReadFile(unit.TerminationFile(h.Store.PodDir("u"), "c"))
	require.NoError(t, err)
	assert.Empty(t, message, "each run has a message of its own")
}

func TestRecordWithTheClockSetBack(t *testing.T) {
	h, now := helper(t, `
case "$*" in
*-infra) echo "10.88.0.9 " ;;
*) echo '[{"ID":"id1","Image":"img1","State":{"Status":"exited","ExitCode":5,"StartedAt":"2026-01-02T03:04:05Z","FinishedAt":"2026-01-02T03:04:06Z"}}]' ;;
esac`)
	ctx := context.Background()
	require.NoError(t, h.Backoff(ctx))
	require.NoError(t, h.Record(ctx, Ending{"exit-code", "exited", "5"}))
	*now = now.Add(-time.Hour)
	require.NoError(t, h.Backoff(ctx))
	r, err := h.Store.Record("u", "c")
	require.NoError(t, err)
	assert.False(t, r.Ended(), "the second run goes on, whatever the clock says")
	require.NoError(t, h.Record(ctx, Ending{"exit-code", "exited", "5"}))
	r, err = h.Store.Record("u", "c")
	require.NoError(t, err)
	assert.True(t, r.Ended())
	assert.NotNil(t, r.Before)
	assert.Equal(t, firstDelay, r.Delay)
}

func TestRecordWithoutAnAnswer(t *testing.T) {
	for name, c := range map[string]struct {
		stderr string
		e      Ending
		code   int32
		reason string
	}{
		"no such container": {`no such container "n"`, Ending{"exit-code", "exited", "125"}, 128, "StartError"},
		"a failed run":      {"database is locked", Ending{"exit-code", "exited", "3"}, 3, "Error"},
		"a good run":        {"database is locked", Ending{"success", "exited", "0"}, 0, "Completed"},
	} {
		t.Run(name, func(t *testing.T) {
			h, now := helper(t, `echo 'Error: `+c.stderr+`' >&2; exit 125`)
			require.NoError(t, h.Store.PutRecord("u", "c", lifecycle.Record{Attempts: 1, Started: *now}))
			err := h.Record(context.Background(), c.e)
			assert.Equal(t, c.reason != "StartError", err != nil, "%v", err)
			r, err := h.Store.Record("u", "c")
			require.NoError(t, err)
			assert.True(t, r.Ended())
			assert.Equal(t, c.code, r.Last.ExitCode)
			assert.Equal(t, c.reason, r.Last.Reason)
		})
	}
}

func TestBackoffWaitsBeforeAnError(t *testing.T) {
	h, _ := helper(t, "exit 1") // the pod's address cannot be found
	var waits []time.Duration
	over := make(chan time.Time)
	close(over)
	h.After = func(d time.Duration) <-chan time.Time { waits = append(waits, d); return over }
	require.ErrorContains(t, h.Backoff(context.Background()), "address")
	assert.Equal(t, []time.Duration{firstDelay}, waits)
}

func TestBackoffIsInterruptible(t *testing.T) {
	h, now := helper(t, "exit 1")
	require.NoError(t, h.Store.PutRecord("u", "c", lifecycle.Record{Attempts: 5, BootID: "boot", Until: now.Add(time.Minute)}))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	require.ErrorIs(t, h.Backoff(ctx), context.Canceled)
	r, err := h.Store.Record("u", "c")
	require.NoError(t, err)
	assert.EqualValues(t, 5, r.Attempts, "a wait that was interrupted is no start")
}

func TestRunInitNever(t *testing.T) {
	h, _ := helper(t, `
case "$*" in
*-infra) echo "10.88.0.9 " ;;
*inspect*) echo '[{"ID":"id1","Image":"img1","State":{"Status":"exited","ExitCode":2,"StartedAt":"2026-01-02T03:04:05Z","FinishedAt":"2026-01-02T03:04:06Z"}}]' ;;
esac`)
	require.ErrorContains(t, h.RunInit(context.Background(), corev1.RestartPolicyNever, 1, []string{h.Podman, "run"}), "exit code 2")
	r, err := h.Store.Record("u", "c")
	require.NoError(t, err)
	assert.EqualValues(t, 1, r.Attempts)
	assert.EqualValues(t, 2, r.Last.ExitCode)
}

func TestStopUsesTheGraceOfTheDeletion(t *testing.T) {
	h, _ := helper(t, `echo "$*" >"$(dirname "$0")/args"`)
	args := func() string {
		data, err := os.ReadFile(filepath.Join(filepath.Dir(h.Podman), "args"))
		require.NoError(t, err)
		return string(data)
	}
	require.NoError(t, h.Stop(context.Background(), 30))
	assert.Equal(t, "stop --ignore --time=30 n\n", args())
	i, err := h.Store.Instance("u")
	require.NoError(t, err)
	i.Phase, i.Grace = lifecycle.Stopping, 2
	require.NoError(t, h.Store.Put(i))
	require.NoError(t, h.Stop(context.Background(), 30))
	assert.Equal(t, "stop --ignore --time=2 n\n", args())
}
