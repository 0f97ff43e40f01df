package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/jetbridge/jetbridge/test/lab/internal/layout"
)

// followInterval is how often a followed log is looked at.
const followInterval = 200 * time.Millisecond

// Logs prints the log of a component or a device's console, and goes on with
// what is added until ctx ends if follow is set.
func Logs(ctx context.Context, lab layout.Lab, name string, follow bool, out io.Writer) error {
	if filepath.Base(name) != name {
		return fmt.Errorf("no log %q", name)
	}
	f, err := os.Open(lab.Log(name))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("no log of %q; there are: %s", name, strings.Join(logNames(lab), " "))
	}
	if err != nil {
		return fmt.Errorf("cannot open log: %w", err)
	}
	defer f.Close()
	tick := time.NewTicker(followInterval)
	defer tick.Stop()
	for {
		if _, err := io.Copy(out, f); err != nil {
			return fmt.Errorf("cannot read log: %w", err)
		}
		if !follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func logNames(lab layout.Lab) []string {
	entries, err := os.ReadDir(lab.Path("logs"))
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		names = append(names, strings.TrimSuffix(e.Name(), ".log"))
	}
	return names
}
