package supervise

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jetbridge/jetbridge/test/lab/device"
	"github.com/jetbridge/jetbridge/test/lab/internal/control"
	"github.com/jetbridge/jetbridge/test/lab/internal/layout"
)

// States of a device.
const (
	deviceBooting = "booting"
	deviceOn      = "on"
	deviceOff     = "off"
)

// Limits of patience with devices.
const (
	bootTimeout     = 2 * time.Minute
	shutdownTimeout = 2 * time.Minute
	enrollTimeout   = 3 * time.Minute
)

// firstHost is the last byte of the first device's address.
const firstHost = 11

// devices are the lab's devices.
type devices struct {
	config layout.Config
	log    *slog.Logger
	exe    string
	life   context.Context // ends with the supervisor: a boot must not end with the request that asked for it
	cancel context.CancelFunc
	watch  sync.WaitGroup

	mu  sync.Mutex // guards what follows
	all []*machine
}

// machine is a device and its place in the lab.
type machine struct {
	options device.Options
	log     *os.File

	op sync.Mutex // one change of power at a time

	mu      sync.Mutex // guards what follows
	status  control.Device
	current *device.Device // the last that was booted; may have ended
}

func newDevices(c layout.Config, log *slog.Logger) (*devices, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("cannot find own program: %w", err)
	}
	life, cancel := context.WithCancel(context.Background())
	return &devices{config: c, log: log, exe: exe, life: life, cancel: cancel}, nil
}

// list is a copy of all devices' status, edge-2 before edge-10.
func (s *devices) list() []control.Device {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]control.Device, 0, len(s.all))
	for _, m := range s.all {
		list = append(list, m.get())
	}
	slices.SortFunc(list, func(a, b control.Device) int {
		return cmp.Or(cmp.Compare(len(a.Name), len(b.Name)), strings.Compare(a.Name, b.Name))
	})
	return list
}

func (s *devices) find(name string) (*machine, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.all {
		if m.options.Name == name {
			return m, nil
		}
	}
	return nil, fmt.Errorf("no device %q in lab %s", name, s.config.Name)
}

func (m *machine) get() control.Device {
	m.mu.Lock()
	defer m.mu.Unlock()
	status := m.status
	status.Labels = maps.Clone(status.Labels)
	return status
}

func (m *machine) set(change func(*control.Device)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	before := m.status.State
	change(&m.status)
	if m.status.State != before {
		m.status.Since = time.Now()
	}
}

// on is the running device.
func (m *machine) on() (*device.Device, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.status.State != deviceOn {
		return nil, fmt.Errorf("device %s is %s", m.options.Name, m.status.State)
	}
	return m.current, nil
}

