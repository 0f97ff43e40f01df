// Package supervise runs everything that a lab consists of: the control plane,
// Flight Control, their databases, the registry, the shim and the devices.
//
// It is the only child of the first process of the lab's namespaces (package
// nsinit) and is told what to do over the sockets of package control. The host
// reaches the lab through its relays: listeners that were opened in the host's
// network and inherited, whose connections go on inside the lab's.
package supervise

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/jetbridge/jetbridge/test/lab/internal/control"
	"github.com/jetbridge/jetbridge/test/lab/internal/kube"
	"github.com/jetbridge/jetbridge/test/lab/internal/layout"
	"github.com/jetbridge/jetbridge/test/lab/internal/nsinit"
)

// Supervisor holds the lab's parts.
type Supervisor struct {
	log        *slog.Logger
	config     layout.Config
	base       context.Context // the supervisor's life
	order      []string        // components, as they are shown
	components map[string]*component
	tokens     *tokens
	devices    *devices
}

// Run is the body of the hidden subcommand supervise. dir is the lab's folder.
func Run(ctx context.Context, dir string) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, os.Interrupt)
	defer stop()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	c, err := layout.Lab{Name: filepath.Base(dir), Dir: dir}.Load()
	if err != nil {
		return err
	}
	client, err := kube.NewClient("https://127.0.0.1:6443", c.Lab().PKI())
	if err != nil {
		return err
	}
	all, err := specs(c, client)
	if err != nil {
		return err
	}
	s := &Supervisor{log: log, config: c, base: ctx, components: map[string]*component{}}
	for _, spec := range all {
		s.order = append(s.order, spec.Name)
		s.components[spec.Name] = newComponent(spec, c.Lab().Log(spec.Name), log)
	}
	s.tokens = &tokens{client: client, lab: c.Lab(), log: log}
	if s.devices, err = newDevices(c, log); err != nil {
		return err
	}
	var running sync.WaitGroup
	defer running.Wait()
	defer s.end()
	running.Go(func() { s.tokens.keep(ctx) })
	if err := s.relays(ctx, &running); err != nil {
		return err
	}
	execListener, err := net.ListenUnix("unix", &net.UnixAddr{Name: c.Lab().ExecSocket()})
	if err != nil {
		return fmt.Errorf("cannot listen for commands: %w", err)
	}
	running.Go(func() { s.serveExec(ctx, execListener) })
	listener, err := (&net.ListenConfig{}).Listen(ctx, "unix", c.Lab().Socket())
	if err != nil {
		return fmt.Errorf("cannot listen for control: %w", err)
	}
	server := &http.Server{Handler: s.handler(), ReadHeaderTimeout: 10 * time.Second}
	running.Go(func() {
		<-ctx.Done()
		server.Close()
	})
	log.Info("supervisor ready", "lab", c.Name)
	if err := server.Serve(listener); err != nil && !errors.Is(err, http.ErrServerClosed) {
		stop()
		return fmt.Errorf("cannot serve control: %w", err)
	}
	return nil
}

// end stops what runs, all at once.
func (s *Supervisor) end() {
	var all sync.WaitGroup
	for _, c := range s.components {
		all.Go(func() { c.stop(true) })
	}
	all.Go(s.devices.end)
	all.Wait()
}

// relays serves the inherited listeners, and the same ports inside the lab, so
// that what the host's tools are configured with is also true in here.
func (s *Supervisor) relays(ctx context.Context, running *sync.WaitGroup) error {
	for i, r := range layout.Relays() {
		file := os.NewFile(uintptr(nsinit.SupervisorListenerFD+i), r.Name)
		outside, err := net.FileListener(file)
		if err != nil {
			return fmt.Errorf("cannot take over listener of %s: %w", r.Name, err)
		}
		if err := file.Close(); err != nil {
			return fmt.Errorf("cannot take over listener of %s: %w", r.Name, err)
		}
		inside, err := (&net.ListenConfig{}).Listen(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(s.config.Ports[r.Name])))
		if err != nil {
			return fmt.Errorf("cannot listen for %s inside the lab: %w", r.Name, err)
		}
		for _, listener := range []net.Listener{outside, inside} {
			running.Go(func() { (&relay{target: r.Target, log: s.log}).serve(ctx, listener) })
		}
	}
	return nil
}

