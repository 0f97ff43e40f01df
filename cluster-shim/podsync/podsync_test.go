package podsync

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/record"

	"github.com/jetbridge/jetbridge/cluster-shim/device"
	"github.com/jetbridge/jetbridge/shared/bundle"
	"github.com/jetbridge/jetbridge/shared/report"
	"github.com/jetbridge/jetbridge/shared/wellknown"
)

// world has node "n" for device "d"; other parts are played by its methods.
type world struct {
	t       *testing.T
	dev     device.State
	missing []string
	loading bool
	minted  bool
	changed int
	forgot  []types.UID
	cluster *fake.Clientset
	s       *Sync
}

func (w *world) DeviceOf(node string) (string, bool)            { return "d", node == "n" }
func (w *world) NodeOf(dev string) (string, bool)               { return "n", dev == "d" }
func (w *world) Allocatable(d device.State) corev1.ResourceList { return d.Report.Capacity }
func (w *world) Get(name string) (device.State, bool)           { return w.dev, name == "d" }
func (w *world) Forget(uid types.UID)                           { w.forgot = append(w.forgot, uid) }
func (w *world) Changed(string)                                 { w.changed++ }
func (w *world) Withdraw(string, types.UID) bool                { return !w.minted }
func (w *world) Held(string, types.UID) (string, string, bool)  { return "", "", false }
func (w *world) Resolve(_ context.Context, p *corev1.Pod, _ bool, _ func()) (Resolved, error) {
	return Resolved{Pod: bundle.Pod{Metadata: metav1.ObjectMeta{Name: p.Name, Namespace: p.Namespace, UID: p.UID, DeletionTimestamp: p.DeletionTimestamp}, Spec: p.Spec}, Missing: w.missing, Loading: w.loading}, nil
}

func newWorld(t *testing.T, pods ...*corev1.Pod) *world {
	t.Helper()
	w := &world{t: t, cluster: fake.NewClientset()}
	w.dev = device.State{Name: "d", Connection: device.Connected, Report: &report.Report{Capacity: corev1.ResourceList{
		corev1.ResourceCPU: resource.MustParse("1"), corev1.ResourceMemory: resource.MustParse("1Gi"), corev1.ResourcePods: resource.MustParse("10"),
	}}}
	s, err := New(Options{
		Client: w.cluster, Nodes: w, Devices: w, Resolver: w, Events: record.NewFakeRecorder(100), Log: slog.New(slog.DiscardHandler),
		Now: func() time.Time { return time.Unix(1000, 0) },
	})
	require.NoError(t, err)
	s.Use(w)
	w.s = s
	for _, p := range pods {
		require.NoError(t, w.cluster.Tracker().Add(p))
		require.NoError(t, s.informer.GetIndexer().Add(p))
	}
	return w
}

// sync runs one step for a pod, then shows its outcome to the informer.
func (w *world) sync(p *corev1.Pod) *corev1.Pod {
	w.t.Helper()
	require.NoError(w.t, w.s.sync(w.t.Context(), keyOf(p)))
	return w.observe(p)
}

func (w *world) observe(p *corev1.Pod) *corev1.Pod {
	w.t.Helper()
	got, err := w.cluster.CoreV1().Pods(p.Namespace).Get(w.t.Context(), p.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		require.NoError(w.t, w.s.informer.GetIndexer().Delete(p))
		return nil
	}
	require.NoError(w.t, err)
	require.NoError(w.t, w.s.informer.GetIndexer().Update(got))
	return got
}

func pod(name string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "ns", UID: types.UID("uid-" + name)},
		Spec:       corev1.PodSpec{NodeName: "n", Containers: []corev1.Container{{Name: "c", Image: "i"}}},
		Status:     corev1.PodStatus{Phase: corev1.PodPending},
	}
}

func claimed(name string) *corev1.Pod {
	p := pod(name)
	p.Annotations = map[string]string{wellknown.AnnotationDevice: "d"}
	p.Finalizers = []string{wellknown.FinalizerStopConfirmed}
	return p
}

func deleted(p *corev1.Pod) *corev1.Pod {
	now := metav1.NewTime(time.Unix(900, 0))
	p.DeletionTimestamp, p.DeletionGracePeriodSeconds = &now, new(int64(30))
	return p
}

func (w *world) reports(p *corev1.Pod, phase corev1.PodPhase, stopped bool) {
	w.dev.Report.Pods = []report.Pod{{UID: p.UID, Stopped: stopped, Status: corev1.PodStatus{Phase: phase}}}
}

