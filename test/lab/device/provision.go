package device

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// ProvisionOptions are what a device gets besides its operating system.
type ProvisionOptions struct {
	// FlightctlAgent is the path of the flightctl-agent program; empty leaves
	// what is on the device.
	FlightctlAgent string
	// FlightctlConfig is the agent's configuration with the enrollment
	// credentials: what `flightctl certificate request --signer=enrollment
	// --output=embedded` prints. Empty leaves what is on the device.
	FlightctlConfig []byte
	// Overlay is a folder that is copied over the root, as an installation with
	// DESTDIR makes it; may be empty. Everything belongs to root afterwards.
	// Units of it whose name begins with "jetbridge-" are enabled if they can be.
	Overlay string
}

// agentUnit runs flightctl-agent as its RPM does: told about changes by a
// signal, restarted ever more slowly, and its children left alone when it stops.
const agentUnit = `[Unit]
Description=Flight Control agent
After=network.target
StartLimitIntervalSec=5
StartLimitBurst=1000

[Service]
Type=notify
ExecStart=/usr/bin/flightctl-agent
ExecReload=/bin/kill -HUP $MAINPID
KillMode=process
KillSignal=SIGINT
Restart=always
RestartSec=5
RestartSteps=20
RestartMaxDelaySec=61

[Install]
WantedBy=multi-user.target
`

const (
	agentUnitName  = "flightctl-agent.service"
	overlayUnits   = "jetbridge-" // begins the names of units to enable
	agentUser      = "u flightctl-console - \"Flight Control console\" /var/lib/flightctl /bin/bash\n"
	agentSudoers   = "flightctl-console ALL=(ALL) NOPASSWD: ALL\n"
	agentConfig    = "/etc/flightctl/config.yaml"
	agentSysusers  = "/usr/lib/sysusers.d/flightctl.conf"
	unitFolder     = "/usr/lib/systemd/system"
	modeProgram    = 0o755
	modePlain      = 0o644
	modeSecret     = 0o600
	modeSudoers    = 0o440
	flightctlHooks = "/usr/lib/flightctl/hooks.d/"
)

// agentSettings is added to the agent's configuration. Two seconds is the
// least that the agent accepts.
func agentSettings() map[string]any {
	return map[string]any{
		"spec-fetch-interval":    "2s",
		"status-update-interval": "2s",
		"system-info": []string{
			"hostname", "architecture", "kernel", "distroName", "distroVersion", "cpuCores", "memoryTotalKb", "netIpDefault",
		},
		"system-info-custom": []string{"jetbridge"},
	}
}

// mergeAgentConfig adds the lab's settings to the agent's configuration.
func mergeAgentConfig(config []byte) ([]byte, error) {
	var c map[string]any
	if err := yaml.Unmarshal(config, &c); err != nil {
		return nil, fmt.Errorf("cannot read configuration of flightctl-agent: %w", err)
	}
	if c["enrollment-service"] == nil {
		return nil, errors.New("cannot use configuration of flightctl-agent: it has no enrollment-service")
	}
	for key, value := range agentSettings() {
		c[key] = value
	}
	return yaml.Marshal(c)
}

// Provision installs flightctl-agent and the overlay on a device that is off,
// and creates the device if it is new. The services start when it boots.
func Provision(ctx context.Context, o Options, p ProvisionOptions) error {
	if err := Create(ctx, o); err != nil {
		return err
	}
	in, err := p.open()
	if err != nil {
		return fmt.Errorf("cannot provision device %s: %w", o.Name, err)
	}
	defer in.close()
	err = insideOff(ctx, o, func() error {
		if err := in.install(); err != nil {
			return err
		}
		for _, args := range in.commands() {
			cmd := exec.CommandContext(ctx, args[0], args[1:]...)
			cmd.Env = append(execEnv(), "SYSTEMD_OFFLINE=1")
			cmd.Stdin = bytes.NewReader(nil) // there is no /dev
			if out, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("cannot run %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("cannot provision device %s: %w", o.Name, err)
	}
	return nil
}

// Provision installs flightctl-agent and the overlay on the running device, and
// (re)starts their services without waiting for them.
func (d *Device) Provision(ctx context.Context, p ProvisionOptions) error {
	in, err := p.open()
	if err != nil {
		return fmt.Errorf("cannot provision device %s: %w", d.o.Name, err)
	}
	defer in.close()
	if err := d.insideOn(ctx, in.install); err != nil {
		return fmt.Errorf("cannot provision device %s: %w", d.o.Name, err)
	}
	commands := append([][]string{{"systemctl", "daemon-reload"}}, in.commands()...)
	if len(in.units) > 0 {
		commands = append(commands, append([]string{"systemctl", "restart", "--no-block"}, in.units...))
	}
	for _, args := range commands {
		var out bytes.Buffer
		code, err := d.Exec(ctx, ExecOptions{Args: args, Stdout: &out, Stderr: &out})
		if err == nil && code != 0 {
			err = fmt.Errorf("cannot run %s: exit code %d: %s", strings.Join(args, " "), code, bytes.TrimSpace(out.Bytes()))
		}
		if err != nil {
			return fmt.Errorf("cannot provision device %s: %w", d.o.Name, err)
		}
	}
	return nil
}

// installation is what is to be installed, opened before the caller enters the
// device, for then its paths mean other files.
type installation struct {
	agent   *os.File // nil if there is none
	config  []byte
	overlay *os.Root // nil if there is none
	units   []string // to enable, found by install
}

func (p ProvisionOptions) open() (_ *installation, err error) {
	in := &installation{}
	defer func() {
		if err != nil {
			in.close()
		}
	}()
	if p.FlightctlAgent != "" {
		if in.agent, err = os.Open(p.FlightctlAgent); err != nil {
			return nil, fmt.Errorf("cannot open flightctl-agent: %w", err)
		}
	}
	if len(p.FlightctlConfig) > 0 {
		if in.config, err = mergeAgentConfig(p.FlightctlConfig); err != nil {
			return nil, err
		}
	}
	if p.Overlay != "" {
		if in.overlay, err = os.OpenRoot(p.Overlay); err != nil {
			return nil, fmt.Errorf("cannot open overlay: %w", err)
		}
	}
	return in, nil
}

// close releases what is only read; there is nothing to learn from its errors.
func (in *installation) close() {
	if in.agent != nil {
		_ = in.agent.Close()
	}
	if in.overlay != nil {
		_ = in.overlay.Close()
	}
}

// install writes the files below the current root.
func (in *installation) install() error {
	in.units = nil
	for _, dir := range []string{
		"/etc/flightctl/conf.d", "/usr/lib/flightctl/custom-info.d", flightctlHooks + "afterupdating",
		flightctlHooks + "beforeupdating", flightctlHooks + "afterrebooting", flightctlHooks + "beforerebooting",
	} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("cannot make folder: %w", err)
		}
	}
	if in.agent != nil {
		for _, f := range []struct {
			path    string
			content io.Reader
			mode    fs.FileMode
		}{
			{"/usr/bin/flightctl-agent", in.agent, modeProgram},
			{path.Join(unitFolder, agentUnitName), strings.NewReader(agentUnit), modePlain},
			{agentSysusers, strings.NewReader(agentUser), modePlain},
			{"/etc/sudoers.d/flightctl-console", strings.NewReader(agentSudoers), modeSudoers},
		} {
			if err := installFile(f.path, f.content, f.mode); err != nil {
				return err
			}
		}
		in.units = append(in.units, agentUnitName)
	}
	if len(in.config) > 0 {
		if err := installFile(agentConfig, bytes.NewReader(in.config), modeSecret); err != nil {
			return err
		}
	}
	if in.overlay == nil {
		return nil
	}
	return fs.WalkDir(in.overlay.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("cannot read overlay: %w", err)
		}
		return in.installEntry(name, d)
	})
}

