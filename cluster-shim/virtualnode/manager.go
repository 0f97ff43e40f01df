package virtualnode

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/virtual-kubelet/virtual-kubelet/node"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/jetbridge/jetbridge/cluster-shim/device"
	"github.com/jetbridge/jetbridge/shared/wellknown"
)

const (
	// retryMin and retryMax bound the pause after a failed start of a node.
	retryMin = time.Second
	retryMax = time.Minute
	pageSize = 500
)

// Devices is what the manager needs of the inventory.
type Devices interface {
	List() []device.State
	Get(name string) (device.State, bool)
}

// Options of a Manager.
type Options struct {
	// Client writes nodes; Leases renews leases, apart so that neither
	// starves the other.
	Client, Leases kubernetes.Interface
	Devices        Devices
	Settings       Settings
	// StatusInterval is the time between two status updates of a node that
	// does not change.
	StatusInterval time.Duration
	// LeaseDuration and LeaseRenewal are those of node leases.
	LeaseDuration, LeaseRenewal time.Duration
	Log                         *slog.Logger
}

// Manager keeps the nodes. Make one with New.
type Manager struct {
	o           Options
	wake        chan struct{}
	subscribers []func(node string)

	mu sync.Mutex // guards everything that follows
	// names and devices map devices to nodes and back.
	names, devices map[string]string
	runners        map[string]*runner
}

// runner keeps one node.
type runner struct {
	changed chan struct{}
	stop    context.CancelFunc
}

// New makes a manager without nodes.
func New(o Options) *Manager {
	return &Manager{o: o, wake: make(chan struct{}, 1), names: map[string]string{}, devices: map[string]string{}, runners: map[string]*runner{}}
}

// Subscribe adds a function that is called with each node that the manager
// begins to keep. It must not block, and must be added before Run.
func (m *Manager) Subscribe(f func(node string)) { m.subscribers = append(m.subscribers, f) }

// Changed tells the manager that a device changed; it does not block.
func (m *Manager) Changed(name string) {
	m.mu.Lock()
	r := m.runners[name]
	m.mu.Unlock()
	if r != nil {
		poke(r.changed)
	}
	poke(m.wake)
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // it is awake already
	}
}

// DeviceOf returns the device that a node stands for.
func (m *Manager) DeviceOf(node string) (string, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, ok := m.devices[node]
	return d, ok
}

// NodeOf returns the node that stands for a device.
func (m *Manager) NodeOf(device string) (string, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, ok := m.names[device]
	return n, ok
}

// Allocatable is what pods may use of a device.
func (m *Manager) Allocatable(d device.State) corev1.ResourceList {
	return m.o.Settings.Allocatable(d)
}