func TestClaimThenDeliver(t *testing.T) {
	p := pod("a")
	w := newWorld(t, p)
	p = w.sync(p)
	assert.Equal(t, "d", p.Annotations[wellknown.AnnotationDevice])
	assert.Equal(t, []string{wellknown.FinalizerStopConfirmed}, p.Finalizers)
	patches := 0
	for _, a := range w.cluster.Actions() {
		if a.Matches("patch", "pods") && a.GetSubresource() == "" {
			patches++
		}
	}
	assert.Equal(t, 1, patches, "both in one patch")
	assert.Zero(t, w.changed, "nothing goes out before the claim is seen")

	p = w.sync(p)
	assert.Equal(t, 1, w.changed)
	assert.Equal(t, "ContainerCreating", p.Status.ContainerStatuses[0].State.Waiting.Reason)
	w.sync(p)
	assert.Equal(t, 1, w.changed, "the same is no change")

	w.reports(p, corev1.PodRunning, false)
	assert.Equal(t, corev1.PodRunning, w.sync(p).Status.Phase)
	w.cluster.ClearActions()
	w.sync(p)
	for _, a := range w.cluster.Actions() {
		assert.Equal(t, "get", a.GetVerb(), "an unchanged status is not written")
	}
}

func TestUnsupportedAndTooBigAreRejected(t *testing.T) {
	unsupported := pod("net")
	unsupported.Spec.HostNetwork = true
	big := pod("big")
	big.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("2")}
	w := newWorld(t, unsupported, big)
	got := w.sync(unsupported)
	assert.Equal(t, corev1.PodFailed, got.Status.Phase)
	assert.Equal(t, wellknown.ReasonUnsupportedField, got.Status.Reason)
	assert.Contains(t, got.Status.Message, "spec.hostNetwork")
	assert.Empty(t, got.Finalizers)
	assert.Equal(t, "OutOfcpu", w.sync(big).Status.Reason)
	assert.Zero(t, w.changed)
}

func TestTwoPodsCannotShareTheLastPlace(t *testing.T) {
	a, b := pod("a"), pod("b")
	for _, p := range []*corev1.Pod{a, b} {
		p.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("800m")}
	}
	w := newWorld(t, a, b)
	require.NoError(t, w.s.sync(t.Context(), keyOf(a))) // its claim is not in the informer yet
	assert.Equal(t, "OutOfcpu", w.sync(b).Status.Reason)
	assert.NotEmpty(t, w.observe(a).Finalizers)
}

func TestMissingConfigWaits(t *testing.T) {
	p := pod("a")
	w := newWorld(t, p)
	w.missing = []string{`ConfigMap "x"`}
	p = w.sync(p)
	assert.Empty(t, p.Finalizers)
	assert.Equal(t, "CreateContainerConfigError", p.Status.ContainerStatuses[0].State.Waiting.Reason)
	assert.Contains(t, p.Status.ContainerStatuses[0].State.Waiting.Message, `ConfigMap "x"`)
	w.missing = nil
	assert.NotEmpty(t, w.sync(p).Finalizers)
}

func TestDeletedPodWaitsForTheDevice(t *testing.T) {
	p := deleted(claimed("a"))
	*p.DeletionGracePeriodSeconds = 0 // as kubectl delete --force leaves it
	w := newWorld(t, p)
	w.minted = true
	p = w.sync(p)
	require.NotNil(t, p)
	assert.NotEmpty(t, p.Finalizers)
	assert.Equal(t, 1, w.changed, "the device is told to stop it")
	pods, _, _ := w.desired()
	require.Len(t, pods, 1)
	assert.True(t, pods[0].Terminating())

	w.reports(p, corev1.PodSucceeded, true)
	assert.Nil(t, w.sync(p), "confirmed, so it goes")
	deletes := 0
	for _, a := range w.cluster.Actions() {
		if d, ok := a.(k8stesting.DeleteAction); ok {
			deletes++
			assert.EqualValues(t, 0, *d.GetDeleteOptions().GracePeriodSeconds)
			assert.Equal(t, p.UID, *d.GetDeleteOptions().Preconditions.UID)
		}
	}
	assert.Equal(t, 1, deletes)
}

// desired is Desired with an informer that is not running.
func (w *world) desired() ([]bundle.Pod, bundle.Secrets, bool) {
	var pods []bundle.Pod
	for _, p := range w.s.podsOn("n") {
		if delivered(p, "d") {
			pods = append(pods, w.s.entries[p.UID].pod)
		}
	}
	return pods, nil, true
}

