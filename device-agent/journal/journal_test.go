package journal

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/jetbridge/jetbridge/device-agent/lifecycle"
	"github.com/jetbridge/jetbridge/shared/bundle"
	"github.com/jetbridge/jetbridge/shared/report"
)

func store(t *testing.T) *Store {
	t.Helper()
	dir := t.TempDir()
	s, err := Open(filepath.Join(dir, "state"), filepath.Join(dir, "run"))
	require.NoError(t, err)
	return s
}

func TestInstances(t *testing.T) {
	s := store(t)
	i := &lifecycle.Instance{Phase: lifecycle.Running, Pod: bundle.Pod{Metadata: metav1.ObjectMeta{UID: "../../etc", Name: "p"}}, Started: time.Unix(1, 0).UTC()}
	require.NoError(t, s.Put(i))
	assert.NotContains(t, s.PodDir("../../etc"), "..", "a UID names no other folder")
	all, err := s.Instances()
	require.NoError(t, err)
	assert.Equal(t, map[types.UID]*lifecycle.Instance{"../../etc": i}, all)
	require.NoError(t, s.PutRecord("../../etc", "c", lifecycle.Record{Attempts: 2}))
	r, err := s.Record("../../etc", "c")
	require.NoError(t, err)
	assert.EqualValues(t, 2, r.Attempts)

	require.NoError(t, s.Remove("../../etc"))
	require.NoError(t, s.Remove("../../etc"), "twice is no error")
	gone, err := s.Instance("../../etc")
	require.NoError(t, err)
	assert.Nil(t, gone)
}

func TestDamageIsAnError(t *testing.T) {
	s := store(t)
	require.NoError(t, s.Put(&lifecycle.Instance{Pod: bundle.Pod{Metadata: metav1.ObjectMeta{UID: "u"}}}))
	require.NoError(t, os.WriteFile(filepath.Join(s.PodDir("u"), "pod.json"), []byte("{"), 0o600))
	_, err := s.Instances()
	require.Error(t, err, "a pod is never overlooked")
}

func TestSweep(t *testing.T) {
	s := store(t)
	require.NoError(t, s.Put(&lifecycle.Instance{Pod: bundle.Pod{Metadata: metav1.ObjectMeta{UID: "kept"}}}))
	require.NoError(t, os.MkdirAll(s.PodDir("left"), 0o700))
	require.NoError(t, os.MkdirAll(s.RunDir("left"), 0o700))
	require.NoError(t, s.Sweep())
	assert.DirExists(t, s.PodDir("kept"))
	assert.NoDirExists(t, s.PodDir("left"))
	assert.NoDirExists(t, s.RunDir("left"))
}

func TestTombstones(t *testing.T) {
	s := store(t)
	for n := range report.MaxTombstones + 2 {
		if n < 3 || n >= report.MaxTombstones-1 {
			require.NoError(t, s.AddTombstone(types.UID(fmt.Sprint("u", n))))
			continue
		}
		if n == 3 { // fill up without a thousand syncs
			var many []types.UID
			for k := range report.MaxTombstones - 1 {
				many = append(many, types.UID(fmt.Sprint("u", k)))
			}
			require.NoError(t, writeJSON(filepath.Join(s.state, "tombstones.json"), many))
		}
	}
	require.NoError(t, s.AddTombstone("u500"), "a second time changes nothing")
	got, err := s.Tombstones()
	require.NoError(t, err)
	assert.Len(t, got, report.MaxTombstones)
	assert.Equal(t, types.UID(fmt.Sprint("u", report.MaxTombstones+1)), got[len(got)-1])
	assert.Equal(t, types.UID("u2"), got[0])
}

func TestWriteFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	require.NoError(t, WriteFile(path, []byte("a"), 0o600))
	require.NoError(t, WriteFile(path, []byte("b"), 0o644))
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.Equal(t, "b", string(data))
	require.Error(t, WriteFile(filepath.Join(path, "below-a-file"), nil, 0o600))
	entries, err := os.ReadDir(filepath.Dir(path))
	require.NoError(t, err)
	assert.Len(t, entries, 1, "nothing temporary is left")
}

func TestNumber(t *testing.T) {
	s := store(t)
	n, err := s.Number("sequence")
	require.NoError(t, err)
	assert.Zero(t, n)
	require.NoError(t, s.SetNumber("sequence", 7))
	n, err = s.Number("sequence")
	require.NoError(t, err)
	assert.EqualValues(t, 7, n)
}

func TestTombstonesAtOnce(t *testing.T) {
	s := store(t)
	errs := make([]error, 20)
	var all sync.WaitGroup
	for n := range errs {
		all.Go(func() { errs[n] = s.AddTombstone(types.UID(fmt.Sprint("u", n))) })
	}
	all.Wait()
	require.NoError(t, errors.Join(errs...))
	got, err := s.Tombstones()
	require.NoError(t, err)
	assert.Len(t, got, len(errs))
}
