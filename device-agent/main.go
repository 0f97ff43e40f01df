// Command jetbridge-agent runs Kubernetes pods on an edge device that Flight
// Control manages: it takes in the bundle of the device's pods, turns them
// into systemd services that run podman, and reports what became of them.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/jetbridge/jetbridge/device-agent/config"
	"github.com/jetbridge/jetbridge/device-agent/container"
	"github.com/jetbridge/jetbridge/device-agent/host"
	"github.com/jetbridge/jetbridge/device-agent/journal"
	"github.com/jetbridge/jetbridge/shared/wellknown"
)

const (
	defaultPodman = "/usr/bin/podman"
	// deviceNameFile, in the run folder, tells the status command the name.
	deviceNameFile = "device-name"
)

// version is set by the linker.
var version string

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "jetbridge-agent:", err)
		os.Exit(1)
	}
}

func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return "unknown"
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use: "jetbridge-agent", Short: "Runs Kubernetes pods on a device that Flight Control manages",
		Version: buildVersion(), SilenceUsage: true, SilenceErrors: true,
	}
	root.AddCommand(daemonCommand("run", "Run the agent", run), daemonCommand("boot", "Start the pods after a boot, without network or agent", boot), nudgeCommand(), statusCommand())
	root.AddCommand(helperCommands()...)
	return root
}

func daemonCommand(use, short string, f func(context.Context, *config.Config, *slog.Logger) error) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs}
	config.Flags(c.Flags())
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := config.Load(cmd.Flags(), os.Environ())
		if err != nil {
			return err
		}
		log := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: cfg.LogLevel}))
		log.Info("starting", "command", use, "version", buildVersion())
		return f(cmd.Context(), cfg, log)
	}
	return c
}

// nudgeCommand is Flightctl's hook. It never fails: a hook that fails rolls
// the device back, and the agent sees the bundle by itself in any case.
func nudgeCommand() *cobra.Command {
	var socket string
	c := &cobra.Command{Use: "nudge", Short: "Tell the agent that a bundle may have arrived; never fails"}
	c.Flags().StringVar(&socket, "socket", wellknown.SocketPath, "the agent's socket")
	c.FParseErrWhitelist.UnknownFlags = true
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := nudge(cmd.Context(), socket); err != nil {
			fmt.Fprintln(cmd.ErrOrStderr(), "jetbridge-agent: the agent was not told:", err)
		}
		return nil
	}
	return c
}

func nudge(ctx context.Context, socket string) (err error) {
	d := net.Dialer{Timeout: 2 * time.Second}
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	if err := conn.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return err
	}
	_, err = io.WriteString(conn, "nudge\n")
	return err
}

// helperCommands are what units run.
func helperCommands() []*cobra.Command {
	var list []*cobra.Command
	add := func(use, short string, setup func(*cobra.Command) func(context.Context, *container.Helper, []string) error) {
		c := &cobra.Command{Use: use, Short: short, Hidden: true}
		var uid, podman, state, runDir string
		h := &container.Helper{Now: time.Now, After: time.After}
		c.Flags().StringVar(&uid, "pod", "", "the pod's UID")
		c.Flags().StringVar(&h.Container, "container", "", "the container's name in the pod")
		c.Flags().StringVar(&h.Name, "name", "", "the container's name in podman")
		c.Flags().StringVar(&podman, "podman-path", defaultPodman, "the podman program")
		c.Flags().StringVar(&state, "state-dir", wellknown.StateDir, "folder of what must survive a reboot")
		c.Flags().StringVar(&runDir, "run-dir", wellknown.RunDir, "folder of what a reboot may forget")
		f := setup(c)
		c.RunE = func(cmd *cobra.Command, args []string) error {
			var err error
			h.UID, h.Podman = types.UID(uid), podman
			if h.BootID, err = host.BootID(); err != nil {
				return err
			}
			if h.Store, err = journal.Open(state, runDir); err != nil {
				return err
			}
			return f(cmd.Context(), h, args)
		}
		list = append(list, c)
	}
	add("backoff", "Wait until a container may start", func(*cobra.Command) func(context.Context, *container.Helper, []string) error {
		return func(ctx context.Context, h *container.Helper, _ []string) error { return h.Backoff(ctx) }
	})
	add("record", "Write down how a container ended", func(*cobra.Command) func(context.Context, *container.Helper, []string) error {
		return func(ctx context.Context, h *container.Helper, _ []string) error {
			return h.Record(ctx, container.EndingFromEnv())
		}
	})
	add("stop", "Stop a container", func(c *cobra.Command) func(context.Context, *container.Helper, []string) error {
		grace := c.Flags().Int64("grace", 30, "grace period in seconds")
		return func(ctx context.Context, h *container.Helper, _ []string) error { return h.Stop(ctx, *grace) }
	})
	add("run-init", "Run an init container until it succeeds", func(c *cobra.Command) func(context.Context, *container.Helper, []string) error {
		policy := c.Flags().String("restart-policy", "", "the pod's restart policy")
		grace := c.Flags().Int64("grace", 30, "grace period in seconds")
		return func(ctx context.Context, h *container.Helper, args []string) error {
			return h.RunInit(ctx, corev1.RestartPolicy(*policy), *grace, args)
		}
	})
	return list
}
