package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jetbridge/jetbridge/test/lab/internal/binaries"
	"github.com/jetbridge/jetbridge/test/lab/internal/cgroup"
	"github.com/jetbridge/jetbridge/test/lab/internal/layout"
)

// endTimeout is how long the kernel may take to let go of all processes.
const endTimeout = time.Minute

// Down ends a lab and proves that nothing is left of it: one line for each
// thing that was checked. What is left is an error.
func Down(ctx context.Context, lab layout.Lab, out io.Writer) error {
	unlock, err := lockLab(ctx, lab)
	if err != nil {
		return err
	}
	defer unlock()
	c, err := lab.Load()
	if errors.Is(err, layout.ErrNoLab) {
		c = layout.Config{Name: lab.Name, Dir: lab.Dir}
		// A lab that ended before it wrote anything down can have made only these.
		if c.Cgroups, err = cgroup.Plan("jetbridge-lab-" + lab.Name); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	before, err := namespaces(c.Cgroups)
	if err != nil {
		return err
	}
	if err := end(ctx, c); err != nil {
		return err
	}
	if err := prove(c, before, out); err != nil {
		return err
	}
	if err := os.Remove(lockFile(lab)); err != nil {
		return fmt.Errorf("cannot remove lock: %w", err)
	}
	// The folder of all labs goes with the last one.
	if err := os.Remove(filepath.Dir(lab.Dir)); err != nil && !errors.Is(err, syscall.ENOTEMPTY) {
		return fmt.Errorf("cannot remove folder of labs: %w", err)
	}
	return nil
}

func lockFile(lab layout.Lab) string {
	return filepath.Join(filepath.Dir(lab.Dir), "."+lab.Name+".lock")
}

func lockLab(ctx context.Context, lab layout.Lab) (func(), error) {
	return binaries.Lock(ctx, lockFile(lab))
}

// end kills all of a lab and removes its files.
func end(ctx context.Context, c layout.Config) error {
	if alive(c.Init) {
		// The kernel kills a PID namespace with its first process.
		if err := syscall.Kill(c.Init.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("cannot kill the lab: %w", err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, endTimeout)
	defer cancel()
	if err := cgroup.Remove(ctx, c.Cgroups); err != nil {
		return err
	}
	// Its end as a child is its parent's affair: on some hosts nobody reaps it.
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for alive(c.Init) {
		select {
		case <-ctx.Done():
			return fmt.Errorf("cannot end the lab: process %d lives on", c.Init.PID)
		case <-tick.C:
		}
	}
	if err := os.RemoveAll(c.Dir); err != nil {
		return fmt.Errorf("cannot remove state folder: %w", err)
	}
	return nil
}

// namespaces are all namespaces of the processes in the cgroups and below that
// are not the caller's own.
func namespaces(all []cgroup.Hierarchy) ([]string, error) {
	var found []string
	for _, h := range all {
		err := filepath.WalkDir(h.Dir, func(path string, entry os.DirEntry, err error) error {
			if err != nil || entry.Name() != "cgroup.procs" {
				return ignoreGone(err)
			}
			b, err := os.ReadFile(path)
			if err != nil {
				return ignoreGone(err)
			}
			for _, pid := range strings.Fields(string(b)) {
				found = append(found, namespacesOf(pid)...)
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("cannot look into cgroup: %w", err)
		}
	}
	slices.Sort(found)
	found = slices.Compact(found)
	own := namespacesOf("self")
	return slices.DeleteFunc(found, func(ns string) bool { return slices.Contains(own, ns) }), nil
}

func ignoreGone(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENODEV) {
		return nil
	}
	return err
}

// namespacesOf lists a process' namespaces as the kernel names them; none if it is gone.
func namespacesOf(pid string) []string {
	var all []string
	for _, kind := range []string{"pid", "mnt", "net", "uts", "ipc", "cgroup"} {
		if ns, err := os.Readlink(filepath.Join("/proc", pid, "ns", kind)); err == nil {
			all = append(all, ns)
		}
	}
	return all
}

// check is one thing that must not be left.
type check struct {
	what string
	left []string
	err  error
}

// prove looks for everything that a lab makes.
func prove(c layout.Config, before []string, out io.Writer) error {
	var failed error
	for _, check := range checks(c, before) {
		fmt.Fprintln(out, check.line())
		if check.err != nil {
			failed = errors.Join(failed, check.err)
		} else if len(check.left) > 0 {
			failed = errors.Join(failed, fmt.Errorf("left of lab %s: %s %s", c.Name, check.what, strings.Join(check.left, ", ")))
		}
	}
	return failed
}

func (c check) line() string {
	switch {
	case c.err != nil:
		return fmt.Sprintf("%-12s cannot tell: %v", c.what, c.err)
	case len(c.left) > 0:
		return fmt.Sprintf("%-12s LEFT: %s", c.what, strings.Join(c.left, ", "))
	}
	return fmt.Sprintf("%-12s none left", c.what)
}

func checks(c layout.Config, before []string) []check {
	processes := check{what: "processes"}
	spaces := check{what: "namespaces"}
	pids, err := os.ReadDir("/proc")
	processes.err = err
	for _, entry := range pids {
		if _, err := strconv.Atoi(entry.Name()); err != nil {
			continue
		}
		if b, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "stat")); err != nil || isZombie(string(b)) {
			continue
		}
		for _, ns := range namespacesOf(entry.Name()) {
			if slices.Contains(before, ns) {
				processes.left = append(processes.left, entry.Name())
				spaces.left = append(spaces.left, ns)
			}
		}
	}
	slices.Sort(processes.left)
	processes.left = slices.Compact(processes.left)
	slices.Sort(spaces.left)
	spaces.left = slices.Compact(spaces.left)

	mounts := check{what: "mounts"}
	b, err := os.ReadFile("/proc/self/mountinfo")
	mounts.err = err
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, c.Dir+"/") {
			mounts.left = append(mounts.left, strings.TrimSpace(line))
		}
	}
	interfaces := check{what: "interfaces"}
	links, err := os.ReadDir("/sys/class/net")
	interfaces.err = err
	for _, link := range links {
		if link.Name() == layout.Bridge {
			interfaces.left = append(interfaces.left, link.Name())
		}
	}
	files := check{what: "files"}
	if _, err := os.Lstat(c.Dir); err == nil {
		files.left = []string{c.Dir}
	}
	return []check{processes, spaces, mounts, interfaces, {what: "cgroups", left: cgroup.Left(c.Cgroups)}, files}
}
