package main

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestSteps(t *testing.T) {
	file := filepath.Join(t.TempDir(), "a", "b")
	t.Setenv("TESTER_TEST", "value")
	for _, test := range []struct {
		name string
		args []string
		code int
		out  string
	}{
		{"print", []string{"print", "hello"}, 0, "hello\n"},
		{"order and exit", []string{"print", "a", "print", "b", "exit", "7", "print", "c"}, 7, "a\nb\n"},
		{"env", []string{"env", "TESTER_TEST"}, 0, "TESTER_TEST=value\n"},
		{"write, append, cat", []string{"write", file, "x", "append", file, "y", "cat", file}, 0, "xy\n"},
		{"lines", []string{"lines", "2", "1ms"}, 0, "line 1\nline 2\n"},
		{"eat", []string{"eat", "64Ki", "sleep", "1ms"}, 0, "ate 64Ki\n"},
		{"missing file", []string{"cat", file + "-missing"}, 1, ""},
		{"unknown step", []string{"jump"}, 2, ""},
		{"missing argument", []string{"write", "x"}, 2, ""},
		{"bad code", []string{"exit", "256"}, 2, ""},
		{"bad size", []string{"eat", "1Ti"}, 2, ""},
		{"bad duration", []string{"sleep", "1"}, 2, ""},
		{"nothing", nil, 2, ""},
		{"trap takes its signals only", []string{"trap", "USR1", "print", "x"}, 0, "x\n"},
		{"trap all", []string{"trap", "--", "print", "x"}, 0, "x\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var out bytes.Buffer
			code := (&tester{out: &out}).run(t.Context(), test.args)
			assert.Equal(t, test.code, code)
			assert.Equal(t, test.out, out.String())
		})
	}
}

func TestHandler(t *testing.T) {
	for path, status := range map[string]int{"/": 200, "/status/503": 503, "/status/x": 400, "/status/99": 400} {
		w := httptest.NewRecorder()
		handler("hello").ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		assert.Equal(t, status, w.Code, path)
		assert.Equal(t, "hello\n", w.Body.String(), path)
	}
}

func TestParseSize(t *testing.T) {
	for text, size := range map[string]uint64{"0": 0, "1000": 1000, "64Mi": 64 << 20, "1Gi": 1 << 30} {
		got, err := parseSize(text)
		require.NoError(t, err, text)
		assert.Equal(t, size, got, text)
	}
	for _, text := range []string{"", "-1", "1.5Gi", "9999Gi", "x"} {
		_, err := parseSize(text)
		require.ErrorIs(t, err, errUsage, text)
	}
}
