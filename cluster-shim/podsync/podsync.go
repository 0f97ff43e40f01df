// Package podsync carries pods between the API and the devices: it checks,
// resolves and hands over what is bound to our nodes, writes back what devices
// report, and lets go of a pod only when its device confirmed the stop. It is
// the sole writer of those pods.
//
// There is one informer, and one queue keyed by node, namespace, name and UID:
// the UID is a pod's identity, so that a successor of the same name is never
// taken for it. Handlers read the state anew and trust no event.
package podsync

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/workqueue"

	"github.com/jetbridge/jetbridge/cluster-shim/device"
	"github.com/jetbridge/jetbridge/cluster-shim/podstatus"
	"github.com/jetbridge/jetbridge/shared/admit"
	"github.com/jetbridge/jetbridge/shared/bundle"
	"github.com/jetbridge/jetbridge/shared/report"
	"github.com/jetbridge/jetbridge/shared/support"
	"github.com/jetbridge/jetbridge/shared/wellknown"
)

const (
	byNode   = "node"
	byDevice = "device"
	// resync makes every pod be looked at again, for tokens' sake.
	resync  = time.Hour
	failMin = 200 * time.Millisecond
	failMax = time.Minute
	workers = 8

	reasonMissing   = "CreateContainerConfigError"
	eventMount      = "FailedMount"
	eventForeign    = "ForeignDevice"
	reasonWaitsNode = "DeviceNotReporting"
)

// Nodes says which nodes are ours.
type Nodes interface {
	DeviceOf(node string) (string, bool)
	NodeOf(device string) (string, bool)
	Allocatable(d device.State) corev1.ResourceList
}

// Devices finds a device.
type Devices interface {
	Get(name string) (device.State, bool)
}

// Resolved is what a resolver found for a pod.
type Resolved struct {
	Pod     bundle.Pod
	Secrets bundle.PodSecrets
	// Missing names what the pod cannot start without.
	Missing []string
	// Loading says that the answer comes later.
	Loading bool
}

// Resolver finds what pods need.
type Resolver interface {
	Resolve(ctx context.Context, pod *corev1.Pod, lenient bool, changed func()) (Resolved, error)
	Forget(uid types.UID)
}

// Delivery brings pods to devices.
type Delivery interface {
	Changed(device string)
	Withdraw(device string, uid types.UID) bool
	Held(device string, uid types.UID) (reason, message string, held bool)
}

// Options of a Sync.
type Options struct {
	Client   kubernetes.Interface
	Nodes    Nodes
	Devices  Devices
	Resolver Resolver
	Events   record.EventRecorder
	Log      *slog.Logger
	// Now is the clock; time.Now if nil.
	Now func() time.Time
}

// key names one pod for good.
type key struct {
	node, namespace, name string
	uid                   types.UID
}

// Sync is the worker. Make one with New.
type Sync struct {
	o        Options
	delivery Delivery
	informer cache.SharedIndexInformer
	queue    workqueue.TypedRateLimitingInterface[key]

	mu sync.Mutex // guards everything that follows
	// entries is what was resolved for each pod.
	entries map[types.UID]entry
	// admitted are pods that were let onto their node just now and may not
	// have their annotation in the informer yet.
	admitted map[types.UID]bool
	// waiting says why a pod was not handed over.
	waiting map[types.UID]podstatus.Waiting
}

type entry struct {
	device  string
	pod     bundle.Pod
	secrets bundle.PodSecrets
}