// installEntry copies one entry of the overlay.
func (in *installation) installEntry(name string, d fs.DirEntry) error {
	info, err := d.Info()
	if err != nil {
		return fmt.Errorf("cannot read overlay: %w", err)
	}
	target := path.Join("/", name)
	switch {
	case d.IsDir():
		err := os.Mkdir(target, info.Mode().Perm())
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		if err == nil {
			err = os.Chmod(target, info.Mode().Perm()) // whatever the umask is
		}
		if err != nil {
			return fmt.Errorf("cannot make folder: %w", err)
		}
		return nil
	case info.Mode()&fs.ModeSymlink != 0:
		link, err := in.overlay.Readlink(name)
		if err != nil {
			return fmt.Errorf("cannot read overlay: %w", err)
		}
		return replace(target, func() error { return os.Symlink(link, target) })
	case !info.Mode().IsRegular():
		return fmt.Errorf("cannot install %s of the overlay: neither file, folder nor symlink", target)
	}
	f, err := in.overlay.Open(name)
	if err != nil {
		return fmt.Errorf("cannot read overlay: %w", err)
	}
	defer f.Close()
	if err := installFile(target, f, info.Mode().Perm()); err != nil {
		return err
	}
	if !isUnitOfOverlay(target) {
		return nil
	}
	content, err := os.ReadFile(target)
	if err != nil {
		return fmt.Errorf("cannot read unit: %w", err)
	}
	if hasInstallSection(content) {
		in.units = append(in.units, path.Base(target))
	}
	return nil
}

// isUnitOfOverlay tells whether the path is that of a unit to enable: not of a
// template, which can be enabled only for an instance.
func isUnitOfOverlay(target string) bool {
	dir, name := path.Split(target)
	return slices.Contains([]string{unitFolder + "/", "/lib/systemd/system/", "/etc/systemd/system/"}, dir) &&
		strings.HasPrefix(name, overlayUnits) && !strings.Contains(name, "@") &&
		slices.Contains([]string{".service", ".path", ".socket", ".timer", ".target"}, path.Ext(name))
}

func hasInstallSection(unit []byte) bool {
	for line := range bytes.Lines(unit) {
		if string(bytes.TrimSpace(line)) == "[Install]" {
			return true
		}
	}
	return false
}

// installFile replaces a file in one step, so that a program may be running from the old one.
func installFile(target string, content io.Reader, mode fs.FileMode) (err error) {
	if err := os.MkdirAll(path.Dir(target), 0o755); err != nil {
		return fmt.Errorf("cannot make folder: %w", err)
	}
	f, err := os.CreateTemp(path.Dir(target), ".install-*")
	if err != nil {
		return fmt.Errorf("cannot install %s: %w", target, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("cannot install %s: %w", target, err), os.Remove(f.Name()))
		}
	}()
	_, err = io.Copy(f, content)
	err = errors.Join(err, f.Chmod(mode), f.Close())
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), target)
}

// commands are to be run in the device after install.
func (in *installation) commands() [][]string {
	var all [][]string
	if in.agent != nil {
		all = append(all, []string{"systemd-sysusers", filepath.Base(agentSysusers)})
	}
	if len(in.units) > 0 {
		all = append(all, append([]string{"systemctl", "enable"}, in.units...))
	}
	return all
}
