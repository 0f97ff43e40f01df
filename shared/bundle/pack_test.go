package bundle_test

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/require"
)

// pack compresses any value as JSON, whether it is a bundle or not.
func pack(t *testing.T, v any) []byte {
	t.Helper()
	text, err := json.Marshal(v)
	require.NoError(t, err)
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, err = w.Write(text)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return base64.StdEncoding.AppendEncode(nil, out.Bytes())
}
