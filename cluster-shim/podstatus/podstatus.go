// Package podstatus makes the status that a pod gets in the API from what its
// device reports and from the state of the device's connection.
//
// A device is trusted for its own pods only, and only for the fields that are
// named here. A terminal phase stays, restart counts never decrease, and the
// transition time of a condition stays while its status does.
package podstatus

import (
	"strings"
	"unicode"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/jetbridge/jetbridge/cluster-shim/device"
	"github.com/jetbridge/jetbridge/shared/report"
	"github.com/jetbridge/jetbridge/shared/wellknown"
)

const (
	// maxMessage limits a text from a device, in bytes, as the kubelet
	// limits termination messages.
	maxMessage = 4096
	// maxReason limits a reason from a device, in bytes.
	maxReason = 128
	// reasonCreating is what the kubelet says of containers to come.
	reasonCreating = "ContainerCreating"
	reasonNotReady = "ContainersNotReady"
)

// Waiting is why a pod was not handed to its device yet.
type Waiting struct {
	Reason, Message string
}

// Input is all that a status depends on.
type Input struct {
	// Pod is the pod as the API has it.
	Pod *corev1.Pod
	// Reported is what the device says of it; nil if nothing.
	Reported *report.Pod
	// Connection is that of the pod's device.
	Connection device.Connection
	// Waiting is why the pod waits in the cluster; nil if it does not.
	Waiting *Waiting
	// Now becomes the transition time of conditions that change.
	Now metav1.Time
}

// Build makes the status.
func Build(in Input) corev1.PodStatus {
	old := in.Pod.Status
	out := *old.DeepCopy()
	if in.Reported != nil {
		fromReport(&out, in)
	} else if !Terminal(old.Phase) {
		pending(&out, in)
	}
	if Terminal(old.Phase) {
		out.Phase, out.Reason, out.Message = old.Phase, old.Reason, old.Message
	}
	if in.Connection == device.Disconnected && !Terminal(out.Phase) {
		setCondition(&out.Conditions, corev1.PodCondition{
			Type: corev1.PodReady, Status: corev1.ConditionFalse, Reason: wellknown.ReasonDeviceDisconnected,
			Message: "The device has no contact with Flight Control; this is its last known state.",
		}, in)
	}
	return out
}

// Rejected is the status of a pod that its node refuses for good.
func Rejected(pod *corev1.Pod, reason, message string) corev1.PodStatus {
	out := *pod.Status.DeepCopy()
	out.Phase, out.Reason, out.Message = corev1.PodFailed, reason, clean(message, maxMessage)
	return out
}

// Terminal says whether a pod in this phase ended for good.
func Terminal(phase corev1.PodPhase) bool {
	return phase == corev1.PodSucceeded || phase == corev1.PodFailed
}

// pending is the status of a pod of which the device says nothing.
func pending(out *corev1.PodStatus, in Input) {
	if out.Phase == "" {
		out.Phase = corev1.PodPending
	}
	reason, message := reasonCreating, ""
	if in.Waiting != nil {
		reason, message = in.Waiting.Reason, in.Waiting.Message
	}
	started := func(list []corev1.ContainerStatus) bool {
		for _, s := range list {
			if s.State.Waiting == nil {
				return true
			}
		}
		return false
	}
	if started(out.ContainerStatuses) || started(out.InitContainerStatuses) {
		return // the last that was known says more
	}
	fill := func(containers []corev1.Container) []corev1.ContainerStatus {
		var list []corev1.ContainerStatus
		for _, c := range containers {
			list = append(list, corev1.ContainerStatus{
				Name: c.Name, Image: c.Image, Started: new(bool),
				State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}},
			})
		}
		return list
	}
	out.InitContainerStatuses = fill(in.Pod.Spec.InitContainers)
	out.ContainerStatuses = fill(in.Pod.Spec.Containers)
	for _, t := range []corev1.PodConditionType{corev1.ContainersReady, corev1.PodReady} {
		setCondition(&out.Conditions, corev1.PodCondition{Type: t, Status: corev1.ConditionFalse, Reason: reasonNotReady}, in)
	}
}