// New makes a sync. Deliver to must be set by Use before Run.
func New(o Options) (*Sync, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	s := &Sync{
		o:     o,
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[key](failMin, failMax)),
		informer: informers.NewSharedInformerFactoryWithOptions(o.Client, resync, informers.WithTweakListOptions(func(l *metav1.ListOptions) {
			l.FieldSelector = fields.OneTermNotEqualSelector("spec.nodeName", "").String()
		})).Core().V1().Pods().Informer(),
		entries: map[types.UID]entry{}, admitted: map[types.UID]bool{}, waiting: map[types.UID]podstatus.Waiting{},
	}
	if err := s.informer.SetTransform(func(obj any) (any, error) {
		if m, err := meta.Accessor(obj); err == nil {
			m.SetManagedFields(nil)
		}
		return obj, nil
	}); err != nil {
		return nil, fmt.Errorf("cannot set up pod informer: %w", err)
	}
	if err := s.informer.AddIndexers(cache.Indexers{byNode: func(obj any) ([]string, error) {
		if p, ok := obj.(*corev1.Pod); ok {
			return []string{p.Spec.NodeName}, nil
		}
		return nil, nil
	}, byDevice: func(obj any) ([]string, error) {
		if p, ok := obj.(*corev1.Pod); ok && p.Annotations[wellknown.AnnotationDevice] != "" {
			return []string{p.Annotations[wellknown.AnnotationDevice]}, nil
		}
		return nil, nil
	}}); err != nil {
		return nil, fmt.Errorf("cannot set up pod index: %w", err)
	}
	_, err := s.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { s.enqueue(obj) },
		UpdateFunc: func(_, obj any) { s.enqueue(obj) },
		DeleteFunc: func(obj any) {
			if t, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = t.Obj
			}
			s.enqueue(obj)
		},
	})
	if err != nil {
		return nil, fmt.Errorf("cannot watch pods: %w", err)
	}
	return s, nil
}

// Use sets where pods go. It is apart from New because both need each other.
func (s *Sync) Use(d Delivery) { s.delivery = d }

func (s *Sync) enqueue(obj any) {
	p, ok := obj.(*corev1.Pod)
	if !ok {
		return
	}
	_, ours := s.o.Nodes.DeviceOf(p.Spec.NodeName)
	if ours || p.Annotations[wellknown.AnnotationDevice] != "" {
		s.queue.Add(keyOf(p))
	}
}

func keyOf(p *corev1.Pod) key {
	return key{node: p.Spec.NodeName, namespace: p.Namespace, name: p.Name, uid: p.UID}
}

// NodeChanged has all pods of a node looked at again; it does not block.
func (s *Sync) NodeChanged(node string) {
	for _, p := range s.podsOn(node) {
		s.queue.Add(keyOf(p))
	}
}

// DeviceChanged has all pods of a device looked at again, and what it shall
// have; it does not block.
func (s *Sync) DeviceChanged(name string) {
	if node, ok := s.o.Nodes.NodeOf(name); ok {
		s.NodeChanged(node)
	}
	for _, p := range s.indexed(byDevice, name) { // they may be on any node
		s.queue.Add(keyOf(p))
	}
}

func (s *Sync) podsOn(node string) []*corev1.Pod { return s.indexed(byNode, node) }

func (s *Sync) indexed(index, value string) []*corev1.Pod {
	list, err := s.informer.GetIndexer().ByIndex(index, value)
	if err != nil {
		return nil // the index exists
	}
	out := make([]*corev1.Pod, 0, len(list))
	for _, obj := range list {
		if p, ok := obj.(*corev1.Pod); ok {
			out = append(out, p)
		}
	}
	return out
}

// Synced says whether all pods are known.
func (s *Sync) Synced() bool { return s.informer.HasSynced() }

// Run works until ctx ends, and waits for its workers.
func (s *Sync) Run(ctx context.Context) {
	var group sync.WaitGroup
	defer group.Wait()
	defer context.AfterFunc(ctx, s.queue.ShutDown)()
	group.Go(func() { s.informer.RunWithContext(ctx) })
	if !cache.WaitForCacheSync(ctx.Done(), s.informer.HasSynced) {
		return
	}
	for range workers {
		group.Go(func() {
			for s.work(ctx) {
			}
		})
	}
	group.Wait()
}

func (s *Sync) work(ctx context.Context) bool {
	k, quit := s.queue.Get()
	if quit {
		return false
	}
	defer s.queue.Done(k)
	if err := s.sync(ctx, k); err != nil {
		if ctx.Err() == nil && !apierrors.IsConflict(err) {
			s.o.Log.WarnContext(ctx, "cannot sync pod, trying again", "namespace", k.namespace, "pod", k.name, "uid", k.uid, "node", k.node, "error", err)
		}
		s.queue.AddRateLimited(k)
		return true
	}
	s.queue.Forget(k)
	return true
}

// Desired returns what a device shall have; false while a pod that it has, or
// may have, was not looked at yet.
func (s *Sync) Desired(name string) ([]bundle.Pod, bundle.Secrets, bool) {
	node, ok := s.o.Nodes.NodeOf(name)
	if !ok || !s.informer.HasSynced() {
		return nil, nil, false
	}
	var pods []bundle.Pod
	secrets := bundle.Secrets{}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.podsOn(node) {
		if !delivered(p, name) {
			continue
		}
		e, ok := s.entries[p.UID]
		if !ok {
			return nil, nil, false
		}
		pods = append(pods, e.pod)
		if len(e.secrets.Secrets) > 0 || len(e.secrets.Tokens) > 0 {
			secrets[p.UID] = e.secrets
		}
	}
	return pods, secrets, true
}

