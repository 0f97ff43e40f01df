// Package inventory keeps the shim's view of all devices: it polls Flightctl,
// decodes what the devices report, judges their connection, and tells
// subscribers which devices changed.
//
// # Connection
//
// A device is in contact when Flightctl saw it, or when a new report came,
// within DisconnectAfter. Flightctl's own summary lags by five to seven
// minutes, so the finer last-seen time is asked for, for those devices only
// that were silent for half of that time, the longest silent first and a few
// in each round. While Flightctl cannot be reached nothing changes; after an
// outage every device gets the whole time again, for it had nobody to talk to.
package inventory

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/jetbridge/jetbridge/cluster-shim/device"
	"github.com/jetbridge/jetbridge/cluster-shim/flightapi"
	"github.com/jetbridge/jetbridge/shared/report"
	"github.com/jetbridge/jetbridge/shared/wellknown"
)

// seenPerRound limits how many last-seen times one round asks for.
const seenPerRound = 10

// API is what the inventory needs of Flightctl.
type API interface {
	// Devices lists the devices that match a label selector.
	Devices(ctx context.Context, selector string) ([]flightapi.Device, error)
	// Device reads one; flightapi.ErrNotFound if there is none.
	Device(ctx context.Context, name string) (flightapi.Device, error)
	// LastSeen says how long ago a device was in contact, if ever.
	LastSeen(ctx context.Context, name string) (time.Duration, bool, error)
}

// Options of an Inventory.
type Options struct {
	API API
	// Selector is a label selector in Flightctl's syntax; empty for all.
	Selector string
	// Interval is the time between two rounds.
	Interval time.Duration
	// DisconnectAfter is the time without contact that counts as disconnected.
	DisconnectAfter time.Duration
	Log             *slog.Logger
}

// Inventory is the view. Make one with New.
type Inventory struct {
	o           Options
	subscribers []func(name string)

	mu      sync.Mutex // guards everything that follows
	entries map[string]*entry
	// ready is set by the first list that succeeded.
	ready bool
	// failing says that the last list failed.
	failing bool
}

type entry struct {
	state device.State
	// text is the report as it came last, so that the same is not decoded twice.
	text string
	// contact is the last proof of life; zero if none.
	contact time.Time
	// assumed says that contact is a guess, made of a device that was found
	// with a report, until Flightctl tells when it was seen: else each start
	// of the shim would make all nodes unknown for a while.
	assumed bool
	// asked is when the last-seen time was last asked for.
	asked time.Time
}

// New makes an empty inventory.
func New(o Options) *Inventory {
	return &Inventory{o: o, entries: map[string]*entry{}}
}

// Subscribe adds a function that is called with the name of each device that
// changed. It must not block, and must be added before Run.
func (v *Inventory) Subscribe(f func(name string)) { v.subscribers = append(v.subscribers, f) }

// Ready says whether Flightctl answered once.
func (v *Inventory) Ready() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.ready
}

// Get returns the device of this name.
func (v *Inventory) Get(name string) (device.State, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	e, ok := v.entries[name]
	if !ok {
		return device.State{}, false
	}
	return e.state, true
}

// List returns all devices, by name.
func (v *Inventory) List() []device.State {
	v.mu.Lock()
	defer v.mu.Unlock()
	out := make([]device.State, 0, len(v.entries))
	for _, name := range slices.Sorted(maps.Keys(v.entries)) {
		out = append(out, v.entries[name].state)
	}
	return out
}

