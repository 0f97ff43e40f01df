package device

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// LinkState is how a device's link is to be. It is kept in the device's folder,
// and holds for every boot.
type LinkState struct {
	// Down is a link that is pulled.
	Down bool `json:"down,omitempty"`
	// LossPercent is how many of a hundred pings over the link are lost.
	LossPercent float64 `json:"lossPercent,omitempty"`
	// Delay is how much longer a ping over the link takes.
	Delay time.Duration `json:"delayNanoseconds,omitempty"`
}

// perDirection converts what a round trip shows to what each direction does.
func (s LinkState) perDirection() impairment {
	return impairment{
		loss:  1 - math.Sqrt(1-s.LossPercent/100),
		delay: s.Delay / 2,
	}
}

func (s LinkState) impaired() bool { return s.LossPercent > 0 || s.Delay > 0 }

func linkFile(dir string) string { return filepath.Join(dir, "link.json") }

// ReadLinkState reads the state of the link of the device with that state folder.
func ReadLinkState(dir string) (LinkState, error) {
	var s LinkState
	b, err := os.ReadFile(linkFile(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return s, fmt.Errorf("cannot read state of link: %w", err)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("cannot read state of link: %w", err)
	}
	return s, nil
}

// WriteLinkState sets the state of the link of a device that is off, for its next boot.
func WriteLinkState(dir string, s LinkState) error {
	b, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("cannot keep state of link: %w", err)
	}
	if err := writeAtomically(linkFile(dir), append(b, '\n')); err != nil {
		return fmt.Errorf("cannot keep state of link: %w", err)
	}
	return nil
}

// linkNames are the interfaces of a device's link in the lab's namespace. An
// interface name has at most 15 characters, hence the hash.
type linkNames struct {
	host  string // other end of the device's eth0
	inner string // the forwarder's end of the pair that leads to the bridge
	outer string // its other end, in the bridge
}

func namesFor(device string) linkNames {
	sum := sha256.Sum256([]byte(device))
	h := hex.EncodeToString(sum[:4])
	names := linkNames{host: "ve-" + h, inner: "fi-" + h, outer: "fo-" + h}
	if len(device) <= 12 {
		names.host = "ve-" + device
	}
	return names
}

// hardwareAddr is the device's own for its life.
func hardwareAddr(device string) net.HardwareAddr {
	sum := sha256.Sum256([]byte(device))
	mac := net.HardwareAddr(sum[8:14])
	mac[0] = mac[0]&^1 | 2 // one station, locally administered
	return mac
}

// link is the device's connection to the lab's bridge: a veth pair. While it is
// impaired, a forwarder stands between its host end and the bridge.
type link struct {
	dir    string // the device's state folder
	bridge string
	names  linkNames

	mu        sync.Mutex // guards everything that follows
	state     LinkState
	forwarder *forwarder // nil while the link is not impaired
	unplugged bool
}

// plug connects a new device, whose first process is pid, and configures its
// end. The link is in the state that it was left in.
func plug(ctx context.Context, o Options, pid int) (*link, error) {
	state, err := ReadLinkState(o.Dir)
	if err != nil {
		return nil, err
	}
	l := &link{dir: o.Dir, bridge: o.Bridge, names: namesFor(o.Name), state: state}
	if err := l.sweep(); err != nil {
		return nil, err
	}
	if err := pinBridge(o.Bridge); err != nil {
		return nil, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = l.names.host
	veth := &netlink.Veth{
		LinkAttrs: attrs, PeerName: "eth0", PeerHardwareAddr: hardwareAddr(o.Name), PeerNamespace: netlink.NsPid(pid),
	}
	if err := netlink.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("cannot make link %s: %w", l.names.host, err)
	}
	if err := errors.Join(configureEnd(o, pid), l.reconcile(ctx)); err != nil {
		return nil, errors.Join(err, l.unplug())
	}
	return l, nil
}