// delivered says that the device has the pod or is about to get it. A pod that
// ended stays with its device until its object goes, so that it never starts
// again.
func delivered(p *corev1.Pod, device string) bool {
	return p.Annotations[wellknown.AnnotationDevice] == device && (hasFinalizer(p) || podstatus.Terminal(p.Status.Phase))
}

func hasFinalizer(p *corev1.Pod) bool {
	for _, f := range p.Finalizers {
		if f == wellknown.FinalizerStopConfirmed {
			return true
		}
	}
	return false
}

// sync brings one pod a step further.
func (s *Sync) sync(ctx context.Context, k key) error {
	obj, exists, err := s.informer.GetIndexer().GetByKey(k.namespace + "/" + k.name)
	if err != nil {
		return fmt.Errorf("cannot look up pod: %w", err)
	}
	p, _ := obj.(*corev1.Pod)
	if !exists || p == nil || p.UID != k.uid {
		s.forget(k)
		return nil
	}
	bound, owner := s.owner(p)
	if bound == "" && owner == "" {
		return nil
	}
	if p.DeletionTimestamp != nil && !hasFinalizer(p) {
		return s.remove(ctx, p) // it never left the cluster, or it ended
	}
	if owner != "" && owner != bound {
		return s.foreign(ctx, p, owner)
	}
	dev, known := s.o.Devices.Get(bound)
	if !known {
		return nil // the inventory will tell
	}
	switch {
	case p.DeletionTimestamp != nil:
		return s.stop(ctx, p, dev)
	case podstatus.Terminal(p.Status.Phase) && owner == "":
		return nil // rejected by us or by somebody else
	}
	if owner == "" {
		if goOn, err := s.admit(ctx, p, dev); err != nil || !goOn {
			return err
		}
	}
	return s.handOver(ctx, p, dev, owner == "")
}

// owner returns the device that the pod's node stands for and the one that the
// pod was given to.
func (s *Sync) owner(p *corev1.Pod) (bound, owner string) {
	bound, _ = s.o.Nodes.DeviceOf(p.Spec.NodeName)
	return bound, p.Annotations[wellknown.AnnotationDevice]
}

func (s *Sync) forget(k key) {
	s.o.Resolver.Forget(k.uid)
	s.mu.Lock()
	e, ok := s.entries[k.uid]
	delete(s.entries, k.uid)
	delete(s.admitted, k.uid)
	delete(s.waiting, k.uid)
	s.mu.Unlock()
	if ok {
		s.delivery.Changed(e.device)
	}
}

// foreign is a pod whose node now stands for another device: it is delivered
// nowhere, and goes when the device that has it confirms.
func (s *Sync) foreign(ctx context.Context, p *corev1.Pod, owner string) error {
	s.o.Events.Eventf(p, corev1.EventTypeWarning, eventForeign, "The pod belongs to device %s, for which node %s does not stand.", owner, p.Spec.NodeName)
	dev, known := s.o.Devices.Get(owner)
	if p.DeletionTimestamp == nil || !known || dev.Report == nil || !dev.Report.Confirmed(p.UID) {
		return nil
	}
	return s.finalize(ctx, p, dev)
}

// admit makes a node's own checks of a pod that was bound to it.
func (s *Sync) admit(ctx context.Context, p *corev1.Pod, dev device.State) (bool, error) {
	if errs := support.Check(&p.Spec); len(errs) > 0 {
		return false, s.reject(ctx, p, wellknown.ReasonUnsupportedField, errs.ToAggregate().Error())
	}
	if dev.Report == nil {
		s.wait(p, reasonWaitsNode, "The device has reported nothing yet.")
		return false, s.writeStatus(ctx, p, dev)
	}
	s.mu.Lock()
	var others []*corev1.Pod
	for _, o := range s.podsOn(p.Spec.NodeName) {
		if o.UID != p.UID && !podstatus.Terminal(o.Status.Phase) && (s.admitted[o.UID] || o.Annotations[wellknown.AnnotationDevice] == dev.Name) {
			others = append(others, o)
		}
	}
	rejection := admit.Check(p, others, s.o.Nodes.Allocatable(dev))
	if rejection == nil {
		s.admitted[p.UID] = true
	}
	s.mu.Unlock()
	if rejection != nil {
		return false, s.reject(ctx, p, rejection.Reason, rejection.Message)
	}
	return true, nil
}

