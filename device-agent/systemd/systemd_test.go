package systemd

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		updates, errs := make(chan *dbus.PropertiesUpdate), make(chan error)
		var connected atomic.Bool
		connected.Store(true)
		names := make(chan string, 10)
		done := make(chan error, 1)
		watchWith := func(ctx context.Context) {
			go func() { done <- watch(ctx, updates, errs, connected.Load, "jb-", func(name string) { names <- name }) }()
		}
		watchWith(t.Context())
		updates <- &dbus.PropertiesUpdate{UnitName: "other.service"}
		updates <- &dbus.PropertiesUpdate{UnitName: "jb-a.service"}
		assert.Equal(t, "jb-a.service", <-names)
		errs <- errors.New("full")
		assert.Empty(t, <-names, "look at all")
		<-time.After(time.Minute)
		synctest.Wait()
		assert.Empty(t, done, "it goes on while there is a connection")

		connected.Store(false)
		require.ErrorContains(t, <-done, "lost systemd", "nothing but the clock says so")

		connected.Store(true)
		ctx, cancel := context.WithCancel(t.Context())
		watchWith(ctx)
		cancel()
		require.NoError(t, <-done)
	})
}
