package device

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

// hierarchy is one cgroup tree of the host and a cgroup in it.
type hierarchy struct {
	// Controllers is what /proc/self/cgroup calls the tree: "" for cgroup v2,
	// "name=systemd", or the v1 controllers that share it, such as "cpu,cpuacct".
	Controllers string
	// Dir is the folder of the cgroup.
	Dir string
}

func (h hierarchy) v2() bool { return h.Controllers == "" }

// leafCgroup takes the processes out of a v2 cgroup that is to have
// controllers for its children: the kernel does not allow both.
const leafCgroup = "lab-processes"

// execCgroup is where commands that enter the device from outside run. It is a
// child of the device's root cgroup, which under v2 cannot hold processes itself.
const execCgroup = "lab-exec"

// currentCgroups finds the folders of the cgroups that a process is in, from
// its /proc/PID/cgroup and /proc/PID/mountinfo.
func currentCgroups(cgroup, mountinfo string) ([]hierarchy, error) {
	var all []hierarchy
	for line := range strings.Lines(cgroup) {
		id, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
		controllers, path, ok2 := strings.Cut(rest, ":")
		if !ok || !ok2 || id == "" {
			return nil, fmt.Errorf("cannot read cgroup line %q", line)
		}
		dir, err := cgroupDir(mountinfo, controllers, path)
		if err != nil {
			return nil, err
		}
		all = append(all, hierarchy{Controllers: controllers, Dir: dir})
	}
	if len(all) == 0 {
		return nil, errors.New("cannot find any cgroup: is this a Linux with cgroups?")
	}
	return all, nil
}

// cgroupDir finds the folder of path, a cgroup in the tree of the controllers.
func cgroupDir(mountinfo, controllers, path string) (string, error) {
	for line := range strings.Lines(mountinfo) {
		before, after, ok := strings.Cut(line, " - ")
		mount, super := strings.Fields(before), strings.Fields(after)
		if !ok || len(mount) < 5 || len(super) < 3 || !carries(super[0], super[2], controllers) {
			continue
		}
		root, point := mount[3], mount[4]
		rel, err := filepath.Rel(root, path)
		if err != nil || rel == ".." || strings.HasPrefix(rel, "../") || strings.HasPrefix(root, "/..") {
			continue // a mount of another part of the tree
		}
		return filepath.Join(point, rel), nil
	}
	name := controllers
	if name == "" {
		name = "cgroup v2"
	}
	return "", fmt.Errorf("cannot find a mount of %s that shows %s", name, path)
}

// carries tells whether a file system of this type and with these options is
// the tree of the controllers.
func carries(fstype, options, controllers string) bool {
	if controllers == "" {
		return fstype == "cgroup2"
	}
	if fstype != "cgroup" {
		return false
	}
	has := strings.Split(options, ",")
	for c := range strings.SplitSeq(controllers, ",") {
		if !slices.Contains(has, c) {
			return false
		}
	}
	return true
}

// makeCgroups makes a cgroup of that name below the caller's own in every hierarchy.
func makeCgroups(name string) ([]hierarchy, error) {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("cannot read own cgroups: %w", err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("cannot read own mounts: %w", err)
	}
	current, err := currentCgroups(string(own), string(mounts))
	if err != nil {
		return nil, err
	}
	var made []hierarchy
	for _, h := range current {
		if h.v2() {
			if filepath.Base(h.Dir) == leafCgroup {
				h.Dir = filepath.Dir(h.Dir)
			}
			// Beside v1 trees, the v2 tree has to stay without controllers: crun insists.
			if len(current) == 1 {
				if err := enableControllers(h.Dir); err != nil {
					return made, err
				}
			}
		}
		h.Dir = filepath.Join(h.Dir, name)
		made = append(made, h)
		if err := makeCgroup(h); err != nil {
			return made, err
		}
	}
	return made, nil
}

func makeCgroup(h hierarchy) error {
	if err := os.Mkdir(h.Dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("cannot make cgroup: %w", err)
	}
	if !slices.Contains(strings.Split(h.Controllers, ","), "cpuset") {
		return nil
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
	return nil
}

// enableControllers gives the children of a v2 cgroup all controllers that the
// cgroup itself has.
func enableControllers(dir string) error {
	available, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("cannot read cgroup controllers: %w", err)
	}
	for _, controller := range strings.Fields(string(available)) {
		err := enableController(dir, controller)
		if errors.Is(err, syscall.EBUSY) {
			if err := emptyIntoLeaf(dir); err != nil {
				return err
			}
			err = enableController(dir, controller)
		}
		if err != nil {
			return fmt.Errorf("cannot enable cgroup controller %s: %w", controller, err)
		}
	}
	return nil
}

func enableController(dir, controller string) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0o644)
}

// emptyIntoLeaf moves the processes of a v2 cgroup into a child of it. It
// refuses to touch processes outside of the caller's PID namespace.
func emptyIntoLeaf(dir string) error {
	leaf := hierarchy{Dir: filepath.Join(dir, leafCgroup)}
	pids, err := processes(dir)
	if err != nil {
		return err
	}
	if slices.Contains(pids, 0) {
		return fmt.Errorf("cannot use cgroup %s: foreign processes are in it", dir)
	}
	if err := makeCgroup(leaf); err != nil {
		return err
	}
	for _, pid := range pids {
		if err := join(leaf, pid); err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
	}
	return nil
}

// join moves a process into the cgroup.
func join(h hierarchy, pid int) error {
	if err := os.WriteFile(filepath.Join(h.Dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644); err != nil {
		return fmt.Errorf("cannot join cgroup: %w", err)
	}
	return nil
}

// joinExecCgroup moves a process into the cgroup for commands from outside, in
// the device's cgroup h. The device's systemd removes it when it is empty, which
// may happen at any moment, so it is made for every command.
func joinExecCgroup(h hierarchy, pid int) error {
	const attempts = 10
	h.Dir = filepath.Join(h.Dir, execCgroup)
	var err error
	for range attempts {
		if err = makeCgroup(h); err == nil {
			err = join(h, pid)
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENODEV) {
			return err
		}
	}
	return err
}

// processes lists the processes of a cgroup; 0 is one that cannot be seen from here.
func processes(dir string) ([]int, error) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil, fmt.Errorf("cannot list processes of cgroup: %w", err)
	}
	var pids []int
	for _, word := range strings.Fields(string(b)) {
		pid, err := strconv.Atoi(word)
		if err != nil {
			return nil, fmt.Errorf("cannot read process %q of cgroup %s: %w", word, dir, err)
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// removeCgroups kills what is left in the cgroups and removes them. A killed
// process leaves its cgroup only when it has quite gone, so this may take a moment.
func removeCgroups(ctx context.Context, all []hierarchy) error {
	retry := time.NewTicker(10 * time.Millisecond)
	defer retry.Stop()
	for {
		var failed error
		for _, h := range all {
			failed = errors.Join(failed, removeCgroup(h.Dir))
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

func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var failed error
	for _, entry := range entries {
		if entry.IsDir() {
			failed = errors.Join(failed, removeCgroup(filepath.Join(dir, entry.Name())))
		}
	}
	if failed != nil {
		return failed
	}
	pids, err := processes(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENODEV) {
		return err
	}
	for _, pid := range pids {
		if pid == 0 || pid == os.Getpid() {
			continue
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("cannot kill process %d: %w", pid, err)
		}
	}
	if err := syscall.Rmdir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &fs.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	return nil
}
