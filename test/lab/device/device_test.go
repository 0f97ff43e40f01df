package device

import (
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func validOptions() Options {
	return Options{
		Name: "edge-1", Tree: "/cache/tree", Dir: "/state/edge-1", Bridge: "edge0",
		Address: netip.MustParsePrefix("10.77.0.11/24"), Gateway: netip.MustParseAddr("10.77.0.1"),
		Cgroup: "edge-1", Registry: "10.77.0.1:5000", Exec: "/bin/lab",
	}
}

func TestValidate(t *testing.T) {
	require.NoError(t, validOptions().validate())
	for what, change := range map[string]func(*Options){
		"name":             func(o *Options) { o.Name = "Edge" },
		"name with dots":   func(o *Options) { o.Name = ".." },
		"no name":          func(o *Options) { o.Name = "" },
		"address":          func(o *Options) { o.Address = netip.Prefix{} },
		"gateway":          func(o *Options) { o.Gateway = netip.Addr{} },
		"bridge":           func(o *Options) { o.Bridge = "" },
		"program":          func(o *Options) { o.Exec = "" },
		"cgroup":           func(o *Options) { o.Cgroup = "a/b" },
		"no cgroup":        func(o *Options) { o.Cgroup = "" },
		"relative tree":    func(o *Options) { o.Tree = "tree" },
		"colon in tree":    func(o *Options) { o.Tree = "/a:b" },
		"comma in dir":     func(o *Options) { o.Dir = "/a,b" },
		"backslash in dir": func(o *Options) { o.Dir = `/a\b` },
	} {
		o := validOptions()
		change(&o)
		assert.Error(t, o.validate(), what)
	}
}

func TestSettings(t *testing.T) {
	f := settings(validOptions(), identity{MachineID: "0123"})
	assert.Equal(t, "edge-1\n", f.Regular["/etc/hostname"])
	assert.Equal(t, "0123\n", f.Regular["/etc/machine-id"])
	assert.Contains(t, f.Regular["/etc/hosts"], "127.0.0.1 localhost edge-1\n", "sudo waits long for a host that it cannot resolve")
	assert.Equal(t, registries("10.77.0.1:5000"), f.Regular["/etc/containers/registries.conf.d/lab.conf"])
	assert.Contains(t, f.Regular["/etc/systemd/journald.conf.d/lab.conf"], "Storage=persistent")
	assert.Equal(t, "/dev/null", f.Symlinks["/etc/systemd/system/getty@.service"])
	assert.Equal(t, "/usr/lib/systemd/system/podman.socket", f.Symlinks["/etc/systemd/system/sockets.target.wants/podman.socket"])
	o := validOptions()
	o.Registry = ""
	assert.NotContains(t, settings(o, identity{}).Regular, "/etc/containers/registries.conf.d/lab.conf")
}

func TestRandomIDs(t *testing.T) {
	assert.Regexp(t, `^[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}$`, randomID())
	assert.Regexp(t, `^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`, randomUUID())
	one, other := randomID(), randomID()
	assert.NotEqual(t, one, other)
}

func TestNames(t *testing.T) {
	short, long := namesFor("edge-1"), namesFor("a-device-with-a-very-long-name")
	assert.Equal(t, "ve-edge-1", short.host)
	for _, names := range []linkNames{short, long} {
		for _, name := range []string{names.host, names.inner, names.outer} {
			assert.LessOrEqual(t, len(name), 15, "the kernel's limit")
		}
	}
	assert.NotEqual(t, long, namesFor("a-device-with-a-very-long-name2"))
	mac := hardwareAddr("edge-1")
	assert.Len(t, mac, 6)
	assert.Equal(t, byte(2), mac[0]&3, "one station, locally administered")
	assert.Equal(t, mac, hardwareAddr("edge-1"))
	assert.NotEqual(t, mac, hardwareAddr("edge-2"))
}

func TestLinkState(t *testing.T) {
	dir := t.TempDir()
	s, err := ReadLinkState(dir)
	require.NoError(t, err)
	assert.Equal(t, LinkState{}, s)
	assert.False(t, s.impaired())
	want := LinkState{Down: true, LossPercent: 36, Delay: 200 * time.Millisecond}
	require.NoError(t, WriteLinkState(dir, want))
	s, err = ReadLinkState(dir)
	require.NoError(t, err)
	assert.Equal(t, want, s)
	assert.True(t, s.impaired())
	i := s.perDirection()
	assert.InDelta(t, 0.2, i.loss, 1e-9, "0.8 × 0.8 of the round trips survive")
	assert.Equal(t, 100*time.Millisecond, i.delay)
	assert.InDelta(t, 1, LinkState{LossPercent: 100}.perDirection().loss, 0)
}

func TestConsole(t *testing.T) {
	log := make(chan string, 1)
	c, err := openConsole(writerFunc(func(p []byte) (int, error) {
		log <- string(p)
		return len(p), nil
	}))
	require.NoError(t, err)
	_, err = c.slave.WriteString("one\ntwo\n")
	require.NoError(t, err)
	assert.Equal(t, "one\ntwo\n", <-log, "not altered by the terminal")
	require.NoError(t, c.close())
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
