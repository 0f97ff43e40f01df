package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/jetbridge/jetbridge/test/lab/internal/control"
	"github.com/jetbridge/jetbridge/test/lab/internal/layout"
)

// AddDevice builds the agent, and adds a device that has it.
func AddDevice(ctx context.Context, lab layout.Lab, checkout string, d control.AddDevice) (control.Device, error) {
	files, err := overlay(ctx, lab, checkout)
	if err != nil {
		return control.Device{}, err
	}
	return addDevice(ctx, lab, files, d)
}

func addDevice(ctx context.Context, lab layout.Lab, overlay string, d control.AddDevice) (control.Device, error) {
	config, err := flightctl(ctx, lab, "certificate", "request", "--signer=enrollment", "--expiration=365d", "--output=embedded")
	if err != nil {
		return control.Device{}, fmt.Errorf("cannot get the agent's configuration: %w", err)
	}
	d.AgentConfig, d.Overlay = config, overlay
	return control.NewClient(lab).AddDevice(ctx, d)
}

// RemoveDevice takes a device out of Flight Control and out of the lab.
func RemoveDevice(ctx context.Context, lab layout.Lab, name string) error {
	client := control.NewClient(lab)
	status, err := client.Status(ctx)
	if err != nil {
		return err
	}
	id := ""
	for _, d := range status.Devices {
		if d.Name == name {
			id = d.ID
		}
	}
	if err := client.RemoveDevice(ctx, name); err != nil {
		return err
	}
	if id == "" {
		return nil
	}
	// In this order: a request cannot be deleted while its device exists.
	for _, kind := range []string{"device/", "enrollmentrequest/"} {
		if _, err := flightctl(ctx, lab, "delete", kind+id); err != nil {
			return err
		}
	}
	return nil
}

func flightctl(ctx context.Context, lab layout.Lab, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(lab.Bin(), "flightctl"), args...)
	cmd.Dir = lab.Home() // it leaves the certificates that it requests where it runs
	var out, problem bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problem
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("flightctl %s: %w: %s", args[0], err, strings.TrimSpace(problem.String()))
	}
	return out.Bytes(), nil
}

// overlay builds the agent and lays it out as an installation does. Without an
// agent in the checkout there is nothing to lay over a device.
func overlay(ctx context.Context, lab layout.Lab, checkout string) (string, error) {
	install := filepath.Join(checkout, "packaging", "install-agent")
	if _, err := os.Stat(install); errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	program := filepath.Join(lab.Bin(), "jetbridge-agent")
	if err := goBuild(ctx, checkout, program, "./device-agent", productTags); err != nil {
		return "", err
	}
	dir := lab.Path("overlay")
	if err := os.RemoveAll(dir); err != nil {
		return "", fmt.Errorf("cannot remove old overlay: %w", err)
	}
	cmd := exec.CommandContext(ctx, install, dir, program)
	cmd.Dir = checkout
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("cannot install the agent: %w\n%s", err, text)
	}
	return dir, nil
}
