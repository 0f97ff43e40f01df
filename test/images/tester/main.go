// Command tester is a container for tests: a static program that does, step by
// step, what its arguments say. See usage.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const usage = `usage: tester STEP [STEP...]

Steps are done in the order in which they are given. Those marked with * go on
in the background until the program ends.

  print TEXT           print a line
  lines N INTERVAL  *  print N numbered lines (0: without end), one each interval
  env NAME             print NAME=value of an environment variable ("-" prints all, sorted)
  cat FILE             print a file
  write FILE TEXT      write a file, and its folders
  append FILE TEXT     add a line to a file
  serve PORT TEXT   *  answer every HTTP request on the port with 200 and the text;
                       the path /status/CODE answers with that code
  burn N            *  keep N threads busy
  eat SIZE          *  take memory and touch it: 64Mi, 1Gi, 1000
  trap [SIGNAL...]  *  print these signals (all of HUP INT QUIT TERM USR1 USR2 if
                       none is named) and go on: end the list with "--" or the
                       last argument
  sleep DURATION       wait; SIGTERM ends the program with code 143
  forever              wait without end
  exit CODE            end with this code; the default after the last step is 0

Without trap, SIGTERM ends the program with code 143 at any step.
`

func main() {
	t := &tester{out: os.Stdout}
	os.Exit(t.run(context.Background(), os.Args[1:]))
}

// errUsage is a mistake in the arguments.
var errUsage = errors.New("see usage")

// tester does the steps. Its memory is held until it ends.
type tester struct {
	mu      sync.Mutex // guards out
	out     io.Writer
	trapped bool
	eaten   [][]byte
	lines   sync.WaitGroup
}

// step takes its arguments and returns how many it took.
type step func(ctx context.Context, t *tester, args []string) (taken int, err error)

func steps() map[string]step {
	return map[string]step{
		"print": one(func(_ context.Context, t *tester, text string) error { t.println(text); return nil }),
		"env":   one(env),
		"cat":   one(cat),
		"write": two(func(_ context.Context, _ *tester, file, text string) error { return write(file, text, os.O_TRUNC) }),
		"append": two(func(_ context.Context, _ *tester, file, text string) error {
			return write(file, text+"\n", os.O_APPEND)
		}),
		"serve":   two(serve),
		"lines":   two(lines),
		"burn":    one(burn),
		"eat":     one(eat),
		"trap":    trap,
		"sleep":   one(sleep),
		"forever": func(ctx context.Context, _ *tester, _ []string) (int, error) { <-ctx.Done(); return 0, ctx.Err() },
		"exit":    one(exit),
	}
}

func one(f func(context.Context, *tester, string) error) step {
	return func(ctx context.Context, t *tester, args []string) (int, error) {
		if len(args) < 1 {
			return 0, fmt.Errorf("one argument is needed: %w", errUsage)
		}
		return 1, f(ctx, t, args[0])
	}
}

func two(f func(context.Context, *tester, string, string) error) step {
	return func(ctx context.Context, t *tester, args []string) (int, error) {
		if len(args) < 2 {
			return 0, fmt.Errorf("two arguments are needed: %w", errUsage)
		}
		return 2, f(ctx, t, args[0], args[1])
	}
}

// exitCode ends the program.
type exitCode int

func (e exitCode) Error() string { return "exit " + strconv.Itoa(int(e)) }

const codeTerminated = 128 + int(syscall.SIGTERM)

// run does the steps and returns the program's exit code.
func (t *tester) run(ctx context.Context, args []string) int {
	if len(args) == 0 || slices.Contains([]string{"help", "-h", "--help"}, args[0]) {
		fmt.Fprint(os.Stderr, usage)
		return 2
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// The first process of a container has no default action for signals.
	terminate := make(chan os.Signal, 1)
	signal.Notify(terminate, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(terminate)
	done := make(chan error, 1)
	go func() { done <- t.steps(ctx, args) }()
	for {
		select {
		case <-terminate:
			t.mu.Lock()
			trapped := t.trapped
			t.mu.Unlock()
			if !trapped {
				return codeTerminated
			}
		case err := <-done:
			return code(err)
		}
	}
}

func code(err error) int {
	var exit exitCode
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return int(exit)
	case errors.Is(err, errUsage):
		fmt.Fprintln(os.Stderr, "tester:", err)
		return 2
	}
	fmt.Fprintln(os.Stderr, "tester:", err)
	return 1
}

func (t *tester) steps(ctx context.Context, args []string) error {
	known := steps()
	for len(args) > 0 {
		name := args[0]
		do, ok := known[name]
		if !ok {
			return fmt.Errorf("no step %q: %w", name, errUsage)
		}
		taken, err := do(ctx, t, args[1:])
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		args = args[1+taken:]
	}
	t.lines.Wait()
	return nil
}

func (t *tester) println(text string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	fmt.Fprintln(t.out, text)
}

func env(_ context.Context, t *tester, name string) error {
	if name != "-" {
		t.println(name + "=" + os.Getenv(name))
		return nil
	}
	all := os.Environ()
	slices.Sort(all)
	for _, pair := range all {
		t.println(pair)
	}
	return nil
}

func cat(_ context.Context, t *tester, file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	_, err = t.out.Write(b)
	return err
}

func write(file, text string, how int) (err error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|how, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	_, err = f.WriteString(text)
	return err
}

// handler answers with the text, or with the status that the path asks for.
func handler(text string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if wanted, ok := strings.CutPrefix(r.URL.Path, "/status/"); ok {
			status, err := strconv.Atoi(wanted)
			if err != nil || status < 200 || status > 599 {
				status = http.StatusBadRequest
			}
			w.WriteHeader(status)
		}
		fmt.Fprintln(w, text)
	})
}

func serve(ctx context.Context, t *tester, port, text string) error {
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return fmt.Errorf("%q is no port: %w", port, errUsage)
	}
	server := &http.Server{Addr: ":" + strconv.FormatUint(number, 10), Handler: handler(text), ReadHeaderTimeout: time.Minute}
	t.lines.Go(func() {
		if err := server.ListenAndServe(); err != nil && !errors.Is(err, http.ErrServerClosed) {
			t.println("cannot serve: " + err.Error())
		}
	})
	context.AfterFunc(ctx, func() { server.Close() })
	return nil
}

func lines(ctx context.Context, t *tester, count, interval string) error {
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 {
		return fmt.Errorf("%q is no number of lines: %w", count, errUsage)
	}
	every, err := time.ParseDuration(interval)
	if err != nil || every <= 0 {
		return fmt.Errorf("%q is no interval: %w", interval, errUsage)
	}
	t.lines.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for i := 1; n == 0 || i <= n; i++ {
			t.println("line " + strconv.Itoa(i))
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	})
	return nil
}

func burn(ctx context.Context, t *tester, threads string) error {
	n, err := strconv.Atoi(threads)
	if err != nil || n < 1 {
		return fmt.Errorf("%q is no number of threads: %w", threads, errUsage)
	}
	for range n {
		t.lines.Go(func() {
			for ctx.Err() == nil {
				for x := 0; x < 1_000_000; x++ {
					_ = x * x
				}
			}
		})
	}
	return nil
}

func eat(_ context.Context, t *tester, size string) error {
	n, err := parseSize(size)
	if err != nil {
		return err
	}
	memory := make([]byte, n)
	for i := 0; i < len(memory); i += os.Getpagesize() {
		memory[i] = 1
	}
	t.eaten = append(t.eaten, memory)
	t.println("ate " + size)
	return nil
}

// parseSize reads a number of bytes with an optional Ki, Mi or Gi.
func parseSize(size string) (uint64, error) {
	number, shift := size, 0
	for suffix, bits := range map[string]int{"Ki": 10, "Mi": 20, "Gi": 30} {
		if cut, ok := strings.CutSuffix(size, suffix); ok {
			number, shift = cut, bits
		}
	}
	n, err := strconv.ParseUint(number, 10, 33)
	if err != nil || n<<shift > 1<<40 {
		return 0, fmt.Errorf("%q is no size: %w", size, errUsage)
	}
	return n << shift, nil
}

func signals() map[string]syscall.Signal {
	return map[string]syscall.Signal{
		"HUP": syscall.SIGHUP, "INT": syscall.SIGINT, "QUIT": syscall.SIGQUIT, "TERM": syscall.SIGTERM,
		"USR1": syscall.SIGUSR1, "USR2": syscall.SIGUSR2,
	}
}

func trap(ctx context.Context, t *tester, args []string) (taken int, err error) {
	var chosen []os.Signal
	known := signals()
	for _, name := range args {
		s, ok := known[name]
		if !ok {
			break
		}
		chosen = append(chosen, s)
		taken++
	}
	if taken < len(args) && args[taken] == "--" {
		taken++
	}
	if len(chosen) == 0 {
		for _, s := range known {
			chosen = append(chosen, s)
		}
	}
	got := make(chan os.Signal, 16)
	signal.Notify(got, chosen...)
	t.mu.Lock()
	t.trapped = t.trapped || slices.Contains(chosen, os.Signal(syscall.SIGTERM))
	t.mu.Unlock()
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case s := <-got:
				for name, number := range known {
					if number == s {
						t.println("signal " + name)
					}
				}
			}
		}
	}()
	return taken, nil
}

func sleep(ctx context.Context, _ *tester, duration string) error {
	d, err := time.ParseDuration(duration)
	if err != nil || d < 0 {
		return fmt.Errorf("%q is no duration: %w", duration, errUsage)
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

func exit(_ context.Context, _ *tester, text string) error {
	n, err := strconv.ParseUint(text, 10, 8)
	if err != nil {
		return fmt.Errorf("%q is no exit code: %w", text, errUsage)
	}
	return exitCode(n)
}
