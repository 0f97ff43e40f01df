// Package config reads the agent's configuration: defaults, the file,
// JETBRIDGE_ variables of the environment and flags, each over the one before.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"github.com/spf13/viper"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/jetbridge/jetbridge/shared/wellknown"
)

// DefaultFile is read if it is there.
const DefaultFile = "/etc/jetbridge/agent.yaml"

// Config is a valid configuration.
type Config struct {
	StateDir, RunDir, BundlePath, UnitsDir string
	// DeviceName is empty if Flightctl's certificate shall tell it.
	DeviceName, FlightctlDataDir string
	FlightctlUnit                string
	PodmanSocket, PodmanPath     string
	Listen                       string
	ResyncInterval               time.Duration
	ReloadInterval               time.Duration
	LogLevel                     slog.Level
	MaxPods                      int64
	ReserveCPU, ReserveMemory    resource.Quantity
	// KubernetesHost and KubernetesPort are given to all pods; may be empty.
	KubernetesHost, KubernetesPort string
}

type option struct {
	key, usage string
	value      any
}

func options() []option {
	return []option{
		{"state-dir", "folder of what must survive a reboot", wellknown.StateDir},
		{"run-dir", "folder of what a reboot may forget", wellknown.RunDir},
		{"bundle-path", "file in which Flightctl puts the desired state", wellknown.BundlePath},
		{"units-dir", "folder from which systemd loads the pods' units", "/run/systemd/system"},
		{"device-name", "this device's name in Flightctl; empty: from Flightctl's certificate", ""},
		{"flightctl-data-dir", "folder of Flightctl's agent", "/var/lib/flightctl"},
		{"flightctl-unit", "service of Flightctl's agent", "flightctl-agent.service"},
		{"podman-socket", "socket of podman's API", "/run/podman/podman.sock"},
		{"podman-path", "the podman program", "/usr/bin/podman"},
		{"listen", "address of health and metrics; empty: none", "127.0.0.1:9477"},
		{"resync-interval", "longest time between two looks at everything", 30 * time.Second},
		{"reload-interval", "shortest time between two reloads of Flightctl's agent", 2 * time.Second},
		{"log-level", "debug, info, warn or error", "info"},
		{"max-pods", "most pods on this device", 110},
		{"reserve-cpu", "CPU that pods do not get", "0"},
		{"reserve-memory", "memory that pods do not get", "0"},
		{"kubernetes-service-host", "API server's address for pods; empty: none", ""},
		{"kubernetes-service-port", "API server's port for pods", "443"},
	}
}

// Flags adds all options to a command's flags.
func Flags(f *pflag.FlagSet) {
	f.String("config", "", "configuration file (default "+DefaultFile+", if it is there)")
	for _, o := range options() {
		switch v := o.value.(type) {
		case string:
			f.String(o.key, v, o.usage)
		case int:
			f.Int(o.key, v, o.usage)
		case time.Duration:
			f.Duration(o.key, v, o.usage)
		}
	}
}

// Load reads and validates the configuration. environ is os.Environ().
func Load(f *pflag.FlagSet, environ []string) (*Config, error) {
	v := viper.New()
	known := map[string]bool{}
	for _, o := range options() {
		v.SetDefault(o.key, o.value)
		known[o.key] = true
	}
	path, err := f.GetString("config")
	if err != nil {
		return nil, fmt.Errorf("cannot read flags: %w", err)
	}
	explicit := path != ""
	if !explicit {
		path = DefaultFile
	}
	v.SetConfigFile(path)
	v.SetConfigType("yaml")
	if err := v.ReadInConfig(); err != nil && (explicit || !errors.Is(err, fs.ErrNotExist)) {
		return nil, fmt.Errorf("cannot read configuration %s: %w", path, err)
	}
	var errs field.ErrorList
	for _, key := range v.AllKeys() {
		if !known[key] {
			errs = append(errs, field.Forbidden(field.NewPath(key), "unknown key"))
		}
	}
	for _, e := range environ {
		name, value, _ := strings.Cut(e, "=")
		rest, ours := strings.CutPrefix(name, "JETBRIDGE_")
		if !ours {
			continue
		}
		key := strings.ReplaceAll(strings.ToLower(rest), "_", "-")
		if !known[key] {
			errs = append(errs, field.Forbidden(field.NewPath(name), "unknown variable"))
			continue
		}
		v.Set(key, value)
	}
	f.Visit(func(flag *pflag.Flag) {
		if known[flag.Name] {
			v.Set(flag.Name, flag.Value.String())
		}
	})
	c, more := build(v)
	if errs = append(errs, more...); len(errs) > 0 {
		return nil, fmt.Errorf("invalid configuration: %w", errs.ToAggregate())
	}
	return c, nil
}

