package device

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const hybridMounts = `31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
35 31 0:32 /other /mnt/memory rw,relatime - cgroup cgroup rw,memory
36 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:5 master:1 - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
`

func TestCurrentCgroups(t *testing.T) {
	for _, test := range []struct {
		name, cgroup, mounts string
		want                 []hierarchy
		problem              string
	}{
		{
			name:   "hybrid",
			cgroup: "4:memory:/a/b\n3:cpuset:/\n2:cpu,cpuacct:/x\n1:name=systemd:/user.slice\n0::/user.slice\n",
			mounts: hybridMounts,
			want: []hierarchy{
				{"memory", "/sys/fs/cgroup/memory/a/b"},
				{"cpuset", "/sys/fs/cgroup/cpuset"},
				{"cpu,cpuacct", "/sys/fs/cgroup/cpu,cpuacct/x"},
				{"name=systemd", "/sys/fs/cgroup/systemd/user.slice"},
				{"", "/sys/fs/cgroup/unified/user.slice"},
			},
		},
		{
			name:   "cgroup v2 alone",
			cgroup: "0::/lab.slice/lab\n",
			mounts: "26 25 0:23 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
			want:   []hierarchy{{"", "/sys/fs/cgroup/lab.slice/lab"}},
		},
		{
			name:   "mount of a part",
			cgroup: "0::/docker/abc/lab\n",
			mounts: "26 25 0:23 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup rw\n",
			want:   []hierarchy{{"", "/sys/fs/cgroup/lab"}},
		},
		{
			name:    "mount from before the cgroup namespace",
			cgroup:  "0::/\n",
			mounts:  "26 25 0:23 /../.. /sys/fs/cgroup rw - cgroup2 cgroup rw\n",
			problem: "cannot find a mount of cgroup v2 that shows /",
		},
		{name: "not mounted", cgroup: "7:devices:/\n", mounts: hybridMounts, problem: "cannot find a mount of devices"},
		{name: "none", mounts: hybridMounts, problem: "cannot find any cgroup"},
		{name: "garbage", cgroup: "what?\n", mounts: hybridMounts, problem: "cannot read cgroup line"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := currentCgroups(test.cgroup, test.mounts)
			if test.problem != "" {
				require.ErrorContains(t, err, test.problem)
				return
			}
			require.NoError(t, err)
			assert.Equal(t, test.want, got)
		})
	}
}

func TestMakeCgroupCopiesCpuset(t *testing.T) {
	parent := t.TempDir()
	for file, content := range map[string]string{"cpuset.cpus": "0-1\n", "cpuset.mems": "0\n"} {
		require.NoError(t, os.WriteFile(filepath.Join(parent, file), []byte(content), 0o644))
	}
	h := hierarchy{"cpu,cpuset", filepath.Join(parent, "dev")}
	require.NoError(t, makeCgroup(h))
	require.NoError(t, makeCgroup(h), "again is no error")
	b, err := os.ReadFile(filepath.Join(h.Dir, "cpuset.cpus"))
	require.NoError(t, err)
	assert.Equal(t, "0-1\n", string(b))
	assert.Error(t, makeCgroup(hierarchy{"", filepath.Join(parent, "no", "such")}))
}

func TestProcesses(t *testing.T) {
	dir := t.TempDir()
	procs := filepath.Join(dir, "cgroup.procs")
	require.NoError(t, os.WriteFile(procs, []byte("1\n0\n42\n"), 0o644))
	pids, err := processes(dir)
	require.NoError(t, err)
	assert.Equal(t, []int{1, 0, 42}, pids)
	require.ErrorContains(t, emptyIntoLeaf(dir), "foreign processes", "what cannot be seen is not moved")
	require.NoError(t, os.WriteFile(procs, []byte("x\n"), 0o644))
	_, err = processes(dir)
	assert.Error(t, err)
}

func TestRemoveCgroups(t *testing.T) {
	require.NoError(t, removeCgroups(t.Context(), []hierarchy{{"", filepath.Join(t.TempDir(), "gone")}}))
	assert.NoError(t, removeCgroups(t.Context(), nil))
}
