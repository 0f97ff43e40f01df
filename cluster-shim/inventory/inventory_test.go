package inventory

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/jetbridge/jetbridge/cluster-shim/device"
	"github.com/jetbridge/jetbridge/cluster-shim/flightapi"
	"github.com/jetbridge/jetbridge/shared/report"
	"github.com/jetbridge/jetbridge/shared/wellknown"
)

// fake is a Flightctl; tests run on one goroutine at a time.
type fake struct {
	devices map[string]flightapi.Device
	hidden  map[string]bool
	seen    map[string]time.Time
	down    bool
}

func (f *fake) Devices(context.Context, string) ([]flightapi.Device, error) {
	if f.down {
		return nil, errors.New("no route")
	}
	var out []flightapi.Device
	for name, d := range f.devices {
		if !f.hidden[name] {
			out = append(out, d)
		}
	}
	return out, nil
}

func (f *fake) Device(_ context.Context, name string) (flightapi.Device, error) {
	d, ok := f.devices[name]
	if !ok {
		return d, fmt.Errorf("%w: %s", flightapi.ErrNotFound, name)
	}
	return d, nil
}

func (f *fake) LastSeen(_ context.Context, name string) (time.Duration, bool, error) {
	at, ok := f.seen[name]
	return time.Since(at), ok, nil
}

func text(t *testing.T, seq int64) string {
	t.Helper()
	s, err := (&report.Report{FormatVersion: 1, Device: "d", BootID: "b", Sequence: seq}).Encode()
	require.NoError(t, err)
	return s
}

func dev(t *testing.T, seq int64) flightapi.Device {
	return flightapi.Device{Name: "d", Summary: "Online", CustomInfo: map[string]string{wellknown.CustomInfoKey: text(t, seq)}}
}

func inventoryOf(f *fake) *Inventory {
	return New(Options{API: f, Interval: time.Second, DisconnectAfter: time.Minute, Log: slog.New(slog.DiscardHandler)})
}

func state(t *testing.T, v *Inventory) device.State {
	t.Helper()
	s, ok := v.Get("d")
	require.True(t, ok)
	return s
}

func TestNewestReportCounts(t *testing.T) {
	f := &fake{devices: map[string]flightapi.Device{"d": dev(t, 5)}}
	v := inventoryOf(f)
	var changes []string
	v.Subscribe(func(name string) { changes = append(changes, name) })
	assert.False(t, v.Ready())
	require.NoError(t, v.round(t.Context()))
	assert.True(t, v.Ready())
	assert.EqualValues(t, 5, state(t, v).Report.Sequence)

	f.devices["d"] = dev(t, 4)
	require.NoError(t, v.round(t.Context()))
	assert.EqualValues(t, 5, state(t, v).Report.Sequence, "an older report changes nothing")

	f.devices["d"] = flightapi.Device{Name: "d", CustomInfo: map[string]string{wellknown.CustomInfoKey: ""}}
	require.NoError(t, v.round(t.Context()))
	assert.NotNil(t, state(t, v).Report, "no data is no news")

	f.devices["d"] = flightapi.Device{Name: "d", CustomInfo: map[string]string{wellknown.CustomInfoKey: "!"}}
	require.NoError(t, v.round(t.Context()))
	assert.NotNil(t, state(t, v).Report)
	assert.Equal(t, []string{"d"}, changes)
}

func TestConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{devices: map[string]flightapi.Device{"d": dev(t, 1)}, seen: map[string]time.Time{"d": time.Now()}}
		v := inventoryOf(f)
		require.NoError(t, v.round(t.Context()))
		assert.Equal(t, device.Connected, state(t, v).Connection)

		time.Sleep(50 * time.Second) //nolint:forbidigo // fake time
		require.NoError(t, v.round(t.Context()))
		assert.Equal(t, device.Connected, state(t, v).Connection)

		time.Sleep(20 * time.Second) //nolint:forbidigo // fake time
		require.NoError(t, v.round(t.Context()))
		assert.Equal(t, device.Disconnected, state(t, v).Connection)

		f.seen["d"] = time.Now()
		require.NoError(t, v.round(t.Context()))
		assert.Equal(t, device.Connected, state(t, v).Connection)
	})
}

func TestDeviceThatIsOffAtTheStart(t *testing.T) {
	f := &fake{devices: map[string]flightapi.Device{"d": dev(t, 1)}, seen: map[string]time.Time{"d": time.Now().Add(-time.Hour)}}
	v := inventoryOf(f)
	require.NoError(t, v.round(t.Context()))
	assert.Equal(t, device.Disconnected, state(t, v).Connection)
}

func TestNeverSeen(t *testing.T) {
	f := &fake{devices: map[string]flightapi.Device{"d": {Name: "d", Summary: "Unknown"}}}
	v := inventoryOf(f)
	require.NoError(t, v.round(t.Context()))
	assert.Equal(t, device.Unheard, state(t, v).Connection)
}

func TestOutageOfFlightctlFreezes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{devices: map[string]flightapi.Device{"d": dev(t, 1)}, seen: map[string]time.Time{"d": time.Now()}}
		v := inventoryOf(f)
		require.NoError(t, v.round(t.Context()))
		f.down = true
		time.Sleep(time.Hour) //nolint:forbidigo // fake time
		require.Error(t, v.round(t.Context()))
		assert.Equal(t, device.Connected, state(t, v).Connection)
		f.down = false
		require.NoError(t, v.round(t.Context()))
		assert.Equal(t, device.Connected, state(t, v).Connection, "it gets time to come back")
		time.Sleep(2 * time.Minute) //nolint:forbidigo // fake time
		require.NoError(t, v.round(t.Context()))
		assert.Equal(t, device.Disconnected, state(t, v).Connection)
	})
}

func TestMissingIsNotGone(t *testing.T) {
	f := &fake{devices: map[string]flightapi.Device{"d": dev(t, 1)}, hidden: map[string]bool{}}
	v := inventoryOf(f)
	require.NoError(t, v.round(t.Context()))
	f.hidden["d"] = true
	require.NoError(t, v.round(t.Context()))
	assert.False(t, state(t, v).Gone)
	delete(f.devices, "d")
	require.NoError(t, v.round(t.Context()))
	assert.True(t, state(t, v).Gone)
	f.devices["d"] = dev(t, 1)
	delete(f.hidden, "d")
	require.NoError(t, v.round(t.Context()))
	assert.False(t, state(t, v).Gone)
}

func TestRunEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		v := inventoryOf(&fake{})
		go v.Run(ctx)
		synctest.Wait()
		assert.True(t, v.Ready())
		cancel()
		synctest.Wait()
	})
}
