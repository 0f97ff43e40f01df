package supervise

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/jetbridge/jetbridge/test/lab/device"
	"github.com/jetbridge/jetbridge/test/lab/internal/control"
)

// install puts the agents onto a device that is off.
func (s *devices) install(ctx context.Context, m *machine, d control.AddDevice) error {
	return device.Provision(ctx, m.options, device.ProvisionOptions{
		FlightctlAgent:  filepath.Join(s.config.FlightctlBin, "flightctl-agent"),
		FlightctlConfig: d.AgentConfig,
		Overlay:         d.Overlay,
	})
}

// enroll has a running device approved, and returns its name in Flight Control.
func (s *devices) enroll(ctx context.Context, m *machine) (string, error) {
	d, err := m.on()
	if err != nil {
		return "", err
	}
	return device.Enroll(ctx, device.EnrollOptions{CLI: s.flightctl, Device: d, Labels: m.get().Labels})
}

// flightctl runs the CLI as the lab's operator.
func (s *devices) flightctl(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(s.config.FlightctlBin, "flightctl"), args...)
	cmd.Env = append(os.Environ(), "XDG_CONFIG_HOME="+s.config.Lab().CLIConfig())
	var out, problem bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problem
	if err := cmd.Run(); err != nil {
		return out.Bytes(), fmt.Errorf("flightctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(problem.String()))
	}
	return out.Bytes(), nil
}