// Run polls until ctx ends.
func (v *Inventory) Run(ctx context.Context) {
	tick := time.NewTicker(v.o.Interval)
	defer tick.Stop()
	for {
		if err := v.round(ctx); err != nil && ctx.Err() == nil {
			v.o.Log.WarnContext(ctx, "cannot look at devices, keeping what is known", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// round is one poll.
func (v *Inventory) round(ctx context.Context) error {
	devices, err := v.o.API.Devices(ctx, v.o.Selector)
	if err != nil {
		v.mu.Lock()
		v.failing = true
		v.mu.Unlock()
		return fmt.Errorf("cannot list devices: %w", err)
	}
	changed := map[string]bool{}
	now := time.Now()
	v.mu.Lock()
	if v.failing {
		// Whoever could not reach Flightctl is not to blame for the outage.
		for _, e := range v.entries {
			if e.state.Connection == device.Connected {
				e.contact = now
			}
		}
	}
	v.failing = false
	listed := map[string]bool{}
	for _, d := range devices {
		listed[d.Name] = true
		if v.merge(ctx, d, now) {
			changed[d.Name] = true
		}
	}
	var missing []string
	for name, e := range v.entries {
		if !listed[name] && !e.state.Gone {
			missing = append(missing, name)
		}
	}
	v.mu.Unlock()

	errs := []error{v.lookFor(ctx, missing, changed), v.askSeen(ctx, changed)}
	v.judge(ctx, changed)
	v.mu.Lock()
	v.ready = true
	v.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(changed)) {
		for _, f := range v.subscribers {
			f(name)
		}
	}
	return errors.Join(errs...)
}

// merge takes over what a list says of a device. The caller holds mu.
func (v *Inventory) merge(ctx context.Context, d flightapi.Device, now time.Time) bool {
	e, known := v.entries[d.Name]
	if !known {
		e = &entry{state: device.State{Name: d.Name, Connection: device.Unheard}}
		v.entries[d.Name] = e
		v.o.Log.InfoContext(ctx, "found device", "device", d.Name, "fleet", d.Fleet, "alias", d.Labels[wellknown.DeviceLabelAlias])
	}
	old := e.state
	next := old
	next.Fleet, next.Labels, next.Alias, next.Gone = d.Fleet, d.Labels, d.Labels[wellknown.DeviceLabelAlias], false
	changed := !known || old.Fleet != next.Fleet || old.Gone || !maps.Equal(old.Labels, next.Labels)
	if text := d.CustomInfo[wellknown.CustomInfoKey]; text != "" && text != e.text {
		e.text = text
		r, err := report.Decode(text, d.Name)
		switch {
		case errors.Is(err, report.ErrNoData):
		case err != nil:
			v.o.Log.WarnContext(ctx, "cannot read report of device", "device", d.Name, "error", err)
		case r.Newer(old.Report):
			next.Report = r
			switch {
			case old.Report != nil:
				e.contact, e.assumed = now, false
			case e.contact.IsZero() && d.Summary != "Unknown":
				e.contact, e.assumed = now.Add(-v.o.DisconnectAfter/2), true
			}
			changed = true
		}
	}
	e.state = next
	return changed
}

// lookFor asks for devices that a list lacked: one that is not found is gone.
func (v *Inventory) lookFor(ctx context.Context, names []string, changed map[string]bool) error {
	slices.Sort(names)
	var errs []error
	for _, name := range names[:min(len(names), seenPerRound)] {
		d, err := v.o.API.Device(ctx, name)
		v.mu.Lock()
		switch {
		case errors.Is(err, flightapi.ErrNotFound):
			v.o.Log.WarnContext(ctx, "device left Flightctl, its node gets no more heartbeats", "device", name)
			v.entries[name].state.Gone = true
			changed[name] = true
		case err != nil:
			errs = append(errs, fmt.Errorf("cannot look for device %s: %w", name, err))
		case v.merge(ctx, d, time.Now()):
			changed[name] = true
		}
		v.mu.Unlock()
	}
	return errors.Join(errs...)
}

// askSeen asks when silent devices were last seen.
func (v *Inventory) askSeen(ctx context.Context, changed map[string]bool) error {
	now := time.Now()
	v.mu.Lock()
	var silent []*entry
	for _, e := range v.entries {
		if !e.state.Gone && now.Sub(e.contact) >= v.o.DisconnectAfter/2 {
			silent = append(silent, e)
		}
	}
	slices.SortFunc(silent, func(a, b *entry) int {
		return cmp.Or(a.asked.Compare(b.asked), cmp.Compare(a.state.Name, b.state.Name))
	})
	silent = silent[:min(len(silent), seenPerRound)]
	names := make([]string, len(silent))
	for i, e := range silent {
		names[i] = e.state.Name
		e.asked = now
	}
	v.mu.Unlock()
	var errs []error
	for _, name := range names {
		age, ok, err := v.o.API.LastSeen(ctx, name)
		if err != nil {
			errs = append(errs, fmt.Errorf("cannot ask when device %s was seen: %w", name, err))
			// Not to know is no reason to call it disconnected.
			v.mu.Lock()
			if e := v.entries[name]; e.state.Connection == device.Connected {
				e.contact = now.Add(-v.o.DisconnectAfter / 2)
			}
			v.mu.Unlock()
			continue
		}
		if !ok {
			continue
		}
		v.mu.Lock()
		e := v.entries[name]
		if at := time.Now().Add(-age); e.assumed || at.After(e.contact) {
			e.contact, e.assumed = at, false
		}
		if e.state.Connection == device.Unheard {
			changed[name] = true
		}
		v.mu.Unlock()
	}
	return errors.Join(errs...)
}

// judge decides the connection of every device.
func (v *Inventory) judge(ctx context.Context, changed map[string]bool) {
	now := time.Now()
	v.mu.Lock()
	defer v.mu.Unlock()
	for name, e := range v.entries {
		next := e.state.Connection
		switch {
		case e.contact.IsZero():
		case now.Sub(e.contact) <= v.o.DisconnectAfter:
			next = device.Connected
		case now.Sub(e.asked) > v.o.DisconnectAfter:
			// Nobody asked lately: the round's budget went to others.
		default:
			next = device.Disconnected
		}
		if next != e.state.Connection {
			v.o.Log.InfoContext(ctx, "connection of device changed", "device", name, "from", e.state.Connection, "to", next, "lastContact", e.contact)
			e.state.Connection = next
			changed[name] = true
		}
	}
}
