// Package control is how the lab's commands speak to its supervisor: HTTP with
// JSON over a unix socket in the lab's folder, and a second socket over which a
// command's own standard streams are handed to a device.
package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/jetbridge/jetbridge/test/lab/internal/layout"
)

// Component is a supervised process.
type Component struct {
	Name     string    `json:"name"`
	State    string    `json:"state"` // starting, running, stopped, killed or failed
	PID      int       `json:"pid"`   // in the lab's PID namespace; 0 if it does not run
	Restarts int       `json:"restarts"`
	Since    time.Time `json:"since"` // when the state began
}

// Device is a device of the lab.
type Device struct {
	Name    string            `json:"name"`
	State   string            `json:"state"`           // booting, on or off
	PID     int               `json:"pid"`             // in the lab's PID namespace; 0 if it is off
	Address string            `json:"address"`         // on the lab's bridge
	ID      string            `json:"id,omitempty"`    // its name in Flight Control, once enrolled
	Fleet   string            `json:"fleet,omitempty"` // that it was enrolled for
	Labels  map[string]string `json:"labels,omitempty"`
	Link    string            `json:"link"` // up, down, and what is wrong with it
	Since   time.Time         `json:"since"`
}

// Status is all that the supervisor knows.
type Status struct {
	Components []Component `json:"components"`
	Devices    []Device    `json:"devices"`
}

// AddDevice asks for a new device.
type AddDevice struct {
	Name   string            `json:"name"`
	Fleet  string            `json:"fleet,omitempty"`
	Labels map[string]string `json:"labels,omitempty"`
	// Enroll has the enrollment request approved, by the CLI.
	Enroll bool `json:"enroll"`
	// AgentConfig is what flightctl-agent enrolls with.
	AgentConfig []byte `json:"agentConfig"`
	// Overlay is a folder that is copied over the device's root; may be empty.
	Overlay string `json:"overlay,omitempty"`
}

// Net asks for a change of a device's link; what is nil stays.
type Net struct {
	Up    *bool          `json:"up,omitempty"`
	Loss  *float64       `json:"loss,omitempty"` // percent
	Delay *time.Duration `json:"delay,omitempty"`
}

// Problem is the body of an answer that is not OK.
type Problem struct {
	Error string `json:"error"`
}

// Client speaks to a lab's supervisor.
type Client struct {
	http *http.Client
	lab  layout.Lab
}

// NewClient makes a client of a lab. Nothing is sent yet.
func NewClient(lab layout.Lab) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", lab.Socket())
	}
	return &Client{lab: lab, http: &http.Client{Transport: &http.Transport{DialContext: dial}}}
}

// Status asks for what there is.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	return s, c.do(ctx, http.MethodGet, "/v1/status", nil, &s)
}

// Component has a component started, stopped, killed or restarted. After start
// and restart it is ready.
func (c *Client) Component(ctx context.Context, name, action string) error {
	return c.do(ctx, http.MethodPost, "/v1/components/"+name+"/"+action, nil, nil)
}

// Tokens has all service account tokens renewed at once.
func (c *Client) Tokens(ctx context.Context) error {
	return c.do(ctx, http.MethodPost, "/v1/tokens", nil, nil)
}

// AddDevice makes a device and boots it.
func (c *Client) AddDevice(ctx context.Context, d AddDevice) (Device, error) {
	var answer Device
	return answer, c.do(ctx, http.MethodPost, "/v1/devices", d, &answer)
}

// RemoveDevice ends a device and removes all of it from the lab.
func (c *Client) RemoveDevice(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodDelete, "/v1/devices/"+name, nil, nil)
}

// Power switches a device: on, off, reboot or kill.
func (c *Client) Power(ctx context.Context, name, action string) error {
	return c.do(ctx, http.MethodPost, "/v1/devices/"+name+"/power/"+action, nil, nil)
}

// Net changes a device's link.
func (c *Client) Net(ctx context.Context, name string, n Net) error {
	return c.do(ctx, http.MethodPost, "/v1/devices/"+name+"/net", n, nil)
}

func (c *Client) do(ctx context.Context, method, path string, body, answer any) (err error) {
	var reader io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("cannot encode request: %w", err)
		}
		reader = bytes.NewReader(b)
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://lab"+path, reader)
	if err != nil {
		return fmt.Errorf("cannot make request: %w", err)
	}
	response, err := c.http.Do(request)
	if err != nil {
		return fmt.Errorf("cannot reach lab %s (is it up?): %w", c.lab.Name, err)
	}
	defer func() { err = errors.Join(err, response.Body.Close()) }()
	b, err := io.ReadAll(response.Body)
	if err != nil {
		return fmt.Errorf("cannot read answer: %w", err)
	}
	if response.StatusCode != http.StatusOK {
		var p Problem
		if json.Unmarshal(b, &p) != nil || p.Error == "" {
			p.Error = response.Status + ": " + strings.TrimSpace(string(b))
		}
		return errors.New(p.Error)
	}
	if answer == nil {
		return nil
	}
	if err := json.Unmarshal(b, answer); err != nil {
		return fmt.Errorf("cannot read answer: %w", err)
	}
	return nil
}
