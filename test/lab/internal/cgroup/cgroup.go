// Package cgroup makes and removes the cgroups that a lab lives in: one in
// every hierarchy of the host, v1, v2 or both, and nothing beside them.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Hierarchy is a tree of cgroups and one cgroup in it.
type Hierarchy struct {
	// Controllers is the tree's name in /proc/PID/cgroup: "" for cgroup v2,
	// "name=systemd", or v1 controllers such as "cpu,cpuacct".
	Controllers string `json:"controllers"`
	// Dir is the cgroup's folder.
	Dir string `json:"dir"`
}

// Parse finds the folders of a process' cgroups from its /proc/PID/cgroup and
// /proc/PID/mountinfo.
func Parse(cgroups, mountinfo string) ([]Hierarchy, error) {
	var all []Hierarchy
	for line := range strings.Lines(cgroups) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			return nil, fmt.Errorf("cannot read cgroup line %q", line)
		}
		dir, ok := find(mountinfo, parts[1], parts[2])
		if !ok {
			return nil, fmt.Errorf("cannot find where cgroups of %q are mounted", parts[1])
		}
		all = append(all, Hierarchy{Controllers: parts[1], Dir: dir})
	}
	if len(all) == 0 {
		return nil, errors.New("cannot find any cgroup")
	}
	return all, nil
}

func find(mountinfo, controllers, path string) (string, bool) {
	for line := range strings.Lines(mountinfo) {
		before, after, _ := strings.Cut(line, " - ")
		mount, super := strings.Fields(before), strings.Fields(after)
		if len(mount) < 5 || len(super) < 3 || !is(super[0], super[2], controllers) {
			continue
		}
		rel, err := filepath.Rel(mount[3], path)
		if err == nil && rel != ".." && !strings.HasPrefix(rel, "../") {
			return filepath.Join(mount[4], rel), true
		}
	}
	return "", false
}

func is(fstype, options, controllers string) bool {
	if controllers == "" {
		return fstype == "cgroup2"
	}
	has := strings.Split(options, ",")
	missing := func(c string) bool { return !slices.Contains(has, c) }
	return fstype == "cgroup" && !slices.ContainsFunc(strings.Split(controllers, ","), missing)
}

// Current finds the caller's own cgroups.
func Current() ([]Hierarchy, error) {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("cannot read own cgroups: %w", err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("cannot read own mounts: %w", err)
	}
	return Parse(string(own), string(mounts))
}

// Plan says which cgroups Make would make for the name.
func Plan(name string) ([]Hierarchy, error) {
	all, err := Current()
	if err != nil {
		return nil, err
	}
	for i, h := range all {
		if h.Controllers == "" && len(all) == 1 {
			h.Dir = withControllers(h.Dir)
		}
		all[i].Dir = filepath.Join(h.Dir, name)
	}
	return all, nil
}

// withControllers is the nearest v2 cgroup from dir upwards whose children get
// the memory controller. A session's own cgroup cannot give it to children, for
// it has processes.
func withControllers(dir string) string {
	for at := dir; ; at = filepath.Dir(at) {
		enabled, err := os.ReadFile(filepath.Join(at, "cgroup.subtree_control"))
		if err != nil {
			return dir
		}
		if slices.Contains(strings.Fields(string(enabled)), "memory") {
			return at
		}
	}
}

// Make makes the cgroups; those that exist are used.
func Make(all []Hierarchy) error {
	for _, h := range all {
		if err := os.Mkdir(h.Dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("cannot make cgroup: %w", err)
		}
		if !slices.Contains(strings.Split(h.Controllers, ","), "cpuset") {
			continue
		}
		// A new v1 cpuset is empty, and an empty one takes no process.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			value, err := os.ReadFile(filepath.Join(filepath.Dir(h.Dir), file))
			if err != nil {
				return fmt.Errorf("cannot read cpuset: %w", err)
			}
			if err := os.WriteFile(filepath.Join(h.Dir, file), value, 0o644); err != nil {
				return fmt.Errorf("cannot set cpuset: %w", err)
			}
		}
	}
	return nil
}

// Join moves a process into the cgroups.
func Join(all []Hierarchy, pid int) error {
	for _, h := range all {
		if err := os.WriteFile(filepath.Join(h.Dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644); err != nil {
			return fmt.Errorf("cannot join cgroup: %w", err)
		}
	}
	return nil
}

// Remove kills what is left in the cgroups and in those below them, and removes
// them. It repeats that until it succeeds or ctx ends.
func Remove(ctx context.Context, all []Hierarchy) error {
	retry := time.NewTicker(20 * time.Millisecond)
	defer retry.Stop()
	for {
		var failed error
		for _, h := range all {
			failed = errors.Join(failed, remove(h.Dir))
		}
		if failed == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("cannot remove cgroups: %w", failed)
		case <-retry.C:
		}
	}
}

func remove(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var failed error
	for _, e := range entries {
		if e.IsDir() {
			failed = errors.Join(failed, remove(filepath.Join(dir, e.Name())))
		}
	}
	pids, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENODEV) && !errors.Is(err, syscall.EOPNOTSUPP) {
		failed = errors.Join(failed, err)
	}
	for _, word := range strings.Fields(string(pids)) {
		pid, err := strconv.Atoi(word)
		if err != nil || pid == 0 {
			continue // a process of a PID namespace that is not ours to see
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			failed = errors.Join(failed, fmt.Errorf("cannot kill process %d: %w", pid, err))
		}
	}
	if failed != nil {
		return failed
	}
	if err := syscall.Rmdir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &fs.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	return nil
}

// Left lists those of the cgroups that exist.
func Left(all []Hierarchy) []string {
	var left []string
	for _, h := range all {
		if _, err := os.Stat(h.Dir); err == nil {
			left = append(left, h.Dir)
		}
	}
	return left
}
