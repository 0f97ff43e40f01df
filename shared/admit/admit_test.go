package admit_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/types"

	"github.com/jetbridge/jetbridge/shared/admit"
)

func list(kv ...string) corev1.ResourceList {
	l := corev1.ResourceList{}
	for i := 0; i < len(kv); i += 2 {
		l[corev1.ResourceName(kv[i])] = resource.MustParse(kv[i+1])
	}
	return l
}

func pod(uid string, kv ...string) *corev1.Pod {
	p := &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Resources: corev1.ResourceRequirements{Requests: list(kv...)}}}}}
	p.UID = types.UID(uid)
	return p
}

func phase(p *corev1.Pod, phase corev1.PodPhase) *corev1.Pod {
	p.Status.Phase = phase
	return p
}

func withInit(p *corev1.Pod, kv ...string) *corev1.Pod {
	p.Spec.InitContainers = []corev1.Container{{Resources: corev1.ResourceRequirements{Requests: list(kv...)}}}
	return p
}

func many(n int) []*corev1.Pod {
	var pods []*corev1.Pod
	for i := range n {
		pods = append(pods, pod(fmt.Sprint("other-", i)))
	}
	return pods
}

func TestCheck(t *testing.T) {
	node := list("cpu", "2", "memory", "1Gi", "ephemeral-storage", "10Gi", "pods", "3")
	out := func(reason, resource string, requested, used, capacity int64) *admit.Rejection {
		return &admit.Rejection{Reason: reason, Message: fmt.Sprintf("Node didn't have enough resource: %s, requested: %d, used: %d, capacity: %d", resource, requested, used, capacity)}
	}
	for name, c := range map[string]struct {
		pod    *corev1.Pod
		others []*corev1.Pod
		node   corev1.ResourceList
		want   *admit.Rejection
	}{
		"empty pod":          {pod: pod("a"), node: node},
		"exact fit":          {pod: pod("a", "cpu", "1500m", "memory", "1Gi"), others: []*corev1.Pod{pod("b", "cpu", "500m")}, node: node},
		"cpu":                {pod: pod("a", "cpu", "1501m"), others: []*corev1.Pod{pod("b", "cpu", "500m")}, node: node, want: out("OutOfcpu", "cpu", 1501, 500, 2000)},
		"memory":             {pod: pod("a", "memory", "1025Mi"), node: node, want: out("OutOfmemory", "memory", 1025<<20, 0, 1<<30)},
		"storage":            {pod: pod("a", "ephemeral-storage", "11Gi"), node: node, want: out("OutOfephemeral-storage", "ephemeral-storage", 11<<30, 0, 10<<30)},
		"pods":               {pod: pod("a"), others: many(3), node: node, want: out("OutOfpods", "pods", 1, 3, 3)},
		"pods before cpu":    {pod: pod("a", "cpu", "9"), others: many(3), node: node, want: out("OutOfpods", "pods", 1, 3, 3)},
		"cpu before memory":  {pod: pod("a", "cpu", "9", "memory", "9Gi"), node: node, want: out("OutOfcpu", "cpu", 9000, 0, 2000)},
		"itself among them":  {pod: pod("a", "cpu", "2"), others: []*corev1.Pod{pod("a", "cpu", "2")}, node: node},
		"ended pods":         {pod: pod("a", "cpu", "2"), others: []*corev1.Pod{phase(pod("b", "cpu", "2"), corev1.PodSucceeded), phase(pod("c", "cpu", "2"), corev1.PodFailed)}, node: node},
		"running pods":       {pod: pod("a", "cpu", "2"), others: []*corev1.Pod{phase(pod("b", "cpu", "1"), corev1.PodRunning)}, node: node, want: out("OutOfcpu", "cpu", 2000, 1000, 2000)},
		"init containers":    {pod: withInit(pod("a", "cpu", "1"), "cpu", "3"), node: node, want: out("OutOfcpu", "cpu", 3000, 0, 2000)},
		"over-full node":     {pod: pod("a"), others: []*corev1.Pod{pod("b", "cpu", "5")}, node: node},
		"over-full, wants 1": {pod: pod("a", "cpu", "1m"), others: []*corev1.Pod{pod("b", "cpu", "5")}, node: node, want: out("OutOfcpu", "cpu", 1, 5000, 2000)},
		"node has nothing":   {pod: pod("a"), want: out("OutOfpods", "pods", 1, 0, 0)},
		"node has no memory": {pod: pod("a", "memory", "1"), node: list("pods", "1", "cpu", "1"), want: out("OutOfmemory", "memory", 1, 0, 0)},

		// Amounts that an int64 cannot hold must not look small.
		"cpu beyond int64":    {pod: pod("a", "cpu", "9E"), node: node, want: out("OutOfcpu", "cpu", 1<<63-1, 0, 2000)},
		"memory beyond int64": {pod: pod("a", "memory", "10E"), node: node, want: out("OutOfmemory", "memory", 1<<63-1, 0, 1<<30)},
		"sum beyond int64":    {pod: pod("a", "memory", "1"), others: []*corev1.Pod{pod("b", "memory", "8E"), pod("c", "memory", "8E")}, node: node, want: out("OutOfmemory", "memory", 1, 1<<63-1, 1<<30)},
		"absurd":              {pod: pod("a", "memory", "1e999999999"), node: node, want: out("OutOfmemory", "memory", 1<<63-1, 0, 0)},
		"absurd other":        {pod: pod("a", "memory", "1"), others: []*corev1.Pod{pod("b", "memory", "1e999999999")}, node: node},
	} {
		t.Run(name, func(t *testing.T) {
			assert.Equal(t, c.want, admit.Check(c.pod, c.others, c.node))
		})
	}
}
