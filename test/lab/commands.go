package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/jetbridge/jetbridge/test/lab/internal/control"
	"github.com/jetbridge/jetbridge/test/lab/internal/host"
	"github.com/jetbridge/jetbridge/test/lab/internal/images"
	"github.com/jetbridge/jetbridge/test/lab/internal/layout"
)

// defaultName is the lab that is meant when none is named.
const defaultName = "lab"

// commands share the lab's name.
type commands struct {
	name string
}

func (c *commands) lab() (layout.Lab, error) { return layout.New(c.name) }

// running is the lab, if it has been brought up.
func (c *commands) running() (layout.Lab, error) {
	lab, err := c.lab()
	if err != nil {
		return lab, err
	}
	if _, err := lab.Load(); errors.Is(err, layout.ErrNoLab) {
		return lab, fmt.Errorf("no lab %s is up: run lab up --name %s", c.name, c.name)
	} else if err != nil {
		return lab, err
	}
	return lab, nil
}

func newCommand() *cobra.Command {
	c := &commands{}
	root := &cobra.Command{
		Use:           "lab",
		Short:         "A cluster, Flight Control and devices on one machine",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	name := defaultName
	if env := os.Getenv("LAB_NAME"); env != "" {
		name = env
	}
	root.PersistentFlags().StringVar(&c.name, "name", name, "the lab's name (environment: LAB_NAME)")
	root.AddCommand(c.up(), c.down(), c.status(), c.env(), c.exec(), c.net(), c.power(), c.device(), c.logs(), c.image())
	for _, action := range []struct{ name, short string }{
		{"start", "start a component, and wait until it is ready"},
		{"stop", "stop a component; it stays down until it is started"},
		{"kill", "kill a component at once; it stays down until it is started"},
		{"restart", "stop a component and start it again"},
	} {
		root.AddCommand(c.component(action.name, action.short))
	}
	return root
}

func (c *commands) up() *cobra.Command {
	var o host.UpOptions
	cmd := &cobra.Command{
		Use: "up", Short: "bring the lab up, or add what it lacks", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if os.Geteuid() != 0 {
				return errors.New("the lab makes namespaces and cgroups and needs root")
			}
			if o.Lab, err = c.lab(); err != nil {
				return err
			}
			if o.Checkout, err = checkout(); err != nil {
				return err
			}
			o.Progress = cmd.ErrOrStderr()
			return host.Up(cmd.Context(), o)
		},
	}
	cmd.Flags().IntVar(&o.Devices, "devices", 2, "how many devices: edge-1 alone, edge-2 in fleet edge, and so on")
	cmd.Flags().BoolVar(&o.WithoutShim, "without-shim", false, "leave jetbridge-shim out")
	return cmd
}

// checkout finds the project's folder: from the program's own, else from the current one, upwards.
func checkout() (string, error) {
	var from []string
	if exe, err := os.Executable(); err == nil {
		from = append(from, filepath.Dir(exe))
	}
	wd, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("cannot find current folder: %w", err)
	}
	for _, dir := range append(from, wd) {
		for ; dir != "/"; dir = filepath.Dir(dir) {
			if _, err := os.Stat(filepath.Join(dir, "test/lab/thirdparty/kube/go.mod")); err == nil {
				return dir, nil
			}
		}
	}
	return "", errors.New("cannot find the project: run this in its checkout")
}

func (c *commands) down() *cobra.Command {
	return &cobra.Command{
		Use: "down", Short: "end the lab, and prove that nothing is left", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return errors.New("ending a lab needs root")
			}
			lab, err := c.lab()
			if err != nil {
				return err
			}
			return host.Down(cmd.Context(), lab, cmd.OutOrStdout())
		},
	}
}

func (c *commands) status() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "show components and devices", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			lab, err := c.running()
			if err != nil {
				return err
			}
			return host.ShowStatus(cmd.Context(), lab, cmd.OutOrStdout())
		},
	}
}

func (c *commands) env() *cobra.Command {
	return &cobra.Command{
		Use: "env", Short: `print exports for a shell: eval "$(lab env)"`, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			lab, err := c.running()
			if err != nil {
				return err
			}
			return host.Env(cmd.Context(), lab, cmd.OutOrStdout())
		},
	}
}

func (c *commands) exec() *cobra.Command {
	cmd := &cobra.Command{
		Use: "exec DEVICE -- CMD [ARG...]", Short: "run a command on a device, with its streams and exit code", Args: cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			lab, err := c.running()
			if err != nil {
				return err
			}
			request, err := parseExec(args)
			if err != nil {
				return err
			}
			code, err := control.Exec(cmd.Context(), lab, request, os.Stdin, os.Stdout, os.Stderr)
			if err != nil {
				return err
			}
			if code != 0 {
				return exitCode(code)
			}
			return nil
		},
	}
	cmd.Flags().SetInterspersed(false)
	return cmd
}

// parseExec reads DEVICE [--] CMD ARG...
func parseExec(args []string) (control.ExecRequest, error) {
	request := control.ExecRequest{Device: args[0], Args: args[1:]}
	if request.Args[0] == "--" {
		request.Args = request.Args[1:]
	}
	if len(request.Args) == 0 {
		return request, errors.New("which command? lab exec DEVICE -- CMD")
	}
	return request, nil
}

