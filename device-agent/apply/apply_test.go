package apply

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/jetbridge/jetbridge/device-agent/journal"
	"github.com/jetbridge/jetbridge/device-agent/lifecycle"
	"github.com/jetbridge/jetbridge/device-agent/podenv"
	"github.com/jetbridge/jetbridge/device-agent/podman"
	"github.com/jetbridge/jetbridge/device-agent/systemd"
	"github.com/jetbridge/jetbridge/device-agent/unit"
	"github.com/jetbridge/jetbridge/shared/bundle"
	"github.com/jetbridge/jetbridge/shared/report"
)

var errDead = errors.New("the device lost its power")

// world stands for systemd and podman, and outlives engines.
type world struct {
	mu     sync.Mutex
	active map[string]bool
	log    []string
	ops    int
	// dieAt is the operation from which on everything fails; 0: never.
	dieAt   int
	noImage map[string]bool
	hang    map[string]bool
	folder  string
}

func (w *world) op(what, name string, change func()) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ops++
	if w.dieAt > 0 && w.ops >= w.dieAt {
		return errDead
	}
	w.log = append(w.log, what+" "+name)
	change()
	return nil
}

func (w *world) Units(_ context.Context, patterns ...string) ([]systemd.Unit, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []systemd.Unit
	for name := range w.active {
		for _, p := range patterns {
			if ok, _ := filepath.Match(p, name); ok {
				out = append(out, systemd.Unit{Name: name, ActiveState: "active"})
			}
		}
	}
	return out, nil
}

func (w *world) Start(_ context.Context, name string) error {
	if _, err := os.Stat(filepath.Join(w.folder, name)); err != nil {
		return fmt.Errorf("unit not found: %w", err)
	}
	return w.op("start", name, func() { w.active[name] = true })
}

func (w *world) Stop(_ context.Context, name string) error {
	return w.op("stop", name, func() { delete(w.active, name) })
}
func (w *world) ResetFailed(context.Context, string) error              { return nil }
func (w *world) Containers(context.Context) ([]podman.Container, error) { return nil, nil }
func (w *world) PodIPs(context.Context, string) ([]string, error)       { return nil, nil }
func (w *world) ImageID(_ context.Context, ref string) (string, error)  { return "", nil }
func (w *world) RemovePod(_ context.Context, name string) error {
	return w.op("remove pod", name, func() {})
}
func (w *world) RemoveContainer(_ context.Context, name string) error {
	return w.op("remove", name, func() {})
}
func (w *world) Pull(ctx context.Context, ref string, _ podman.Auth) (string, error) {
	w.mu.Lock()
	missing, hangs := w.noImage[ref], w.hang[ref]
	w.mu.Unlock()
	if hangs {
		<-ctx.Done()
		return "", ctx.Err()
	}
	if missing {
		return "", errors.New("manifest unknown")
	}
	return "id", w.op("pull", ref, func() {})
}

func newWorld(t *testing.T) *world {
	return &world{active: map[string]bool{}, noImage: map[string]bool{}, hang: map[string]bool{}, folder: t.TempDir()}
}

type device struct {
	world *world
	store *journal.Store
	dir   string
}

func newDevice(t *testing.T) *device {
	t.Helper()
	dir := t.TempDir()
	store, err := journal.Open(filepath.Join(dir, "state"), filepath.Join(dir, "run"))
	require.NoError(t, err)
	return &device{world: newWorld(t), store: store, dir: dir}
}

func (d *device) engine() *Engine {
	return New(Options{
		Store: d.store, Systemd: d.world, Podman: d.world, Log: slog.New(slog.DiscardHandler), Now: time.Now,
		Agent: "/usr/bin/jetbridge-agent", PodmanPath: "/usr/bin/podman", RuntimeUnits: d.world.folder, HostIP: func() string { return "10.0.0.1" },
		Facts: podenv.Facts{Allocatable: corev1.ResourceList{"pods": resource.MustParse("3"), "cpu": resource.MustParse("1"), "memory": resource.MustParse("1Gi")}}, Changed: func() {},
	})
}

// run lets an engine work for a while of the test's fake time.
func (d *device) run(t *testing.T, e *Engine, s *State, long time.Duration) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	defer time.AfterFunc(long, cancel).Stop()
	e.Set(s)
	require.NoError(t, e.Run(ctx))
}

