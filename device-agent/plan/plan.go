// Package plan decides what to do next: desired pods times actual pods gives
// steps. It is pure, and is asked again after each step, so that it does not
// matter where a crash interrupted the last run.
//
// What leaves or changes is stopped, and confirmed, before anything starts.
package plan

import (
	"cmp"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/jetbridge/jetbridge/device-agent/lifecycle"
	"github.com/jetbridge/jetbridge/device-agent/unit"
	"github.com/jetbridge/jetbridge/shared/bundle"
)

// Kind is what a step does.
type Kind string

const (
	// Prepare checks a pod and fetches its images.
	Prepare Kind = "prepare"
	// Start writes a pod's units and starts them.
	Start Kind = "start"
	// Replace stops the containers whose images changed, and starts new ones.
	Replace Kind = "replace"
	// Stop stops a pod with its grace period, for good.
	Stop Kind = "stop"
	// Bury remembers that a pod that never ran here will never run.
	Bury Kind = "bury"
	// Forget removes a stopped pod that nobody wants to know of any more.
	Forget Kind = "forget"
)

// Step is one thing to do with one pod.
type Step struct {
	Kind Kind
	UID  types.UID
	// Grace is the grace period of a Stop, in seconds, at least 1.
	Grace int64
}

// Input is what a plan depends on.
type Input struct {
	Desired    []bundle.Pod
	Instances  map[types.UID]*lifecycle.Instance
	Tombstones map[types.UID]bool
	// Prepared says which pods' images are here.
	Prepared map[types.UID]bool
}

// Next returns the steps that can be done now, in any order, at once.
func Next(in Input) []Step {
	desired := make(map[types.UID]*bundle.Pod, len(in.Desired))
	for i := range in.Desired {
		desired[in.Desired[i].Metadata.UID] = &in.Desired[i]
	}
	var steps []Step
	stopping := false
	for uid, instance := range in.Instances {
		want := desired[uid]
		switch {
		case instance.Phase == lifecycle.Stopped && want == nil:
			steps = append(steps, Step{Kind: Forget, UID: uid})
		case instance.Phase == lifecycle.Stopped:
			if want.Terminating() && !in.Tombstones[uid] {
				steps = append(steps, Step{Kind: Bury, UID: uid})
			}
		case instance.Phase == lifecycle.Stopping || want == nil || want.Terminating():
			stopping = true
			steps = append(steps, Step{Kind: Stop, UID: uid, Grace: grace(instance, want)})
		}
	}
	for uid, want := range desired {
		instance := in.Instances[uid]
		switch {
		case want.Terminating():
			if instance == nil && !in.Tombstones[uid] {
				steps = append(steps, Step{Kind: Bury, UID: uid})
			}
		case in.Tombstones[uid] || instance != nil && (instance.Phase == lifecycle.Stopped || instance.Phase == lifecycle.Stopping):
		case instance != nil && instance.Phase == lifecycle.Running && !Changed(instance, want):
		case !in.Prepared[uid]:
			steps = append(steps, Step{Kind: Prepare, UID: uid})
		case stopping:
		case instance != nil && instance.Phase == lifecycle.Running:
			steps = append(steps, Step{Kind: Replace, UID: uid})
		default:
			steps = append(steps, Step{Kind: Start, UID: uid})
		}
	}
	slices.SortFunc(steps, func(a, b Step) int { return cmp.Or(cmp.Compare(a.UID, b.UID), cmp.Compare(a.Kind, b.Kind)) })
	return steps
}

// Changed says whether a running pod has other images than those that are
// wanted: nothing else of a pod's units can change. Names are not compared, so
// that a version of the agent that names units otherwise restarts nothing.
func Changed(i *lifecycle.Instance, want *bundle.Pod) bool {
	wanted := slices.Concat(want.Spec.InitContainers, want.Spec.Containers)
	return !slices.EqualFunc(i.Units.All(), wanted, func(u unit.Container, c corev1.Container) bool {
		return u.Container == c.Name && u.Image == c.Image
	})
}

// Settled says whether everything that had to stop did stop, and everything
// else was handed to systemd, refused, or tried in vain for now, as tried says.
func Settled(in Input, tried func(types.UID) bool) bool {
	for _, s := range Next(in) {
		switch s.Kind {
		case Forget:
		case Prepare, Start, Replace:
			if !tried(s.UID) {
				return false
			}
		default:
			return false
		}
	}
	return true
}

func grace(i *lifecycle.Instance, want *bundle.Pod) int64 {
	if i.Phase == lifecycle.Stopping && i.Grace > 0 && want == nil {
		return i.Grace
	}
	if want != nil && want.Metadata.DeletionGracePeriodSeconds != nil {
		return max(*want.Metadata.DeletionGracePeriodSeconds, 1)
	}
	return unit.Grace(&corev1.Pod{Spec: i.Pod.Spec})
}
