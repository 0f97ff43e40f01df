// Package apply makes the device run what a bundle asks for: it asks plan what
// to do, records each intent, does it, records the result, and asks again.
package apply

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/jetbridge/jetbridge/device-agent/container"
	"github.com/jetbridge/jetbridge/device-agent/image"
	"github.com/jetbridge/jetbridge/device-agent/journal"
	"github.com/jetbridge/jetbridge/device-agent/lifecycle"
	"github.com/jetbridge/jetbridge/device-agent/plan"
	"github.com/jetbridge/jetbridge/device-agent/podenv"
	"github.com/jetbridge/jetbridge/device-agent/podman"
	"github.com/jetbridge/jetbridge/device-agent/status"
	"github.com/jetbridge/jetbridge/device-agent/systemd"
	"github.com/jetbridge/jetbridge/device-agent/unit"
	"github.com/jetbridge/jetbridge/device-agent/volume"
	"github.com/jetbridge/jetbridge/shared/admit"
	"github.com/jetbridge/jetbridge/shared/bundle"
	"github.com/jetbridge/jetbridge/shared/support"
	"github.com/jetbridge/jetbridge/shared/wellknown"
)

const (
	// parallel is how many pods are worked on at once.
	parallel = 4
	// Back-off of pods that could not be prepared, started or stopped.
	firstRetry, maxRetry = 10 * time.Second, 5 * time.Minute
)

// Systemd is what the engine needs of systemd.
type Systemd interface {
	Units(ctx context.Context, patterns ...string) ([]systemd.Unit, error)
	Start(ctx context.Context, name string) error
	Stop(ctx context.Context, name string) error
	ResetFailed(ctx context.Context, name string) error
}

// Podman is what the engine needs of podman.
type Podman interface {
	image.Podman
	Containers(ctx context.Context) ([]podman.Container, error)
	PodIPs(ctx context.Context, pod string) ([]string, error)
	RemovePod(ctx context.Context, pod string) error
	RemoveContainer(ctx context.Context, name string) error
}

// Options are what an engine works with.
type Options struct {
	Store   *journal.Store
	Systemd Systemd
	Podman  Podman
	Log     *slog.Logger
	Now     func() time.Time
	// Agent and PodmanPath are the programs that units run.
	Agent, PodmanPath string
	// HelperFlags tell the agent's helpers where everything is.
	HelperFlags []string
	// RuntimeUnits is the folder from which systemd loads units.
	RuntimeUnits string
	Facts        podenv.Facts
	// HostIP finds the device's address, which may change.
	HostIP func() string
	// Changed is called, from any goroutine, when a status may have changed.
	Changed func()
}

// State is what shall be: a bundle, with its secrets opened.
type State struct {
	Bundle  *bundle.Bundle
	Secrets bundle.Secrets
}

// Engine works until Run's context ends.
type Engine struct {
	o    Options
	wake chan struct{}

	// mu guards everything that follows.
	mu       sync.Mutex
	state    *State
	busy     map[types.UID]*work
	prepared map[types.UID]string // the images that are here, by pod
	trouble  map[types.UID]*trouble
	applied  int64
}

type work struct {
	kind   plan.Kind
	cancel context.CancelFunc
}

// trouble is why a pod does not get on, and when it is tried again.
type trouble struct {
	delay   time.Duration
	until   time.Time
	waiting map[string]status.Waiting
}

// New returns an engine that does nothing before its first bundle.
func New(o Options) *Engine {
	return &Engine{
		o: o, wake: make(chan struct{}, 1),
		busy: map[types.UID]*work{}, prepared: map[types.UID]string{}, trouble: map[types.UID]*trouble{},
	}
}

// Set gives the engine a new desired state.
func (e *Engine) Set(s *State) {
	e.mu.Lock()
	e.state = s
	for _, t := range e.trouble { // what failed may work with the new bundle
		t.until = time.Time{}
	}
	e.mu.Unlock()
	e.Wake()
}

// Applied is the highest generation that was carried out.
func (e *Engine) Applied() int64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.applied
}

