// Package image fetches the images of pods, with the pull policies, the pull
// secrets and the reasons of the kubelet.
package image

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/distribution/reference"
	corev1 "k8s.io/api/core/v1"

	"github.com/jetbridge/jetbridge/device-agent/podman"
	"github.com/jetbridge/jetbridge/shared/bundle"
)

// Reasons of a failure.
const (
	ErrImagePull      = "ErrImagePull"
	ImagePullBackOff  = "ImagePullBackOff"
	ErrImageNeverPull = "ErrImageNeverPull"
	InvalidImageName  = "InvalidImageName"
)

// Error is why a container has no image.
type Error struct {
	Reason string
	Err    error
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Podman is what this package needs of podman.
type Podman interface {
	ImageID(ctx context.Context, ref string) (string, error)
	Pull(ctx context.Context, ref string, auth podman.Auth) (string, error)
}

// Ensure makes the container's image available. Errors are of type *Error.
func Ensure(ctx context.Context, p Podman, c *corev1.Container, secrets []bundle.Secret) error {
	named, err := reference.ParseNormalizedNamed(c.Image)
	if err != nil {
		return &Error{InvalidImageName, fmt.Errorf("failed to apply default image tag %q: couldn't parse image name %q: %w", c.Image, c.Image, err)}
	}
	ref := reference.TagNameOnly(named).String()
	if policy(c) != corev1.PullAlways {
		id, err := p.ImageID(ctx, c.Image)
		if err != nil {
			return &Error{ErrImagePull, err}
		}
		if id != "" {
			return nil
		}
		if policy(c) == corev1.PullNever {
			return &Error{ErrImageNeverPull, fmt.Errorf("container image %q is not present with pull policy of Never", c.Image)}
		}
	}
	auths := Credentials(secrets, named)
	if len(auths) == 0 {
		auths = []podman.Auth{{}}
	}
	for _, a := range auths {
		if _, err = p.Pull(ctx, ref, a); err == nil {
			return nil
		}
	}
	return &Error{ErrImagePull, fmt.Errorf("failed to pull image %q: %w", c.Image, err)}
}

// policy is the container's pull policy; the API server fills it in always.
func policy(c *corev1.Container) corev1.PullPolicy {
	if c.ImagePullPolicy == "" {
		return corev1.PullIfNotPresent
	}
	return c.ImagePullPolicy
}

// Credentials are those of the pull secrets that are for the image's
// registry and path, the most specific first.
func Credentials(secrets []bundle.Secret, image reference.Named) []podman.Auth {
	type entry struct {
		Username, Password, Auth string
	}
	type match struct {
		length int
		auth   podman.Auth
	}
	var found []match
	for _, s := range secrets {
		entries := map[string]entry{}
		switch s.Type {
		case corev1.SecretTypeDockerConfigJson:
			var config struct{ Auths map[string]entry }
			if json.Unmarshal(s.Data[corev1.DockerConfigJsonKey], &config) != nil {
				continue
			}
			entries = config.Auths
		case corev1.SecretTypeDockercfg:
			if json.Unmarshal(s.Data[corev1.DockerConfigKey], &entries) != nil {
				continue
			}
		}
		for key, e := range entries {
			where := strings.TrimPrefix(strings.TrimPrefix(key, "https://"), "http://")
			where = strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(where, "/"), "/v1"), "/v2")
			if where == "index.docker.io" {
				where = "docker.io"
			}
			if image.Name() != where && !strings.HasPrefix(image.Name(), where+"/") {
				continue
			}
			a := podman.Auth{Username: e.Username, Password: e.Password}
			if raw, err := base64.StdEncoding.DecodeString(e.Auth); e.Auth != "" && err == nil {
				a.Username, a.Password, _ = strings.Cut(string(raw), ":")
			}
			at := 0
			for at < len(found) && found[at].length >= len(where) {
				at++
			}
			found = append(found[:at], append([]match{{len(where), a}}, found[at:]...)...)
		}
	}
	out := make([]podman.Auth, len(found))
	for i, m := range found {
		out[i] = m.auth
	}
	return out
}
