package device

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// console is the terminal that a device has as /dev/console; what is written
// to it goes to a log.
type console struct {
	path   string // of the device's side, in the caller's mount namespace
	master *os.File
	slave  *os.File // kept open, or the master would fail whenever nobody has the console open
	copied sync.WaitGroup
	err    error // of the log; valid after copied
}

func openConsole(log io.Writer) (*console, error) {
	if log == nil {
		log = io.Discard
	}
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open console: %w", err)
	}
	c := &console{master: os.NewFile(uintptr(fd), "console")}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot unlock console: %w", err), c.master.Close())
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot name console: %w", err), c.master.Close())
	}
	c.path = fmt.Sprintf("/dev/pts/%d", n)
	if c.slave, err = os.OpenFile(c.path, os.O_RDWR|syscall.O_NOCTTY, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot open console: %w", err), c.master.Close())
	}
	if err := raw(int(c.slave.Fd())); err != nil {
		return nil, errors.Join(err, c.master.Close(), c.slave.Close())
	}
	c.copied.Go(func() {
		// The end is EIO when the last of the device has closed the console, or ErrClosed.
		_, err := io.Copy(log, c.master)
		if err != nil && !errors.Is(err, syscall.EIO) && !errors.Is(err, os.ErrClosed) {
			c.err = fmt.Errorf("cannot log console: %w", err)
		}
	})
	return c, nil
}

// raw turns off what a terminal does to the text that passes through it.
func raw(fd int) error {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return fmt.Errorf("cannot read console mode: %w", err)
	}
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, t); err != nil {
		return fmt.Errorf("cannot set console mode: %w", err)
	}
	return nil
}

// close is to be called when the device has ended. It waits for the last output.
func (c *console) close() error {
	err := c.slave.Close()
	c.copied.Wait()
	return errors.Join(err, c.err, c.master.Close())
}
