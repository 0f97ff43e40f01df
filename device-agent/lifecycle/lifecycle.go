// Package lifecycle is what the agent remembers of its pods: which phase each
// of them is in, and what its containers did. The journal keeps these values on
// disk, so their JSON is a format that later versions must read.
package lifecycle

import (
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/jetbridge/jetbridge/device-agent/unit"
	"github.com/jetbridge/jetbridge/shared/bundle"
)

// Phase is what is being done with a pod.
type Phase string

// A pod goes Starting → Running → Stopping → Stopped; a pod that was refused
// or that ended by itself is Stopped too, and never starts again.
const (
	Starting Phase = "starting"
	Running  Phase = "running"
	Stopping Phase = "stopping"
	Stopped  Phase = "stopped"
)

// Instance is one pod on this device.
type Instance struct {
	Phase Phase `json:"phase"`
	// Pod is the pod as it was last applied, without its secrets.
	Pod bundle.Pod `json:"pod"`
	// Units are empty for a pod that was refused.
	Units unit.Names `json:"units"`
	// Grace is, while the pod stops, its grace period in seconds.
	Grace int64 `json:"grace,omitempty"`
	// Started is when the device took the pod over.
	Started time.Time `json:"started"`
	// Ended says that the pod stopped by itself, and not for its deletion.
	Ended bool `json:"ended,omitempty"`
	// Final is the status that a stopped pod keeps.
	Final *corev1.PodStatus `json:"final,omitempty"`
}

// Record is what one container did. The units' helpers write it.
type Record struct {
	// Attempts counts the starts, the present one too.
	Attempts int32 `json:"attempts"`
	// EndedAttempts is the number of the start that ended last. No clock says
	// whether a start has ended: clocks are set back.
	EndedAttempts int32 `json:"endedAttempts,omitempty"`
	// BootID is the boot of the last start.
	BootID string `json:"bootID,omitempty"`
	// Started is the last start; zero before the first.
	Started time.Time `json:"started,omitzero"`
	// Last is the last end, nil before the first.
	Last *End `json:"last,omitempty"`
	// Before is the end before Last.
	Before *End `json:"before,omitempty"`
	// Delay is the present back-off, and Until when it is over.
	Delay time.Duration `json:"delay,omitempty"`
	Until time.Time     `json:"until,omitzero"`
}

// Ended says whether the last start has ended.
func (r *Record) Ended() bool {
	return r.Last != nil && r.EndedAttempts == r.Attempts
}

// End records how the last start ended.
func (r *Record) End(end End) {
	r.Before, r.Last, r.EndedAttempts = r.Last, &end, r.Attempts
}

// Interrupt records, at the given time, that nobody could write down how the
// last start ended: a power cut.
func (r *Record) Interrupt(now time.Time) {
	r.End(End{
		ExitCode: 255, Reason: "Unknown", Message: "The device stopped without writing down how the container ended.",
		Started: r.Started, Finished: now.UTC(),
	})
}

// End is how a container ended.
type End struct {
	ContainerID string    `json:"containerID,omitempty"`
	ImageID     string    `json:"imageID,omitempty"`
	ExitCode    int32     `json:"exitCode"`
	Reason      string    `json:"reason"`
	Message     string    `json:"message,omitempty"`
	Started     time.Time `json:"started,omitzero"`
	Finished    time.Time `json:"finished"`
}