// pinBridge gives the bridge an address of its own. Without that it takes the
// lowest of its ports', and loses its neighbours when ports come and go.
func pinBridge(name string) error {
	bridge, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("cannot find bridge %s: %w", name, err)
	}
	want := hardwareAddr("bridge " + name)
	if bytes.Equal(bridge.Attrs().HardwareAddr, want) {
		return nil
	}
	if err := netlink.LinkSetHardwareAddr(bridge, want); err != nil {
		return fmt.Errorf("cannot give bridge %s its address: %w", name, err)
	}
	return nil
}

// configureEnd sets up the network inside the device.
func configureEnd(o Options, pid int) error {
	ns, err := netns.GetFromPid(pid)
	if err != nil {
		return fmt.Errorf("cannot open device's network: %w", err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("cannot enter device's network: %w", err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("cannot find device's loopback: %w", err)
	}
	eth0, err := h.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("cannot find device's eth0: %w", err)
	}
	address, err := netlink.ParseAddr(o.Address.String())
	if err != nil {
		return fmt.Errorf("cannot use address %s: %w", o.Address, err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("cannot bring device's loopback up: %w", err)
	}
	if err := h.AddrAdd(eth0, address); err != nil {
		return fmt.Errorf("cannot give device its address: %w", err)
	}
	// Segments of their final size, so that a lost frame is a lost packet.
	if err := h.LinkSetGSOMaxSegs(eth0, 1); err != nil {
		return fmt.Errorf("cannot set up device's eth0: %w", err)
	}
	if err := h.LinkSetUp(eth0); err != nil {
		return fmt.Errorf("cannot bring device's eth0 up: %w", err)
	}
	route := &netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: o.Gateway.AsSlice()}
	if err := h.RouteAdd(route); err != nil {
		return fmt.Errorf("cannot set device's default route: %w", err)
	}
	return nil
}

// Link pulls the device's link (up is false) or plugs it in again. Like Loss and
// Delay, it also holds for later boots, and may be called when the device is off.
func (d *Device) Link(ctx context.Context, up bool) error {
	return d.setLink(ctx, func(s *LinkState) { s.Down = !up })
}

// Loss makes the link lose that percentage of round trips, each direction its
// part; 0 ends it.
func (d *Device) Loss(ctx context.Context, percent float64) error {
	if !(percent >= 0 && percent <= 100) {
		return fmt.Errorf("invalid loss %v: must be from 0 to 100 percent", percent)
	}
	return d.setLink(ctx, func(s *LinkState) { s.LossPercent = percent })
}

// Delay makes round trips over the link take so much longer, each direction
// half of it; 0 ends it.
func (d *Device) Delay(ctx context.Context, delay time.Duration) error {
	if delay < 0 {
		return fmt.Errorf("invalid delay %s: must not be negative", delay)
	}
	return d.setLink(ctx, func(s *LinkState) { s.Delay = delay })
}

func (d *Device) setLink(ctx context.Context, change func(*LinkState)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := d.link.set(ctx, change); err != nil {
		return fmt.Errorf("cannot change link of device %s: %w", d.o.Name, err)
	}
	return nil
}

func (l *link) set(ctx context.Context, change func(*LinkState)) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.unplugged {
		// A newer boot may have changed the state since.
		state, err := ReadLinkState(l.dir)
		if err != nil {
			return err
		}
		l.state = state
	}
	change(&l.state)
	if err := WriteLinkState(l.dir, l.state); err != nil {
		return err
	}
	if l.unplugged {
		return nil
	}
	return l.reconcile(ctx)
}