// handler answers the control socket.
func (s *Supervisor) handler() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, f func(r *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			answer, err := f(r)
			w.Header().Set("Content-Type", "application/json")
			if err != nil {
				s.log.Error("request failed", "method", r.Method, "path", r.URL.Path, "error", err)
				w.WriteHeader(http.StatusUnprocessableEntity)
				answer = control.Problem{Error: err.Error()}
			}
			if err := json.NewEncoder(w).Encode(answer); err != nil {
				s.log.Error("cannot answer", "path", r.URL.Path, "error", err)
			}
		})
	}
	handle("GET /v1/status", func(*http.Request) (any, error) { return s.status(), nil })
	handle("POST /v1/components/{name}/{action}", func(r *http.Request) (any, error) {
		return nil, s.component(r.Context(), r.PathValue("name"), r.PathValue("action"))
	})
	handle("POST /v1/tokens", func(r *http.Request) (any, error) { return nil, s.tokens.renew(r.Context()) })
	handle("POST /v1/devices", func(r *http.Request) (any, error) {
		var d control.AddDevice
		if err := decode(r.Body, &d); err != nil {
			return nil, err
		}
		return s.devices.add(r.Context(), d)
	})
	handle("DELETE /v1/devices/{name}", func(r *http.Request) (any, error) {
		return nil, s.devices.remove(r.Context(), r.PathValue("name"))
	})
	handle("POST /v1/devices/{name}/power/{action}", func(r *http.Request) (any, error) {
		return nil, s.devices.power(r.Context(), r.PathValue("name"), r.PathValue("action"))
	})
	handle("POST /v1/devices/{name}/net", func(r *http.Request) (any, error) {
		var n control.Net
		if err := decode(r.Body, &n); err != nil {
			return nil, err
		}
		return nil, s.devices.net(r.Context(), r.PathValue("name"), n)
	})
	return mux
}

func decode(r io.Reader, v any) error {
	d := json.NewDecoder(r)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("cannot read request: %w", err)
	}
	return nil
}

func (s *Supervisor) status() control.Status {
	var all control.Status
	for _, name := range s.order {
		all.Components = append(all.Components, s.components[name].get())
	}
	all.Devices = s.devices.list()
	return all
}

func (s *Supervisor) component(ctx context.Context, name, action string) error {
	c := s.components[name]
	if c == nil {
		return fmt.Errorf("no component %q; there are %v", name, s.order)
	}
	switch action {
	case "start":
		return c.start(ctx, s.base)
	case "stop":
		c.stop(false)
	case "kill":
		c.stop(true)
	case "restart":
		c.stop(false)
		return c.start(ctx, s.base)
	default:
		return fmt.Errorf("no action %q for a component", action)
	}
	return nil
}

// serveExec runs commands on devices with their callers' own files.
func (s *Supervisor) serveExec(ctx context.Context, listener *net.UnixListener) {
	stop := context.AfterFunc(ctx, func() { listener.Close() })
	defer stop()
	var running sync.WaitGroup
	defer running.Wait()
	for {
		conn, err := listener.AcceptUnix()
		if err != nil {
			if ctx.Err() == nil {
				s.log.Error("cannot accept commands", "error", err)
			}
			return
		}
		running.Go(func() {
			defer conn.Close()
			if err := s.exec(ctx, conn); err != nil {
				s.log.Error("cannot run a command for a caller", "error", err)
			}
		})
	}
}

func (s *Supervisor) exec(ctx context.Context, conn *net.UnixConn) error {
	request, files, err := control.ReceiveExec(conn)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		// The caller sends nothing more: this read ends when the caller does.
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			cancel()
		}
	}()
	code, err := s.devices.exec(ctx, request, files[0], files[1], files[2])
	for _, f := range files {
		f.Close()
	}
	answer := control.ExecAnswer{Code: code}
	if err != nil {
		answer.Error = err.Error()
	}
	writeErr := control.WriteMessage(conn, answer)
	conn.Close()
	<-gone
	if writeErr != nil && ctx.Err() == nil {
		return fmt.Errorf("cannot answer: %w", writeErr)
	}
	return nil
}
