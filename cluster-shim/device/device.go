// Package device is what the shim knows of one device at a moment: what
// Flightctl says of it and what it reported itself. Values are shared between
// goroutines and are never changed after they were made.
package device

import "github.com/jetbridge/jetbridge/shared/report"

// Connection says whether a device is in contact with Flightctl.
type Connection string

const (
	// Unheard is a device that never made contact since the shim looks.
	Unheard Connection = "Unheard"
	// Connected is a device in contact.
	Connected Connection = "Connected"
	// Disconnected is a device without contact for too long.
	Disconnected Connection = "Disconnected"
)

// State is one device.
type State struct {
	// Name is the device's name in Flightctl.
	Name string
	// Alias is the name that people gave it; empty if none.
	Alias string
	// Fleet owns the device; empty for a standalone one.
	Fleet string
	// Labels are those of the device in Flightctl.
	Labels map[string]string
	// Report is the newest report; nil before the first.
	Report *report.Report
	// Connection is the state of the contact.
	Connection Connection
	// Gone says that Flightctl has no such device any more.
	Gone bool
}

// Observed is the bundle generation that the device has seen; 0 if none.
func (s State) Observed() int64 {
	if s.Report == nil {
		return 0
	}
	return s.Report.Observed
}
