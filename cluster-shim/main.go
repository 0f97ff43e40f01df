// Command jetbridge-shim makes Flight Control's devices nodes of a Kubernetes
// cluster: it keeps a Node for each device and carries the pods that are bound
// to them, and their status, between the two.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/flowcontrol"

	"github.com/jetbridge/jetbridge/cluster-shim/config"
	"github.com/jetbridge/jetbridge/cluster-shim/delivery"
	"github.com/jetbridge/jetbridge/cluster-shim/device"
	"github.com/jetbridge/jetbridge/cluster-shim/flightapi"
	"github.com/jetbridge/jetbridge/cluster-shim/inventory"
	"github.com/jetbridge/jetbridge/cluster-shim/podsync"
	"github.com/jetbridge/jetbridge/cluster-shim/resolve"
	"github.com/jetbridge/jetbridge/cluster-shim/virtualnode"
	"github.com/jetbridge/jetbridge/shared/wellknown"
)

// version is set by the linker: -X main.version=...
var version = ""

const (
	component = "jetbridge-shim"
	// kubernetesVersion is the kubelet that virtual nodes behave like.
	kubernetesVersion = "v1.37.2"
	// requestTimeout ends calls of the API that hang; watches are no such calls.
	requestTimeout  = 15 * time.Second
	shutdownTimeout = 5 * time.Second
	qps             = 100
	burst           = 200
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "jetbridge-shim:", err)
		os.Exit(1) //nolint:gocritic // nothing is left to end
	}
}

func command() *cobra.Command {
	cmd := &cobra.Command{
		Use: component, Short: "Flight Control's devices as nodes of a Kubernetes cluster",
		Args: cobra.NoArgs, SilenceUsage: true, SilenceErrors: true, Version: versionText(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(cmd.Flags())
			if err != nil {
				return err
			}
			log := slog.New(slog.NewJSONHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: c.LogLevel}))
			return run(cmd.Context(), c, log)
		},
	}
	config.AddFlags(cmd.Flags())
	return cmd
}

func versionText() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}

