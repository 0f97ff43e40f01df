package cgroup

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const hybridMounts = `30 20 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw
31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
33 30 0:29 /outer /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
34 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
`

func TestParse(t *testing.T) {
	got, err := Parse("5:memory:/a/b\n3:cpu,cpuacct:/\n2:name=systemd:/outer/in\n0::/c\n", hybridMounts)
	require.NoError(t, err)
	assert.Equal(t, []Hierarchy{
		{"memory", "/sys/fs/cgroup/memory/a/b"},
		{"cpu,cpuacct", "/sys/fs/cgroup/cpu,cpuacct"},
		{"name=systemd", "/sys/fs/cgroup/systemd/in"},
		{"", "/sys/fs/cgroup/unified/c"},
	}, got)
}

func TestParseErrors(t *testing.T) {
	for _, text := range []string{"", "nonsense\n", "9:pids:/\n", "2:name=systemd:/elsewhere\n"} {
		_, err := Parse(text, hybridMounts)
		require.Error(t, err, text)
	}
}
