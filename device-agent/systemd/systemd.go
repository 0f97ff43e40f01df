// Package systemd is the only user of D-Bus: it starts, stops and watches units.
package systemd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"
)

// Unit is a loaded unit.
type Unit struct {
	Name        string
	ActiveState string
	SubState    string
}

// Conn is a connection to the system's manager.
type Conn struct {
	conn *dbus.Conn
}

// Connect connects to systemd's private socket or to the system bus.
func Connect(ctx context.Context) (*Conn, error) {
	c, err := dbus.NewWithContext(ctx)
	if err != nil {
		return nil, fmt.Errorf("cannot connect to systemd: %w", err)
	}
	return &Conn{conn: c}, nil
}

// Close ends the connection.
func (c *Conn) Close() { c.conn.Close() }

// Connected says whether the connection still works.
func (c *Conn) Connected() bool { return c.conn.Connected() }

// Units lists the loaded units whose names match a pattern.
func (c *Conn) Units(ctx context.Context, patterns ...string) ([]Unit, error) {
	list, err := c.conn.ListUnitsByPatternsContext(ctx, nil, patterns)
	if err != nil {
		return nil, fmt.Errorf("cannot list units: %w", err)
	}
	out := make([]Unit, 0, len(list))
	for _, u := range list {
		out = append(out, Unit{Name: u.Name, ActiveState: u.ActiveState, SubState: u.SubState})
	}
	return out, nil
}

// Start asks systemd to start a unit and does not wait for it.
func (c *Conn) Start(ctx context.Context, name string) error {
	if _, err := c.conn.StartUnitContext(ctx, name, "replace", nil); err != nil {
		return fmt.Errorf("cannot start %s: %w", name, err)
	}
	return nil
}

// Stop stops a unit and returns when it is inactive. A unit that systemd does
// not know is inactive.
func (c *Conn) Stop(ctx context.Context, name string) error {
	result := make(chan string, 1)
	if _, err := c.conn.StopUnitContext(ctx, name, "replace", result); err != nil {
		if noSuchUnit(err) {
			return nil
		}
		return fmt.Errorf("cannot stop %s: %w", name, err)
	}
	select {
	case r := <-result:
		if r != "done" {
			return fmt.Errorf("cannot stop %s: the job ended as %q", name, r)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("cannot stop %s: %w", name, ctx.Err())
	}
}

// ResetFailed forgets that a unit failed, so that it is unloaded.
func (c *Conn) ResetFailed(ctx context.Context, name string) error {
	if err := c.conn.ResetFailedUnitContext(ctx, name); err != nil && !noSuchUnit(err) {
		return fmt.Errorf("cannot reset %s: %w", name, err)
	}
	return nil
}

// Reload asks a service to reload itself and does not wait for it.
func (c *Conn) Reload(ctx context.Context, name string) error {
	if _, err := c.conn.ReloadUnitContext(ctx, name, "replace", nil); err != nil {
		return fmt.Errorf("cannot reload %s: %w", name, err)
	}
	return nil
}

// StatusText is what a service says of itself.
func (c *Conn) StatusText(ctx context.Context, name string) (string, error) {
	p, err := c.conn.GetServicePropertyContext(ctx, name, "StatusText")
	if err != nil {
		return "", fmt.Errorf("cannot read the status of %s: %w", name, err)
	}
	s, ok := p.Value.Value().(string)
	if !ok {
		return "", fmt.Errorf("the status text of %s is no text", name)
	}
	return s, nil
}

// Version is systemd's version.
func (c *Conn) Version() (string, error) {
	v, err := c.conn.GetManagerProperty("Version")
	if err != nil {
		return "", fmt.Errorf("cannot read systemd's version: %w", err)
	}
	return strings.Trim(v, `"`), nil
}

// Watch calls changed with the name of each unit with the prefix whose
// properties change, until ctx ends or, which is an error, the connection is
// lost.
func (c *Conn) Watch(ctx context.Context, prefix string, changed func(string)) error {
	updates := make(chan *dbus.PropertiesUpdate, 256)
	errs := make(chan error, 16)
	c.conn.SetPropertiesSubscriber(updates, errs)
	defer c.conn.SetPropertiesSubscriber(nil, nil)
	if err := c.conn.Subscribe(); err != nil {
		return fmt.Errorf("cannot subscribe to systemd: %w", err)
	}
	return watch(ctx, updates, errs, c.Connected, prefix, changed)
}

// checkInterval is how long a lost connection may go unnoticed: the library
// tells nobody of it.
const checkInterval = 5 * time.Second

func watch(ctx context.Context, updates <-chan *dbus.PropertiesUpdate, errs <-chan error, connected func() bool, prefix string, changed func(string)) error {
	check := time.NewTicker(checkInterval)
	defer check.Stop()
	for {
		select {
		case <-check.C:
			if !connected() {
				return errors.New("lost systemd: the connection was closed")
			}
		case u := <-updates:
			if strings.HasPrefix(u.UnitName, prefix) {
				changed(u.UnitName)
			}
		case err := <-errs:
			if !connected() {
				return fmt.Errorf("lost systemd: %w", err)
			}
			// An update was dropped since too many came at once: look at all.
			changed("")
		case <-ctx.Done():
			return nil
		}
	}
}

func noSuchUnit(err error) bool {
	var e godbus.Error
	return errors.As(err, &e) && e.Name == "org.freedesktop.systemd1.NoSuchUnit"
}
