package device

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base32"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// CLI runs the flightctl command with these arguments and returns what it
// prints. Its errors contain what the command says about them.
type CLI func(ctx context.Context, args ...string) ([]byte, error)

// EnrollOptions say how a device joins Flight Control.
type EnrollOptions struct {
	CLI    CLI
	Device *Device
	// Labels are set on the device in Flight Control. The label alias, which
	// Flight Control shows as the device's alias, is the device's host name
	// unless it is given here.
	Labels map[string]string
}

// enrollInterval is how often Flight Control is asked for progress; it counts
// against the API's rate limit.
const enrollInterval = time.Second

// Enroll waits for the enrollment request of the device's flightctl-agent,
// approves it, and returns Flight Control's name for the device once the device
// is online. A device that is enrolled already is only waited for.
//
// The request is recognized by its name, which follows from the agent's key:
// so devices can enroll at the same time.
func Enroll(ctx context.Context, e EnrollOptions) (name string, err error) {
	who := e.Device.Name()
	if name, err = waitForIdentity(ctx, e.Device.o.Dir); err != nil {
		return "", fmt.Errorf("cannot enroll device %s: %w", who, err)
	}
	approved := false
	err = poll(ctx, func() error {
		out, err := e.CLI(ctx, "get", "enrollmentrequest/"+name, "-o", "json")
		if err != nil {
			return err
		}
		approved, err = isApproved(out)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("cannot enroll device %s: no enrollment request %s: %w", who, name, err)
	}
	if !approved {
		if _, err := e.CLI(ctx, approveArgs(name, who, e.Labels)...); err != nil {
			return "", fmt.Errorf("cannot approve enrollment of device %s: %w", who, err)
		}
	}
	err = poll(ctx, func() error {
		out, err := e.CLI(ctx, "get", "device/"+name, "-o", "json")
		if err != nil {
			return err
		}
		return online(out)
	})
	if err != nil {
		return "", fmt.Errorf("cannot see device %s (%s) online: %w", who, name, err)
	}
	return name, nil
}

func approveArgs(name, hostname string, labels map[string]string) []string {
	words := []string{}
	if _, ok := labels["alias"]; !ok {
		words = append(words, "alias="+hostname)
	}
	for key, value := range labels {
		words = append(words, key+"="+value)
	}
	slices.Sort(words)
	args := []string{"approve", "enrollmentrequest/" + name}
	for _, word := range words {
		args = append(args, "-l", word)
	}
	return args
}

// RemoveOptions say how a device leaves Flight Control.
type RemoveOptions struct {
	CLI CLI
	// Name is Flight Control's name of the device, as Enroll returned it.
	Name string
	// Decommission lets the device wipe its enrollment first: its agent does
	// that and reboots the device. Else the device is only forgotten, and its
	// agent, if it runs, asks for enrollment again.
	Decommission bool
}

// Remove takes a device out of Flight Control. A device that is not there is no error.
func Remove(ctx context.Context, r RemoveOptions) error {
	if r.Decommission {
		_, err := r.CLI(ctx, "decommission", "device/"+r.Name)
		if isNotFound(err) {
			err = nil
		}
		if err != nil {
			return fmt.Errorf("cannot decommission device %s: %w", r.Name, err)
		}
		if err := poll(ctx, func() error { return decommissioned(ctx, r) }); err != nil {
			return fmt.Errorf("cannot see device %s decommissioned: %w", r.Name, err)
		}
	}
	// In this order: a request cannot be deleted while its device exists.
	for _, kind := range []string{"device", "enrollmentrequest"} {
		if _, err := r.CLI(ctx, "delete", kind+"/"+r.Name); err != nil && !isNotFound(err) {
			return fmt.Errorf("cannot delete %s %s: %w", kind, r.Name, err)
		}
	}
	return nil
}

func decommissioned(ctx context.Context, r RemoveOptions) error {
	out, err := r.CLI(ctx, "get", "device/"+r.Name, "-o", "json")
	if isNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	var d deviceObject
	if err := json.Unmarshal(out, &d); err != nil {
		return fmt.Errorf("cannot read device: %w", err)
	}
	if d.Status.Lifecycle.Status != "Decommissioned" {
		return fmt.Errorf("its lifecycle is %s", d.Status.Lifecycle.Status)
	}
	return nil
}

// isNotFound recognizes the CLI's way to say so; it has no exit code for it.
func isNotFound(err error) bool {
	return err != nil && (strings.Contains(err.Error(), "404") || strings.Contains(strings.ToLower(err.Error()), "not found"))
}

// The parts that matter of Flight Control's objects.
type (
	deviceObject struct {
		Status struct {
			Summary struct {
				Status string `json:"status"`
			} `json:"summary"`
			Lifecycle struct {
				Status string `json:"status"`
			} `json:"lifecycle"`
		} `json:"status"`
	}
	enrollmentObject struct {
		Status struct {
			Approval *struct {
				Approved bool `json:"approved"`
			} `json:"approval"`
		} `json:"status"`
	}
)

func isApproved(enrollmentRequest []byte) (bool, error) {
	var e enrollmentObject
	if err := json.Unmarshal(enrollmentRequest, &e); err != nil {
		return false, fmt.Errorf("cannot read enrollment request: %w", err)
	}
	return e.Status.Approval != nil && e.Status.Approval.Approved, nil
}

// online returns nil if the device is, else an error that says what it is.
func online(device []byte) error {
	var d deviceObject
	if err := json.Unmarshal(device, &d); err != nil {
		return fmt.Errorf("cannot read device: %w", err)
	}
	if d.Status.Summary.Status != "Online" {
		return fmt.Errorf("it is %s", d.Status.Summary.Status)
	}
	return nil
}

// poll calls f until it returns nil; when ctx ends first, it returns the last error of f.
func poll(ctx context.Context, f func() error) error {
	ticker := time.NewTicker(enrollInterval)
	defer ticker.Stop()
	var last error
	for {
		err := f()
		if err == nil {
			return nil
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), last)
		case <-ticker.C:
		}
	}
}

