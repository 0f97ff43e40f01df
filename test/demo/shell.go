package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
)

// shell runs an operator's commands and shows them as they would be typed.
type shell struct {
	out  io.Writer
	lab  string   // the lab's binary
	name string   // the lab's name
	env  []string // what `lab env` exports, once the lab is up
	tty  bool     // whether out shows colours
}

// coloured puts text into an ANSI colour or style where somebody sees it.
func (s *shell) coloured(code, text string) string {
	if !s.tty {
		return text
	}
	return "\033[" + code + "m" + text + "\033[0m"
}

// say prints a line of narration.
func (s *shell) say(format string, args ...any) {
	fmt.Fprintf(s.out, "# "+format+"\n", args...)
}

// show prints a command, runs it and prints what it printed.
func (s *shell) show(ctx context.Context, name string, args ...string) (string, error) {
	fmt.Fprintln(s.out, s.coloured("36", "$ "+quoted(name, args)))
	return s.exec(ctx, s.out, name, args...)
}

// quiet runs a command without a word, to look whether something came true.
func (s *shell) quiet(ctx context.Context, name string, args ...string) (string, error) {
	return s.exec(ctx, io.Discard, name, args...)
}

// onDevice runs a command on a device and shows it.
func (s *shell) onDevice(ctx context.Context, device string, args ...string) (string, error) {
	return s.show(ctx, s.lab, append([]string{"exec", "--name", s.name, device, "--"}, args...)...)
}

func (s *shell) exec(ctx context.Context, out io.Writer, name string, args ...string) (string, error) {
	path, err := s.find(name)
	if err != nil {
		return "", err
	}
	var both bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), s.env...)
	cmd.Stdout = io.MultiWriter(&both, out)
	cmd.Stderr = cmd.Stdout
	if err := cmd.Run(); err != nil {
		return both.String(), fmt.Errorf("%s: %w: %s", quoted(name, args), err, strings.TrimSpace(both.String()))
	}
	return both.String(), nil
}

// find looks a program up in the lab's PATH, which exec.Command would not.
func (s *shell) find(name string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for i := len(s.env) - 1; i >= 0; i-- {
		if path, ok := strings.CutPrefix(s.env[i], "PATH="); ok {
			dir, _, _ := strings.Cut(path, ":")
			if _, err := os.Stat(dir + "/" + name); err == nil {
				return dir + "/" + name, nil
			}
		}
	}
	return exec.LookPath(name)
}

// loadEnv reads what `lab env` exports.
func (s *shell) loadEnv(ctx context.Context) error {
	// The exports are shell, so a shell reads them.
	cmd := exec.CommandContext(ctx, "sh", "-c", `eval "$("$1" env --name "$2")" && env -0`, "sh", s.lab, s.name)
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("cannot read lab env: %w", err)
	}
	s.env = nil
	for pair := range strings.SplitSeq(strings.TrimRight(string(out), "\x00"), "\x00") {
		s.env = append(s.env, pair)
	}
	return nil
}

// quoted is the command as one would type it.
func quoted(name string, args []string) string {
	words := []string{name}
	for _, a := range args {
		if a == "" || strings.ContainsAny(a, " \t\n'\"$`\\*?[]{}()<>|&;#~") {
			a = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
		words = append(words, a)
	}
	return strings.Join(words, " ")
}
