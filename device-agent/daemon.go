package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	corev1 "k8s.io/api/core/v1"

	"github.com/jetbridge/jetbridge/device-agent/apply"
	"github.com/jetbridge/jetbridge/device-agent/config"
	"github.com/jetbridge/jetbridge/device-agent/host"
	"github.com/jetbridge/jetbridge/device-agent/intake"
	"github.com/jetbridge/jetbridge/device-agent/journal"
	"github.com/jetbridge/jetbridge/device-agent/podenv"
	"github.com/jetbridge/jetbridge/device-agent/podman"
	agentreport "github.com/jetbridge/jetbridge/device-agent/report"
	"github.com/jetbridge/jetbridge/device-agent/systemd"
	"github.com/jetbridge/jetbridge/device-agent/unit"
	"github.com/jetbridge/jetbridge/shared/report"
	"github.com/jetbridge/jetbridge/shared/wellknown"
)

// parts are what both run and boot need.
type parts struct {
	device  string
	intake  *intake.Intake
	engine  *apply.Engine
	store   *journal.Store
	systemd *systemd.Conn
	podman  *podman.Client
	base    report.Report
	changed func() // what the engine calls; set before the engine runs
}

func assemble(ctx context.Context, cfg *config.Config, log *slog.Logger) (*parts, error) {
	p := &parts{device: cfg.DeviceName, changed: func() {}}
	var err error
	if p.device == "" {
		if p.device, err = host.DeviceName(host.Certificate(cfg.FlightctlDataDir)); err != nil {
			return nil, err
		}
	}
	if p.store, err = journal.Open(cfg.StateDir, cfg.RunDir); err != nil {
		return nil, err
	}
	key, err := intake.LoadKey(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	public, err := key.Public()
	if err != nil {
		return nil, err
	}
	bootID, err := host.BootID()
	if err != nil {
		return nil, err
	}
	capacity, err := host.Capacity(cfg.StateDir, cfg.MaxPods)
	if err != nil {
		return nil, err
	}
	allocatable := reserve(capacity, cfg)
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("cannot find this program: %w", err)
	}
	if p.systemd, err = systemd.Connect(ctx); err != nil {
		return nil, err
	}
	p.podman = podman.New(cfg.PodmanSocket)
	p.intake = intake.New(p.device, key, cfg.BundlePath, cfg.StateDir)
	p.engine = apply.New(apply.Options{
		Store: p.store, Systemd: p.systemd, Podman: p.podman, Log: log, Now: time.Now, Agent: self, PodmanPath: cfg.PodmanPath,
		HelperFlags: helperFlags(cfg), RuntimeUnits: cfg.UnitsDir, Changed: func() { p.changed() },
		HostIP: host.IP, Facts: podenv.Facts{Allocatable: allocatable, KubernetesHost: cfg.KubernetesHost, KubernetesPort: cfg.KubernetesPort},
	})
	p.base = report.Report{
		FormatVersion: report.FormatVersion, Device: p.device, BootID: bootID, AgentVersion: buildVersion(),
		KeyID: public.ID(), PublicKey: public.Bytes(), Capacity: allocatable,
	}
	return p, nil
}

// helperFlags are what differs from the helpers' defaults.
func helperFlags(cfg *config.Config) []string {
	var flags []string
	for _, f := range [][3]string{
		{"--state-dir=", cfg.StateDir, wellknown.StateDir}, {"--run-dir=", cfg.RunDir, wellknown.RunDir}, {"--podman-path=", cfg.PodmanPath, defaultPodman},
	} {
		if f[1] != f[2] {
			flags = append(flags, f[0]+f[1])
		}
	}
	return flags
}

// reserve is what is left for pods.
func reserve(capacity corev1.ResourceList, cfg *config.Config) corev1.ResourceList {
	out := capacity.DeepCopy()
	cpu, memory := out[corev1.ResourceCPU], out[corev1.ResourceMemory]
	cpu.Sub(cfg.ReserveCPU)
	memory.Sub(cfg.ReserveMemory)
	if cpu.Sign() < 0 {
		cpu.Set(0)
	}
	if memory.Sign() < 0 {
		memory.Set(0)
	}
	out[corev1.ResourceCPU], out[corev1.ResourceMemory] = cpu, memory
	return out
}