// reserve takes a name and an address.
func (s *devices) reserve(d control.AddDevice) (*machine, error) {
	if err := layout.CheckName(d.Name); err != nil {
		return nil, err
	}
	gateway, err := netip.ParseAddr(layout.Gateway)
	if err != nil {
		return nil, fmt.Errorf("cannot read gateway: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	taken := func(address netip.Addr) bool {
		return slices.ContainsFunc(s.all, func(m *machine) bool { return m.options.Address.Addr() == address })
	}
	base := gateway.As4()
	base[3] = firstHost
	address := netip.AddrFrom4(base)
	for taken(address) {
		address = address.Next()
		if address.As4()[3] == 255 {
			return nil, errors.New("no address is left on the lab's bridge")
		}
	}
	if slices.ContainsFunc(s.all, func(m *machine) bool { return m.options.Name == d.Name }) {
		return nil, fmt.Errorf("device %s exists already", d.Name)
	}
	log, err := os.OpenFile(s.config.Lab().Log(d.Name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("cannot open log: %w", err)
	}
	m := &machine{log: log, options: device.Options{
		Name: d.Name, Tree: s.config.DeviceTree, Dir: s.config.Lab().Path("devices", d.Name), Bridge: layout.Bridge,
		Address: netip.PrefixFrom(address, 24), Gateway: gateway, Cgroup: "device-" + d.Name,
		Registry: layout.RegistryAddress, Log: log, Exec: s.exe,
	}}
	m.status = control.Device{
		Name: d.Name, State: deviceOff, Address: address.String(), Fleet: d.Fleet, Labels: enrollLabels(d), Link: linkText(device.LinkState{}),
		Since: time.Now(),
	}
	s.all = append(s.all, m)
	return m, nil
}

// enrollLabels are what a device is approved with: its alias is its name.
func enrollLabels(d control.AddDevice) map[string]string {
	labels := map[string]string{"alias": d.Name}
	if d.Fleet != "" {
		labels["fleet"] = d.Fleet
	}
	maps.Copy(labels, d.Labels)
	return labels
}

// add makes a device, boots it and has it enrolled if that is asked for.
func (s *devices) add(ctx context.Context, d control.AddDevice) (control.Device, error) {
	m, err := s.reserve(d)
	if err != nil {
		return control.Device{}, err
	}
	if err := s.install(ctx, m, d); err != nil {
		return control.Device{}, errors.Join(err, s.forget(m))
	}
	if err := s.boot(m); err != nil { //nolint:contextcheck // a device outlives the request that boots it
		return control.Device{}, errors.Join(err, s.forget(m))
	}
	if d.Enroll {
		enrollCtx, cancel := context.WithTimeout(ctx, enrollTimeout)
		defer cancel()
		id, err := s.enroll(enrollCtx, m)
		if err != nil {
			return control.Device{}, err // it stays for a look
		}
		m.set(func(c *control.Device) { c.ID = id })
	}
	return m.get(), nil
}

// forget drops a device that is off.
func (s *devices) forget(m *machine) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = slices.DeleteFunc(s.all, func(other *machine) bool { return other == m })
	m.log.Close()
	if err := os.RemoveAll(m.options.Dir); err != nil {
		return fmt.Errorf("cannot remove device %s: %w", m.options.Name, err)
	}
	return nil
}

// remove ends a device as a power cut does, and drops it.
func (s *devices) remove(ctx context.Context, name string) error {
	m, err := s.find(name)
	if err != nil {
		return err
	}
	if err := s.power(ctx, name, "kill"); err != nil {
		return err
	}
	return s.forget(m)
}

// boot switches a device on that is off.
func (s *devices) boot(m *machine) error {
	m.op.Lock()
	defer m.op.Unlock()
	return s.bootLocked(m)
}

// bootLocked needs m.op.
func (s *devices) bootLocked(m *machine) error {
	if m.get().State != deviceOff {
		return nil
	}
	m.set(func(c *control.Device) { c.State = deviceBooting })
	ctx, cancel := context.WithTimeout(s.life, bootTimeout)
	defer cancel()
	d, err := device.Boot(ctx, m.options)
	if err != nil {
		m.set(func(c *control.Device) { c.State = deviceOff })
		return err
	}
	m.mu.Lock()
	m.current = d
	m.mu.Unlock()
	m.set(func(c *control.Device) { c.State, c.PID = deviceOn, d.PID() })
	s.log.Info("device on", "name", m.options.Name, "pid", d.PID())
	s.watch.Go(func() { s.follow(m, d) })
	return nil
}

// follow waits for a device's end, and boots it again if it ended for that.
func (s *devices) follow(m *machine, d *device.Device) {
	err := d.Wait()
	m.set(func(c *control.Device) { c.State, c.PID = deviceOff, 0 })
	if err != nil {
		s.log.Error("device ended", "name", m.options.Name, "error", err)
	} else {
		s.log.Info("device off", "name", m.options.Name)
	}
	if d.WantsReboot() && s.life.Err() == nil {
		if err := s.boot(m); err != nil {
			s.log.Error("cannot boot device again", "name", m.options.Name, "error", err)
		}
	}
}

// power switches a device.
func (s *devices) power(ctx context.Context, name, action string) error {
	m, err := s.find(name)
	if err != nil {
		return err
	}
	if !slices.Contains([]string{"on", "off", "reboot", "kill"}, action) {
		return fmt.Errorf("no power action %q", action)
	}
	m.op.Lock()
	defer m.op.Unlock()
	if m.get().State == deviceOn && action != "on" {
		m.mu.Lock()
		d := m.current
		m.mu.Unlock()
		end := d.Kill
		if action != "kill" {
			end = func() error {
				ctx, cancel := context.WithTimeout(ctx, shutdownTimeout)
				defer cancel()
				return d.Shutdown(ctx)
			}
		}
		if err := end(); err != nil {
			return err
		}
		m.set(func(c *control.Device) { c.State, c.PID = deviceOff, 0 })
	}
	if action == "on" || action == "reboot" {
		return s.bootLocked(m) //nolint:contextcheck // a device outlives the request that boots it
	}
	return nil
}

// linkText is for people: "up", "down", "up, loss 20%, delay 200ms".
func linkText(l device.LinkState) string {
	text := "up"
	if l.Down {
		text = "down"
	}
	if l.LossPercent > 0 {
		text += fmt.Sprintf(", loss %g%%", l.LossPercent)
	}
	if l.Delay > 0 {
		text += fmt.Sprintf(", delay %s", l.Delay)
	}
	return text
}

// net changes a device's link.
func (s *devices) net(ctx context.Context, name string, n control.Net) error {
	m, err := s.find(name)
	if err != nil {
		return err
	}
	m.mu.Lock()
	d := m.current
	m.mu.Unlock()
	if d == nil {
		return fmt.Errorf("device %s was never on", name)
	}
	if n.Up != nil {
		if err := d.Link(ctx, *n.Up); err != nil {
			return err
		}
	}
	if n.Loss != nil {
		if err := d.Loss(ctx, *n.Loss); err != nil {
			return err
		}
	}
	if n.Delay != nil {
		if err := d.Delay(ctx, *n.Delay); err != nil {
			return err
		}
	}
	now, err := device.ReadLinkState(m.options.Dir)
	if err != nil {
		return err
	}
	m.set(func(c *control.Device) { c.Link = linkText(now) })
	return nil
}

// exec runs a command on a device.
func (s *devices) exec(ctx context.Context, r control.ExecRequest, stdin, stdout, stderr *os.File) (int, error) {
	m, err := s.find(r.Device)
	if err != nil {
		return 0, err
	}
	d, err := m.on()
	if err != nil {
		return 0, err
	}
	return d.Exec(ctx, device.ExecOptions{Args: r.Args, Stdin: stdin, Stdout: stdout, Stderr: stderr})
}

// end cuts the power of all devices.
func (s *devices) end() {
	s.cancel()
	s.mu.Lock()
	all := slices.Clone(s.all)
	s.mu.Unlock()
	for _, m := range all {
		m.mu.Lock()
		d := m.current
		m.mu.Unlock()
		if d == nil {
			continue
		}
		if err := d.Kill(); err != nil {
			s.log.Error("cannot end device", "name", m.options.Name, "error", err)
		}
	}
	s.watch.Wait()
}
