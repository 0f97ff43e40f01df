package bundle

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// FuzzDecode: no bytes make Decode panic, and what it accepts encodes to the
// same document.
func FuzzDecode(f *testing.F) {
	d := Desired{Device: "d"}
	b, err := d.Mint(1, nil)
	require.NoError(f, err)
	packed, err := b.Encode()
	require.NoError(f, err)
	f.Add(packed)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		if b, err := Decode(data, "d"); err == nil {
			checkStable(t, b)
		}
	})
}

// FuzzDocument goes past compression and hash: any JSON becomes a bundle with
// a good hash.
func FuzzDocument(f *testing.F) {
	for _, text := range []string{
		`{}`,
		`{"generation":1,"pods":[{"metadata":{"namespace":"a","name":"b","uid":"c"},"spec":{"containers":[{"name":"d","image":"e","resources":{"limits":{"cpu":"1500m"}}}]},"configMaps":[{"name":"f","data":{"g":"aGk="}}]}]}`,
		`{"pods":[{"metadata":{"deletionTimestamp":"2026-01-02T03:04:05Z","deletionGracePeriodSeconds":0},"spec":{"volumes":[{"name":"a","hostPath":{"path":"/\u0000\ud800"}}]}}]}`,
		`{"sealed":"AAAA","keyID":"x","pods":null}`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var b Bundle
		if json.Unmarshal(text, &b) != nil {
			return
		}
		b.FormatVersion, b.Device = FormatVersion, "d"
		hash, err := b.hash()
		if err != nil {
			return
		}
		b.ContentHash = hash
		packed, err := b.Encode()
		if err != nil {
			return
		}
		if out, err := Decode(packed, "d"); err == nil {
			checkStable(t, out)
		}
	})
}

func checkStable(t *testing.T, b *Bundle) {
	t.Helper()
	packed, err := b.Encode()
	require.NoError(t, err)
	again, err := Decode(packed, b.Device)
	require.NoError(t, err)
	assert.Equal(t, b.ContentHash, again.ContentHash)
	repacked, err := again.Encode()
	require.NoError(t, err)
	assert.Equal(t, packed, repacked)
}
