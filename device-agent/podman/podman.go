// Package podman is the only user of podman's bindings. Its types are our own,
// so that nothing else depends on podman's.
package podman

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/containers/podman/v5/pkg/bindings"
	"github.com/containers/podman/v5/pkg/bindings/containers"
	"github.com/containers/podman/v5/pkg/bindings/images"
	"github.com/containers/podman/v5/pkg/bindings/pods"
	"github.com/containers/podman/v5/pkg/bindings/system"
	"github.com/containers/podman/v5/pkg/errorhandling"
)

// Labels of every container of ours; units set them.
const (
	LabelUID       = "jetbridge.dev/uid"
	LabelContainer = "jetbridge.dev/container"
)

// Container is one container of a pod, as podman knows it.
type Container struct {
	ID, Name        string
	UID, Container  string
	Image, ImageID  string
	State           string
	Started, Exited time.Time
	ExitCode        int32
}

// Auth are credentials for one registry; empty means anonymous.
type Auth struct {
	Username, Password string
}

// Client talks to podman's API socket.
type Client struct {
	uri string
}

// New returns a client of the socket, which need not be there yet.
func New(socket string) *Client { return &Client{uri: "unix://" + socket} }

// connect makes a connection that lives as long as ctx. Podman's service ends
// when it is idle, and systemd starts it again, so none is kept.
func (c *Client) connect(ctx context.Context) (context.Context, error) {
	conn, err := bindings.NewConnection(ctx, c.uri)
	if err != nil {
		return nil, fmt.Errorf("cannot reach podman: %w", err)
	}
	return conn, nil
}

// Version returns podman's version, such as 5.4.2.
func (c *Client) Version(ctx context.Context) (string, error) {
	conn, err := c.connect(ctx)
	if err != nil {
		return "", err
	}
	v, err := system.Version(conn, nil)
	if err != nil {
		return "", fmt.Errorf("cannot ask podman for its version: %w", err)
	}
	if v.Server == nil {
		return "", errors.New("podman reports no server version")
	}
	return v.Server.Version, nil
}

// Containers lists all containers of ours, running or not.
func (c *Client) Containers(ctx context.Context) ([]Container, error) {
	conn, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	list, err := containers.List(conn, new(containers.ListOptions).WithAll(true).WithFilters(map[string][]string{"label": {LabelUID}}))
	if err != nil {
		return nil, fmt.Errorf("cannot list containers: %w", err)
	}
	out := make([]Container, 0, len(list))
	for _, l := range list {
		if l.IsInfra {
			continue
		}
		k := Container{
			ID: l.ID, UID: l.Labels[LabelUID], Container: l.Labels[LabelContainer], Image: l.Image, ImageID: l.ImageID,
			State: l.State, ExitCode: l.ExitCode,
		}
		if len(l.Names) > 0 {
			k.Name = l.Names[0]
		}
		if l.StartedAt > 0 {
			k.Started = time.Unix(l.StartedAt, 0).UTC()
		}
		if l.ExitedAt > 0 {
			k.Exited = time.Unix(l.ExitedAt, 0).UTC()
		}
		out = append(out, k)
	}
	return out, nil
}

// PodIPs returns the addresses of a pod, none if it does not run.
func (c *Client) PodIPs(ctx context.Context, pod string) ([]string, error) {
	conn, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	p, err := pods.Inspect(conn, pod, nil)
	if notFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot inspect pod %s: %w", pod, err)
	}
	if p.InfraContainerID == "" {
		return nil, nil
	}
	infra, err := containers.Inspect(conn, p.InfraContainerID, nil)
	if notFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot inspect the infra container of pod %s: %w", pod, err)
	}
	var ips []string
	if infra.NetworkSettings != nil {
		for _, n := range infra.NetworkSettings.Networks {
			if n.IPAddress != "" {
				ips = append(ips, n.IPAddress)
			}
		}
	}
	return ips, nil
}

// RemovePod removes a pod and what is left of its containers. None is no error.
func (c *Client) RemovePod(ctx context.Context, pod string) error {
	conn, err := c.connect(ctx)
	if err != nil {
		return err
	}
	if _, err := pods.Remove(conn, pod, new(pods.RemoveOptions).WithForce(true).WithTimeout(0)); err != nil && !notFound(err) {
		return fmt.Errorf("cannot remove pod %s: %w", pod, err)
	}
	return nil
}

// RemoveContainer removes a container and its anonymous volumes. None is no error.
func (c *Client) RemoveContainer(ctx context.Context, name string) error {
	conn, err := c.connect(ctx)
	if err != nil {
		return err
	}
	if _, err := containers.Remove(conn, name, new(containers.RemoveOptions).WithForce(true).WithVolumes(true).WithTimeout(0).WithIgnore(true)); err != nil && !notFound(err) {
		return fmt.Errorf("cannot remove container %s: %w", name, err)
	}
	return nil
}

// ImageID returns the ID of an image that is on the device, or "".
func (c *Client) ImageID(ctx context.Context, ref string) (string, error) {
	conn, err := c.connect(ctx)
	if err != nil {
		return "", err
	}
	img, err := images.GetImage(conn, ref, nil)
	if notFound(err) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("cannot inspect image %s: %w", ref, err)
	}
	return img.ID, nil
}

// Pull fetches an image and returns its ID. The error carries no credentials.
func (c *Client) Pull(ctx context.Context, ref string, auth Auth) (string, error) {
	conn, err := c.connect(ctx)
	if err != nil {
		return "", err
	}
	o := new(images.PullOptions).WithQuiet(true).WithProgressWriter(io.Discard).WithRetry(0).WithPolicy("always")
	if auth.Username != "" || auth.Password != "" {
		o = o.WithUsername(auth.Username).WithPassword(auth.Password)
	}
	ids, err := images.Pull(conn, ref, o)
	if err != nil {
		return "", fmt.Errorf("cannot pull image %s: %w", ref, redact(err, auth.Password))
	}
	if len(ids) == 0 {
		return "", fmt.Errorf("cannot pull image %s: podman returned none", ref)
	}
	return ids[0], nil
}

func redact(err error, secret string) error {
	if secret == "" || !strings.Contains(err.Error(), secret) {
		return err
	}
	return errors.New(strings.ReplaceAll(err.Error(), secret, "REDACTED"))
}

func notFound(err error) bool {
	var m *errorhandling.ErrorModel
	return errors.As(err, &m) && m.ResponseCode == http.StatusNotFound
}
