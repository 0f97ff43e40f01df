package flightapi_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/flightctl/flightctl/api/core/v1beta1"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/jetbridge/jetbridge/cluster-shim/flightapi"
)

func client(t *testing.T, h http.HandlerFunc) *flightapi.Client {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	token := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(token, []byte("secret\n"), 0o600))
	c, err := flightapi.New(flightapi.Options{URL: s.URL, TokenFile: token, Organization: "org"})
	require.NoError(t, err)
	t.Cleanup(c.Close)
	return c
}

func TestDevicesArePaged(t *testing.T) {
	c := client(t, func(w http.ResponseWriter, r *http.Request) {
		assert.Equal(t, "Bearer secret", r.Header.Get("Authorization"))
		assert.Equal(t, "org", r.URL.Query().Get("org_id"))
		assert.Equal(t, "site=x", r.URL.Query().Get("labelSelector"))
		if r.URL.Query().Get("continue") == "" {
			fmt.Fprint(w, `{"items":[{"metadata":{"name":"a","owner":"Fleet/f","labels":{"k":"v"}}}],"metadata":{"continue":"next"}}`)
			return
		}
		fmt.Fprint(w, `{"items":[{"metadata":{"name":"b"},"status":{"summary":{"status":"Online"},"systemInfo":{"customInfo":{"jetbridge":"r"}}}}],"metadata":{}}`)
	})
	got, err := c.Devices(t.Context(), "site=x")
	require.NoError(t, err)
	assert.Equal(t, []flightapi.Device{
		{Name: "a", Fleet: "f", Labels: map[string]string{"k": "v"}},
		{Name: "b", Summary: "Online", CustomInfo: map[string]string{"jetbridge": "r"}},
	}, got)
}

const standalone = `{"apiVersion":"flightctl.io/v1beta1","kind":"Device",
"metadata":{"name":"d","resourceVersion":"9","generation":12345678901234567},
"spec":{"config":[{"name":"other","inline":[{"path":"/etc/motd","content":"hi","mode":420}]}],"future":{"x":1}},
"status":{"summary":{"status":"Online"}}}`

func TestSetDeviceFileLeavesTheRestAlone(t *testing.T) {
	doc := standalone
	puts := 0
	c := client(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			body, err := io.ReadAll(r.Body)
			assert.NoError(t, err)
			if puts++; puts == 1 {
				w.WriteHeader(http.StatusConflict) // somebody was faster
				return
			}
			doc = string(body)
		}
		fmt.Fprint(w, doc)
	})
	file := flightapi.File{Path: "/var/lib/x", Content: "text/+==", Mode: 0o600}
	changed, err := c.SetDeviceFile(t.Context(), "d", "jetbridge", file)
	require.NoError(t, err)
	assert.True(t, changed)
	assert.JSONEq(t, `{"apiVersion":"flightctl.io/v1beta1","kind":"Device",
"metadata":{"name":"d","resourceVersion":"9","generation":12345678901234567},
"spec":{"config":[{"name":"other","inline":[{"path":"/etc/motd","content":"hi","mode":420}]},
{"name":"jetbridge","inline":[{"path":"/var/lib/x","content":"text/+==","contentEncoding":"plain","mode":384,"user":"root"}]}],"future":{"x":1}}}`, doc)

	changed, err = c.SetDeviceFile(t.Context(), "d", "jetbridge", file)
	require.NoError(t, err)
	assert.False(t, changed, "nothing to do the second time")
	assert.Equal(t, 2, puts)

	// Flightctl's own types and checks accept the document.
	var d v1beta1.Device
	require.NoError(t, json.Unmarshal([]byte(doc), &d))
	assert.Empty(t, d.Validate())
}

func TestSetFleetRef(t *testing.T) {
	doc := `{"apiVersion":"flightctl.io/v1beta1","kind":"Fleet","metadata":{"name":"f"},"spec":{"selector":{"matchLabels":{"a":"b"}},"template":{"spec":{}}}}`
	c := client(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			body, err := io.ReadAll(r.Body)
			assert.NoError(t, err)
			doc = string(body)
		}
		fmt.Fprint(w, doc)
	})
	ref := flightapi.HTTPRef{Repository: "jetbridge", Suffix: `/v1/{{ .metadata.name }}`, FilePath: "/var/lib/x"}
	has, err := c.HasFleetRef(t.Context(), "f", "jetbridge", ref)
	require.NoError(t, err)
	assert.False(t, has)
	changed, err := c.SetFleetRef(t.Context(), "f", "jetbridge", ref)
	require.NoError(t, err)
	assert.True(t, changed)
	has, err = c.HasFleetRef(t.Context(), "f", "jetbridge", ref)
	require.NoError(t, err)
	assert.True(t, has)
	var f v1beta1.Fleet
	require.NoError(t, json.Unmarshal([]byte(doc), &f))
	assert.Empty(t, f.Validate())
}

func TestErrors(t *testing.T) {
	for code, want := range map[int]error{404: flightapi.ErrNotFound, 429: flightapi.ErrRateLimited} {
		c := client(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) })
		_, err := c.Device(t.Context(), "d")
		require.ErrorIs(t, err, want)
	}
	c := client(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			w.WriteHeader(http.StatusConflict)
			fmt.Fprint(w, `{"message":"updating the resource is not allowed because it has an owner"}`)
			return
		}
		fmt.Fprint(w, standalone)
	})
	_, err := c.SetDeviceFile(t.Context(), "d", "jetbridge", flightapi.File{Path: "/x"})
	assert.ErrorIs(t, err, flightapi.ErrOwned)
}

func TestLastSeenGoesByFlightctlsClock(t *testing.T) {
	server := time.Date(2020, 1, 1, 12, 0, 0, 0, time.UTC)
	c := client(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Date", server.Format(http.TimeFormat))
		if r.URL.Path == "/api/v1/devices/never/lastseen" {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		fmt.Fprintf(w, `{"lastSeen":%q}`, server.Add(-time.Minute).Format(time.RFC3339))
	})
	age, ok, err := c.LastSeen(t.Context(), "d")
	require.NoError(t, err)
	assert.True(t, ok)
	assert.Equal(t, time.Minute, age)
	_, ok, err = c.LastSeen(t.Context(), "never")
	require.NoError(t, err)
	assert.False(t, ok)
}