// Wake makes the engine look at everything again.
func (e *Engine) Wake() {
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// Run works until ctx ends, and returns when everything that it started has
// ended. Running pods are left alone.
func (e *Engine) Run(ctx context.Context) error {
	var workers sync.WaitGroup
	defer workers.Wait()
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		if err := e.round(ctx, &workers); err != nil {
			e.o.Log.Error("cannot plan", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-e.wake:
		case <-tick.C:
		}
	}
}

// input is what the next plan depends on. The caller holds mu.
func (e *Engine) input() (plan.Input, error) {
	instances, err := e.o.Store.Instances()
	if err != nil {
		return plan.Input{}, err
	}
	tombstones, err := e.o.Store.Tombstones()
	if err != nil {
		return plan.Input{}, err
	}
	in := plan.Input{Desired: e.state.Bundle.Pods, Instances: instances, Tombstones: map[types.UID]bool{}, Prepared: map[types.UID]bool{}}
	for _, t := range tombstones {
		in.Tombstones[t] = true
	}
	for i := range in.Desired {
		p := &in.Desired[i]
		images, ok := e.prepared[p.Metadata.UID]
		in.Prepared[p.Metadata.UID] = ok && images == imagesOf(&p.Spec)
	}
	return in, nil
}

func imagesOf(s *corev1.PodSpec) string {
	var b strings.Builder
	for _, c := range slices.Concat(s.InitContainers, s.Containers) {
		b.WriteString(c.Image + "\n")
	}
	return b.String()
}

func (e *Engine) round(ctx context.Context, workers *sync.WaitGroup) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.state == nil {
		return nil
	}
	in, err := e.input()
	if err != nil {
		return err
	}
	desired := map[types.UID]*bundle.Pod{}
	for i := range in.Desired {
		desired[in.Desired[i].Metadata.UID] = &in.Desired[i]
	}
	for _, s := range plan.Next(in) {
		if w := e.busy[s.UID]; w != nil {
			if s.Kind == plan.Stop && w.kind == plan.Prepare {
				w.cancel() // a pull must not hold up a deletion
			}
			continue
		}
		if s.Kind != plan.Stop && e.working(s.Kind) >= parallel {
			continue
		}
		if t := e.trouble[s.UID]; t != nil && e.o.Now().Before(t.until) {
			continue
		}
		stepCtx, cancel := context.WithCancel(ctx)
		e.busy[s.UID] = &work{kind: s.Kind, cancel: cancel}
		pod, secrets := desired[s.UID], e.state.Secrets[s.UID]
		instances := in.Instances
		workers.Go(func() {
			defer cancel()
			err := e.step(stepCtx, s, pod, secrets, instances)
			e.done(s, pod, err)
		})
	}
	tried := func(uid types.UID) bool { return e.busy[uid] == nil && e.trouble[uid] != nil }
	if plan.Settled(in, tried) && len(e.busy) == 0 && e.applied != e.state.Bundle.Generation {
		e.applied = e.state.Bundle.Generation
		e.o.Log.Info("bundle applied", "generation", e.applied)
		e.o.Changed()
	}
	return nil
}

// working counts the steps of a kind that are being done. The caller holds mu.
func (e *Engine) working(kind plan.Kind) int {
	n := 0
	for _, w := range e.busy {
		if w.kind == kind {
			n++
		}
	}
	return n
}

func (e *Engine) done(s plan.Step, pod *bundle.Pod, err error) {
	e.mu.Lock()
	delete(e.busy, s.UID)
	switch {
	case err == nil:
		delete(e.trouble, s.UID)
		switch s.Kind {
		case plan.Prepare:
			e.prepared[s.UID] = imagesOf(&pod.Spec)
		case plan.Forget, plan.Bury:
			delete(e.prepared, s.UID)
		}
	case errors.Is(err, context.Canceled):
	default:
		t := e.trouble[s.UID]
		if t == nil {
			t = &trouble{}
			e.trouble[s.UID] = t
		}
		t.delay = min(max(2*t.delay, firstRetry), maxRetry)
		t.until = e.o.Now().Add(t.delay)
		t.waiting = waiting(err, pod, t.waiting != nil)
	}
	e.mu.Unlock()
	if err != nil {
		e.o.Log.Error("step failed", "step", s.Kind, "pod", s.UID, "error", err)
	}
	e.o.Changed()
	e.Wake()
}

// containerError is a failure that concerns one container.
type containerError struct {
	container, reason string
	err               error
}

func (e *containerError) Error() string {
	return fmt.Sprintf("container %s: %s: %v", e.container, e.reason, e.err)
}
func (e *containerError) Unwrap() error { return e.err }

