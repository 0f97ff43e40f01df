// Package status computes a pod's status from what systemd, podman and the
// units' records say, as the kubelet would report it. It is pure.
package status

import (
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/jetbridge/jetbridge/device-agent/lifecycle"
)

// Observed is a container that exists now.
type Observed struct {
	ID, ImageID string
	Running     bool
	Started     time.Time
}

// Waiting says why a container does not run yet.
type Waiting struct{ Reason, Message string }

// Input is all that a pod's status depends on.
type Input struct {
	Instance *lifecycle.Instance
	// Records, Containers and Waiting are by the container's name in the pod.
	Records    map[string]lifecycle.Record
	Containers map[string]Observed
	Waiting    map[string]Waiting
	// PodActive says whether the pod's own service runs.
	PodActive bool
	HostIP    string
	PodIPs    []string
	// Previous is the status before, nil if there was none: conditions that
	// did not change keep their time.
	Previous *corev1.PodStatus
	Now      time.Time
}

// Compute returns the status of a pod that runs, starts or stops.
func Compute(in Input) corev1.PodStatus {
	pod := &in.Instance.Pod
	started := metav1.NewTime(in.Instance.Started)
	out := corev1.PodStatus{StartTime: &started, QOSClass: qos(&pod.Spec)}
	if in.HostIP != "" {
		out.HostIP, out.HostIPs = in.HostIP, []corev1.HostIP{{IP: in.HostIP}}
	}
	for i, ip := range in.PodIPs {
		if i == 0 {
			out.PodIP = ip
		}
		out.PodIPs = append(out.PodIPs, corev1.PodIP{IP: ip})
	}
	initialized := true
	for i := range pod.Spec.InitContainers {
		s := containerStatus(in, &pod.Spec.InitContainers[i], true, initialized)
		initialized = initialized && s.Ready
		out.InitContainerStatuses = append(out.InitContainerStatuses, s)
	}
	for i := range pod.Spec.Containers {
		out.ContainerStatuses = append(out.ContainerStatuses, containerStatus(in, &pod.Spec.Containers[i], false, initialized))
	}
	out.Phase = phase(in, &out, initialized)
	out.Conditions = conditions(in, &out, initialized)
	return out
}

// Refused is the status of a pod that the device will not run.
func Refused(i *lifecycle.Instance, reason, message string) corev1.PodStatus {
	started := metav1.NewTime(i.Started)
	return corev1.PodStatus{Phase: corev1.PodFailed, Reason: reason, Message: message, StartTime: &started}
}

// WillRestart says whether a container that ended like this starts again.
func WillRestart(policy corev1.RestartPolicy, init bool, exitCode int32) bool {
	switch policy {
	case corev1.RestartPolicyNever:
		return false
	case corev1.RestartPolicyOnFailure:
		return exitCode != 0
	default:
		return !init || exitCode != 0
	}
}

func containerStatus(in Input, c *corev1.Container, init, reached bool) corev1.ContainerStatus {
	r, seen := in.Records[c.Name], in.Containers[c.Name]
	gone := in.Instance.Phase == lifecycle.Stopped
	s := corev1.ContainerStatus{Name: c.Name, Image: c.Image, RestartCount: max(r.Attempts-1, 0)}
	started := false
	switch {
	case seen.Running && !gone:
		s.State.Running = &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(seen.Started)}
		s.ContainerID, s.ImageID = id(seen.ID), seen.ImageID
		s.LastTerminationState.Terminated = terminated(r.Last)
		s.Ready, started = !init, true
	case r.Attempts == 0:
		s.State.Waiting = notStarted(in, c, init, reached)
	case r.Ended() && (gone || in.Instance.Phase == lifecycle.Stopping || r.Delay == 0 || !WillRestart(in.Instance.Pod.Spec.RestartPolicy, init, r.Last.ExitCode)):
		s.State.Terminated = terminated(r.Last)
		s.LastTerminationState.Terminated = terminated(r.Before)
		s.ContainerID, s.ImageID = id(r.Last.ContainerID), r.Last.ImageID
		s.Ready = init && r.Last.ExitCode == 0
	case r.Ended():
		s.State.Waiting = &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff", Message: fmt.Sprintf(
			"back-off %s restarting failed container=%s pod=%s_%s(%s)", r.Delay, c.Name, in.Instance.Pod.Metadata.Name, in.Instance.Pod.Metadata.Namespace, in.Instance.Pod.Metadata.UID)}
		s.LastTerminationState.Terminated = terminated(r.Last)
		s.ContainerID, s.ImageID = id(r.Last.ContainerID), r.Last.ImageID
	case gone:
		s.State.Terminated = &corev1.ContainerStateTerminated{
			ExitCode: 137, Reason: "ContainerStatusUnknown", Message: "The container could not be located when the pod was terminated",
			StartedAt: metav1.NewTime(r.Started), FinishedAt: metav1.NewTime(in.Now),
		}
	default:
		s.State.Waiting = notStarted(in, c, init, true)
		s.LastTerminationState.Terminated = terminated(r.Last)
	}
	s.Started = &started
	return s
}

