package image

import (
	"context"
	"errors"
	"testing"

	"github.com/distribution/reference"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"github.com/jetbridge/jetbridge/device-agent/podman"
	"github.com/jetbridge/jetbridge/shared/bundle"
)

type fake struct {
	local  string
	pulled []string
	accept podman.Auth
}

func (f *fake) ImageID(context.Context, string) (string, error) { return f.local, nil }
func (f *fake) Pull(_ context.Context, ref string, a podman.Auth) (string, error) {
	f.pulled = append(f.pulled, ref+" "+a.Username)
	if a != f.accept {
		return "", errors.New("unauthorized")
	}
	return "id", nil
}

func TestPolicies(t *testing.T) {
	for name, c := range map[string]struct {
		local, image string
		policy       corev1.PullPolicy
		reason       string
		pulls        int
	}{
		"present":           {"id", "a:1", corev1.PullIfNotPresent, "", 0},
		"absent":            {"", "a:1", corev1.PullIfNotPresent, "", 1},
		"always":            {"id", "a:1", corev1.PullAlways, "", 1},
		"never, present":    {"id", "a:1", corev1.PullNever, "", 0},
		"never, absent":     {"", "a:1", corev1.PullNever, ErrImageNeverPull, 0},
		"no valid name":     {"", "A B", corev1.PullAlways, InvalidImageName, 0},
		"a flag is no name": {"", "--privileged", corev1.PullAlways, InvalidImageName, 0},
	} {
		t.Run(name, func(t *testing.T) {
			f := &fake{local: c.local}
			err := Ensure(context.Background(), f, &corev1.Container{Image: c.image, ImagePullPolicy: c.policy}, nil)
			assert.Len(t, f.pulled, c.pulls)
			if c.reason == "" {
				require.NoError(t, err)
				return
			}
			var failed *Error
			require.ErrorAs(t, err, &failed)
			assert.Equal(t, c.reason, failed.Reason)
		})
	}
}

func TestPullSecrets(t *testing.T) {
	secrets := []bundle.Secret{
		{Name: "a", Type: corev1.SecretTypeDockerConfigJson, Data: map[string][]byte{".dockerconfigjson": []byte(`{"auths":{"reg:5000":{"username":"u1","password":"p1"},"reg:5000/team":{"auth":"dTI6cDI6eA=="},"other":{"username":"no"}}}`)}},
		{Name: "b", Type: corev1.SecretTypeDockercfg, Data: map[string][]byte{".dockercfg": []byte(`{"https://reg:5000/v1/":{"username":"u3","password":"p3"}}`)}},
		{Name: "c", Type: corev1.SecretTypeDockerConfigJson, Data: map[string][]byte{".dockerconfigjson": []byte(`not json`)}},
	}
	named, err := reference.ParseNormalizedNamed("reg:5000/team/app:1")
	require.NoError(t, err)
	assert.Equal(t, []podman.Auth{{Username: "u2", Password: "p2:x"}, {Username: "u1", Password: "p1"}, {Username: "u3", Password: "p3"}}, Credentials(secrets, named))

	f := &fake{accept: podman.Auth{Username: "u3", Password: "p3"}}
	require.NoError(t, Ensure(context.Background(), f, &corev1.Container{Image: "reg:5000/team/app", ImagePullPolicy: corev1.PullAlways}, secrets))
	assert.Equal(t, []string{"reg:5000/team/app:latest u2", "reg:5000/team/app:latest u1", "reg:5000/team/app:latest u3"}, f.pulled)
}