// waiting turns an error into what its containers wait for.
func waiting(err error, pod *bundle.Pod, again bool) map[string]status.Waiting {
	out := map[string]status.Waiting{}
	var one *containerError
	if errors.As(err, &one) {
		w := status.Waiting{Reason: one.reason, Message: one.err.Error()}
		if again && w.Reason == image.ErrImagePull {
			w = status.Waiting{Reason: image.ImagePullBackOff, Message: "Back-off pulling image: " + w.Message}
		}
		out[one.container] = w
		return out
	}
	if pod != nil {
		for _, c := range pod.Spec.Containers {
			out[c.Name] = status.Waiting{Reason: "ContainerCreating", Message: err.Error()}
		}
	}
	return out
}

func (e *Engine) step(ctx context.Context, s plan.Step, pod *bundle.Pod, secrets bundle.PodSecrets, instances map[types.UID]*lifecycle.Instance) error {
	// A copy of its own: others read those of the plan meanwhile.
	instance, err := e.o.Store.Instance(s.UID)
	if err != nil {
		return err
	}
	switch s.Kind {
	case plan.Prepare:
		return e.prepare(ctx, pod, secrets, instances)
	case plan.Start, plan.Replace:
		return e.start(ctx, pod, secrets, instance)
	case plan.Stop:
		return e.stop(ctx, instance, s.Grace, false)
	case plan.Bury:
		return e.o.Store.AddTombstone(s.UID)
	case plan.Forget:
		if err := e.o.Store.AddTombstone(s.UID); err != nil {
			return err
		}
		return e.o.Store.Remove(s.UID)
	default:
		return fmt.Errorf("step %q is not known", s.Kind)
	}
}

func apiPod(p *bundle.Pod) *corev1.Pod { return &corev1.Pod{ObjectMeta: p.Metadata, Spec: p.Spec} }

// prepare refuses what the device cannot run, and fetches the images.
func (e *Engine) prepare(ctx context.Context, pod *bundle.Pod, secrets bundle.PodSecrets, instances map[types.UID]*lifecycle.Instance) error {
	known := instances[pod.Metadata.UID]
	if known == nil {
		if errs := support.Check(&pod.Spec); len(errs) > 0 {
			return e.refuse(pod, wellknown.ReasonUnsupportedField, errs.ToAggregate().Error())
		}
		var others []*corev1.Pod
		for _, i := range instances {
			if i.Phase != lifecycle.Stopped {
				others = append(others, apiPod(&i.Pod))
			}
		}
		// A pod that leaves still counts: it will be asked again when it is gone.
		if r := admit.Check(apiPod(pod), others, e.o.Facts.Allocatable); r != nil {
			if slices.ContainsFunc(others, func(p *corev1.Pod) bool { return p.DeletionTimestamp != nil }) {
				return fmt.Errorf("%s: %s", r.Reason, r.Message)
			}
			return e.refuse(pod, r.Reason, r.Message)
		}
	}
	var pull []bundle.Secret
	for _, ref := range pod.Spec.ImagePullSecrets {
		for _, s := range secrets.Secrets {
			if s.Name == ref.Name {
				pull = append(pull, s)
			}
		}
	}
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		if err := image.Ensure(ctx, e.o.Podman, &c, pull); err != nil {
			var failed *image.Error
			if errors.As(err, &failed) {
				return &containerError{container: c.Name, reason: failed.Reason, err: err}
			}
			return err
		}
	}
	return nil
}

func (e *Engine) refuse(pod *bundle.Pod, reason, message string) error {
	i := &lifecycle.Instance{Phase: lifecycle.Stopped, Pod: *pod, Started: e.o.Now().UTC().Truncate(time.Second), Ended: true}
	final := status.Refused(i, reason, message)
	i.Final = &final
	e.o.Log.Warn("pod refused", "namespace", pod.Metadata.Namespace, "pod", pod.Metadata.Name, "uid", pod.Metadata.UID, "reason", reason, "message", message)
	return e.o.Store.Put(i)
}

