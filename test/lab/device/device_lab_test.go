//go:build lab

package device

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/jetbridge/jetbridge/test/lab/rootfs"
)

// These tests boot real devices. They need root, and run in namespaces that
// TestMain makes, as the lab does. The program of the test is also the program
// that devices run again.
//
//	go test -tags lab ./test/lab/device
//
// LAB_CACHE is where the base trees are made or found.

const (
	testBridge  = "edge0"
	testGateway = "10.77.0.1"
	insideVar   = "LAB_DEVICE_TEST_INSIDE"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "device-init":
			fmt.Fprintln(os.Stderr, Init(os.Args[2:]))
			os.Exit(1)
		case "device-exec":
			os.Exit(ExecInit(os.Args[2:]))
		}
	}
	if os.Getenv(insideVar) == "" {
		os.Exit(outside())
	}
	if err := inside(); err != nil {
		fmt.Fprintln(os.Stderr, "cannot set the test up:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// outside runs the tests in namespaces of their own, and compares the host before and after.
func outside() int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "tests with the tag lab need root")
		return 1
	}
	before, err := hostState()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), insideVar+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:   syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
		Unshareflags: syscall.CLONE_NEWNS,
		Pdeathsig:    syscall.SIGKILL,
	}
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "tests failed:", err)
		return 1
	}
	after, err := hostState()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if before != after {
		fmt.Fprintf(os.Stderr, "the host is not as it was.\nbefore:\n%s\nafter:\n%s\n", before, after)
		return 1
	}
	return 0
}

// hostState describes what a device could leave on the host.
func hostState() (string, error) {
	var s strings.Builder
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	s.Write(mounts)
	links, err := netlink.LinkList()
	if err != nil {
		return "", err
	}
	for _, link := range links {
		fmt.Fprintln(&s, link.Attrs().Name)
	}
	err = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && d.IsDir() && strings.Contains(path, "devicetest-") {
			fmt.Fprintln(&s, path)
		}
		return err
	})
	return s.String(), err
}

func inside() error {
	if err := syscall.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = testBridge
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	if err := netlink.LinkAdd(bridge); err != nil {
		return err
	}
	address, err := netlink.ParseAddr(testGateway + "/24")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(bridge, address); err != nil {
		return err
	}
	return netlink.LinkSetUp(bridge)
}

func cacheDir(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("LAB_CACHE"); dir != "" {
		return dir
	}
	dir, err := os.UserCacheDir()
	require.NoError(t, err)
	return filepath.Join(dir, "jetbridge", "rootfs")
}

func testOptions(t *testing.T, name string, host byte) Options {
	t.Helper()
	tree, err := rootfs.Ensure(t.Context(), rootfs.Device(), cacheDir(t), os.Stderr)
	require.NoError(t, err)
	self, err := os.Executable()
	require.NoError(t, err)
	log := &syncBuffer{}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("console of %s:\n%s", name, log)
		}
	})
	return Options{
		Name: name, Tree: tree, Dir: filepath.Join(t.TempDir(), name), Bridge: testBridge,
		Address: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, 0, host}), 24),
		Gateway: netip.MustParseAddr(testGateway), Cgroup: "devicetest-" + name,
		Registry: testGateway + ":5000", Log: log, Exec: self,
	}
}

func bootTest(t *testing.T, o Options) *Device {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	start := time.Now()
	d, err := Boot(ctx, o)
	require.NoError(t, err)
	t.Logf("%s booted in %s", o.Name, time.Since(start).Round(time.Millisecond))
	t.Cleanup(func() { assert.NoError(t, d.Kill()) })
	return d
}

// run runs a shell script in the device and returns its output.
func run(t *testing.T, d *Device, script string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var out bytes.Buffer
	code, err := d.Exec(ctx, ExecOptions{Args: []string{"/bin/sh", "-c", script}, Stdout: &out, Stderr: &out})
	require.NoError(t, err)
	return strings.TrimSpace(out.String()), code
}

func mustRun(t *testing.T, d *Device, script string) string {
	t.Helper()
	out, code := run(t, d, script)
	require.Zero(t, code, "%s\n%s", script, out)
	return out
}

