//go:build lab

package device

import (
	"bytes"
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// dialRead connects and returns what the other side says until it closes.
func dialRead(ctx context.Context, address string) (string, error) {
	dialer := net.Dialer{Timeout: time.Second}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return "", err
	}
	buf := make([]byte, 64)
	n, err := conn.Read(buf)
	return string(buf[:n]), err
}

// serveAndFetch serves content in the lab's namespace, and returns what a
// container on the device fetched of it.
func serveAndFetch(t *testing.T, d *Device, content string) string {
	t.Helper()
	listener, err := net.Listen("tcp", testGateway+":0")
	require.NoError(t, err)
	var wg sync.WaitGroup
	var serveErr error
	wg.Go(func() {
		conn, err := listener.Accept()
		if err != nil {
			serveErr = err
			return
		}
		_, serveErr = io.WriteString(conn, content)
		conn.Close()
	})
	_, port, err := net.SplitHostPort(listener.Addr().String())
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var out, errOut bytes.Buffer
	code, err := d.Exec(ctx, ExecOptions{
		Args: []string{"podman", "run", "--rm", "localhost/busybox", "nc", testGateway, port}, Stdout: &out, Stderr: &errOut,
	})
	require.NoError(t, err)
	require.Zero(t, code, errOut.String())
	require.NoError(t, listener.Close())
	wg.Wait()
	require.NoError(t, serveErr)
	return out.String()
}
