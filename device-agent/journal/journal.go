// Package journal keeps on disk what must survive a crash at any instruction:
// which pods this device has, what is being done with them, what their
// containers did, and which pods were stopped for good.
//
// Every write is a new file, synced, renamed and its folder synced. What is
// going to be done with a pod is recorded before it is done.
package journal

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"k8s.io/apimachinery/pkg/types"

	"github.com/jetbridge/jetbridge/device-agent/lifecycle"
	"github.com/jetbridge/jetbridge/shared/report"
)

// Store is the state folder.
type Store struct {
	state, run string
	// tombstones guards the list of tombstones: pods are stopped at once.
	tombstones sync.Mutex
}

// Open makes the folders. run is where a reboot may forget.
func Open(state, run string) (*Store, error) {
	for _, dir := range []string{state, filepath.Join(state, "pods"), filepath.Join(state, "units"), run, filepath.Join(run, "pods")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("cannot make the state folder: %w", err)
		}
	}
	return &Store{state: state, run: run}, nil
}

// PodDir is the pod's folder that survives reboots, RunDir the other one.
func (s *Store) PodDir(uid types.UID) string { return filepath.Join(s.state, "pods", safe(uid)) }

// RunDir is the pod's folder in memory.
func (s *Store) RunDir(uid types.UID) string { return filepath.Join(s.run, "pods", safe(uid)) }

// UnitsDir holds the unit files of all pods that shall start at boot.
func (s *Store) UnitsDir() string { return filepath.Join(s.state, "units") }

// safe keeps a UID, which comes from outside, from naming another folder.
func safe(uid types.UID) string {
	return strings.Map(func(r rune) rune {
		if r == '-' || r == '_' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' {
			return r
		}
		return '_'
	}, string(uid))
}

// Instances returns all pods. One whose file cannot be read is an error.
func (s *Store) Instances() (map[types.UID]*lifecycle.Instance, error) {
	entries, err := os.ReadDir(filepath.Join(s.state, "pods"))
	if err != nil {
		return nil, fmt.Errorf("cannot list pods: %w", err)
	}
	out := map[types.UID]*lifecycle.Instance{}
	for _, e := range entries {
		var i lifecycle.Instance
		found, err := readJSON(filepath.Join(s.state, "pods", e.Name(), "pod.json"), &i)
		if err != nil {
			return nil, err
		}
		if found {
			out[i.Pod.Metadata.UID] = &i
		}
	}
	return out, nil
}

// Instance returns one pod, or nil.
func (s *Store) Instance(uid types.UID) (*lifecycle.Instance, error) {
	var i lifecycle.Instance
	found, err := readJSON(filepath.Join(s.PodDir(uid), "pod.json"), &i)
	if err != nil || !found {
		return nil, err
	}
	return &i, nil
}

// Put records a pod.
func (s *Store) Put(i *lifecycle.Instance) error {
	dir := s.PodDir(i.Pod.Metadata.UID)
	for _, d := range []string{dir, filepath.Join(dir, "containers"), filepath.Join(dir, "log"), filepath.Join(dir, "termination")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return fmt.Errorf("cannot record pod %s: %w", i.Pod.Metadata.UID, err)
		}
	}
	return writeJSON(filepath.Join(dir, "pod.json"), i)
}

// Remove forgets a pod and deletes its folders. Its record goes first, so that
// a crash leaves no pod without its folders.
func (s *Store) Remove(uid types.UID) error {
	dir := s.PodDir(uid)
	if err := os.Remove(filepath.Join(dir, "pod.json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot forget pod %s: %w", uid, err)
	}
	return errors.Join(os.RemoveAll(dir), os.RemoveAll(s.RunDir(uid)))
}

// Sweep deletes folders that no pod has, which a crash during Remove leaves.
func (s *Store) Sweep() error {
	entries, err := os.ReadDir(filepath.Join(s.state, "pods"))
	if err != nil {
		return fmt.Errorf("cannot list pods: %w", err)
	}
	var errs []error
	for _, e := range entries {
		dir := filepath.Join(s.state, "pods", e.Name())
		if _, err := os.Stat(filepath.Join(dir, "pod.json")); errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, os.RemoveAll(dir), os.RemoveAll(filepath.Join(s.run, "pods", e.Name())))
		}
	}
	return errors.Join(errs...)
}

func (s *Store) recordPath(uid types.UID, container string) string {
	return filepath.Join(s.PodDir(uid), "containers", filepath.Base(container)+".json")
}

// Record returns what a container did; a zero record before its first start.
func (s *Store) Record(uid types.UID, container string) (lifecycle.Record, error) {
	var r lifecycle.Record
	_, err := readJSON(s.recordPath(uid, container), &r)
	return r, err
}

// PutRecord writes what a container did.
func (s *Store) PutRecord(uid types.UID, container string, r lifecycle.Record) error {
	return writeJSON(s.recordPath(uid, container), &r)
}

// Tombstones are the UIDs that were stopped for good, the newest last.
func (s *Store) Tombstones() ([]types.UID, error) {
	var t []types.UID
	_, err := readJSON(filepath.Join(s.state, "tombstones.json"), &t)
	return t, err
}

// AddTombstone remembers that a pod was stopped for good.
func (s *Store) AddTombstone(uid types.UID) error {
	s.tombstones.Lock()
	defer s.tombstones.Unlock()
	t, err := s.Tombstones()
	if err != nil {
		return err
	}
	if slices.Contains(t, uid) {
		return nil
	}
	t = append(t, uid)
	t = t[max(0, len(t)-report.MaxTombstones):]
	return writeJSON(filepath.Join(s.state, "tombstones.json"), t)
}

// Number returns a counter of this name, 0 if it was never set.
func (s *Store) Number(name string) (int64, error) {
	data, err := os.ReadFile(filepath.Join(s.state, name))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("cannot read %s: %w", name, err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("cannot read %s: %w", name, err)
	}
	return n, nil
}

// SetNumber writes a counter.
func (s *Store) SetNumber(name string, n int64) error {
	return WriteFile(filepath.Join(s.state, name), []byte(strconv.FormatInt(n, 10)+"\n"), 0o600)
}

func readJSON(path string, into any) (bool, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("cannot read state: %w", err)
	}
	if err := json.Unmarshal(data, into); err != nil {
		return false, fmt.Errorf("cannot read %s: %w", path, err)
	}
	return true, nil
}

func writeJSON(path string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	return WriteFile(path, append(data, '\n'), 0o600)
}

// WriteFile replaces a file: after a crash it is the old one or the new one.
func WriteFile(path string, data []byte, mode fs.FileMode) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot write %s: %w", path, err)
		}
	}()
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(mode), f.Sync())
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