// Materialize makes what the pod's containers read: volumes and variables.
func (e *Engine) Materialize(pod *bundle.Pod, secrets bundle.PodSecrets) error {
	uid := pod.Metadata.UID
	content := podenv.Content{Pod: pod, Secrets: secrets}
	dirs := volume.Dirs{State: e.o.Store.PodDir(uid), Run: e.o.Store.RunDir(uid)}
	if err := os.MkdirAll(filepath.Join(dirs.Run, "env"), 0o700); err != nil {
		return fmt.Errorf("cannot make the pod's folder: %w", err)
	}
	if err := volume.Ensure(dirs, content, e.facts()); err != nil {
		return err
	}
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		vars, err := e.variables(content, &c)
		if err != nil {
			return &containerError{container: c.Name, reason: "CreateContainerConfigError", err: err}
		}
		data, err := json.Marshal(vars)
		if err != nil {
			return fmt.Errorf("cannot write variables: %w", err)
		}
		if err := journal.WriteFile(container.EnvFile(dirs.Run, c.Name), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func (e *Engine) facts() podenv.Facts {
	f := e.o.Facts
	f.HostIP = e.o.HostIP()
	return f
}

func (e *Engine) variables(content podenv.Content, c *corev1.Container) ([]podenv.Var, error) {
	facts := e.facts()
	facts.PodIP = container.PodIPPlaceholder
	vars, err := podenv.Resolve(content, c, facts)
	if err != nil {
		return nil, err
	}
	if _, _, err := podenv.Files(vars); err != nil {
		return nil, err
	}
	return vars, nil
}

// start renders and starts a pod, or what changed of it.
func (e *Engine) start(ctx context.Context, pod *bundle.Pod, secrets bundle.PodSecrets, old *lifecycle.Instance) error {
	uid := pod.Metadata.UID
	next := &lifecycle.Instance{Phase: lifecycle.Starting, Pod: *pod, Units: unit.NamesFor(apiPod(pod)), Started: e.o.Now().UTC().Truncate(time.Second)}
	files, err := e.render(pod, secrets)
	if err != nil {
		var refused *refusal
		if errors.As(err, &refused) && old == nil {
			return e.refuse(pod, wellknown.ReasonUnsupportedField, refused.Error())
		}
		return err // what runs is left alone
	}
	if old == nil {
		if err := e.o.Store.Put(next); err != nil {
			return err
		}
	} else {
		next.Started = old.Started
	}
	if err := e.Materialize(pod, secrets); err != nil {
		return err
	}
	if err := e.writeUnits(files); err != nil {
		return err
	}
	if old != nil {
		gone := missing(old.Units.All(), next.Units.All())
		if err := e.stopContainers(ctx, gone); err != nil {
			return err
		}
		for _, c := range gone { // another image has no back-off yet
			r, err := e.o.Store.Record(uid, c.Container)
			if err != nil {
				return err
			}
			r.Delay, r.Until = 0, time.Time{}
			if err := e.o.Store.PutRecord(uid, c.Container, r); err != nil {
				return err
			}
		}
		if err := e.o.Store.Put(next); err != nil {
			return err
		}
		if err := e.removeUnits(ctx, unitNames(gone)); err != nil {
			return err
		}
	}
	for _, c := range next.Units.Mains {
		if err := e.o.Systemd.Start(ctx, c.Unit); err != nil {
			return err
		}
	}
	next.Phase = lifecycle.Running
	if err := e.o.Store.Put(next); err != nil {
		return err
	}
	e.o.Log.Info("pod started", "namespace", pod.Metadata.Namespace, "pod", pod.Metadata.Name, "uid", uid)
	return nil
}

type refusal struct{ err error }

func (r *refusal) Error() string { return r.err.Error() }

func (e *Engine) render(pod *bundle.Pod, secrets bundle.PodSecrets) ([]unit.File, error) {
	uid := pod.Metadata.UID
	content := podenv.Content{Pod: pod, Secrets: secrets}
	dirs := volume.Dirs{State: e.o.Store.PodDir(uid), Run: e.o.Store.RunDir(uid)}
	sources := map[string]string{}
	for i := range pod.Spec.Volumes {
		sources[pod.Spec.Volumes[i].Name] = volume.Source(dirs, &pod.Spec.Volumes[i])
	}
	byContainer := map[string][]podenv.Var{}
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		vars, err := e.variables(content, &c)
		if err != nil {
			return nil, &containerError{container: c.Name, reason: "CreateContainerConfigError", err: err}
		}
		byContainer[c.Name] = vars
	}
	files, errs := unit.Render(unit.Input{
		Pod:     apiPod(pod),
		Host:    unit.Host{Agent: e.o.Agent, Flags: e.o.HelperFlags, Podman: e.o.PodmanPath, StateDir: dirs.State, RunDir: dirs.Run},
		Sources: sources,
		Expand: func(name, variable string) (string, bool, error) {
			for _, v := range byContainer[name] {
				switch {
				case v.Name != variable:
				case v.Secret:
					return "", false, fmt.Errorf("$(%s) comes from a Secret, and command lines are visible on the device; read the variable in the container instead", variable)
				case v.Runtime:
					return "", false, fmt.Errorf("$(%s) is the pod's address, which is not known before it starts; read the variable in the container instead", variable)
				default:
					return v.Value, true, nil
				}
			}
			return "", false, nil
		},
	})
	if len(errs) > 0 {
		return nil, &refusal{errs.ToAggregate()}
	}
	return files, nil
}

// writeUnits puts unit files where systemd finds them, now and after a boot.
func (e *Engine) writeUnits(files []unit.File) error {
	for _, dir := range []string{e.o.Store.UnitsDir(), e.o.RuntimeUnits} {
		for _, f := range files {
			path := filepath.Join(dir, f.Name)
			if old, err := os.ReadFile(path); err == nil && string(old) == f.Content {
				continue
			}
			if err := journal.WriteFile(path, []byte(f.Content), 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

func (e *Engine) removeUnits(ctx context.Context, names []string) error {
	var errs []error
	for _, name := range names {
		errs = append(errs, e.o.Systemd.ResetFailed(ctx, name))
		for _, dir := range []string{e.o.Store.UnitsDir(), e.o.RuntimeUnits} {
			if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, fmt.Errorf("cannot remove unit: %w", err))
			}
		}
	}
	return errors.Join(errs...)
}

func missing(from, in []unit.Container) []unit.Container {
	var out []unit.Container
	for _, c := range from {
		if !slices.Contains(in, c) {
			out = append(out, c)
		}
	}
	return out
}

func unitNames(list []unit.Container) []string {
	out := make([]string, len(list))
	for i, c := range list {
		out[i] = c.Unit
	}
	return out
}

// stopContainers stops units at once and returns when all are inactive and
// nothing is left of their containers.
func (e *Engine) stopContainers(ctx context.Context, list []unit.Container) error {
	errs := make([]error, len(list))
	var all sync.WaitGroup
	for i, c := range list {
		all.Go(func() {
			if errs[i] = e.o.Systemd.Stop(ctx, c.Unit); errs[i] == nil {
				errs[i] = e.o.Podman.RemoveContainer(ctx, c.Podman())
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// stop stops a pod for good and records its end. ended says that it ended by
// itself; then it gets no tombstone yet.
func (e *Engine) stop(ctx context.Context, i *lifecycle.Instance, grace int64, ended bool) error {
	uid := i.Pod.Metadata.UID
	if i.Phase != lifecycle.Stopping || i.Grace != grace {
		i.Phase, i.Grace, i.Ended = lifecycle.Stopping, grace, ended
		if err := e.o.Store.Put(i); err != nil {
			return err
		}
		e.o.Changed()
	}
	if err := e.stopContainers(ctx, i.Units.Mains); err != nil {
		return err
	}
	if err := e.stopContainers(ctx, i.Units.Inits); err != nil {
		return err
	}
	for _, name := range []string{i.Units.Pod, i.Units.Slice} {
		if err := e.o.Systemd.Stop(ctx, name); err != nil {
			return err
		}
	}
	if err := e.o.Podman.RemovePod(ctx, i.Units.PodmanPod()); err != nil {
		return err
	}
	records, err := e.records(i)
	if err != nil {
		return err
	}
	if err := e.removeUnits(ctx, append(unitNames(i.Units.All()), i.Units.Pod, i.Units.Slice)); err != nil {
		return err
	}
	i.Phase = lifecycle.Stopped
	final := status.Compute(status.Input{Instance: i, Records: records, HostIP: e.o.HostIP(), Now: e.o.Now()})
	i.Final = &final
	if err := e.o.Store.Put(i); err != nil {
		return err
	}
	if !i.Ended {
		if err := e.o.Store.AddTombstone(uid); err != nil {
			return err
		}
	}
	e.o.Log.Info("pod stopped", "namespace", i.Pod.Metadata.Namespace, "pod", i.Pod.Metadata.Name, "uid", uid, "phase", final.Phase)
	return nil
}

func (e *Engine) records(i *lifecycle.Instance) (map[string]lifecycle.Record, error) {
	out := map[string]lifecycle.Record{}
	for _, c := range i.Units.All() {
		r, err := e.o.Store.Record(i.Pod.Metadata.UID, c.Container)
		if err != nil {
			return nil, err
		}
		if r.Attempts > 0 {
			out[c.Container] = r
		}
	}
	return out, nil
}

// Restore brings back, after a boot, everything that shall run: it needs no
// daemon and no network. Pods that run already are left alone.
func (e *Engine) Restore(ctx context.Context, s *State) error {
	instances, err := e.o.Store.Instances()
	if err != nil {
		return err
	}
	var errs []error
	for uid, i := range instances {
		if i.Phase != lifecycle.Running {
			continue
		}
		pod, secrets := &i.Pod, bundle.PodSecrets{}
		if s != nil {
			secrets = s.Secrets[uid]
		}
		if err := e.restore(ctx, i, pod, secrets); err != nil {
			errs = append(errs, fmt.Errorf("cannot restore pod %s/%s: %w", pod.Metadata.Namespace, pod.Metadata.Name, err))
		}
	}
	return errors.Join(errs...)
}

func (e *Engine) restore(ctx context.Context, i *lifecycle.Instance, pod *bundle.Pod, secrets bundle.PodSecrets) error {
	if err := e.Materialize(pod, secrets); err != nil {
		return err
	}
	for _, name := range append(unitNames(i.Units.All()), i.Units.Pod, i.Units.Slice) {
		data, err := os.ReadFile(filepath.Join(e.o.Store.UnitsDir(), name))
		if err != nil {
			return fmt.Errorf("cannot read unit: %w", err)
		}
		path := filepath.Join(e.o.RuntimeUnits, name)
		if old, err := os.ReadFile(path); err == nil && string(old) == string(data) {
			continue
		}
		if err := journal.WriteFile(path, data, 0o644); err != nil {
			return err
		}
	}
	return e.heal(ctx, i)
}

// heal starts the units of a pod that should run and do not: after a boot, or
// when the pod's own service failed before them.
func (e *Engine) heal(ctx context.Context, i *lifecycle.Instance) error {
	for _, c := range i.Units.Inits {
		r, err := e.o.Store.Record(i.Pod.Metadata.UID, c.Container)
		if err != nil {
			return err
		}
		if i.Pod.Spec.RestartPolicy == corev1.RestartPolicyNever && r.Ended() && r.Last.ExitCode != 0 {
			return nil // the pod has failed
		}
	}
	units, err := e.o.Systemd.Units(ctx, unitNames(i.Units.Mains)...)
	if err != nil {
		return err
	}
	alive := map[string]bool{}
	for _, u := range units {
		alive[u.Name] = u.ActiveState != "inactive" && u.ActiveState != "failed"
	}
	for _, c := range i.Units.Mains {
		if alive[c.Unit] {
			continue
		}
		r, err := e.o.Store.Record(i.Pod.Metadata.UID, c.Container)
		if err != nil {
			return err
		}
		if r.Ended() && !status.WillRestart(i.Pod.Spec.RestartPolicy, false, r.Last.ExitCode) {
			continue
		}
		if err := e.o.Systemd.Start(ctx, c.Unit); err != nil {
			return err
		}
		e.o.Log.Info("container unit started again", "unit", c.Unit)
	}
	return nil
}

// Refresh brings the volumes and variables of running pods up to date with
// the bundle, and starts units that should run and do not.
func (e *Engine) Refresh(ctx context.Context) error {
	e.mu.Lock()
	state := e.state
	e.mu.Unlock()
	if state == nil {
		return nil
	}
	var errs []error
	for k := range state.Bundle.Pods {
		pod := &state.Bundle.Pods[k]
		if !e.claim(pod.Metadata.UID, "refresh") {
			continue
		}
		if err := e.refresh(ctx, pod, state.Secrets[pod.Metadata.UID]); err != nil {
			errs = append(errs, fmt.Errorf("cannot update pod %s/%s: %w", pod.Metadata.Namespace, pod.Metadata.Name, err))
		}
		e.release(pod.Metadata.UID)
	}
	e.Wake()
	return errors.Join(errs...)
}

// claim makes the caller the only one who works on a pod, until release.
func (e *Engine) claim(uid types.UID, kind plan.Kind) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.busy[uid] != nil {
		return false
	}
	e.busy[uid] = &work{kind: kind, cancel: func() {}}
	return true
}

func (e *Engine) release(uid types.UID) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.busy, uid)
}

func (e *Engine) refresh(ctx context.Context, pod *bundle.Pod, secrets bundle.PodSecrets) error {
	i, err := e.o.Store.Instance(pod.Metadata.UID)
	if err != nil || i == nil || i.Phase != lifecycle.Running || pod.Terminating() || plan.Changed(i, pod) {
		return err
	}
	err = e.Materialize(pod, secrets)
	if err == nil && !samePod(&i.Pod, pod) { // a reboot offline needs the newest content
		i.Pod = *pod
		err = e.o.Store.Put(i)
	}
	return errors.Join(err, e.heal(ctx, i))
}

func samePod(a, b *bundle.Pod) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && string(x) == string(y)
}