func TestTombstoneConfirmsToo(t *testing.T) {
	p := deleted(claimed("a"))
	w := newWorld(t, p)
	w.minted = true
	w.dev.Report.Tombstones = []types.UID{p.UID}
	assert.Nil(t, w.sync(p))
}

func TestNeverDelivered(t *testing.T) {
	unclaimed, kept := deleted(pod("a")), deleted(claimed("b"))
	w := newWorld(t, unclaimed, kept)
	assert.Nil(t, w.sync(unclaimed), "it goes at once")
	assert.Nil(t, w.sync(kept), "claimed, but in no bundle")
}

func TestAnEndedPodIsReleasedAndStaysDelivered(t *testing.T) {
	p := claimed("job")
	w := newWorld(t, p)
	w.reports(p, corev1.PodSucceeded, false)
	p = w.sync(p)
	assert.Equal(t, corev1.PodSucceeded, p.Status.Phase)
	assert.NotEmpty(t, w.sync(p).Finalizers, "not stopped yet")
	w.reports(p, corev1.PodSucceeded, true)
	p = w.sync(p)
	assert.Empty(t, p.Finalizers)
	pods, _, _ := w.desired()
	assert.Len(t, pods, 1, "so that the device never starts it again")
}

func TestAnotherDevicesPodIsNotDelivered(t *testing.T) {
	p := claimed("a")
	p.Annotations[wellknown.AnnotationDevice] = "other"
	w := newWorld(t, p)
	w.sync(p)
	assert.Zero(t, w.changed)
	assert.False(t, delivered(p, "d"))
}

func TestSuccessorOfTheSameName(t *testing.T) {
	p := claimed("a")
	w := newWorld(t, p)
	old := keyOf(p)
	old.uid = "predecessor"
	require.NoError(t, w.s.sync(t.Context(), old))
	assert.Equal(t, []types.UID{"predecessor"}, w.forgot)
	assert.Empty(t, w.cluster.Actions())
}

func TestNoReportNoAdmission(t *testing.T) {
	p := pod("a")
	w := newWorld(t, p)
	w.dev.Report = nil
	p = w.sync(p)
	assert.Equal(t, corev1.PodPending, p.Status.Phase)
	assert.Equal(t, wellknown.ReasonDeviceNotReporting, p.Status.ContainerStatuses[0].State.Waiting.Reason)
}

func TestDisconnectedPodIsNotReady(t *testing.T) {
	p := claimed("a")
	p.Status.Phase = corev1.PodRunning
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	w := newWorld(t, p)
	w.dev.Connection = device.Disconnected
	w.reports(p, corev1.PodRunning, false)
	p = w.sync(p)
	assert.Equal(t, corev1.ConditionFalse, p.Status.Conditions[0].Status)
	assert.Equal(t, wellknown.ReasonDeviceDisconnected, p.Status.Conditions[0].Reason)
	assert.Equal(t, corev1.PodRunning, p.Status.Phase)
}

// refuses makes the API refuse each status.
func (w *world) refuses() {
	w.cluster.PrependReactor("patch", "pods", func(a k8stesting.Action) (bool, runtime.Object, error) {
		if a.GetSubresource() != "status" {
			return false, nil, nil
		}
		return true, nil, apierrors.NewInvalid(corev1.SchemeGroupVersion.WithKind("Pod").GroupKind(), "a", nil)
	})
}

func TestARefusedStatusKeepsNoPod(t *testing.T) {
	stopped, ended := deleted(claimed("a")), claimed("job")
	ended.Status.Phase = corev1.PodSucceeded
	w := newWorld(t, stopped, ended)
	w.minted = true
	w.refuses()
	w.reports(stopped, corev1.PodSucceeded, true)
	assert.Nil(t, w.sync(stopped))
	w.reports(ended, corev1.PodSucceeded, true)
	w.dev.Report.Pods[0].Status.Message = "new"
	assert.Empty(t, w.sync(ended).Finalizers)
}

func TestAnUndeliveredPodOfAnUnknownDeviceGoes(t *testing.T) {
	p := deleted(pod("a"))
	w := newWorld(t, p)
	w.s.o.Devices = nobody{}
	assert.Nil(t, w.sync(p))
}

type nobody struct{}

func (nobody) Get(string) (device.State, bool) { return device.State{}, false }

func TestDeviceChangedWakesItsPodsOnAnyNode(t *testing.T) {
	p := claimed("a")
	p.Spec.NodeName = "renamed"
	w := newWorld(t, p)
	w.s.DeviceChanged("d")
	assert.Equal(t, 1, w.s.queue.Len())
}
