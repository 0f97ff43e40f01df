package report_test

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/jetbridge/jetbridge/shared/report"
)

// FuzzDecode: no text makes Decode panic, and what it accepts encodes to the
// same report.
func FuzzDecode(f *testing.F) {
	f.Add(encode(f, sample()))
	f.Add("")
	f.Add("AAAA")
	f.Fuzz(func(t *testing.T, text string) {
		if r, err := report.Decode(text, device); err == nil {
			checkStable(t, r)
		}
	})
}

// FuzzDocument goes past compression: any JSON becomes a report of the device.
func FuzzDocument(f *testing.F) {
	text, err := json.Marshal(sample())
	require.NoError(f, err)
	f.Add(text)
	f.Add([]byte(`{"capacity":{"cpu":"1500u","memory":1e3}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		if len(text) > 1<<16 {
			return
		}
		var members map[string]json.RawMessage
		if json.Unmarshal(text, &members) != nil || members == nil {
			return
		}
		members["formatVersion"], members["device"] = json.RawMessage("1"), json.RawMessage(`"`+device+`"`)
		full, err := json.Marshal(members)
		require.NoError(t, err)
		if r, err := report.Decode(pack(t, string(full)), device); err == nil {
			checkStable(t, r)
		}
	})
}

func checkStable(t *testing.T, r *report.Report) {
	t.Helper()
	text := encode(t, r)
	again, err := report.Decode(text, device)
	require.NoError(t, err)
	assert.Equal(t, text, encode(t, again))
}
