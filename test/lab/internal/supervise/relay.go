package supervise

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
)

// relay passes connections of listeners on to an address of the lab's network.
type relay struct {
	target string
	log    *slog.Logger
	conns  sync.WaitGroup
}

// serve accepts until ctx ends, and returns when all connections are closed.
func (r *relay) serve(ctx context.Context, listener net.Listener) {
	stop := context.AfterFunc(ctx, func() { listener.Close() })
	defer stop()
	defer r.conns.Wait()
	for {
		conn, err := listener.Accept()
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
				r.log.Error("relay ended", "target", r.target, "error", err)
			}
			return
		}
		r.conns.Go(func() { r.pass(ctx, conn) })
	}
}

// pass copies both ways until both sides have ended.
func (r *relay) pass(ctx context.Context, outside net.Conn) {
	defer outside.Close()
	inside, err := (&net.Dialer{}).DialContext(ctx, "tcp", r.target)
	if err != nil {
		return // what is not there refuses the connection, and so do we
	}
	defer inside.Close()
	stop := context.AfterFunc(ctx, func() { outside.Close(); inside.Close() })
	defer stop()
	var both sync.WaitGroup
	both.Go(func() { oneWay(inside, outside) })
	both.Go(func() { oneWay(outside, inside) })
	both.Wait()
}

// oneWay copies and passes the end on, so that half-closed connections stay so.
func oneWay(to, from net.Conn) {
	_, err := io.Copy(to, from)
	if half, ok := to.(interface{ CloseWrite() error }); ok && err == nil {
		if half.CloseWrite() == nil {
			return
		}
	}
	to.Close()
	from.Close()
}
