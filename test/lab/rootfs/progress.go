package rootfs

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// phases are debootstrap's, in their order, by the first word of its lines.
var phases = [...]string{"Retrieving", "Validating", "Extracting", "Unpacking", "Configuring"}

// tracker reads the output of a build and tells how far it is.
type tracker struct {
	name     string
	progress io.Writer
	start    time.Time

	mu       sync.Mutex // guards everything that follows
	lines    lines
	step     string // debootstrap's current line
	phase    string
	count    int // lines of this phase so far
	packages int // what there is to configure, once known
	last     []string
}

func newTracker(name string, progress io.Writer, start time.Time) *tracker {
	t := &tracker{name: name, progress: progress, start: start, step: "starting"}
	t.lines.f = t.line
	fmt.Fprintf(progress, "tree %s: building (once; the result is cached)\n", name)
	return t
}

// Write takes output of the build.
func (t *tracker) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.lines.Write(p)
}

// line is called with mu held.
func (t *tracker) line(line string) {
	const keep = 20
	t.last = append(t.last, line)
	if len(t.last) > keep {
		t.last = t.last[len(t.last)-keep:]
	}
	step, ok := strings.CutPrefix(line, "I: ")
	if !ok {
		return
	}
	t.step = step
	word, _, _ := strings.Cut(step, " ")
	for _, phase := range phases {
		if word != phase {
			continue
		}
		if phase == "Validating" {
			t.packages++
		}
		if phase != t.phase {
			t.phase, t.count = phase, 0
		}
		t.count++
	}
}

// beat writes a line of progress every interval until the returned function is called.
func (t *tracker) beat(interval time.Duration) (stop func()) {
	var wg sync.WaitGroup
	ended := make(chan struct{})
	wg.Go(func() {
		ticker := time.NewTicker(interval)
		defer ticker.Stop()
		for {
			select {
			case <-ended:
				return
			case now := <-ticker.C:
				fmt.Fprintln(t.progress, t.summary(now))
			}
		}
	})
	return func() {
		close(ended)
		wg.Wait()
	}
}

// summary is one line: what is being done, for how long, and how far.
func (t *tracker) summary(now time.Time) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	far := ""
	switch t.phase {
	case "Retrieving", "Validating":
		far = fmt.Sprintf(" (1 of 3: %d packages so far)", t.packages)
	case "Extracting":
		far = " (1 of 3)"
	case "Unpacking":
		far = fmt.Sprintf(" (2 of 3: package %d of about %d)", min(t.count, t.packages), t.packages)
	case "Configuring":
		far = fmt.Sprintf(" (3 of 3: package %d of about %d)", min(t.count, t.packages), t.packages)
	}
	return fmt.Sprintf("tree %s: %s: %s%s", t.name, now.Sub(t.start).Round(time.Second), t.step, far)
}

// tail is the end of the output.
func (t *tracker) tail() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.Join(t.last, "\n")
}

func (t *tracker) done(now time.Time) {
	fmt.Fprintf(t.progress, "tree %s: ready after %s\n", t.name, now.Sub(t.start).Round(time.Second))
}
