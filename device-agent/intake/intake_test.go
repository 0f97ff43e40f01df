package intake

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/jetbridge/jetbridge/shared/bundle"
)

func TestRead(t *testing.T) {
	dir := t.TempDir()
	key, err := LoadKey(dir)
	require.NoError(t, err)
	again, err := LoadKey(dir)
	require.NoError(t, err)
	assert.Equal(t, key.Bytes(), again.Bytes())
	info, err := os.Stat(filepath.Join(dir, "key"))
	require.NoError(t, err)
	assert.EqualValues(t, 0o600, info.Mode())
	public, err := key.Public()
	require.NoError(t, err)

	source := filepath.Join(dir, "desired")
	put := func(device string, generation int64, value string) {
		d := bundle.Desired{Device: device, Pods: []bundle.Pod{{Metadata: metav1.ObjectMeta{Name: "p", Namespace: "n", UID: "u"}}}, Secrets: bundle.Secrets{
			"u": {Secrets: []bundle.Secret{{Name: "s", Data: map[string][]byte{"k": []byte(value)}}}},
		}}
		b, err := d.Mint(generation, &public)
		require.NoError(t, err)
		data, err := b.Encode()
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(source, data, 0o600))
	}
	secret := func(s *State) string { return string(s.Secrets["u"].Secrets[0].Data["k"]) }

	i := New("dev", key, source, dir)
	s, changed, err := i.Read()
	require.NoError(t, err)
	assert.False(t, changed)
	assert.Nil(t, s, "nothing arrived yet")

	put("dev", 5, "five")
	s, changed, err = i.Read()
	require.NoError(t, err)
	assert.True(t, changed)
	assert.Equal(t, "five", secret(s))
	_, changed, err = i.Read()
	require.NoError(t, err)
	assert.False(t, changed)

	put("dev", 4, "old")
	s, changed, err = i.Read()
	require.NoError(t, err)
	assert.False(t, changed, "the highest generation wins")
	assert.Equal(t, "five", secret(s))

	put("other", 6, "foreign")
	s, _, err = i.Read()
	require.ErrorIs(t, err, bundle.ErrForeignDevice)
	assert.Equal(t, "five", secret(s))

	require.NoError(t, os.WriteFile(source, make([]byte, bundle.MaxEncodedSize+100), 0o600))
	_, _, err = i.Read()
	require.ErrorIs(t, err, bundle.ErrTooLarge)

	// After a restart the last good bundle is there, secrets too, and still wins.
	i = New("dev", key, source, dir)
	s, err = i.Restore()
	require.NoError(t, err)
	assert.Equal(t, "five", secret(s))
	good, err := os.ReadFile(filepath.Join(dir, "good"))
	require.NoError(t, err)
	assert.NotContains(t, string(good), "five")
	put("dev", 5, "replayed")
	_, changed, err = i.Read()
	require.NoError(t, err)
	assert.False(t, changed)
}

func TestGenerationZeroAsksForNothing(t *testing.T) {
	dir := t.TempDir()
	key, err := LoadKey(dir)
	require.NoError(t, err)
	b, err := (&bundle.Desired{Device: "dev"}).Mint(0, nil)
	require.NoError(t, err)
	data, err := b.Encode()
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "desired"), data, 0o600))
	s, changed, err := New("dev", key, filepath.Join(dir, "desired"), dir).Read()
	require.NoError(t, err)
	assert.False(t, changed)
	assert.Nil(t, s)
}
