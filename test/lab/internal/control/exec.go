package control

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/jetbridge/jetbridge/test/lab/internal/layout"
)

// ExecRequest is a command to run on a device.
type ExecRequest struct {
	Device string   `json:"device"`
	Args   []string `json:"args"`
}

// ExecAnswer says how the command ended.
type ExecAnswer struct {
	Code  int    `json:"code"`
	Error string `json:"error,omitempty"`
}

// maxMessage bounds what either side sends: arguments may be long.
const maxMessage = 4 << 20

// Exec runs a command on a device with these very files as its standard
// streams, and returns its exit code. When ctx ends, the command is killed.
func Exec(ctx context.Context, lab layout.Lab, r ExecRequest, stdin, stdout, stderr *os.File) (int, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", lab.ExecSocket())
	if err != nil {
		return 0, fmt.Errorf("cannot reach lab %s (is it up?): %w", lab.Name, err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("cannot hand files over a %T", conn)
	}
	rights := unix.UnixRights(int(stdin.Fd()), int(stdout.Fd()), int(stderr.Fd()))
	if _, _, err := unixConn.WriteMsgUnix([]byte{0}, rights, nil); err != nil {
		return 0, fmt.Errorf("cannot hand files to the lab: %w", err)
	}
	if err := WriteMessage(conn, r); err != nil {
		return 0, fmt.Errorf("cannot send command: %w", err)
	}
	var answer ExecAnswer
	if err := ReadMessage(conn, &answer); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return 0, fmt.Errorf("cannot learn how the command ended: %w", err)
	}
	if answer.Error != "" {
		return 0, errors.New(answer.Error)
	}
	return answer.Code, nil
}

// ReceiveExec takes the files and the command of Exec. The caller closes the files.
func ReceiveExec(conn *net.UnixConn) (_ ExecRequest, files []*os.File, err error) {
	var r ExecRequest
	defer func() {
		if err != nil {
			for _, f := range files {
				f.Close()
			}
		}
	}()
	oob := make([]byte, unix.CmsgSpace(3*4))
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return r, nil, fmt.Errorf("cannot receive files: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return r, nil, fmt.Errorf("cannot receive files: %w", err)
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return r, files, fmt.Errorf("cannot receive files: %w", err)
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "stream"))
		}
	}
	if len(files) != 3 {
		return r, files, fmt.Errorf("cannot run a command with %d files", len(files))
	}
	return r, files, ReadMessage(conn, &r)
}

// WriteMessage sends one value.
func WriteMessage(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > maxMessage {
		return fmt.Errorf("the message has %d bytes, more than %d", len(b), maxMessage)
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...))
	return err
}

// ReadMessage receives one value.
func ReadMessage(r io.Reader, v any) error {
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(size[:])
	if n > maxMessage {
		return fmt.Errorf("the message has %d bytes, more than %d", n, maxMessage)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}
