package main

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestQuoted(t *testing.T) {
	assert.Equal(t, `kubectl get pods -l app=web`, quoted("kubectl", []string{"get", "pods", "-l", "app=web"}))
	assert.Equal(t, `sh -c 'echo '\''a b'\'' "$X"' ''`, quoted("sh", []string{"-c", `echo 'a b' "$X"`, ""}))
}

func TestRequestsByHost(t *testing.T) {
	got, err := requestsByHost(`{"items":[
		{"metadata":{"name":"aaa"},"spec":{"deviceStatus":{"systemInfo":{"hostname":"edge-1"}}}},
		{"metadata":{"name":"bbb"},"spec":{"deviceStatus":{"systemInfo":{"cpuCores":"2"}}}}]}`)
	require.NoError(t, err)
	assert.Equal(t, map[string]string{"edge-1": "aaa"}, got)

	_, err = requestsByHost("Error: unauthorized")
	assert.ErrorContains(t, err, "cannot read enrollment requests")
}

func TestLastIndex(t *testing.T) {
	lines := []string{"a", "b", "a", "c"}
	assert.Equal(t, 2, lastIndex(lines, func(l string) bool { return l == "a" }))
	assert.Equal(t, -1, lastIndex(lines, func(l string) bool { return l == "x" }))
}

func TestField(t *testing.T) {
	assert.Equal(t, "v1.37.2", field("Client Version: v1\nServer Version: v1.37.2\n", "Server Version:"))
	assert.Equal(t, "unknown", field("", "Server Version:"))
}