// reconcile makes the interfaces as the state says. It is called with mu held,
// or before anyone else has the link.
func (l *link) reconcile(ctx context.Context) error {
	host, err := netlink.LinkByName(l.names.host)
	if err != nil {
		return fmt.Errorf("cannot find link %s: %w", l.names.host, err)
	}
	if l.state.Down {
		if err := netlink.LinkSetDown(host); err != nil {
			return fmt.Errorf("cannot pull link: %w", err)
		}
		return nil
	}
	if l.state.impaired() {
		err = l.impair(ctx, host)
	} else {
		err = l.direct(host)
	}
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(host); err != nil {
		return fmt.Errorf("cannot plug link in: %w", err)
	}
	return nil
}

// direct puts the link into the bridge.
func (l *link) direct(host netlink.Link) error {
	if err := l.removeForwarder(); err != nil {
		return err
	}
	bridge, err := netlink.LinkByName(l.bridge)
	if err != nil {
		return fmt.Errorf("cannot find bridge %s: %w", l.bridge, err)
	}
	if err := netlink.LinkSetARPOn(host); err != nil {
		return fmt.Errorf("cannot set up link: %w", err)
	}
	if err := netlink.LinkSetMaster(host, bridge); err != nil {
		return fmt.Errorf("cannot put link into bridge: %w", err)
	}
	return nil
}

// impair puts a forwarder between the link and the bridge.
func (l *link) impair(ctx context.Context, host netlink.Link) error {
	if l.forwarder != nil {
		l.forwarder.set(l.state.perDirection())
		return nil
	}
	bridge, err := netlink.LinkByName(l.bridge)
	if err != nil {
		return fmt.Errorf("cannot find bridge %s: %w", l.bridge, err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = l.names.outer
	attrs.MasterIndex = bridge.Attrs().Index
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: l.names.inner}); err != nil {
		return fmt.Errorf("cannot make links for forwarder: %w", err)
	}
	outer, err := netlink.LinkByName(l.names.outer)
	if err != nil {
		return fmt.Errorf("cannot find link of forwarder: %w", err)
	}
	inner, err := netlink.LinkByName(l.names.inner)
	if err != nil {
		return fmt.Errorf("cannot find link of forwarder: %w", err)
	}
	if err := netlink.LinkSetGSOMaxSegs(outer, 1); err != nil {
		return fmt.Errorf("cannot set up link of forwarder: %w", err)
	}
	if err := netlink.LinkSetNoMaster(host); err != nil {
		return fmt.Errorf("cannot take link out of bridge: %w", err)
	}
	for _, end := range []netlink.Link{host, inner} {
		// The forwarder alone answers there, not the lab's own network stack.
		if err := netlink.LinkSetARPOff(end); err != nil {
			return fmt.Errorf("cannot set up link of forwarder: %w", err)
		}
	}
	for _, end := range []netlink.Link{outer, inner} {
		if err := netlink.LinkSetUp(end); err != nil {
			return fmt.Errorf("cannot bring link of forwarder up: %w", err)
		}
	}
	f, err := startForwarder(ctx, host.Attrs().Index, inner.Attrs().Index, l.state.perDirection())
	if err != nil {
		return err
	}
	l.forwarder = f
	return nil
}

func (l *link) removeForwarder() error {
	if l.forwarder == nil {
		return nil
	}
	err := l.forwarder.stop()
	l.forwarder = nil
	return errors.Join(err, remove(l.names.outer))
}

// unplug removes the interfaces. The state remains.
func (l *link) unplug() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unplugged = true
	return errors.Join(l.removeForwarder(), l.sweep())
}

// sweep removes interfaces of this device that are left.
func (l *link) sweep() error {
	// The other end of each goes with it.
	return errors.Join(remove(l.names.host), remove(l.names.outer))
}

// remove deletes the interface if it is there.
func remove(name string) error {
	old, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err == nil {
		err = netlink.LinkDel(old)
	}
	if errors.Is(err, fs.ErrNotExist) || isNoDevice(err) {
		return nil // it went by itself, with the device's namespace
	}
	if err != nil {
		return fmt.Errorf("cannot remove link %s: %w", name, err)
	}
	return nil
}
