// Package report is what a device says of itself: what it runs, what it has,
// and which bundle it applied.
//
// A report travels as text: base64 over gzip over canonical JSON, because a
// string is all that Flightctl's custom info carries. It is byte for byte the
// same while nothing changes: no clock that moves by itself is in it.
//
// # Order
//
// A device numbers its reports, over reboots too. Newer says whether one
// supersedes another, whichever way they came.
package report

import (
	"errors"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/jetbridge/jetbridge/shared/internal/codec"
)

const (
	// FormatVersion is the only format that this package reads and writes.
	FormatVersion = 1
	// MaxEncodedSize limits the text of a report, in bytes.
	MaxEncodedSize = 512 << 10
	// MaxDecodedSize limits what a report may expand to, in bytes.
	MaxDecodedSize = 8 << 20
	// MaxTombstones is how many stopped pods a device remembers.
	MaxTombstones = 1000
	// MaxCapacity is the most that a device may have of anything, in whole
	// units; a thousand times as much still fits into an int64.
	MaxCapacity = 1 << 53
	// MaxCount bounds sequences and generations, so that counting on from
	// what a device says never overflows.
	MaxCount = 1 << 53
)

// Why a report is refused. Decode wraps exactly one of them.
var (
	// ErrNoData is the empty text that Flightctl sends when the custom-info
	// script failed or nothing was reported yet: it says nothing at all.
	ErrNoData         = errors.New("report is empty")
	ErrTooLarge       = errors.New("report is too large")
	ErrTruncated      = errors.New("report is truncated")
	ErrCorrupt        = errors.New("report is corrupt")
	ErrUnknownVersion = errors.New("report has an unknown format version")
	ErrForeignDevice  = errors.New("report belongs to another device")
)

// Report is the document.
type Report struct {
	FormatVersion int `json:"formatVersion"`
	// Device is the reporting device's name in Flightctl.
	Device string `json:"device"`
	// BootID is the kernel's random ID of this boot.
	BootID string `json:"bootID"`
	// Sequence grows with each new report, over reboots too.
	Sequence int64 `json:"sequence"`
	// AgentVersion is the version of the device-agent.
	AgentVersion string `json:"agentVersion"`
	// KeyID and PublicKey are the device's sealing key.
	KeyID     string `json:"keyID,omitempty"`
	PublicKey []byte `json:"publicKey,omitempty"`
	// Observed is the highest generation that the device read and verified.
	Observed int64 `json:"observed"`
	// Applied is the highest generation of which everything that had to stop
	// is confirmed stopped and everything else was handed to systemd.
	Applied int64 `json:"applied"`
	// LastError is the newest failure that concerns no single pod.
	LastError *Error `json:"lastError,omitempty"`
	// Capacity is what the device has: cpu, memory, ephemeral-storage, pods.
	Capacity corev1.ResourceList `json:"capacity,omitempty"`
	// System is the part of a node's nodeInfo that the device knows.
	System corev1.NodeSystemInfo `json:"system"`
	// Pods are all pods of the bundle, and those that are still stopping.
	Pods []Pod `json:"pods,omitempty"`
	// Tombstones are UIDs that were stopped for good, the newest last.
	Tombstones []types.UID `json:"tombstones,omitempty"`
}

// Error is a failure of the device as a whole.
type Error struct {
	// Reason is one word in CamelCase, such as InvalidBundle.
	Reason  string `json:"reason"`
	Message string `json:"message"`
	// Generation is the bundle that it concerns; 0 if none or unknown.
	Generation int64 `json:"generation,omitempty"`
}

// Pod is one pod's state.
type Pod struct {
	Namespace string    `json:"namespace"`
	Name      string    `json:"name"`
	UID       types.UID `json:"uid"`
	// Stopped says that no process of the pod is left and none will start
	// again: the confirmation that a deleted pod waits for.
	Stopped bool `json:"stopped,omitempty"`
	// Status is what a kubelet would report.
	Status corev1.PodStatus `json:"status"`
}

// Newer says whether r supersedes old, which may be nil. Within one sealing
// key the sequence decides; a device with a new key was set up again, and its
// count began anew.
func (r *Report) Newer(old *Report) bool {
	return old == nil || r.KeyID != old.KeyID || r.Sequence > old.Sequence
}

// Confirmed says that the device will not run the pod of this UID again: it
// reports it as stopped, or has a tombstone of it.
func (r *Report) Confirmed(uid types.UID) bool {
	for i := range r.Pods {
		if r.Pods[i].UID == uid {
			return r.Pods[i].Stopped
		}
	}
	for _, t := range r.Tombstones {
		if t == uid {
			return true
		}
	}
	return false
}

// Pod returns the state of the pod of this UID, or nil.
func (r *Report) Pod(uid types.UID) *Pod {
	for i := range r.Pods {
		if r.Pods[i].UID == uid {
			return &r.Pods[i]
		}
	}
	return nil
}

// format is how reports travel.
func format() codec.Format {
	return codec.Format{
		Name: "report", Version: FormatVersion, MaxPacked: MaxEncodedSize, MaxPlain: MaxDecodedSize,
		TooLarge: ErrTooLarge, Truncated: ErrTruncated, Corrupt: ErrCorrupt, UnknownVersion: ErrUnknownVersion, ForeignDevice: ErrForeignDevice,
	}
}

// Encode gives the text that travels; ErrTooLarge above MaxEncodedSize.
func (r *Report) Encode() (string, error) {
	packed, err := format().Encode(r)
	if err != nil {
		return "", err
	}
	return string(packed), nil
}

// Decode reads and checks the report of the named device.
func Decode(text, device string) (*Report, error) {
	if len(text) > MaxEncodedSize {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, len(text), MaxEncodedSize)
	}
	text = strings.TrimSpace(text)
	if text == "" {
		return nil, ErrNoData
	}
	var r Report
	if err := format().Decode([]byte(text), device, &r); err != nil {
		return nil, err
	}
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return &r, nil
}

// check refuses what no honest device says and what others need not guard
// against, then.
func (r *Report) check() error {
	if r.Sequence < 0 || r.Observed < 0 || r.Applied < 0 {
		return errors.New("negative sequence or generation")
	}
	if max(r.Sequence, r.Observed, r.Applied) > MaxCount {
		return fmt.Errorf("sequence %d, observed %d or applied %d is above %d", r.Sequence, r.Observed, r.Applied, int64(MaxCount))
	}
	for name, q := range r.Capacity {
		if q.Sign() < 0 || q.CmpInt64(MaxCapacity) > 0 {
			return fmt.Errorf("capacity of %s is %s, not from 0 to %d", name, q.String(), int64(MaxCapacity))
		}
	}
	seen := make(map[types.UID]bool, len(r.Pods))
	for i, p := range r.Pods {
		if p.UID == "" {
			return fmt.Errorf("pods[%d] lacks a uid", i)
		}
		if seen[p.UID] {
			return fmt.Errorf("pods[%d] has the uid %s of another pod", i, p.UID)
		}
		seen[p.UID] = true
	}
	return nil
}