// run wires everything and works until ctx ends.
func run(ctx context.Context, c *config.Config, log *slog.Logger) error {
	log.InfoContext(ctx, "starting", "version", versionText(), "flightctl", c.Flightctl.URL, "selector", c.Selector)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	kube, err := restConfig(c.Kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(limited(kube))
	if err != nil {
		return fmt.Errorf("cannot make a client of the cluster: %w", err)
	}
	quick := limited(kube)
	quick.Timeout = requestTimeout
	nodeClient, err := kubernetes.NewForConfig(quick)
	if err != nil {
		return fmt.Errorf("cannot make a client for nodes: %w", err)
	}
	quick = limited(kube)
	quick.Timeout = requestTimeout
	leases, err := kubernetes.NewForConfig(quick)
	if err != nil {
		return fmt.Errorf("cannot make a client for leases: %w", err)
	}

	metrics := newMetrics()
	flight, err := flightapi.New(flightapi.Options{
		URL: c.Flightctl.URL, CAFile: c.Flightctl.CAFile, TokenFile: c.Flightctl.TokenFile,
		InsecureSkipVerify: c.Flightctl.InsecureSkipVerify, Organization: c.Flightctl.Organization,
		Observe: metrics.request,
	})
	if err != nil {
		return err
	}
	defer flight.Close()

	secrets := nodeClient.CoreV1().Secrets(c.Namespace)
	keys, cert, err := bundleKeys(ctx, secrets, c.BundleServer, log)
	if err != nil {
		return err
	}
	taints, err := c.Node.ParsedTaints()
	if err != nil {
		return err
	}

	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	defer broadcaster.Shutdown()
	broadcaster.StartRecordingToSink(&corev1client.EventSinkImpl{Interface: client.CoreV1().Events("")})
	events := broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: component})

	devices := inventory.New(inventory.Options{
		API: flight, Selector: c.Selector, Interval: c.PollInterval, DisconnectAfter: c.DisconnectAfter, Log: log,
	})
	nodes := virtualnode.New(virtualnode.Options{
		Client: nodeClient, Leases: leases, Devices: devices,
		Settings:       virtualnode.Settings{Version: versionText(), KubernetesVersion: kubernetesVersion, Reserve: c.Reserve.Resources(), Taints: taints},
		StatusInterval: c.Node.StatusInterval, LeaseDuration: c.Node.LeaseDuration, LeaseRenewal: c.Node.LeaseDuration * 3 / 8, Log: log,
	})
	resolver := resolve.New(ctx, resolve.Options{Client: asNode(kube), Log: log})
	defer resolver.Close()
	pods, err := podsync.New(podsync.Options{Client: client, Nodes: nodes, Devices: devices, Resolver: resolverFor(resolver), Events: events, Log: log})
	if err != nil {
		return err
	}
	server := delivery.NewServer(keys.User, keys.Password)
	deliveries := delivery.New(delivery.Options{
		API: flight, Devices: devices, Source: pods, Secrets: secrets, Namespace: c.Namespace, MAC: keys.MAC, Server: server,
		Repository: flightapi.Repository{
			Name: wellknown.RepositoryName, URL: c.BundleServer.URL, Username: keys.User, Password: keys.Password,
			CA: authority(c.BundleServer, keys), ValidationSuffix: delivery.ValidationSuffix,
		},
		ManageFleets: c.ManageFleets, RetryAfter: c.RetryAfter, Changed: pods.DeviceChanged,
		Notice: func(dev, reason, message string) {
			if node, ok := nodes.NodeOf(dev); ok {
				events.Event(&corev1.ObjectReference{Kind: "Node", Name: node, UID: nodeUID(node), APIVersion: "v1"}, corev1.EventTypeWarning, reason, message)
			}
		},
		Minted: metrics.minted.Inc, Log: log,
	})
	pods.Use(deliveries)
	devices.Subscribe(nodes.Changed)
	devices.Subscribe(pods.DeviceChanged)
	devices.Subscribe(deliveries.Changed)
	nodes.Subscribe(func(node string) {
		pods.NodeChanged(node)
		if d, ok := nodes.DeviceOf(node); ok {
			deliveries.Changed(d)
		}
	})
	metrics.devices(devices.List)

	ready := func() error {
		switch {
		case !devices.Ready():
			return errors.New("no answer from Flightctl yet")
		case !pods.Synced():
			return errors.New("pods are not known yet")
		case !deliveries.Loaded():
			return errors.New("records of bundles are not loaded yet")
		}
		return nil
	}
	var group sync.WaitGroup
	defer group.Wait()
	failed := make(chan error, 3)
	serve := func(what, address string, h http.Handler, t *tls.Config) {
		group.Go(func() {
			if err := listen(ctx, address, h, t, log); err != nil {
				failed <- fmt.Errorf("cannot serve %s: %w", what, err)
			}
		})
	}
	serve("health and metrics", c.Listen, health(ready, metrics), nil)
	if c.BundleServer.URL != "" {
		serve("bundles", c.BundleServer.Listen, server, &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{cert}})
	}
	group.Go(func() { devices.Run(ctx) })
	group.Go(func() {
		if err := nodes.Run(ctx); err != nil {
			failed <- err
		}
	})
	group.Go(func() { pods.Run(ctx) })
	group.Go(func() { deliveries.Run(ctx) })
	select {
	case <-ctx.Done():
		log.InfoContext(ctx, "stopping")
		return nil
	case err := <-failed:
		cancel()
		return err
	}
}

// nodeUID is what the kubelet uses as well, so that `kubectl describe node`
// finds the event.
func nodeUID(node string) types.UID { return types.UID(node) }

func restConfig(file string) (*rest.Config, error) {
	var c *rest.Config
	var err error
	if file == "" {
		c, err = rest.InClusterConfig()
	} else {
		c, err = clientcmd.BuildConfigFromFlags("", file)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot find the cluster: %w", err)
	}
	c.UserAgent = component + "/" + versionText()
	return c, nil
}

// limited is a copy with a budget of requests of its own.
func limited(c *rest.Config) *rest.Config {
	c = rest.CopyConfig(c)
	c.QPS, c.Burst = qps, burst
	return c
}

// asNode gives clients that act as a node; all share one budget.
func asNode(kube *rest.Config) func(node string) (corev1client.CoreV1Interface, error) {
	limiter := flowcontrol.NewTokenBucketRateLimiter(qps, burst)
	var mu sync.Mutex // guards clients
	clients := map[string]corev1client.CoreV1Interface{}
	return func(node string) (corev1client.CoreV1Interface, error) {
		mu.Lock()
		defer mu.Unlock()
		if c, ok := clients[node]; ok {
			return c, nil
		}
		cfg := rest.CopyConfig(kube)
		cfg.RateLimiter = limiter
		// The name alone: the cluster adds a node's groups, and refuses to be
		// told them in constrained impersonation.
		cfg.Impersonate = rest.ImpersonationConfig{UserName: "system:node:" + node}
		c, err := corev1client.NewForConfig(cfg)
		if err != nil {
			return nil, fmt.Errorf("cannot make a client for node %s: %w", node, err)
		}
		clients[node] = c
		return c, nil
	}
}

