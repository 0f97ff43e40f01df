package volume

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/jetbridge/jetbridge/device-agent/podenv"
	"github.com/jetbridge/jetbridge/shared/bundle"
)

func setup(t *testing.T, volumes ...corev1.Volume) (Dirs, podenv.Content) {
	t.Helper()
	dir := t.TempDir()
	return Dirs{State: filepath.Join(dir, "state"), Run: filepath.Join(dir, "run")}, podenv.Content{
		Pod: &bundle.Pod{
			Metadata: metav1.ObjectMeta{Name: "web", Namespace: "ns", UID: "u"}, Spec: corev1.PodSpec{Volumes: volumes},
			ConfigMaps: []bundle.ConfigMap{{Name: "cm", Data: map[string][]byte{"a": []byte("1"), "b": []byte("2")}}},
		},
		Secrets: bundle.PodSecrets{
			Secrets: []bundle.Secret{{Name: "s", Data: map[string][]byte{"p": []byte("pw")}}},
			Tokens:  []bundle.Token{{Audience: "", ExpirationSeconds: 3607, Value: "tok"}},
		},
	}
}

func read(t *testing.T, path ...string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(path...))
	require.NoError(t, err)
	return string(data)
}

func TestConfigMapIsUpdatedAtOnce(t *testing.T) {
	v := corev1.Volume{Name: "v"}
	v.ConfigMap = &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "cm"}, DefaultMode: new(int32(0o400))}
	d, c := setup(t, v)
	require.NoError(t, Ensure(d, c, podenv.Facts{}))
	dir := Source(d, &v)
	assert.Equal(t, "1", read(t, dir, "a"))
	info, err := os.Stat(filepath.Join(dir, "a"))
	require.NoError(t, err)
	assert.EqualValues(t, 0o400, info.Mode())
	first, err := os.Readlink(filepath.Join(dir, "..data"))
	require.NoError(t, err)

	require.NoError(t, Ensure(d, c, podenv.Facts{}))
	same, err := os.Readlink(filepath.Join(dir, "..data"))
	require.NoError(t, err)
	assert.Equal(t, first, same, "without a change nothing moves")

	c.Pod.ConfigMaps[0].Data = map[string][]byte{"a": []byte("3"), "c": []byte("4")}
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "..left-by-a-crash"), 0o755))
	require.NoError(t, Ensure(d, c, podenv.Facts{}))
	assert.Equal(t, "3", read(t, dir, "a"))
	assert.Equal(t, "4", read(t, dir, "c"))
	assert.NoFileExists(t, filepath.Join(dir, "b"))
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Len(t, entries, 4, "a, c, ..data and its folder")
}

func TestProjected(t *testing.T) {
	v := corev1.Volume{Name: "v"}
	v.Projected = &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
		{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token", ExpirationSeconds: new(int64(3607))}},
		{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "cm"}, Items: []corev1.KeyToPath{{Key: "a", Path: "sub/ca.crt", Mode: new(int32(0o600))}}}},
		{Secret: &corev1.SecretProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "gone"}, Optional: new(true)}},
		{DownwardAPI: &corev1.DownwardAPIProjection{Items: []corev1.DownwardAPIVolumeFile{{Path: "namespace", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.namespace"}}}}},
	}}
	d, c := setup(t, v)
	require.NoError(t, Ensure(d, c, podenv.Facts{}))
	dir := Source(d, &v)
	assert.Equal(t, "tok", read(t, dir, "token"))
	assert.Equal(t, "1", read(t, dir, "sub/ca.crt"))
	assert.Equal(t, "ns", read(t, dir, "namespace"))

	c.Secrets.Tokens = nil
	require.ErrorIs(t, Ensure(d, c, podenv.Facts{}), podenv.ErrMissing)
	assert.Equal(t, "tok", read(t, dir, "token"), "what was there stays")
}

func TestMissingAndEscaping(t *testing.T) {
	v := corev1.Volume{Name: "v"}
	v.Secret = &corev1.SecretVolumeSource{SecretName: "gone"}
	d, c := setup(t, v)
	require.ErrorIs(t, Ensure(d, c, podenv.Facts{}), podenv.ErrMissing)
	for _, path := range []string{"../x", "/x", "a/../../x", "..data", ".", ""} {
		v.Secret = &corev1.SecretVolumeSource{SecretName: "s", Items: []corev1.KeyToPath{{Key: "p", Path: path}}}
		d, c = setup(t, v)
		require.Error(t, Ensure(d, c, podenv.Facts{}), path)
	}
}

func TestEmptyDirAndHostPath(t *testing.T) {
	v := corev1.Volume{Name: "v"}
	v.EmptyDir = &corev1.EmptyDirVolumeSource{}
	d, c := setup(t, v)
	require.NoError(t, Ensure(d, c, podenv.Facts{}))
	require.NoError(t, os.WriteFile(filepath.Join(Source(d, &v), "f"), []byte("x"), 0o600))
	require.NoError(t, Ensure(d, c, podenv.Facts{}))
	assert.Equal(t, "x", read(t, Source(d, &v), "f"), "what is in it stays")

	dir := t.TempDir()
	for _, k := range []struct {
		path string
		kind corev1.HostPathType
		ok   bool
	}{
		{dir, corev1.HostPathUnset, true}, {dir + "/no", corev1.HostPathUnset, false}, {dir, corev1.HostPathDirectory, true}, {dir + "/no", corev1.HostPathDirectory, false},
		{dir, corev1.HostPathFile, false}, {dir + "/f", corev1.HostPathFileOrCreate, true}, {dir + "/f", corev1.HostPathFile, true}, {dir + "/f", corev1.HostPathDirectoryOrCreate, false},
		{dir + "/d/e", corev1.HostPathDirectoryOrCreate, true}, {"/dev/null", corev1.HostPathCharDev, true}, {"/dev/null", corev1.HostPathBlockDev, false}, {"/dev/null", corev1.HostPathSocket, false},
	} {
		err := hostPath(&corev1.HostPathVolumeSource{Path: k.path, Type: &k.kind})
		assert.Equal(t, k.ok, err == nil, "%v: %v", k, err)
	}
}
