// Package admit decides whether a node has room for one more pod, with the
// reasons and messages that a kubelet gives. The shim asks when a pod was bound
// to a node, the device asks again with what it really has.
package admit

import (
	"fmt"
	"maps"
	"math"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/resource"

	"github.com/jetbridge/jetbridge/shared/internal/quantity"
)

// The reasons of a Rejection.
const (
	ReasonOutOfCPU              = "OutOfcpu"
	ReasonOutOfMemory           = "OutOfmemory"
	ReasonOutOfEphemeralStorage = "OutOfephemeral-storage"
	ReasonOutOfPods             = "OutOfpods"
)

// Rejection says why a pod does not fit; its fields are meant for the pod's
// status.
type Rejection struct {
	Reason  string
	Message string
}

// Check says whether pod fits beside others into allocatable, and returns nil
// if so. Pods of others that ended hold nothing, and pod itself may be among
// them. A resource that allocatable lacks is not there: a pod that requests
// some of it does not fit.
func Check(pod *corev1.Pod, others []*corev1.Pod, allocatable corev1.ResourceList) *Rejection {
	var count int64
	used := map[corev1.ResourceName]int64{}
	for _, other := range others {
		if other.UID == pod.UID || ended(other) {
			continue
		}
		if _, bad := absurd(other); bad {
			continue
		}
		count++
		for name, n := range requests(other) {
			used[name] = add(used[name], n)
		}
	}
	if capacity := quantity.Value(allocatable.Pods()); count+1 > capacity {
		return reject(ReasonOutOfPods, corev1.ResourcePods, 1, count, capacity)
	}
	if name, bad := absurd(pod); bad {
		return reject("OutOf"+string(name), name, math.MaxInt64, used[name], 0)
	}
	wanted := requests(pod)
	for _, r := range []struct {
		name     corev1.ResourceName
		reason   string
		capacity int64
	}{
		{corev1.ResourceCPU, ReasonOutOfCPU, quantity.Milli(allocatable.Cpu())},
		{corev1.ResourceMemory, ReasonOutOfMemory, quantity.Value(allocatable.Memory())},
		{corev1.ResourceEphemeralStorage, ReasonOutOfEphemeralStorage, quantity.Value(allocatable.StorageEphemeral())},
	} {
		if wanted[r.name] > 0 && wanted[r.name] > r.capacity-used[r.name] {
			return reject(r.reason, r.name, wanted[r.name], used[r.name], r.capacity)
		}
	}
	return nil
}

// requests is what a pod takes: CPU in thousandths, the rest in bytes.
func requests(pod *corev1.Pod) map[corev1.ResourceName]int64 {
	list := resource.PodRequests(pod, resource.PodResourcesOptions{})
	return map[corev1.ResourceName]int64{
		corev1.ResourceCPU:              quantity.Milli(list.Cpu()),
		corev1.ResourceMemory:           quantity.Value(list.Memory()),
		corev1.ResourceEphemeralStorage: quantity.Value(list.StorageEphemeral()),
	}
}

// absurd names a resource of which pod requests an amount that is not safe to
// add up. Devices do not support such pods, so they never get one.
func absurd(pod *corev1.Pod) (corev1.ResourceName, bool) {
	lists := []corev1.ResourceList{pod.Spec.Overhead}
	if pod.Spec.Resources != nil {
		lists = append(lists, pod.Spec.Resources.Requests)
	}
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		lists = append(lists, c.Resources.Requests)
	}
	for _, list := range lists {
		for _, name := range slices.Sorted(maps.Keys(list)) {
			if q := list[name]; quantity.Check(q.String()) != nil {
				return name, true
			}
		}
	}
	return "", false
}

func ended(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

// add sums two amounts that are not negative; what overflows stays at the top.
func add(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

func reject(reason string, name corev1.ResourceName, requested, used, capacity int64) *Rejection {
	return &Rejection{
		Reason:  reason,
		Message: fmt.Sprintf("Node didn't have enough resource: %s, requested: %d, used: %d, capacity: %d", name, requested, used, capacity),
	}
}
