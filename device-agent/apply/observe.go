package apply

import (
	"cmp"
	"context"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/jetbridge/jetbridge/device-agent/lifecycle"
	"github.com/jetbridge/jetbridge/device-agent/status"
	"github.com/jetbridge/jetbridge/device-agent/unit"
	"github.com/jetbridge/jetbridge/shared/bundle"
	"github.com/jetbridge/jetbridge/shared/report"
)

// Observe returns the state of all pods of the bundle and on the device, by
// namespace, name and UID. previous are the statuses of the last time. Pods
// that ended by themselves are cleaned up on the way.
func (e *Engine) Observe(ctx context.Context, previous map[types.UID]*corev1.PodStatus) ([]report.Pod, error) {
	instances, err := e.o.Store.Instances()
	if err != nil {
		return nil, err
	}
	units, err := e.o.Systemd.Units(ctx, unit.Prefix+"-*")
	if err != nil {
		return nil, err
	}
	active := map[string]string{}
	for _, u := range units {
		active[u.Name] = u.ActiveState
	}
	containers, err := e.o.Podman.Containers(ctx)
	if err != nil {
		return nil, err
	}
	seen := map[string]status.Observed{}
	for _, c := range containers {
		seen[c.Name] = status.Observed{ID: c.ID, ImageID: c.ImageID, Running: c.State == "running", Started: c.Started}
	}
	e.mu.Lock()
	waiting := map[types.UID]map[string]status.Waiting{}
	for uid, t := range e.trouble {
		waiting[uid] = t.waiting
	}
	var pending []bundle.Pod
	if e.state != nil {
		for _, p := range e.state.Bundle.Pods {
			if instances[p.Metadata.UID] == nil && !p.Terminating() {
				pending = append(pending, p)
			}
		}
	}
	e.mu.Unlock()
	var out []report.Pod
	for uid, i := range instances {
		p := report.Pod{Namespace: i.Pod.Metadata.Namespace, Name: i.Pod.Metadata.Name, UID: uid, Stopped: i.Phase == lifecycle.Stopped}
		if p.Stopped && i.Final != nil {
			p.Status = *i.Final
			out = append(out, p)
			continue
		}
		records, err := e.records(i)
		if err != nil {
			return nil, err
		}
		in := status.Input{
			Instance: i, Records: records, Containers: map[string]status.Observed{}, Waiting: waiting[uid],
			PodActive: active[i.Units.Pod] == "active", HostIP: e.o.HostIP(), Previous: previous[uid], Now: e.o.Now(),
		}
		idle := true
		for _, c := range i.Units.All() {
			if o, ok := seen[c.Podman()]; ok {
				in.Containers[c.Container] = o
			}
			s := active[c.Unit]
			idle = idle && (s == "" || s == "inactive" || s == "failed")
		}
		if in.PodActive {
			if in.PodIPs, err = e.o.Podman.PodIPs(ctx, i.Units.PodmanPod()); err != nil {
				return nil, err
			}
		}
		p.Status = status.Compute(in)
		out = append(out, p)
		if ended := p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed; ended && idle && i.Phase == lifecycle.Running {
			e.end(ctx, i)
		}
	}
	for i := range pending {
		p := &pending[i]
		started := e.o.Now()
		if s := previous[p.Metadata.UID]; s != nil && s.StartTime != nil {
			started = s.StartTime.Time
		}
		s := status.Compute(status.Input{
			Instance: &lifecycle.Instance{Phase: lifecycle.Starting, Pod: *p, Started: started},
			Waiting:  waiting[p.Metadata.UID], HostIP: e.o.HostIP(), Previous: previous[p.Metadata.UID], Now: e.o.Now(),
		})
		out = append(out, report.Pod{Namespace: p.Metadata.Namespace, Name: p.Metadata.Name, UID: p.Metadata.UID, Status: s})
	}
	slices.SortFunc(out, func(a, b report.Pod) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.UID, b.UID))
	})
	return out, nil
}

// end cleans up after a pod that ended by itself, unless something else is
// being done with it.
func (e *Engine) end(ctx context.Context, i *lifecycle.Instance) {
	uid := i.Pod.Metadata.UID
	if !e.claim(uid, "end") {
		return
	}
	// It may have been stopped since it was looked at.
	i, err := e.o.Store.Instance(uid)
	if err == nil && i != nil && i.Phase == lifecycle.Running {
		err = e.stop(ctx, i, 1, true)
	}
	e.release(uid)
	if err != nil {
		e.o.Log.Error("cannot clean up after a pod", "uid", uid, "error", err)
	}
	e.o.Changed()
	e.Wake()
}