// resolverFunc lets podsync use a resolver without knowing it.
type resolverFunc struct{ *resolve.Resolver }

func resolverFor(r *resolve.Resolver) podsync.Resolver { return resolverFunc{r} }

// Resolve translates the answer.
func (f resolverFunc) Resolve(ctx context.Context, pod *corev1.Pod, lenient bool, changed func()) (podsync.Resolved, error) {
	r, err := f.Resolver.Resolve(ctx, pod, lenient, changed)
	return podsync.Resolved{Pod: r.Pod, Secrets: r.Secrets, Missing: r.Missing, Loading: r.Loading}, err
}

// bundleKeys reads or makes the shim's keys, trying until the cluster answers,
// and the certificate of the bundle server.
func bundleKeys(ctx context.Context, secrets corev1client.SecretInterface, b config.BundleServer, log *slog.Logger) (*delivery.Keys, tls.Certificate, error) {
	var hosts []string
	if u, err := url.Parse(b.URL); err == nil && u.Hostname() != "" {
		hosts = append(hosts, u.Hostname())
	}
	var keys *delivery.Keys
	for pause := time.Second; ; pause = min(2*pause, time.Minute) {
		var err error
		if keys, err = delivery.EnsureKeys(ctx, secrets, hosts); err == nil {
			break
		}
		log.WarnContext(ctx, "cannot get the shim's keys, trying again", "error", err)
		select {
		case <-ctx.Done():
			return nil, tls.Certificate{}, ctx.Err()
		case <-time.After(pause):
		}
	}
	if b.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(b.CertFile, b.KeyFile)
		if err != nil {
			return nil, cert, fmt.Errorf("cannot read the bundle server's certificate: %w", err)
		}
		return keys, cert, nil
	}
	cert, err := keys.Certificate()
	return keys, cert, err
}

// authority is what Flightctl shall trust the bundle server by: our own
// certificate, or the file's, which may be signed by somebody it knows.
func authority(b config.BundleServer, keys *delivery.Keys) []byte {
	if b.CertFile == "" {
		return keys.CertPEM
	}
	pem, err := os.ReadFile(b.CertFile)
	if err != nil {
		return nil // bundleKeys has read it just before
	}
	return pem
}

// listen serves until ctx ends.
func listen(ctx context.Context, address string, h http.Handler, t *tls.Config, log *slog.Logger) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return err
	}
	if t != nil {
		l = tls.NewListener(l, t)
	}
	s := &http.Server{
		Handler: h, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, WriteTimeout: time.Minute, IdleTimeout: 2 * time.Minute,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	var group sync.WaitGroup
	defer group.Wait()
	ended, end := context.WithCancel(ctx)
	defer end()
	group.Go(func() {
		<-ended.Done()
		limit, cancel := context.WithTimeout(context.WithoutCancel(ended), shutdownTimeout)
		defer cancel()
		_ = s.Shutdown(limit) // what is still open is cut
	})
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func health(ready func() error, m *metrics) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	return mux
}

type metrics struct {
	registry *prometheus.Registry
	minted   prometheus.Counter
	requests *prometheus.HistogramVec
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		minted:   prometheus.NewCounter(prometheus.CounterOpts{Name: "jetbridge_bundles_minted_total", Help: "Bundles that were minted."}),
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "jetbridge_flightctl_request_seconds", Help: "Requests to Flightctl; code 0 is no answer.",
		}, []string{"method", "code"}),
	}
	m.registry.MustRegister(m.minted, m.requests, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "jetbridge_build_info", Help: "Always 1.", ConstLabels: prometheus.Labels{"version": versionText()}}, func() float64 { return 1 }))
	return m
}

func (m *metrics) request(method string, code int, took time.Duration) {
	m.requests.WithLabelValues(method, strconv.Itoa(code)).Observe(took.Seconds())
}

// devices counts devices by connection.
func (m *metrics) devices(list func() []device.State) {
	for _, c := range []device.Connection{device.Unheard, device.Connected, device.Disconnected} {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "jetbridge_devices", Help: "Devices by connection.", ConstLabels: prometheus.Labels{"connection": string(c)},
		}, func() float64 {
			n := 0
			for _, d := range list() {
				if d.Connection == c && !d.Gone {
					n++
				}
			}
			return float64(n)
		}))
	}
}