// busyboxTar is an image's file system with a static busybox.
func busyboxTar(t *testing.T) io.Reader {
	t.Helper()
	tree, err := rootfs.Ensure(t.Context(), rootfs.Services(), cacheDir(t), os.Stderr)
	require.NoError(t, err)
	program, err := os.ReadFile(filepath.Join(tree, "usr/bin/busybox"))
	require.NoError(t, err)
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	require.NoError(t, w.WriteHeader(&tar.Header{Name: "bin/busybox", Mode: 0o755, Size: int64(len(program))}))
	_, err = w.Write(program)
	require.NoError(t, err)
	for _, name := range []string{"sh", "sleep", "cat", "dd", "echo", "head", "tail", "nc"} {
		require.NoError(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + name, Linkname: "busybox", Mode: 0o777}))
	}
	require.NoError(t, w.Close())
	return &b
}

func importBusybox(t *testing.T, d *Device) {
	t.Helper()
	var out bytes.Buffer
	code, err := d.Exec(t.Context(), ExecOptions{
		Args:  []string{"podman", "import", "--change", "CMD [\"/bin/sh\"]", "-", "localhost/busybox"},
		Stdin: busyboxTar(t), Stdout: &out, Stderr: &out,
	})
	require.NoError(t, err)
	require.Zero(t, code, out.String())
}

func TestDevice(t *testing.T) {
	o := testOptions(t, "dev-one", 11)
	d := bootTest(t, o)

	t.Run("system is running", func(t *testing.T) {
		out, _ := run(t, d, "systemctl is-system-running --wait")
		assert.Equal(t, "running", out, "%s", mustRun(t, d, "systemctl --failed --no-pager; systemctl list-jobs --no-pager"))
		assert.Equal(t, "dev-one", mustRun(t, d, "hostname"))
		assert.Equal(t, "active", mustRun(t, d, "systemctl is-active podman.socket"))
		assert.Contains(t, mustRun(t, d, "journalctl -b --no-pager"), "Reached target basic.target")
	})
	t.Run("exec", func(t *testing.T) {
		var out, errOut bytes.Buffer
		code, err := d.Exec(t.Context(), ExecOptions{
			Args:  []string{"/bin/sh", "-c", "cat; echo problem >&2; exit 42"},
			Stdin: strings.NewReader("hello"), Stdout: &out, Stderr: &errOut,
		})
		require.NoError(t, err)
		assert.Equal(t, 42, code)
		assert.Equal(t, "hello", out.String())
		assert.Equal(t, "problem\n", errOut.String())
		_, code = run(t, d, "kill -9 $$")
		assert.Equal(t, 137, code)
		code, err = d.Exec(t.Context(), ExecOptions{Args: []string{"no-such-command"}})
		require.NoError(t, err)
		assert.Equal(t, 127, code)
		assert.NotContains(t, mustRun(t, d, "env"), insideVar)
		for line := range strings.Lines(mustRun(t, d, "cat /proc/self/cgroup")) {
			assert.Truef(t, strings.HasSuffix(strings.TrimSpace(line), ":/"+execCgroup), "in the device's cgroup: %s", line)
		}
		ctx, cancel := context.WithCancel(t.Context())
		r, w, err := os.Pipe()
		require.NoError(t, err)
		defer r.Close()
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err = d.Exec(ctx, ExecOptions{Args: []string{"/bin/sh", "-c", "echo up; exec sleep 1000"}, Stdout: w})
		})
		_, readErr := r.Read(make([]byte, 3))
		require.NoError(t, readErr)
		cancel()
		wg.Wait()
		require.NoError(t, w.Close())
		require.ErrorIs(t, err, context.Canceled)
		_, readErr = r.Read(make([]byte, 1))
		assert.ErrorIs(t, readErr, io.EOF, "the command has ended too")
	})
	t.Run("host is out of reach", func(t *testing.T) {
		assert.Equal(t, "ro", mustRun(t, d, "findmnt -no OPTIONS /proc/sys | cut -d, -f1"))
		assert.Equal(t, "ro", mustRun(t, d, "findmnt -no OPTIONS /sys | cut -d, -f1"))
		// Only looked at, not tried: the clock and the modules are the host's.
		for _, pid := range []string{"1", "self"} {
			bounding, err := strconv.ParseUint(mustRun(t, d, "awk '/^CapBnd/ {print $2}' /proc/"+pid+"/status"), 16, 64)
			require.NoError(t, err)
			assert.Zero(t, bounding&(1<<unix.CAP_SYS_TIME|1<<unix.CAP_SYS_MODULE), pid)
			assert.NotZero(t, bounding&(1<<unix.CAP_SYS_ADMIN), pid)
		}
		mustRun(t, d, "echo 1 >/proc/sys/net/ipv4/ip_forward")
	})
	t.Run("podman", func(t *testing.T) {
		assert.Equal(t, "overlay", mustRun(t, d, "podman info --format '{{.Store.GraphDriverName}}'"))
		importBusybox(t, d)
		assert.Equal(t, "hello", mustRun(t, d, "podman run --rm localhost/busybox echo hello"))
		mustRun(t, d, "podman run -d --name web -p 8080:80 localhost/busybox sh -c 'while echo ok | nc -l -p 80; do :; done'")
		// The container is reached through the published port, from the lab.
		require.Eventually(t, func() bool {
			var answer string
			answer, err := dialRead(t.Context(), "10.77.0.11:8080")
			return err == nil && strings.Contains(answer, "ok")
		}, 20*time.Second, 100*time.Millisecond)
		mustRun(t, d, "podman rm -f -t 0 web")
		// A process that takes more memory than its limit is killed.
		out, code := run(t, d, "podman run --name hog --memory 32m --memory-swap 32m localhost/busybox sh -c 'head -c 100m /dev/zero | tail >/dev/null; exit 5'")
		require.NotZero(t, code, out)
		assert.Equal(t, "true", mustRun(t, d, "podman inspect hog --format '{{.State.OOMKilled}}'"))
		assert.Equal(t, strconv.Itoa(32<<20), mustRun(t, d, "podman run --rm --memory 32m localhost/busybox sh -c "+
			"'cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max'"))
	})
	t.Run("link", func(t *testing.T) {
		ctx := t.Context()
		ping := func(args string) (loss float64, avg float64) { return pingStats(t, d, args) }
		loss, avg := ping("-c 5 -i 0.05")
		assert.Zero(t, loss)
		assert.Less(t, avg, 20.0)

		require.NoError(t, d.Link(ctx, false))
		loss, _ = ping("-c 3 -i 0.05 -W 1")
		assert.InDelta(t, 100, loss, 0)
		require.NoError(t, d.Link(ctx, true))
		mustRun(t, d, "ping -c 1 -w 10 "+testGateway)

		require.NoError(t, d.Delay(ctx, 200*time.Millisecond))
		_, avg = ping("-c 10 -i 0.05")
		assert.InDelta(t, 200, avg, 50)
		require.NoError(t, d.Delay(ctx, 0))
		require.NoError(t, d.Loss(ctx, 20))
		loss, _ = ping("-c 500 -i 0.004 -W 1")
		assert.InDelta(t, 20, loss, 8)
		// TCP with its checksums gets through all the same.
		assert.Equal(t, strings.Repeat("x", 1<<18), serveAndFetch(t, d, strings.Repeat("x", 1<<18)))
		require.NoError(t, d.Loss(ctx, 0))
		loss, avg = ping("-c 50 -i 0.01")
		assert.Zero(t, loss)
		assert.Less(t, avg, 20.0)
		require.Error(t, d.Loss(ctx, 101))
		assert.Error(t, d.Delay(ctx, -time.Second))
	})
}