func (s *Sync) reject(ctx context.Context, p *corev1.Pod, reason, message string) error {
	s.o.Events.Event(p, corev1.EventTypeWarning, reason, message)
	s.o.Log.InfoContext(ctx, "rejected pod", "namespace", p.Namespace, "pod", p.Name, "uid", p.UID, "node", p.Spec.NodeName, "reason", reason, "message", message)
	return s.patchStatus(ctx, p, podstatus.Rejected(p, reason, message))
}

func (s *Sync) wait(p *corev1.Pod, reason, message string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting[p.UID] = podstatus.Waiting{Reason: reason, Message: message}
}

// handOver resolves a pod and gives it to the delivery; a first time it only
// claims the pod, and goes on when the informer shows the claim.
func (s *Sync) handOver(ctx context.Context, p *corev1.Pod, dev device.State, first bool) error {
	again := func() { s.queue.Add(keyOf(p)) }
	res, err := s.o.Resolver.Resolve(ctx, p, !first, again)
	if err != nil {
		s.wait(p, reasonMissing, err.Error())
		return errors.Join(err, s.writeStatus(ctx, p, dev))
	}
	if len(res.Missing) > 0 {
		message := strings.Join(res.Missing, ", ") + " not found"
		s.o.Events.Event(p, corev1.EventTypeWarning, eventMount, message)
		if first {
			s.wait(p, reasonMissing, message)
			return s.writeStatus(ctx, p, dev)
		}
	}
	if res.Loading {
		return s.writeStatus(ctx, p, dev)
	}
	s.mu.Lock()
	delete(s.waiting, p.UID)
	s.mu.Unlock()
	if first {
		return s.claim(ctx, p, dev.Name)
	}
	s.mu.Lock()
	old, had := s.entries[p.UID]
	next := entry{device: dev.Name, pod: res.Pod, secrets: res.Secrets}
	changed := !had || old.device != next.device || !equality.Semantic.DeepEqual(old.pod, next.pod) || !reflect.DeepEqual(old.secrets, next.secrets)
	s.entries[p.UID] = next
	delete(s.admitted, p.UID)
	s.mu.Unlock()
	if changed {
		s.delivery.Changed(dev.Name)
	}
	if podstatus.Terminal(p.Status.Phase) && hasFinalizer(p) && p.DeletionTimestamp == nil && dev.Report != nil && dev.Report.Confirmed(p.UID) {
		if err := s.writeLast(ctx, p, dev); err != nil {
			return err
		}
		return s.release(ctx, p)
	}
	return s.writeStatus(ctx, p, dev)
}

// claim sets finalizer and device in one patch.
func (s *Sync) claim(ctx context.Context, p *corev1.Pod, device string) error {
	return s.patchMeta(ctx, p, map[string]any{
		"uid":         p.UID,
		"annotations": map[string]any{wellknown.AnnotationDevice: device},
		"finalizers":  []string{wellknown.FinalizerStopConfirmed},
	})
}

// release takes our finalizer off.
func (s *Sync) release(ctx context.Context, p *corev1.Pod) error {
	return s.patchMeta(ctx, p, map[string]any{
		"uid":                                 p.UID,
		"$deleteFromPrimitiveList/finalizers": []string{wellknown.FinalizerStopConfirmed},
	})
}

func (s *Sync) patchMeta(ctx context.Context, p *corev1.Pod, m map[string]any) error {
	text, err := json.Marshal(map[string]any{"metadata": m})
	if err != nil {
		return fmt.Errorf("cannot encode patch of pod: %w", err)
	}
	_, err = s.o.Client.CoreV1().Pods(p.Namespace).Patch(ctx, p.Name, types.StrategicMergePatchType, text, metav1.PatchOptions{})
	if err != nil && !gone(err) {
		return fmt.Errorf("cannot patch pod: %w", err)
	}
	return nil
}

// gone says that the very pod does not exist any more: not found, or one of
// another UID has its name.
func gone(err error) bool {
	return apierrors.IsNotFound(err) || apierrors.IsConflict(err) && strings.Contains(err.Error(), "UID")
}

