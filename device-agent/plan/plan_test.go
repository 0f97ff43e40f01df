package plan

import (
	"testing"

	"github.com/stretchr/testify/assert"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/jetbridge/jetbridge/device-agent/lifecycle"
	"github.com/jetbridge/jetbridge/device-agent/unit"
	"github.com/jetbridge/jetbridge/shared/bundle"
)

func pod(uid types.UID, image string) bundle.Pod {
	return bundle.Pod{
		Metadata: metav1.ObjectMeta{Namespace: "default", Name: string(uid), UID: uid},
		Spec:     corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: image}}},
	}
}

func deleted(p bundle.Pod, grace int64) bundle.Pod {
	now := metav1.Now()
	p.Metadata.DeletionTimestamp, p.Metadata.DeletionGracePeriodSeconds = &now, &grace
	return p
}

func instance(phase lifecycle.Phase, p bundle.Pod) *lifecycle.Instance {
	return &lifecycle.Instance{Phase: phase, Pod: p, Units: unit.NamesFor(&corev1.Pod{ObjectMeta: p.Metadata, Spec: p.Spec})}
}

func TestNext(t *testing.T) {
	a, b := pod("a", "x:1"), pod("b", "x:1")
	spec := pod("a", "x:1")
	seven := int64(7)
	spec.Spec.TerminationGracePeriodSeconds = &seven
	type m = map[types.UID]*lifecycle.Instance
	yes := map[types.UID]bool{"a": true, "b": true}
	for name, c := range map[string]struct {
		in   Input
		want []Step
	}{
		"nothing":                          {Input{}, nil},
		"new pods fetch images first":      {Input{Desired: []bundle.Pod{a}}, []Step{{Kind: Prepare, UID: "a"}}},
		"and start then":                   {Input{Desired: []bundle.Pod{a}, Prepared: yes}, []Step{{Kind: Start, UID: "a"}}},
		"a crash while starting resumes":   {Input{Desired: []bundle.Pod{a}, Prepared: yes, Instances: m{"a": instance(lifecycle.Starting, a)}}, []Step{{Kind: Start, UID: "a"}}},
		"what runs is left alone":          {Input{Desired: []bundle.Pod{a}, Instances: m{"a": instance(lifecycle.Running, a)}}, nil},
		"a new image is fetched first":     {Input{Desired: []bundle.Pod{pod("a", "x:2")}, Instances: m{"a": instance(lifecycle.Running, a)}}, []Step{{Kind: Prepare, UID: "a"}}},
		"and replaces then":                {Input{Desired: []bundle.Pod{pod("a", "x:2")}, Prepared: yes, Instances: m{"a": instance(lifecycle.Running, a)}}, []Step{{Kind: Replace, UID: "a"}}},
		"what is gone stops":               {Input{Instances: m{"a": instance(lifecycle.Running, spec)}}, []Step{{Kind: Stop, UID: "a", Grace: 7}}},
		"without a grace period, 30 s":     {Input{Instances: m{"a": instance(lifecycle.Running, a)}}, []Step{{Kind: Stop, UID: "a", Grace: 30}}},
		"what is deleted stops":            {Input{Desired: []bundle.Pod{deleted(spec, 3)}, Instances: m{"a": instance(lifecycle.Running, spec)}}, []Step{{Kind: Stop, UID: "a", Grace: 3}}},
		"grace is at least 1":              {Input{Desired: []bundle.Pod{deleted(a, 0)}, Instances: m{"a": instance(lifecycle.Starting, a)}}, []Step{{Kind: Stop, UID: "a", Grace: 1}}},
		"nothing starts before all stop":   {Input{Desired: []bundle.Pod{b}, Prepared: yes, Instances: m{"a": instance(lifecycle.Stopping, a)}}, []Step{{Kind: Stop, UID: "a", Grace: 30}}},
		"but images are fetched meanwhile": {Input{Desired: []bundle.Pod{b}, Instances: m{"a": instance(lifecycle.Stopping, a)}}, []Step{{Kind: Stop, UID: "a", Grace: 30}, {Kind: Prepare, UID: "b"}}},
		"a stop is finished, whatever":     {Input{Desired: []bundle.Pod{a}, Prepared: yes, Instances: m{"a": instance(lifecycle.Stopping, a)}}, []Step{{Kind: Stop, UID: "a", Grace: 30}}},
		"stopped and gone is forgotten":    {Input{Instances: m{"a": instance(lifecycle.Stopped, a)}}, []Step{{Kind: Forget, UID: "a"}}},
		"stopped never starts again":       {Input{Desired: []bundle.Pod{a}, Prepared: yes, Instances: m{"a": instance(lifecycle.Stopped, a)}}, nil},
		"buried never starts again":        {Input{Desired: []bundle.Pod{a}, Prepared: yes, Tombstones: yes}, nil},
		"deleted before it ran":            {Input{Desired: []bundle.Pod{deleted(a, 5)}}, []Step{{Kind: Bury, UID: "a"}}},
		"and buried":                       {Input{Desired: []bundle.Pod{deleted(a, 5)}, Tombstones: yes}, nil},
		"ended by itself, then deleted":    {Input{Desired: []bundle.Pod{deleted(a, 5)}, Instances: m{"a": instance(lifecycle.Stopped, a)}}, []Step{{Kind: Bury, UID: "a"}}},
	} {
		t.Run(name, func(t *testing.T) { assert.Equal(t, c.want, Next(c.in)) })
	}
}

func TestSettled(t *testing.T) {
	never, always := func(types.UID) bool { return false }, func(types.UID) bool { return true }
	a := pod("a", "x:1")
	type m = map[types.UID]*lifecycle.Instance
	assert.True(t, Settled(Input{Desired: []bundle.Pod{a}, Instances: m{"a": instance(lifecycle.Running, a)}}, never))
	assert.False(t, Settled(Input{Desired: []bundle.Pod{a}}, never), "not tried yet")
	assert.True(t, Settled(Input{Desired: []bundle.Pod{a}}, always), "waits for its image")
	assert.False(t, Settled(Input{Instances: m{"a": instance(lifecycle.Running, a)}}, always), "has to stop")
	assert.True(t, Settled(Input{Instances: m{"a": instance(lifecycle.Stopped, a)}}, never))
}