// Run keeps the nodes until ctx ends, and waits for all of them. The nodes
// stay: a device outlives the shim.
func (m *Manager) Run(ctx context.Context) error {
	if err := m.load(ctx); err != nil {
		return err
	}
	var group sync.WaitGroup
	defer group.Wait()
	retry := time.NewTicker(retryMax)
	defer retry.Stop()
	for {
		for _, d := range m.o.Devices.List() {
			if err := m.ensure(ctx, d, &group); err != nil && ctx.Err() == nil {
				m.o.Log.ErrorContext(ctx, "cannot keep a node for device", "device", d.Name, "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-m.wake:
		case <-retry.C:
		}
	}
}

// load learns which nodes there are from earlier runs. It tries until it can.
func (m *Manager) load(ctx context.Context) error {
	pause := retryMin
	for {
		err := m.loadOnce(ctx)
		if err == nil {
			return nil
		}
		m.o.Log.WarnContext(ctx, "cannot list nodes", "error", err)
		if !sleep(ctx, pause) {
			return nil
		}
		pause = min(2*pause, retryMax)
	}
}

func (m *Manager) loadOnce(ctx context.Context) error {
	opts := metav1.ListOptions{LabelSelector: wellknown.LabelManaged + "=" + valueTrue, Limit: pageSize}
	for {
		list, err := m.o.Client.CoreV1().Nodes().List(ctx, opts)
		if err != nil {
			return fmt.Errorf("cannot list nodes: %w", err)
		}
		m.mu.Lock()
		for _, n := range list.Items {
			if d := n.Labels[wellknown.LabelDevice]; d != "" {
				m.names[d], m.devices[n.Name] = n.Name, d
			}
		}
		m.mu.Unlock()
		if list.Continue == "" {
			return nil
		}
		opts.Continue = list.Continue
	}
}

// ensure starts or stops a device's node.
func (m *Manager) ensure(ctx context.Context, d device.State, group *sync.WaitGroup) error {
	m.mu.Lock()
	r := m.runners[d.Name]
	m.mu.Unlock()
	switch {
	case d.Gone && r != nil:
		r.stop()
		m.mu.Lock()
		delete(m.runners, d.Name)
		m.mu.Unlock()
		return nil
	case d.Gone || r != nil:
		return nil
	}
	name, err := m.claim(ctx, d)
	if err != nil {
		return err
	}
	nctx, stop := context.WithCancel(ctx)
	r = &runner{changed: make(chan struct{}, 1), stop: stop}
	m.mu.Lock()
	m.runners[d.Name] = r
	m.mu.Unlock()
	group.Go(func() { defer stop(); m.keep(nctx, name, d.Name, r) })
	for _, f := range m.subscribers {
		f(name)
	}
	return nil
}

// claim finds the name of a device's node. A node of that name that is not
// ours is somebody's machine and never touched.
func (m *Manager) claim(ctx context.Context, d device.State) (string, error) {
	if name, ok := m.NodeOf(d.Name); ok {
		return name, nil
	}
	var failed error
	free := func(name string) bool {
		gone := map[string]bool{}
		for _, other := range m.o.Devices.List() {
			gone[other.Name] = other.Gone
			if !other.Gone && other.Name != d.Name && (other.Alias == name || other.Name == name) {
				return false
			}
		}
		// The name of a device that is gone is free once its node is.
		if holder, taken := m.DeviceOf(name); taken && !gone[holder] {
			return false
		}
		_, err := m.o.Client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			failed = fmt.Errorf("cannot look for node %s: %w", name, err)
		}
		return apierrors.IsNotFound(err)
	}
	name := Name(d, free)
	if failed == nil && name == d.Name && !free(name) && failed == nil {
		return "", fmt.Errorf("node %s exists and is not of this device", name)
	}
	if failed != nil {
		return "", failed
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.names, m.devices[name])
	m.names[d.Name], m.devices[name] = name, d.Name
	return name, nil
}

// keep runs one node until ctx ends, again and again if it fails.
func (m *Manager) keep(ctx context.Context, name, dev string, r *runner) {
	pause := retryMin
	for ctx.Err() == nil {
		start := time.Now()
		err := m.runNode(ctx, name, dev, r)
		if err == nil || ctx.Err() != nil {
			return
		}
		m.o.Log.WarnContext(ctx, "node stopped, starting it again", "node", name, "device", dev, "error", err)
		if time.Since(start) > retryMax {
			pause = retryMin
		}
		if !sleep(ctx, pause) {
			return
		}
		pause = min(2*pause, retryMax)
	}
}

// provider lets Virtual Kubelet renew the lease while the shim lives: the
// state of the device travels as conditions.
type provider struct{ notify func(*corev1.Node) }

func (*provider) Ping(ctx context.Context) error                             { return ctx.Err() }
func (p *provider) NotifyNodeStatus(_ context.Context, f func(*corev1.Node)) { p.notify = f }

func (m *Manager) runNode(ctx context.Context, name, dev string, r *runner) error {
	nodes := m.o.Client.CoreV1().Nodes()
	d, _ := m.o.Devices.Get(dev)
	var previous []corev1.NodeCondition
	if have, err := nodes.Get(ctx, name, metav1.GetOptions{}); err == nil {
		previous = have.Status.Conditions
	} else if !apierrors.IsNotFound(err) {
		return fmt.Errorf("cannot read node %s: %w", name, err)
	}
	current := m.o.Settings.Build(name, d, previous, metav1.Now())
	p := &provider{}
	c, err := node.NewNodeController(p, current.DeepCopy(), nodes,
		node.WithNodeEnableLeaseV1WithRenewInterval(m.o.Leases.CoordinationV1().Leases(corev1.NamespaceNodeLease), int32(m.o.LeaseDuration/time.Second), m.o.LeaseRenewal),
		node.WithNodeStatusUpdateInterval(m.o.StatusInterval),
		node.WithNodeStatusUpdateErrorHandler(func(ctx context.Context, err error) error {
			if !apierrors.IsNotFound(err) {
				return err
			}
			d, _ := m.o.Devices.Get(dev)
			_, err = nodes.Create(ctx, m.o.Settings.Build(name, d, nil, metav1.Now()), metav1.CreateOptions{})
			return err
		}))
	if err != nil {
		return fmt.Errorf("cannot make node controller of %s: %w", name, err)
	}
	// The controller ends after our loop, for only it empties its channel of
	// status updates that our loop may wait on.
	vk, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer func() { stop(); <-c.Done() }()
	go func() { _ = c.Run(vk) }() // it ends by stop, and its error comes by c.Err
	select {
	case <-ctx.Done():
		return nil
	case <-c.Done():
		return fmt.Errorf("cannot register node %s: %w", name, c.Err())
	case <-c.Ready():
	}
	m.o.Log.InfoContext(ctx, "node runs", "node", name, "device", dev)
	first := true
	var failed <-chan time.Time
	for {
		d, _ = m.o.Devices.Get(dev)
		next := m.o.Settings.Build(name, d, current.Status.Conditions, metav1.Now())
		failed = nil
		if err := m.patchMeta(ctx, next); err != nil && ctx.Err() == nil {
			m.o.Log.WarnContext(ctx, "cannot patch labels of node", "node", name, "error", err)
			failed = time.After(retryMin)
		}
		if first || differs(current, next) {
			p.notify(next.DeepCopy())
		}
		first, current = false, next
		select {
		case <-ctx.Done():
			return nil
		case <-c.Done():
			return errors.Join(errors.New("node controller ended"), c.Err())
		case <-failed:
		case <-r.changed:
		}
	}
}

// differs ignores heartbeats.
func differs(a, b *corev1.Node) bool {
	strip := func(n *corev1.Node) corev1.NodeStatus {
		s := *n.Status.DeepCopy()
		for i := range s.Conditions {
			s.Conditions[i].LastHeartbeatTime = metav1.Time{}
		}
		return s
	}
	return !equality.Semantic.DeepEqual(strip(a), strip(b)) || !maps.Equal(a.Labels, b.Labels)
}

// patchMeta gives the node its labels and taints: ours that are stale go,
// others' stay.
func (m *Manager) patchMeta(ctx context.Context, want *corev1.Node) error {
	nodes := m.o.Client.CoreV1().Nodes()
	have, err := nodes.Get(ctx, want.Name, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("cannot read node %s: %w", want.Name, err)
	}
	patch := metaPatch(have, want)
	if patch == nil {
		return nil
	}
	text, err := json.Marshal(patch)
	if err != nil {
		return fmt.Errorf("cannot encode patch of node %s: %w", want.Name, err)
	}
	if _, err := nodes.Patch(ctx, want.Name, types.MergePatchType, text, metav1.PatchOptions{}); err != nil {
		return fmt.Errorf("cannot patch node %s: %w", want.Name, err)
	}
	return nil
}

// metaPatch is the merge patch from have to want; nil for none.
func metaPatch(have, want *corev1.Node) map[string]any {
	labels := map[string]any{}
	for k, v := range want.Labels {
		if have.Labels[k] != v {
			labels[k] = v
		}
	}
	for k := range have.Labels {
		if _, ok := want.Labels[k]; !ok && (k == wellknown.LabelFleet || strings.HasPrefix(k, wellknown.LabelDevicePrefix)) {
			labels[k] = nil
		}
	}
	taints := slices.Clone(have.Spec.Taints)
	for _, t := range want.Spec.Taints {
		if !slices.ContainsFunc(taints, func(o corev1.Taint) bool { return o.Key == t.Key && o.Effect == t.Effect && o.Value == t.Value }) {
			taints = append(slices.DeleteFunc(taints, func(o corev1.Taint) bool { return o.Key == t.Key && o.Effect == t.Effect }), t)
		}
	}
	patch := map[string]any{}
	if len(labels) > 0 {
		patch["metadata"] = map[string]any{"labels": labels}
	}
	if !equality.Semantic.DeepEqual(taints, have.Spec.Taints) {
		// Taints are one value in a merge patch: who changed them meanwhile wins.
		patch["spec"] = map[string]any{"taints": taints}
		meta, ok := patch["metadata"].(map[string]any)
		if !ok {
			meta = map[string]any{}
			patch["metadata"] = meta
		}
		meta["resourceVersion"] = have.ResourceVersion
	}
	if len(patch) == 0 {
		return nil
	}
	return patch
}

// sleep waits, and says whether ctx still goes on.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
