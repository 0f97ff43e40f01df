package device

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// impairment is what a forwarder does to the frames of each direction.
type impairment struct {
	loss  float64       // probability that a frame is dropped, 0 to 1
	delay time.Duration // how long each frame is held
}

// forwarder copies Ethernet frames between two interfaces, and loses and delays
// them. It stands in for the kernel's netem, which not every kernel has.
type forwarder struct {
	impairment atomic.Pointer[impairment]
	ends       [2]*os.File
	cancel     context.CancelFunc
	running    sync.WaitGroup

	mu  sync.Mutex // guards err
	err error
}

const (
	// A frame has the kernel's virtio_net_hdr before it, so that checksums
	// that were left to the hardware pass through as such.
	vnetHeader = 10
	maxFrame   = vnetHeader + 18 + 65536
	// queueFrames is how many frames one direction can hold; a delay of 2 s at
	// 25 Mbit/s fits. What comes on top is lost, as in a real queue.
	queueFrames = 4096
)

// startForwarder joins the interfaces with these indexes until stop; the end of
// ctx does not end it.
func startForwarder(ctx context.Context, a, b int, i impairment) (*forwarder, error) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	f := &forwarder{cancel: cancel}
	f.set(i)
	for n, index := range []int{a, b} {
		end, err := packetSocket(index)
		if err != nil {
			cancel()
			if n == 1 {
				err = errors.Join(err, f.ends[0].Close())
			}
			return nil, fmt.Errorf("cannot start forwarder: %w", err)
		}
		f.ends[n] = end
	}
	f.copy(ctx, f.ends[0], f.ends[1])
	f.copy(ctx, f.ends[1], f.ends[0])
	return f, nil
}

func (f *forwarder) set(i impairment) { f.impairment.Store(&i) }

// stop ends the forwarder, and returns the first error that it had met.
func (f *forwarder) stop() error {
	f.cancel()
	err := errors.Join(f.ends[0].Close(), f.ends[1].Close())
	f.running.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	return errors.Join(err, f.err)
}

func (f *forwarder) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.err = fmt.Errorf("cannot forward frames: %w", err)
	}
}

type frame struct {
	due  time.Time
	data []byte
}

// copy starts one direction.
func (f *forwarder) copy(ctx context.Context, from, to *os.File) {
	queue := make(chan frame, queueFrames)
	f.running.Go(func() {
		defer close(queue)
		f.receive(from, queue)
	})
	f.running.Go(func() { f.send(ctx, to, queue) })
}

func (f *forwarder) receive(from *os.File, queue chan<- frame) {
	buf := make([]byte, maxFrame)
	for {
		n, err := from.Read(buf)
		switch {
		case errors.Is(err, os.ErrClosed):
			return
		case errors.Is(err, syscall.ENETDOWN):
			continue // said once when the interface goes down
		case err != nil:
			f.fail(err)
			return
		}
		i := f.impairment.Load()
		if rand.Float64() < i.loss {
			continue
		}
		select {
		case queue <- frame{time.Now().Add(i.delay), append([]byte(nil), buf[:n]...)}:
		default: // the queue is full
		}
	}
}

func (f *forwarder) send(ctx context.Context, to *os.File, queue <-chan frame) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		var next frame
		select {
		case <-ctx.Done():
			return
		case frame, ok := <-queue:
			if !ok {
				return
			}
			next = frame
		}
		if wait := time.Until(next.due); wait > 0 {
			timer.Reset(wait)
			select {
			case <-ctx.Done():
				return
			case <-timer.C:
			}
		}
		_, err := to.Write(next.data)
		switch {
		case err == nil:
		case errors.Is(err, os.ErrClosed):
			return
		case errors.Is(err, syscall.ENETDOWN), errors.Is(err, syscall.ENOBUFS), errors.Is(err, syscall.EMSGSIZE),
			errors.Is(err, syscall.ENXIO), errors.Is(err, syscall.EINVAL):
			// The frame is lost, as on a wire that is unplugged or too slow.
		default:
			f.fail(err)
			return
		}
	}
}

// packetSocket opens a socket for all frames that arrive at an interface.
func packetSocket(index int) (_ *os.File, err error) {
	// No protocol until it is bound, or frames of other interfaces would come in.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open packet socket: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, unix.Close(fd))
		}
	}()
	const buffer = 4 << 20
	for _, option := range []struct{ level, name, value int }{
		{unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1},
		{unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1},
		{unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer},
		{unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, buffer},
	} {
		if err := unix.SetsockoptInt(fd, option.level, option.name, option.value); err != nil {
			return nil, fmt.Errorf("cannot set up packet socket: %w", err)
		}
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL), Ifindex: index}); err != nil {
		return nil, fmt.Errorf("cannot bind packet socket: %w", err)
	}
	return os.NewFile(uintptr(fd), "packet socket"), nil
}

func networkOrder(v uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], v)
	return binary.NativeEndian.Uint16(b[:])
}

func isNoDevice(err error) bool {
	return errors.Is(err, syscall.ENODEV) || errors.Is(err, syscall.ESRCH)
}
