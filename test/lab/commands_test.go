package main

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/jetbridge/jetbridge/test/lab/internal/control"
)

func TestParseNet(t *testing.T) {
	yes, no, loss, zero := true, false, 20.0, 0.0
	delay, none := 200*time.Millisecond, time.Duration(0)
	for _, test := range []struct {
		args []string
		want control.Net
	}{
		{[]string{"down"}, control.Net{Up: &no}},
		{[]string{"up"}, control.Net{Up: &yes, Loss: &zero, Delay: &none}},
		{[]string{"loss", "20%"}, control.Net{Loss: &loss}},
		{[]string{"loss", "20"}, control.Net{Loss: &loss}},
		{[]string{"delay", "200ms"}, control.Net{Delay: &delay}},
	} {
		got, err := parseNet(test.args)
		require.NoError(t, err, test.args)
		assert.Equal(t, test.want, got, test.args)
	}
	for _, args := range [][]string{{"sideways"}, {"loss"}, {"loss", "101%"}, {"loss", "NaN"}, {"delay", "-1s"}, {"delay", "5"}, {"up", "now"}} {
		_, err := parseNet(args)
		require.Error(t, err, args)
	}
}

func TestParseExec(t *testing.T) {
	got, err := parseExec([]string{"edge-1", "--", "ls", "--", "-l"})
	require.NoError(t, err)
	assert.Equal(t, control.ExecRequest{Device: "edge-1", Args: []string{"ls", "--", "-l"}}, got)
	_, err = parseExec([]string{"edge-1", "--"})
	require.Error(t, err)
}