func TestReboot(t *testing.T) {
	o := testOptions(t, "dev-reboot", 12)
	d := bootTest(t, o)
	importBusybox(t, d)
	mustRun(t, d, "echo kept >/etc/kept; echo kept >/var/lib/kept; sync")
	id, boot := mustRun(t, d, "cat /etc/machine-id"), mustRun(t, d, "cat /proc/sys/kernel/random/boot_id")
	mac := mustRun(t, d, "cat /sys/class/net/eth0/address")

	t.Log("clean poweroff, with the link pulled")
	require.NoError(t, d.Link(t.Context(), false))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	start := time.Now()
	require.NoError(t, d.Shutdown(ctx))
	t.Logf("off after %s", time.Since(start).Round(time.Millisecond))
	assert.False(t, d.WantsReboot())
	assertNoTrace(t, o)
	_, err := d.Exec(ctx, ExecOptions{Args: []string{"true"}})
	require.ErrorContains(t, err, "is off")

	d = bootTest(t, o)
	assert.Equal(t, "kept\nkept", mustRun(t, d, "cat /etc/kept /var/lib/kept"))
	assert.Equal(t, id, mustRun(t, d, "cat /etc/machine-id"))
	assert.NotEqual(t, boot, mustRun(t, d, "cat /proc/sys/kernel/random/boot_id"))
	assert.Equal(t, mac, mustRun(t, d, "cat /sys/class/net/eth0/address"))
	_, code := run(t, d, "ping -c 1 -W 1 "+testGateway)
	assert.NotZero(t, code, "the link is still pulled")
	require.NoError(t, d.Link(t.Context(), true))
	mustRun(t, d, "ping -c 1 -w 10 "+testGateway)
	boots := mustRun(t, d, "journalctl --list-boots --no-pager -q | grep -v IDX | wc -l")
	assert.Equal(t, "2", boots, "the journal has both boots")
	mustRun(t, d, "podman run --rm localhost/busybox echo still here")

	t.Log("power cut")
	require.NoError(t, d.Delay(t.Context(), 100*time.Millisecond))
	require.NoError(t, d.Kill())
	require.NoError(t, d.Wait())
	assertNoTrace(t, o)
	d = bootTest(t, o)
	_, avg := pingStats(t, d, "-c 5 -i 0.05")
	assert.InDelta(t, 100, avg, 40, "the link is still slow")
	require.NoError(t, d.Delay(t.Context(), 0))
	mustRun(t, d, "podman run --rm localhost/busybox echo still here")

	t.Log("reboot from inside")
	run(t, d, "systemctl reboot --no-block") // whose exit code may get lost with the device
	require.NoError(t, d.Wait())
	assert.True(t, d.WantsReboot())
	assertNoTrace(t, o)
	require.NoError(t, d.Loss(t.Context(), 50), "the link of a device that is off can be changed")
	state, err := ReadLinkState(o.Dir)
	require.NoError(t, err)
	assert.Equal(t, LinkState{LossPercent: 50}, state)
}