func build(v *viper.Viper) (*Config, field.ErrorList) {
	var errs field.ErrorList
	c := &Config{
		StateDir: v.GetString("state-dir"), RunDir: v.GetString("run-dir"), BundlePath: v.GetString("bundle-path"), UnitsDir: v.GetString("units-dir"),
		DeviceName: v.GetString("device-name"), FlightctlDataDir: v.GetString("flightctl-data-dir"), FlightctlUnit: v.GetString("flightctl-unit"),
		PodmanSocket: v.GetString("podman-socket"), PodmanPath: v.GetString("podman-path"), Listen: v.GetString("listen"),
		KubernetesHost: v.GetString("kubernetes-service-host"), KubernetesPort: v.GetString("kubernetes-service-port"),
	}
	for key, path := range map[string]string{
		"state-dir": c.StateDir, "run-dir": c.RunDir, "bundle-path": c.BundlePath, "units-dir": c.UnitsDir,
		"podman-socket": c.PodmanSocket, "podman-path": c.PodmanPath, "flightctl-data-dir": c.FlightctlDataDir,
	} {
		// Paths go into units, where some characters have a meaning.
		if !filepath.IsAbs(path) || strings.ContainsAny(path, " \t\n\\\"'%$") {
			errs = append(errs, field.Invalid(field.NewPath(key), path, "must be an absolute path without blanks, quotes, backslashes, % and $"))
		}
	}
	duration := func(key string, least time.Duration) time.Duration {
		d, err := time.ParseDuration(v.GetString(key))
		if err != nil || d < least {
			errs = append(errs, field.Invalid(field.NewPath(key), v.GetString(key), "must be a duration of at least "+least.String()))
		}
		return d
	}
	c.ResyncInterval, c.ReloadInterval = duration("resync-interval", time.Second), duration("reload-interval", time.Second)
	if err := c.LogLevel.UnmarshalText([]byte(v.GetString("log-level"))); err != nil {
		errs = append(errs, field.NotSupported(field.NewPath("log-level"), v.GetString("log-level"), []string{"debug", "info", "warn", "error"}))
	}
	pods, err := strconv.ParseInt(v.GetString("max-pods"), 10, 64)
	if err != nil || pods < 1 || pods > 1000 {
		errs = append(errs, field.Invalid(field.NewPath("max-pods"), v.GetString("max-pods"), "must be from 1 to 1000"))
	}
	c.MaxPods = pods
	for key, into := range map[string]*resource.Quantity{"reserve-cpu": &c.ReserveCPU, "reserve-memory": &c.ReserveMemory} {
		q, err := resource.ParseQuantity(v.GetString(key))
		if err != nil || q.Sign() < 0 {
			errs = append(errs, field.Invalid(field.NewPath(key), v.GetString(key), "must be a quantity that is not negative"))
		}
		*into = q
	}
	if c.Listen != "" {
		if _, _, err := net.SplitHostPort(c.Listen); err != nil {
			errs = append(errs, field.Invalid(field.NewPath("listen"), c.Listen, "must be host:port"))
		}
	}
	if c.FlightctlUnit == "" {
		errs = append(errs, field.Required(field.NewPath("flightctl-unit"), ""))
	}
	return c, errs
}