// parseNet reads what is to be done to a link. Up heals everything.
func parseNet(args []string) (control.Net, error) {
	yes, no := true, false
	var healthy float64
	var none time.Duration
	switch {
	case len(args) == 1 && args[0] == "up":
		return control.Net{Up: &yes, Loss: &healthy, Delay: &none}, nil
	case len(args) == 1 && args[0] == "down":
		return control.Net{Up: &no}, nil
	case len(args) == 2 && args[0] == "loss":
		percent, err := strconv.ParseFloat(strings.TrimSuffix(args[1], "%"), 64)
		if err != nil || !(percent >= 0 && percent <= 100) {
			return control.Net{}, fmt.Errorf("%q is no percentage from 0%% to 100%%", args[1])
		}
		return control.Net{Loss: &percent}, nil
	case len(args) == 2 && args[0] == "delay":
		delay, err := time.ParseDuration(args[1])
		if err != nil || delay < 0 {
			return control.Net{}, fmt.Errorf("%q is no delay such as 200ms", args[1])
		}
		return control.Net{Delay: &delay}, nil
	}
	return control.Net{}, fmt.Errorf("%q is none of down, up, loss 20%%, delay 200ms", strings.Join(args, " "))
}

func (c *commands) net() *cobra.Command {
	return &cobra.Command{
		Use: "net DEVICE down|up|loss 20%|delay 200ms", Short: "change a device's network; up heals everything", Args: cobra.RangeArgs(2, 3),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := parseNet(args[1:])
			if err != nil {
				return err
			}
			lab, err := c.running()
			if err != nil {
				return err
			}
			return control.NewClient(lab).Net(cmd.Context(), args[0], n)
		},
	}
}

func (c *commands) power() *cobra.Command {
	return &cobra.Command{
		Use: "power DEVICE on|off|reboot|kill", Short: "switch a device; kill is a power cut", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			lab, err := c.running()
			if err != nil {
				return err
			}
			return control.NewClient(lab).Power(cmd.Context(), args[0], args[1])
		},
	}
}

func (c *commands) device() *cobra.Command {
	cmd := &cobra.Command{Use: "device", Short: "add and remove devices"}
	var d control.AddDevice
	var noEnroll bool
	add := &cobra.Command{
		Use: "add NAME", Short: "make a device, boot it and enroll it", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			lab, err := c.running()
			if err != nil {
				return err
			}
			dir, err := checkout()
			if err != nil {
				return err
			}
			d.Name, d.Enroll = args[0], !noEnroll
			added, err := host.AddDevice(cmd.Context(), lab, dir, d)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "device %s is on, at %s\n", added.Name, added.Address)
			return nil
		},
	}
	add.Flags().StringVar(&d.Fleet, "fleet", "", "the fleet that it is enrolled for, by the label fleet")
	add.Flags().StringToStringVar(&d.Labels, "label", nil, "labels in Flight Control: key=value")
	add.Flags().BoolVar(&noEnroll, "no-enroll", false, "leave the enrollment request to be approved by hand")
	remove := &cobra.Command{
		Use: "remove NAME", Short: "end a device, and take it out of Flight Control", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			lab, err := c.running()
			if err != nil {
				return err
			}
			return host.RemoveDevice(cmd.Context(), lab, args[0])
		},
	}
	cmd.AddCommand(add, remove)
	return cmd
}

func (c *commands) component(action, short string) *cobra.Command {
	return &cobra.Command{
		Use: action + " COMPONENT", Short: short, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			lab, err := c.running()
			if err != nil {
				return err
			}
			return control.NewClient(lab).Component(cmd.Context(), args[0], action)
		},
	}
}

func (c *commands) logs() *cobra.Command {
	var follow bool
	cmd := &cobra.Command{
		Use: "logs COMPONENT|DEVICE", Short: "print a component's log or a device's console", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			lab, err := c.running()
			if err != nil {
				return err
			}
			return host.Logs(cmd.Context(), lab, args[0], follow, cmd.OutOrStdout())
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what is added")
	return cmd
}

func (c *commands) image() *cobra.Command {
	cmd := &cobra.Command{Use: "image", Short: "the lab's registry"}
	cmd.AddCommand(&cobra.Command{
		Use: "push REF ARCHIVE", Short: "push a docker archive or an OCI layout, for instance as app:1", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			lab, err := c.running()
			if err != nil {
				return err
			}
			ref, err := push(cmd.Context(), lab, args[0], args[1])
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), ref)
			return nil
		},
	})
	return cmd
}

// push returns the reference by digest, as devices see it.
func push(ctx context.Context, lab layout.Lab, ref, archive string) (string, error) {
	config, err := lab.Load()
	if err != nil {
		return "", err
	}
	image, err := images.Load(archive)
	if err != nil {
		return "", err
	}
	ref = images.Repository(ref, layout.RegistryAddress)
	registry := images.Registry{
		Address: fmt.Sprintf("127.0.0.1:%d", config.Ports[layout.RelayRegistry]),
		User:    config.RegistryUser, Password: config.RegistryPassword,
	}
	digest, err := registry.Push(ctx, ref, image)
	if err != nil {
		return "", err
	}
	repository, _, _ := strings.Cut(ref, "@")
	if colon := strings.LastIndexByte(repository, ':'); colon > strings.LastIndexByte(repository, '/') {
		repository = repository[:colon]
	}
	return layout.RegistryAddress + "/" + repository + "@" + digest, nil
}