func TestTwoDevices(t *testing.T) {
	one, two := testOptions(t, "dev-a", 13), testOptions(t, "dev-b", 14)
	assert.Equal(t, one.Tree, two.Tree)
	var wg sync.WaitGroup
	devices, errs := [2]*Device{}, [2]error{}
	for i, o := range []Options{one, two} {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			devices[i], errs[i] = Boot(ctx, o)
		})
	}
	wg.Wait()
	for i := range devices {
		require.NoError(t, errs[i])
		t.Cleanup(func() { assert.NoError(t, devices[i].Kill()) })
	}
	mustRun(t, devices[0], "ping -c 1 -w 5 10.77.0.14")
	assert.NotEqual(t, mustRun(t, devices[0], "cat /etc/machine-id"), mustRun(t, devices[1], "cat /etc/machine-id"))
	mustRun(t, devices[0], "touch /etc/only-here")
	mustRun(t, devices[1], "test ! -e /etc/only-here")
	require.NoError(t, devices[0].Kill())
	mustRun(t, devices[1], "systemctl is-active dbus")
}

func TestBootFails(t *testing.T) {
	o := testOptions(t, "dev-fails", 15)
	o.Bridge = "nosuch0"
	_, err := Boot(t.Context(), o)
	require.ErrorContains(t, err, "cannot find bridge nosuch0")
	assertNoTrace(t, o)
	o.Bridge = testBridge
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err = Boot(ctx, o)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	assertNoTrace(t, o)
	o.Tree = t.TempDir()
	_, err = Boot(t.Context(), o)
	require.ErrorContains(t, err, "it was made from")
}

func assertNoTrace(t *testing.T, o Options) {
	t.Helper()
	names := namesFor(o.Name)
	for _, name := range []string{names.host, names.inner, names.outer} {
		_, err := netlink.LinkByName(name)
		require.ErrorAs(t, err, &netlink.LinkNotFoundError{}, name)
	}
	found, err := filepath.Glob("/sys/fs/cgroup/*/" + o.Cgroup)
	require.NoError(t, err)
	assert.Empty(t, found)
}

var pingSummary = regexp.MustCompile(`([\d.]+)% packet loss`)
var pingTimes = regexp.MustCompile(`= [\d.]+/([\d.]+)/`)

// pingStats pings the gateway from the device, and returns the loss in percent
// and the average time in milliseconds.
func pingStats(t *testing.T, d *Device, args string) (loss, avg float64) {
	t.Helper()
	out, _ := run(t, d, "ping -q "+args+" "+testGateway)
	m := pingSummary.FindStringSubmatch(out)
	require.NotNil(t, m, out)
	loss, err := strconv.ParseFloat(m[1], 64)
	require.NoError(t, err)
	if m := pingTimes.FindStringSubmatch(out); m != nil {
		avg, err = strconv.ParseFloat(m[1], 64)
		require.NoError(t, err)
	}
	t.Logf("ping %s: %v%% loss, %v ms", args, loss, avg)
	return loss, avg
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
