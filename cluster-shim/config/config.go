// Package config reads the shim's configuration: flags win over environment
// variables (JETBRIDGE_FLIGHTCTL_URL for flightctl.url), these over the file,
// the file over the defaults. Keys that nobody knows are errors.
package config

import (
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"github.com/spf13/viper"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// Config is the whole configuration, checked.
type Config struct {
	// Kubeconfig is a file; empty in a cluster.
	Kubeconfig string `mapstructure:"kubeconfig"`
	// Namespace holds the shim's own Secrets.
	Namespace string    `mapstructure:"namespace"`
	Flightctl Flightctl `mapstructure:"flightctl"`
	// Selector chooses devices by their labels in Flightctl; empty for all.
	Selector string `mapstructure:"selector"`
	// PollInterval is the time between two looks at all devices.
	PollInterval time.Duration `mapstructure:"poll-interval"`
	// DisconnectAfter is the silence that counts as disconnected. Flightctl
	// hears of a quiet device every two minutes.
	DisconnectAfter time.Duration `mapstructure:"disconnect-after"`
	// RetryAfter is the first pause before a bundle is published again.
	RetryAfter   time.Duration `mapstructure:"retry-after"`
	BundleServer BundleServer  `mapstructure:"bundle-server"`
	// ManageFleets lets the shim add its entry to fleets' templates.
	ManageFleets bool `mapstructure:"manage-fleets"`
	// Listen is the address of health and metrics.
	Listen string `mapstructure:"listen"`
	// LogLevel is debug, info, warn or error.
	LogLevel slog.Level `mapstructure:"-"`
	Reserve  Reserve    `mapstructure:"reserve"`
	Node     Node       `mapstructure:"node"`

	// Level is LogLevel as it was written.
	Level string `mapstructure:"log-level"`
}

// Flightctl says how to reach Flightctl.
type Flightctl struct {
	URL                string `mapstructure:"url"`
	CAFile             string `mapstructure:"ca-file"`
	TokenFile          string `mapstructure:"token-file"`
	InsecureSkipVerify bool   `mapstructure:"insecure-skip-verify"`
	Organization       string `mapstructure:"organization"`
}

// BundleServer says where Flightctl fetches the bundles of fleets' devices.
type BundleServer struct {
	// Listen is the address to serve at.
	Listen string `mapstructure:"listen"`
	// URL is how Flightctl's worker reaches it; empty serves no fleets.
	URL string `mapstructure:"url"`
	// CertFile and KeyFile are PEM files; both empty for a certificate of
	// our own.
	CertFile string `mapstructure:"cert-file"`
	KeyFile  string `mapstructure:"key-file"`
}

// Reserve is kept back from each device.
type Reserve struct {
	CPU    string `mapstructure:"cpu"`
	Memory string `mapstructure:"memory"`
}

// Resources is the reserve as a list.
func (r Reserve) Resources() corev1.ResourceList {
	out := corev1.ResourceList{}
	for name, text := range map[corev1.ResourceName]string{corev1.ResourceCPU: r.CPU, corev1.ResourceMemory: r.Memory} {
		if q, err := resource.ParseQuantity(text); err == nil { // Load checked it
			out[name] = q
		}
	}
	return out
}

// Node is how virtual nodes behave.
type Node struct {
	// Taints are added to every node, as key=value:Effect.
	Taints []string `mapstructure:"taints"`
	// StatusInterval is the time between two updates of an unchanged status.
	StatusInterval time.Duration `mapstructure:"status-interval"`
	// LeaseDuration is the time after which a node without renewal is lost.
	LeaseDuration time.Duration `mapstructure:"lease-duration"`
}

// ParsedTaints is Taints as API values.
func (n Node) ParsedTaints() ([]corev1.Taint, error) {
	var out []corev1.Taint
	for _, text := range n.Taints {
		rest, effect, ok := strings.Cut(text, ":")
		key, value, _ := strings.Cut(rest, "=")
		effects := []corev1.TaintEffect{corev1.TaintEffectNoSchedule, corev1.TaintEffectPreferNoSchedule, corev1.TaintEffectNoExecute}
		if !ok || len(validation.IsQualifiedName(key)) > 0 || len(validation.IsValidLabelValue(value)) > 0 || !slices.Contains(effects, corev1.TaintEffect(effect)) {
			return nil, fmt.Errorf("taint %q is not of the form key=value:Effect", text)
		}
		out = append(out, corev1.Taint{Key: key, Value: value, Effect: corev1.TaintEffect(effect)})
	}
	return out, nil
}

// AddFlags defines a flag for each key, and --config.
func AddFlags(f *pflag.FlagSet) {
	f.String("config", "", "configuration file (YAML)")
	f.String("kubeconfig", "", "kubeconfig file; empty in a cluster")
	f.String("namespace", "jetbridge-system", "namespace of the shim's own objects")
	f.String("flightctl.url", "", "URL of Flightctl's user API")
	f.String("flightctl.ca-file", "", "CA of Flightctl's certificate; empty for the system's")
	f.String("flightctl.token-file", "", "file with the token for Flightctl, read again as it rotates")
	f.Bool("flightctl.insecure-skip-verify", false, "trust any certificate of Flightctl (tests only)")
	f.String("flightctl.organization", "", "organization in Flightctl")
	f.String("selector", "", "label selector of the devices in Flightctl")
	f.Duration("poll-interval", 10*time.Second, "time between two looks at all devices, at least 1s")
	f.Duration("disconnect-after", 3*time.Minute, "silence after which a device counts as disconnected")
	f.Duration("retry-after", 90*time.Second, "pause before an unconfirmed bundle is published again; doubles")
	f.String("bundle-server.listen", ":8443", "address that serves bundles to Flightctl")
	f.String("bundle-server.url", "", "URL by which Flightctl's worker reaches the bundle server; empty serves no fleets")
	f.String("bundle-server.cert-file", "", "certificate of the bundle server; empty for one of our own")
	f.String("bundle-server.key-file", "", "key of that certificate")
	f.Bool("manage-fleets", true, "add our configuration entry to the templates of fleets")
	f.String("listen", ":8080", "address of health and metrics")
	f.String("log-level", "info", "debug, info, warn or error")
	f.String("reserve.cpu", "100m", "CPU kept back from each device")
	f.String("reserve.memory", "128Mi", "memory kept back from each device")
	f.StringSlice("node.taints", nil, "more taints for every node, as key=value:Effect")
	f.Duration("node.status-interval", 5*time.Minute, "time between two updates of an unchanged node status")
	f.Duration("node.lease-duration", 40*time.Second, "duration of node leases")
}

// Load reads and checks everything.
func Load(f *pflag.FlagSet) (*Config, error) {
	v := viper.New()
	v.SetEnvPrefix("JETBRIDGE")
	v.SetEnvKeyReplacer(strings.NewReplacer(".", "_", "-", "_"))
	v.AutomaticEnv()
	var bindErr error
	f.VisitAll(func(flag *pflag.Flag) {
		if known(flag.Name) && bindErr == nil {
			bindErr = v.BindPFlag(flag.Name, flag)
		}
	})
	if bindErr != nil {
		return nil, fmt.Errorf("cannot bind flags: %w", bindErr)
	}
	file, err := f.GetString("config")
	if err != nil {
		return nil, fmt.Errorf("cannot read flag config: %w", err)
	}
	if file == "" {
		file = os.Getenv("JETBRIDGE_CONFIG")
	}
	if file != "" {
		v.SetConfigFile(file)
		v.SetConfigType("yaml")
		if err := v.ReadInConfig(); err != nil {
			return nil, fmt.Errorf("cannot read configuration: %w", err)
		}
	}
	var c Config
	if err := v.UnmarshalExact(&c); err != nil {
		return nil, fmt.Errorf("cannot read configuration: %w", err)
	}
	if err := c.check().ToAggregate(); err != nil {
		return nil, fmt.Errorf("configuration is not valid: %w", err)
	}
	return &c, nil
}

// known says whether a flag is a configuration key.
func known(flag string) bool {
	return !slices.Contains([]string{"config", "help", "version"}, flag)
}

func (c *Config) check() field.ErrorList {
	var errs field.ErrorList
	bad := func(path, value, why string) {
		errs = append(errs, field.Invalid(field.NewPath(path), value, why))
	}
	if len(validation.IsDNS1123Label(c.Namespace)) > 0 {
		bad("namespace", c.Namespace, "must be a namespace's name")
	}
	checkURL := func(path, text string) {
		if u, err := url.Parse(text); err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" {
			bad(path, text, "must be an absolute http or https URL")
		}
	}
	if c.Flightctl.URL == "" {
		errs = append(errs, field.Required(field.NewPath("flightctl.url"), "Flightctl's user API"))
	} else {
		checkURL("flightctl.url", c.Flightctl.URL)
	}
	if c.BundleServer.URL != "" {
		checkURL("bundle-server.url", c.BundleServer.URL)
	}
	if _, err := labels.Parse(c.Selector); err != nil {
		bad("selector", c.Selector, err.Error())
	}
	least := func(path string, d, least time.Duration) {
		if d < least {
			bad(path, d.String(), "must be at least "+least.String())
		}
	}
	least("poll-interval", c.PollInterval, time.Second)
	least("disconnect-after", c.DisconnectAfter, 2*c.PollInterval)
	least("retry-after", c.RetryAfter, time.Second)
	least("node.status-interval", c.Node.StatusInterval, time.Second)
	least("node.lease-duration", c.Node.LeaseDuration, 10*time.Second)
	if (c.BundleServer.CertFile == "") != (c.BundleServer.KeyFile == "") {
		bad("bundle-server.cert-file", c.BundleServer.CertFile, "goes together with bundle-server.key-file")
	}
	for path, text := range map[string]string{"listen": c.Listen, "bundle-server.listen": c.BundleServer.Listen} {
		if _, _, err := net.SplitHostPort(text); err != nil {
			bad(path, text, "must be host:port")
		}
	}
	for path, text := range map[string]string{"reserve.cpu": c.Reserve.CPU, "reserve.memory": c.Reserve.Memory} {
		if q, err := resource.ParseQuantity(text); err != nil || q.Sign() < 0 {
			bad(path, text, "must be a quantity that is not negative")
		}
	}
	if _, err := c.Node.ParsedTaints(); err != nil {
		bad("node.taints", strings.Join(c.Node.Taints, ","), err.Error())
	}
	if err := c.LogLevel.UnmarshalText([]byte(c.Level)); err != nil {
		bad("log-level", c.Level, "must be debug, info, warn or error")
	}
	return errs
}