// fromReport takes over the fields that a device may set.
func fromReport(out *corev1.PodStatus, in Input) {
	got := in.Reported.Status
	old := in.Pod.Status
	switch got.Phase {
	case corev1.PodPending, corev1.PodRunning, corev1.PodSucceeded, corev1.PodFailed:
		out.Phase = got.Phase
	default:
		if out.Phase == "" {
			out.Phase = corev1.PodPending
		}
	}
	out.Reason, out.Message = clean(got.Reason, maxReason), clean(got.Message, maxMessage)
	if out.StartTime == nil && got.StartTime != nil {
		out.StartTime = got.StartTime.DeepCopy()
	}
	out.InitContainerStatuses = containers(in.Pod.Spec.RestartPolicy, in.Pod.Spec.InitContainers, got.InitContainerStatuses, old.InitContainerStatuses)
	out.ContainerStatuses = containers(in.Pod.Spec.RestartPolicy, in.Pod.Spec.Containers, got.ContainerStatuses, old.ContainerStatuses)
	for _, c := range got.Conditions {
		switch c.Type {
		case corev1.PodReady, corev1.ContainersReady, corev1.PodInitialized, corev1.PodReadyToStartContainers:
		default:
			continue // not the device's to say
		}
		switch c.Status {
		case corev1.ConditionTrue, corev1.ConditionFalse, corev1.ConditionUnknown:
		default:
			continue
		}
		setCondition(&out.Conditions, corev1.PodCondition{
			Type: c.Type, Status: c.Status, Reason: clean(c.Reason, maxReason), Message: clean(c.Message, maxMessage),
			LastTransitionTime: c.LastTransitionTime,
		}, in)
	}
}

// containers takes over the statuses of those containers that the pod has, in
// the pod's order. The end of a container that may not start again stays: the
// API refuses anything else.
func containers(policy corev1.RestartPolicy, spec []corev1.Container, got, old []corev1.ContainerStatus) []corev1.ContainerStatus {
	var out []corev1.ContainerStatus
	for _, c := range spec {
		g, was := find(got, c.Name), find(old, c.Name)
		if g == nil {
			if was != nil {
				out = append(out, *was.DeepCopy())
			}
			continue
		}
		s := corev1.ContainerStatus{
			Name: c.Name, Image: clean(g.Image, maxMessage), ImageID: clean(g.ImageID, maxMessage), ContainerID: clean(g.ContainerID, maxMessage),
			Ready: g.Ready, RestartCount: max(g.RestartCount, 0), State: state(g.State), LastTerminationState: state(g.LastTerminationState),
		}
		if g.Started != nil {
			s.Started = new(*g.Started)
		}
		if was != nil {
			s.RestartCount = max(s.RestartCount, was.RestartCount)
			if final(policy, was.State.Terminated) && s.State.Terminated == nil {
				kept := was.DeepCopy()
				s.State, s.Ready, s.Started, s.ContainerID = kept.State, kept.Ready, kept.Started, kept.ContainerID
			}
		}
		if s.Image == "" {
			s.Image = c.Image
		}
		out = append(out, s)
	}
	return out
}

// final says that a container which ended like this may not start again.
func final(policy corev1.RestartPolicy, end *corev1.ContainerStateTerminated) bool {
	return end != nil && (policy == corev1.RestartPolicyNever || policy == corev1.RestartPolicyOnFailure && end.ExitCode == 0)
}

// state cleans the texts of a container's state.
func state(s corev1.ContainerState) corev1.ContainerState {
	s = *s.DeepCopy()
	if w := s.Waiting; w != nil {
		w.Reason, w.Message = clean(w.Reason, maxReason), clean(w.Message, maxMessage)
	}
	if t := s.Terminated; t != nil {
		t.Reason, t.Message, t.ContainerID = clean(t.Reason, maxReason), clean(t.Message, maxMessage), clean(t.ContainerID, maxMessage)
	}
	return s
}

func find(list []corev1.ContainerStatus, name string) *corev1.ContainerStatus {
	for i := range list {
		if list[i].Name == name {
			return &list[i]
		}
	}
	return nil
}

// setCondition puts c into the list. While the status stays, so does the
// transition time; else the device's own time counts, if it gave one.
func setCondition(list *[]corev1.PodCondition, c corev1.PodCondition, in Input) {
	if c.LastTransitionTime.IsZero() {
		c.LastTransitionTime = in.Now
	}
	for i, old := range *list {
		if old.Type != c.Type {
			continue
		}
		if was := condition(in.Pod.Status.Conditions, c.Type); was != nil && was.Status == c.Status {
			c.LastTransitionTime = was.LastTransitionTime
		}
		c.ObservedGeneration = old.ObservedGeneration
		(*list)[i] = c
		return
	}
	*list = append(*list, c)
}

func condition(list []corev1.PodCondition, t corev1.PodConditionType) *corev1.PodCondition {
	for i := range list {
		if list[i].Type == t {
			return &list[i]
		}
	}
	return nil
}

// clean makes a text from a device harmless for terminals and for the API:
// valid UTF-8, no control characters but line breaks and tabs, not too long.
func clean(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		if r != '\n' && r != '\t' && unicode.IsControl(r) {
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, "\uFFFD"))
	if len(s) <= limit {
		return s
	}
	for limit > 0 && !utf8.RuneStart(s[limit]) {
		limit--
	}
	return s[:limit]
}