// boot starts all pods again, offline: a oneshot before the agent runs it.
func boot(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
	if _, err := os.Stat(filepath.Join(cfg.StateDir, "pods")); errors.Is(err, fs.ErrNotExist) {
		return nil // nothing ever ran here, perhaps not even enrolled
	}
	p, err := assemble(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer p.systemd.Close()
	state, restoreErr := p.intake.Restore()
	return errors.Join(restoreErr, p.engine.Restore(ctx, (*apply.State)(state)))
}

// run is the daemon.
func run(ctx context.Context, cfg *config.Config, log *slog.Logger) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p, err := assembleWhenEnrolled(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer p.systemd.Close()
	podmanVersion, err := p.podman.Version(ctx)
	if err != nil {
		return err
	}
	if p.base.System, err = host.System(p.base.BootID, "podman://"+podmanVersion); err != nil {
		return err
	}
	systemdVersion, err := p.systemd.Version()
	if err != nil {
		return err
	}
	log.Info("device", "name", p.device, "podman", podmanVersion, "systemd", systemdVersion, "key", p.base.KeyID)
	state, err := p.intake.Restore()
	if err != nil {
		log.Error("the last good bundle is lost; waiting for the next one", "error", err)
	}
	if err := p.store.Sweep(); err != nil {
		return err
	}
	writer := agentreport.New(agentreport.Options{
		Store: p.store, Path: filepath.Join(cfg.RunDir, "report"), Base: p.base, Pods: p.engine.Observe, Applied: p.engine.Applied,
		Flightctl: p.systemd, Unit: cfg.FlightctlUnit, ReloadInterval: cfg.ReloadInterval, Interval: cfg.ResyncInterval, Log: log, Now: time.Now,
	})
	p.changed = writer.Changed
	if err := journal.WriteFile(filepath.Join(cfg.RunDir, deviceNameFile), []byte(p.device+"\n"), 0o644); err != nil {
		return err
	}
	if state != nil {
		writer.Bundle(state.Bundle.Generation, nil)
		p.engine.Set((*apply.State)(state))
	}
	if err := p.engine.Restore(ctx, (*apply.State)(state)); err != nil {
		log.Error("cannot restore all pods", "error", err)
	}
	var fatal sync.Once
	var failure error
	var all sync.WaitGroup
	start := func(what string, f func(context.Context) error) {
		all.Go(func() {
			if err := f(ctx); err != nil && ctx.Err() == nil {
				fatal.Do(func() { failure = fmt.Errorf("%s: %w", what, err) })
				cancel(err)
			}
		})
	}
	poke := make(chan struct{}, 1)
	nudged := func() {
		select {
		case poke <- struct{}{}:
		default:
		}
	}
	start("engine", p.engine.Run)
	start("report", writer.Run)
	start("watch bundle", func(ctx context.Context) error {
		return intake.Watch(ctx, cfg.BundlePath, cfg.ResyncInterval, nudged)
	})
	start("watch systemd", func(ctx context.Context) error {
		return p.systemd.Watch(ctx, unit.Prefix+"-", func(string) { writer.Changed() })
	})
	start("control socket", func(ctx context.Context) error {
		return serveSocket(ctx, filepath.Join(cfg.RunDir, "agent.sock"), nudged)
	})
	start("bundles", func(ctx context.Context) error {
		takeIn(ctx, p, writer, poke, cfg.ResyncInterval, log)
		return nil
	})
	if cfg.Listen != "" {
		start("health", func(ctx context.Context) error { return serveHealth(ctx, cfg.Listen, p, writer) })
	}
	nudged()
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		log.Warn("cannot tell systemd", "error", err)
	}
	<-ctx.Done()
	log.Info("stopping; pods run on")
	all.Wait()
	return failure
}

// assembleWhenEnrolled waits until Flightctl's agent has given the device its
// name.
func assembleWhenEnrolled(ctx context.Context, cfg *config.Config, log *slog.Logger) (*parts, error) {
	told := false
	for {
		p, err := assemble(ctx, cfg, log)
		if !errors.Is(err, fs.ErrNotExist) {
			return p, err
		}
		if !told {
			log.Info("waiting for Flightctl's agent to enroll the device", "reason", err)
			if _, err := daemon.SdNotify(false, daemon.SdNotifyReady+"\nSTATUS=Waiting for enrolment"); err != nil {
				log.Warn("cannot tell systemd", "error", err)
			}
			told = true
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(2 * time.Second):
		}
	}
}

// takeIn reads the bundle whenever it may have changed.
func takeIn(ctx context.Context, p *parts, writer *agentreport.Writer, poke <-chan struct{}, resync time.Duration, log *slog.Logger) {
	var failed string
	refreshed := time.Time{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-poke:
		}
		state, changed, err := p.intake.Read()
		switch {
		case err != nil:
			if err.Error() != failed {
				log.Error("bundle not taken in", "error", err)
				failed = err.Error()
			}
			var generation int64
			if state != nil {
				generation = state.Bundle.Generation
			}
			writer.Bundle(generation, &report.Error{Reason: wellknown.ReasonInvalidBundle, Message: report.SanitizeText(err.Error(), 1000)})
		default:
			failed = ""
			if changed {
				log.Info("bundle taken in", "generation", state.Bundle.Generation, "pods", len(state.Bundle.Pods))
				p.engine.Set((*apply.State)(state))
			}
			if state != nil {
				writer.Bundle(state.Bundle.Generation, nil)
			} else {
				writer.Bundle(0, nil)
			}
		}
		if changed || time.Since(refreshed) >= resync/2 {
			refreshed = time.Now()
			if err := p.engine.Refresh(ctx); err != nil {
				log.Error("cannot refresh pods", "error", err)
			}
		}
	}
}

// serveSocket takes nudges, from root only.
func serveSocket(ctx context.Context, path string, nudged func()) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return errors.Join(err, l.Close())
	}
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		nudged() // whatever it says: connecting is the message
		if err := conn.Close(); err != nil && ctx.Err() == nil {
			return err
		}
	}
}

func serveHealth(ctx context.Context, address string, p *parts, writer *agentreport.Writer) error {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "jetbridge_agent_applied_generation", Help: "Generation of the bundle that was carried out."}, func() float64 { return float64(p.engine.Applied()) }))
	mux := http.NewServeMux()
	check := func(ok func() bool) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			if !ok() {
				http.Error(w, "not ok", http.StatusServiceUnavailable)
				return
			}
			fmt.Fprintln(w, "ok")
		}
	}
	mux.HandleFunc("GET /healthz", check(p.systemd.Connected))
	mux.HandleFunc("GET /readyz", check(func() bool { return p.systemd.Connected() && writer.Written() }))
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	s := &http.Server{Addr: address, Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	if err := s.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
