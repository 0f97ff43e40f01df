// Command demo shows the main job of Jetbridge on a lab of its own: kubectl
// deploys to two real devices. Each step prints the real command and its real
// output; the exit code is 0 only if everything was seen.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	fi, err := os.Stdout.Stat()
	tty := err == nil && fi.Mode()&os.ModeCharDevice != 0
	if err := run(ctx, os.Stdout, tty); err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out io.Writer, tty bool) error {
	s := &shell{out: out, lab: "bin/lab", name: "demo", tty: tty}
	d := &demo{shell: s}
	began := time.Now()
	var rows []row
	var failed error
	for _, step := range d.steps() {
		fmt.Fprintf(out, "\n%s\n", s.coloured("1", "== "+step.title))
		start := time.Now()
		seen, err := step.do(ctx)
		rows = append(rows, row{title: step.title, seen: seen, took: time.Since(start), err: err})
		if err != nil {
			failed = fmt.Errorf("%s: %w", step.title, err)
			break
		}
	}
	printTable(out, rows, time.Since(began))
	if failed != nil {
		fmt.Fprintf(out, "\nThe lab is still up for a look: bin/lab status --name %s; end it with: make lab-down LAB=%s\n", s.name, s.name)
		return failed
	}
	fmt.Fprintf(out, `
The lab is still up. Go on with:
  eval "$(bin/lab env --name %[1]s)"         # kubectl and flightctl of the lab
  kubectl get nodes -o wide
  bin/lab exec --name %[1]s edge-1 -- bash   # on a device
End it with:
  make lab-down LAB=%[1]s
`, s.name)
	return nil
}

// row is a line of the final table.
type row struct {
	title, seen string
	took        time.Duration
	err         error
}

func printTable(out io.Writer, rows []row, total time.Duration) {
	fmt.Fprintln(out)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "STEP\tTIME\tSEEN")
	for _, r := range rows {
		if r.err != nil {
			r.seen = "FAILED: " + firstLine(r.err.Error())
		}
		fmt.Fprintf(w, "%s\t%.1f s\t%s\n", r.title, r.took.Seconds(), r.seen)
	}
	fmt.Fprintf(w, "total\t%.1f s\t\n", total.Seconds())
	if err := w.Flush(); err != nil {
		fmt.Fprintf(os.Stderr, "cannot print the table: %v\n", err)
	}
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

// poll calls check every half second until it gives no error, or the limit
// passed.
func poll(ctx context.Context, limit time.Duration, check func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("not seen within %s", limit), err)
		case <-tick.C:
		}
	}
}
