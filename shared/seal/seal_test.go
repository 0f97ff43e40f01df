package seal_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/jetbridge/jetbridge/shared/seal"
)

func newKey(t *testing.T) (seal.PrivateKey, seal.PublicKey) {
	t.Helper()
	private, err := seal.NewPrivateKey()
	require.NoError(t, err)
	public, err := private.Public()
	require.NoError(t, err)
	return private, public
}

func TestSealAndOpen(t *testing.T) {
	private, public := newKey(t)
	binding := seal.Binding{Device: "d", KeyID: public.ID(), Generation: 7}
	sealed, err := public.Seal(binding, []byte("secret"))
	require.NoError(t, err)
	assert.NotContains(t, string(sealed), "secret")

	plain, err := private.Open(binding, sealed)
	require.NoError(t, err)
	assert.Equal(t, "secret", string(plain))

	again, err := public.Seal(binding, []byte("secret"))
	require.NoError(t, err)
	assert.NotEqual(t, sealed, again, "sealing is randomized")
}

func TestOpen_refuses(t *testing.T) {
	private, public := newKey(t)
	stranger, _ := newKey(t)
	binding := seal.Binding{Device: "d", KeyID: public.ID(), Generation: 7}
	sealed, err := public.Seal(binding, []byte("secret"))
	require.NoError(t, err)

	for name, open := range map[string]func() ([]byte, error){
		"other key": func() ([]byte, error) { return stranger.Open(binding, sealed) },
		"other device": func() ([]byte, error) {
			return private.Open(seal.Binding{Device: "e", KeyID: public.ID(), Generation: 7}, sealed)
		},
		"other key ID": func() ([]byte, error) {
			return private.Open(seal.Binding{Device: "d", KeyID: "x", Generation: 7}, sealed)
		},
		"other generation": func() ([]byte, error) {
			return private.Open(seal.Binding{Device: "d", KeyID: public.ID(), Generation: 8}, sealed)
		},
		"nothing": func() ([]byte, error) { return private.Open(binding, nil) },
	} {
		_, err := open()
		require.ErrorIs(t, err, seal.ErrOpen, name)
	}
	for n := range sealed {
		_, err := private.Open(binding, sealed[:n])
		require.ErrorIs(t, err, seal.ErrOpen, "cut to %d bytes", n)
		changed := append([]byte(nil), sealed...)
		changed[n] ^= 1
		_, err = private.Open(binding, changed)
		require.ErrorIs(t, err, seal.ErrOpen, "byte %d changed", n)
	}
}

// TestBinding_isUnambiguous: no two bindings have the same encoding.
func TestBinding_isUnambiguous(t *testing.T) {
	private, public := newKey(t)
	sealed, err := public.Seal(seal.Binding{Device: "a", KeyID: "b\x001", Generation: 2}, nil)
	require.NoError(t, err)
	_, err = private.Open(seal.Binding{Device: "a\x00b", KeyID: "1", Generation: 2}, sealed)
	require.ErrorIs(t, err, seal.ErrOpen)
}

func TestKeys_roundTrip(t *testing.T) {
	private, public := newKey(t)
	private2, err := seal.ParsePrivateKey(private.Bytes())
	require.NoError(t, err)
	public2, err := seal.ParsePublicKey(public.Bytes())
	require.NoError(t, err)
	assert.Len(t, public.Bytes(), seal.PublicKeySize)
	assert.Equal(t, public.ID(), public2.ID())
	assert.Len(t, public.ID(), 16)

	binding := seal.Binding{Device: "d"}
	sealed, err := public2.Seal(binding, []byte("x"))
	require.NoError(t, err)
	plain, err := private2.Open(binding, sealed)
	require.NoError(t, err)
	assert.Equal(t, "x", string(plain))

	_, err = seal.ParsePublicKey(make([]byte, 31))
	require.Error(t, err)
	_, err = seal.ParsePrivateKey(nil)
	require.Error(t, err)
}

// TestSeal_lowOrderKey: a key that would make every shared secret the same is
// refused, and never used.
func TestSeal_lowOrderKey(t *testing.T) {
	zero, err := seal.ParsePublicKey(make([]byte, seal.PublicKeySize))
	if err == nil {
		_, err = zero.Seal(seal.Binding{}, []byte("secret"))
	}
	require.Error(t, err)
}