func pod(name string, change ...func(*bundle.Pod)) bundle.Pod {
	p := bundle.Pod{
		Metadata: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID(name)},
		Spec:     corev1.PodSpec{RestartPolicy: corev1.RestartPolicyAlways, Containers: []corev1.Container{{Name: "c", Image: "img:1", ImagePullPolicy: corev1.PullAlways}}},
	}
	for _, f := range change {
		f(&p)
	}
	return p
}

func state(generation int64, pods ...bundle.Pod) *State {
	return &State{Bundle: &bundle.Bundle{Generation: generation, Pods: pods}}
}

func deleting(p *bundle.Pod) {
	now := metav1.Now()
	p.Metadata.DeletionTimestamp, p.Metadata.DeletionGracePeriodSeconds = &now, new(int64(3))
}

func (w *world) running() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []string
	for name := range w.active {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

func main(p bundle.Pod) string { return unit.NamesFor(apiPod(&p)).Mains[0].Unit }

func TestStopThenStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDevice(t)
		e := d.engine()
		old, fresh := pod("old"), pod("new")
		d.run(t, e, state(1, old), time.Second)
		assert.Equal(t, []string{main(old)}, d.world.running())
		assert.EqualValues(t, 1, e.Applied())
		d.run(t, e, state(2, pod("old", deleting), fresh), time.Second)
		assert.Equal(t, []string{main(fresh)}, d.world.running())
		assert.EqualValues(t, 2, e.Applied())
		log := strings.Join(d.world.log, "\n")
		assert.Less(t, strings.Index(log, "remove pod"), strings.Index(log, "start "+main(fresh)), "the old one is confirmed gone first:\n%s", log)
		i, err := d.store.Instance("old")
		require.NoError(t, err)
		assert.Equal(t, lifecycle.Stopped, i.Phase)
		assert.EqualValues(t, 3, i.Grace)
		stones, err := d.store.Tombstones()
		require.NoError(t, err)
		assert.Contains(t, stones, types.UID("old"))
		pods, err := e.Observe(t.Context(), nil)
		require.NoError(t, err)
		assert.True(t, (&report.Report{Pods: pods}).Confirmed("old"))
		assert.NoFileExists(t, filepath.Join(d.store.UnitsDir(), main(old)))

		d.run(t, e, state(3, fresh), time.Second)
		i, err = d.store.Instance("old")
		require.NoError(t, err)
		assert.Nil(t, i, "nobody asks for it any more")
		assert.NoDirExists(t, d.store.PodDir("old"))
	})
}

// A crash after any operation leads to the same end.
func TestCrashAnywhere(t *testing.T) {
	a, b := pod("a"), pod("b")
	b2 := pod("b", func(p *bundle.Pod) { p.Spec.Containers[0].Image = "img:2" })
	c := pod("c", func(p *bundle.Pod) { p.Spec.InitContainers = []corev1.Container{{Name: "i", Image: "img:1"}} })
	second := state(2, pod("a", deleting), b2, c)
	for n := 1; ; n++ {
		finished := false
		synctest.Test(t, func(t *testing.T) {
			d := newDevice(t)
			d.run(t, d.engine(), state(1, a, b), time.Second)
			d.world.mu.Lock()
			d.world.ops, d.world.dieAt = 0, n
			d.world.mu.Unlock()
			d.run(t, d.engine(), second, time.Second)
			d.world.mu.Lock()
			finished = d.world.ops < n
			d.world.dieAt = 0
			d.world.mu.Unlock()

			e := d.engine()
			require.NoError(t, e.Restore(t.Context(), second))
			d.run(t, e, second, time.Second)
			want := []string{main(b2), main(c)}
			slices.Sort(want)
			assert.Equal(t, want, d.world.running(), "died at operation %d", n)
			assert.EqualValues(t, 2, e.Applied())
			instances, err := d.store.Instances()
			require.NoError(t, err)
			assert.Equal(t, lifecycle.Stopped, instances["a"].Phase)
			assert.Equal(t, lifecycle.Running, instances["b"].Phase)
			assert.NoFileExists(t, filepath.Join(d.world.folder, main(b)))
		})
		if t.Failed() || finished {
			require.Greater(t, n, 5, "the test did something")
			return
		}
	}
}

func TestRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDevice(t)
		e := d.engine()
		d.run(t, e, state(1,
			pod("field", func(p *bundle.Pod) { p.Spec.HostNetwork = true }),
			pod("big", func(p *bundle.Pod) {
				p.Spec.Containers[0].Resources.Requests = corev1.ResourceList{"cpu": resource.MustParse("2")}
			}),
			pod("image", func(p *bundle.Pod) { p.Spec.Containers[0].Image = "gone:1" }),
			pod("waits", func(p *bundle.Pod) {
				p.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "s"}}}}
			}),
		), time.Second)
		d.world.noImage["docker.io/library/gone:1"] = true
		d.run(t, e, state(2, append(e.state.Bundle.Pods, pod("fine"))...), time.Minute)
		pods, err := e.Observe(t.Context(), nil)
		require.NoError(t, err)
		got := map[string]string{}
		for _, p := range pods {
			s := string(p.Status.Phase) + " " + p.Status.Reason
			if len(p.Status.ContainerStatuses) > 0 && p.Status.ContainerStatuses[0].State.Waiting != nil {
				s += p.Status.ContainerStatuses[0].State.Waiting.Reason
			}
			got[p.Name] = s
		}
		assert.Equal(t, "Failed UnsupportedField", got["field"])
		assert.Equal(t, "Failed OutOfcpu", got["big"])
		assert.Equal(t, "Pending CreateContainerConfigError", got["waits"])
		assert.EqualValues(t, 2, e.Applied(), "what waits does not hold up the rest")
		assert.Contains(t, d.world.running(), main(pod("fine")))
	})
}

func TestPullBackOffAndDeletion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDevice(t)
		d.world.noImage["docker.io/library/gone:1"] = true
		d.world.hang["docker.io/library/slow:1"] = true
		e := d.engine()
		gone := pod("gone", func(p *bundle.Pod) { p.Spec.Containers[0].Image = "gone:1" })
		d.run(t, e, state(1, gone), time.Second)
		reason := func() string {
			pods, err := e.Observe(t.Context(), nil)
			require.NoError(t, err)
			return pods[0].Status.ContainerStatuses[0].State.Waiting.Reason
		}
		assert.Equal(t, "ErrImagePull", reason())
		d.run(t, e, e.state, 20*time.Second)
		assert.Equal(t, "ImagePullBackOff", reason())
		d.world.noImage = map[string]bool{}
		d.run(t, e, e.state, time.Minute)
		assert.Equal(t, []string{main(gone)}, d.world.running())

		// A pull that hangs holds up neither other pods nor the pod's own end.
		slow := func(p *bundle.Pod) { p.Spec.Containers[0].Image = "slow:1" }
		d.run(t, e, state(2, pod("gone", slow), pod("other")), time.Second)
		assert.Contains(t, d.world.running(), main(pod("other")))
		assert.Contains(t, d.world.running(), main(gone), "the old image runs on")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- e.Run(ctx) }()
		synctest.Wait()
		e.Set(state(3, pod("gone", slow, deleting), pod("other")))
		synctest.Wait()
		cancel()
		require.NoError(t, <-done)
		assert.Equal(t, []string{main(pod("other"))}, d.world.running())
	})
}

func TestBootWithoutAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDevice(t)
		p := pod("p", func(p *bundle.Pod) {
			p.Spec.Volumes = []corev1.Volume{{Name: "s", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "s"}}}}
		})
		s := state(1, p)
		s.Secrets = bundle.Secrets{"p": {Secrets: []bundle.Secret{{Name: "s", Data: map[string][]byte{"k": []byte("v")}}}}}
		d.run(t, d.engine(), s, time.Second)
		// A boot: nothing runs, and what is in memory is gone.
		d.world.active, d.world.folder = map[string]bool{}, t.TempDir()
		require.NoError(t, os.RemoveAll(filepath.Join(d.dir, "run")))
		require.NoError(t, d.engine().Restore(t.Context(), s))
		assert.Equal(t, []string{main(p)}, d.world.running())
		data, err := os.ReadFile(filepath.Join(d.store.RunDir("p"), "volumes", "s", "k"))
		require.NoError(t, err)
		assert.Equal(t, "v", string(data))
	})
}