// waitForIdentity waits until flightctl-agent has made its key, and returns the
// name that the device has by it.
func waitForIdentity(ctx context.Context, dir string) (string, error) {
	file := filepath.Join(dir, "var/lib/flightctl/certs/agent.key")
	ticker := time.NewTicker(enrollInterval / 10)
	defer ticker.Stop()
	for {
		key, err := os.ReadFile(file)
		if err == nil {
			name, nameErr := nameFromKey(key)
			if nameErr == nil {
				return name, nil
			}
			err = nameErr // perhaps half written
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("cannot read key of flightctl-agent: %w", err)
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("flightctl-agent has not made its key: %w: %w", ctx.Err(), err)
		case <-ticker.C:
		}
	}
}

// nameFromKey derives a device's name in Flight Control from its agent's
// private key in PEM: the SHA-256 of the public point's coordinates without
// leading zeros, in lower-case base32 of the extended hexadecimal alphabet.
func nameFromKey(keyPEM []byte) (string, error) {
	block, _ := pem.Decode(keyPEM)
	if block == nil {
		return "", errors.New("cannot read key: not PEM")
	}
	key, err := parseKey(block)
	if err != nil {
		return "", fmt.Errorf("cannot read key: %w", err)
	}
	point, err := key.PublicKey.Bytes() // 4, x, y
	if err != nil {
		return "", fmt.Errorf("cannot encode public key: %w", err)
	}
	half := (len(point) - 1) / 2
	hash := sha256.New()
	hash.Write(bytes.TrimLeft(point[1:1+half], "\x00"))
	hash.Write(bytes.TrimLeft(point[1+half:], "\x00"))
	return strings.ToLower(base32.HexEncoding.WithPadding(base32.NoPadding).EncodeToString(hash.Sum(nil))), nil
}

func parseKey(block *pem.Block) (*ecdsa.PrivateKey, error) {
	if block.Type == "EC PRIVATE KEY" {
		return x509.ParseECPrivateKey(block.Bytes)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("it is a %T, not an elliptic curve key", key)
	}
	return ec, nil
}