// stop sees a deleted pod to its end.
func (s *Sync) stop(ctx context.Context, p *corev1.Pod, dev device.State) error {
	var reported *report.Pod
	if dev.Report != nil {
		if dev.Report.Confirmed(p.UID) {
			return s.finalize(ctx, p, dev)
		}
		reported = dev.Report.Pod(p.UID)
	}
	if reported == nil && s.delivery.Withdraw(dev.Name, p.UID) {
		s.o.Log.InfoContext(ctx, "pod was never delivered, letting it go", "namespace", p.Namespace, "pod", p.Name, "uid", p.UID)
		return s.let(ctx, p)
	}
	return s.handOver(ctx, p, dev, false)
}

// finalize writes what the device said last and lets the pod go.
func (s *Sync) finalize(ctx context.Context, p *corev1.Pod, dev device.State) error {
	if err := s.writeLast(ctx, p, dev); err != nil {
		return err
	}
	s.o.Log.InfoContext(ctx, "device confirmed the stop of pod", "namespace", p.Namespace, "pod", p.Name, "uid", p.UID, "device", dev.Name)
	return s.let(ctx, p)
}

// let takes the finalizer off and removes the pod.
func (s *Sync) let(ctx context.Context, p *corev1.Pod) error {
	if hasFinalizer(p) {
		if err := s.release(ctx, p); err != nil {
			return err
		}
	}
	return s.remove(ctx, p)
}

func (s *Sync) remove(ctx context.Context, p *corev1.Pod) error {
	err := s.o.Client.CoreV1().Pods(p.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{
		GracePeriodSeconds: new(int64), Preconditions: metav1.NewUIDPreconditions(string(p.UID)),
	})
	if err != nil && !gone(err) {
		return fmt.Errorf("cannot delete pod: %w", err)
	}
	return nil
}

// writeStatus patches the pod's status if the device or the cluster says
// something new.
func (s *Sync) writeStatus(ctx context.Context, p *corev1.Pod, dev device.State) error {
	in := podstatus.Input{Pod: p, Connection: dev.Connection, Now: metav1.NewTime(s.o.Now())}
	if dev.Report != nil {
		in.Reported = dev.Report.Pod(p.UID)
	}
	s.mu.Lock()
	if w, ok := s.waiting[p.UID]; ok {
		in.Waiting = &w
	}
	s.mu.Unlock()
	if reason, message, held := s.delivery.Held(dev.Name, p.UID); held {
		in.Waiting = &podstatus.Waiting{Reason: reason, Message: message}
		s.o.Events.Event(p, corev1.EventTypeWarning, reason, message)
	}
	return s.patchStatus(ctx, p, podstatus.Build(in))
}

// writeLast is writeStatus for a pod of which the device confirmed the stop: a
// status that the API refuses must not keep it for ever.
func (s *Sync) writeLast(ctx context.Context, p *corev1.Pod, dev device.State) error {
	err := s.writeStatus(ctx, p, dev)
	if apierrors.IsInvalid(err) {
		s.o.Log.WarnContext(ctx, "the last status of pod is refused, going on without it", "namespace", p.Namespace, "pod", p.Name, "uid", p.UID, "error", err)
		return nil
	}
	return err
}

func (s *Sync) patchStatus(ctx context.Context, p *corev1.Pod, next corev1.PodStatus) error {
	if equality.Semantic.DeepEqual(p.Status, next) {
		return nil
	}
	text := func(uid types.UID, st corev1.PodStatus) ([]byte, error) {
		return json.Marshal(corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: uid}, Status: st})
	}
	before, err := text("", p.Status)
	if err != nil {
		return fmt.Errorf("cannot encode status: %w", err)
	}
	after, err := text(p.UID, next) // the UID lands in the patch, as a precondition
	if err != nil {
		return fmt.Errorf("cannot encode status: %w", err)
	}
	patch, err := strategicpatch.CreateTwoWayMergePatch(before, after, corev1.Pod{})
	if err != nil {
		return fmt.Errorf("cannot make patch of status: %w", err)
	}
	_, err = s.o.Client.CoreV1().Pods(p.Namespace).Patch(ctx, p.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	if err != nil && !gone(err) {
		return fmt.Errorf("cannot patch status: %w", err)
	}
	return nil
}
