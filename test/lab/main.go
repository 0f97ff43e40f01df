// Command lab runs the project's lab: a real Kubernetes control plane, a real
// Flight Control with its databases, an image registry, and devices with
// systemd, podman and flightctl-agent, all in namespaces and cgroups of their
// own. `lab help` lists what it can do.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/jetbridge/jetbridge/test/lab/device"
	"github.com/jetbridge/jetbridge/test/lab/internal/nsinit"
	"github.com/jetbridge/jetbridge/test/lab/internal/supervise"
)

// exitCode is a command's own code, to be passed on.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

func main() {
	os.Exit(run(os.Args[1:]))
}

func run(args []string) int {
	ctx := context.Background()
	if len(args) > 0 {
		// What the lab runs itself again with; not for people.
		switch args[0] {
		case "device-exec":
			return device.ExecInit(args[1:])
		case "device-init":
			return report(device.Init(args[1:]))
		case "init", "supervise":
			if len(args) != 2 {
				return report(fmt.Errorf("%s needs the lab's folder", args[0]))
			}
			if args[0] == "init" {
				return report(nsinit.Run(args[1]))
			}
			return report(supervise.Run(ctx, args[1]))
		}
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	return report(newCommand().ExecuteContext(ctx))
}

func report(err error) int {
	var code exitCode
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		return int(code)
	}
	fmt.Fprintln(os.Stderr, "lab:", err)
	return 1
}