func notStarted(in Input, c *corev1.Container, init, reached bool) *corev1.ContainerStateWaiting {
	if w, ok := in.Waiting[c.Name]; ok {
		return &corev1.ContainerStateWaiting{Reason: w.Reason, Message: w.Message}
	}
	if !reached || init && len(in.Records) == 0 {
		return &corev1.ContainerStateWaiting{Reason: "PodInitializing"}
	}
	return &corev1.ContainerStateWaiting{Reason: "ContainerCreating"}
}

func id(s string) string {
	if s == "" {
		return ""
	}
	return "podman://" + s
}

func terminated(e *lifecycle.End) *corev1.ContainerStateTerminated {
	if e == nil {
		return nil
	}
	return &corev1.ContainerStateTerminated{
		ExitCode: e.ExitCode, Reason: e.Reason, Message: e.Message, ContainerID: id(e.ContainerID),
		StartedAt: metav1.NewTime(e.Started), FinishedAt: metav1.NewTime(e.Finished),
	}
}

func phase(in Input, s *corev1.PodStatus, initialized bool) corev1.PodPhase {
	policy := in.Instance.Pod.Spec.RestartPolicy
	if !initialized {
		for _, c := range s.InitContainerStatuses {
			if t := c.State.Terminated; t != nil && t.ExitCode != 0 && (policy == corev1.RestartPolicyNever || in.Instance.Phase == lifecycle.Stopped) {
				return corev1.PodFailed
			}
		}
		if in.Instance.Phase == lifecycle.Stopped {
			return corev1.PodFailed
		}
		return corev1.PodPending
	}
	var waiting, running, stopped, succeeded int
	for _, c := range s.ContainerStatuses {
		t := c.State.Terminated
		if t == nil && c.State.Waiting != nil {
			t = c.LastTerminationState.Terminated
		}
		switch {
		case c.State.Running != nil:
			running++
		case t != nil:
			stopped++
			if t.ExitCode == 0 {
				succeeded++
			}
		default:
			waiting++
		}
	}
	switch {
	case in.Instance.Phase == lifecycle.Stopped:
		if waiting == 0 && stopped == succeeded {
			return corev1.PodSucceeded
		}
		return corev1.PodFailed
	case waiting > 0:
		return corev1.PodPending
	case running > 0 || policy == corev1.RestartPolicyAlways || policy == "":
		return corev1.PodRunning
	case stopped == succeeded:
		return corev1.PodSucceeded
	case policy == corev1.RestartPolicyNever:
		return corev1.PodFailed
	default:
		return corev1.PodRunning
	}
}

func conditions(in Input, s *corev1.PodStatus, initialized bool) []corev1.PodCondition {
	var unready []string
	for _, c := range s.ContainerStatuses {
		if !c.Ready {
			unready = append(unready, c.Name)
		}
	}
	ready := corev1.PodCondition{Status: corev1.ConditionTrue}
	switch {
	case s.Phase == corev1.PodSucceeded:
		ready = corev1.PodCondition{Status: corev1.ConditionFalse, Reason: "PodCompleted"}
	case s.Phase == corev1.PodFailed:
		ready = corev1.PodCondition{Status: corev1.ConditionFalse, Reason: "PodFailed"}
	case len(unready) > 0:
		ready = corev1.PodCondition{Status: corev1.ConditionFalse, Reason: "ContainersNotReady", Message: fmt.Sprintf("containers with unready status: %v", unready)}
	}
	init := corev1.PodCondition{Status: corev1.ConditionTrue}
	if s.Phase == corev1.PodSucceeded {
		init.Reason = "PodCompleted"
	}
	if !initialized {
		var names []string
		for _, c := range s.InitContainerStatuses {
			if !c.Ready {
				names = append(names, c.Name)
			}
		}
		init = corev1.PodCondition{Status: corev1.ConditionFalse, Reason: "ContainersNotInitialized", Message: fmt.Sprintf("containers with incomplete status: %v", names)}
	}
	sandbox := corev1.PodCondition{Status: corev1.ConditionFalse}
	if in.PodActive {
		sandbox.Status = corev1.ConditionTrue
	}
	list := []corev1.PodCondition{sandbox, init, ready, ready}
	for i, kind := range []corev1.PodConditionType{corev1.PodReadyToStartContainers, corev1.PodInitialized, corev1.PodReady, corev1.ContainersReady} {
		c := &list[i]
		c.Type, c.LastTransitionTime = kind, metav1.NewTime(in.Now.Truncate(time.Second).UTC())
		if in.Previous == nil {
			continue
		}
		if j := slices.IndexFunc(in.Previous.Conditions, func(p corev1.PodCondition) bool { return p.Type == kind }); j >= 0 && in.Previous.Conditions[j].Status == c.Status {
			c.LastTransitionTime = in.Previous.Conditions[j].LastTransitionTime
		}
	}
	return list
}

// qos is the pod's quality of service class.
func qos(spec *corev1.PodSpec) corev1.PodQOSClass {
	guaranteed, any := true, false
	for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
		for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
			limit, request := c.Resources.Limits[name], c.Resources.Requests[name]
			any = any || !limit.IsZero() || !request.IsZero()
			guaranteed = guaranteed && !limit.IsZero() && (request.IsZero() || request.Cmp(limit) == 0)
		}
	}
	switch {
	case !any:
		return corev1.PodQOSBestEffort
	case guaranteed:
		return corev1.PodQOSGuaranteed
	default:
		return corev1.PodQOSBurstable
	}
}
