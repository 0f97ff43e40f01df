package arch_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// file is what the rules look at in a Go file.
type file struct {
	folder, name string
	imports      []string
	test, doc    bool
	// clocks are the calls of package time that depend on the moment.
	clocks []string
}

// TestProject checks all rules on all files.
func TestProject(t *testing.T) {
	files := load(t, "../..")
	require.NotEmpty(t, files)
	for _, problem := range violations(files) {
		t.Error(problem)
	}
}

// violations lists what breaks a rule, one line each.
func violations(files []file) []string {
	var problems []string
	for _, f := range files {
		place := path.Join(f.folder, f.name)
		for _, r := range append(workerRules(), rules...) {
			for _, imported := range f.imports {
				if r.forbids(f, imported) {
					problems = append(problems, fmt.Sprintf("%s imports %s: %s", place, imported, r.why))
				}
			}
		}
		if !f.test && within(f.folder, append([]string{"shared"}, pure...)) {
			for _, call := range f.clocks {
				problems = append(problems, fmt.Sprintf("%s calls time.%s: the moment is an argument of pure functions", place, call))
			}
		}
	}
	return append(problems, undocumented(files)...)
}

// workerRules keeps workers apart from each other.
func workerRules() []rule {
	var out []rule
	for _, group := range [][]string{shimWorkers, agentWorkers} {
		for _, worker := range group {
			others := slices.DeleteFunc(slices.Clone(group), func(s string) bool { return s == worker })
			out = append(out, rule{in: []string{worker}, deny: others, why: "workers declare the interface that they need and never import each other"})
		}
	}
	return out
}

func (r rule) forbids(f file, imported string) bool {
	if f.test && !r.tests || !within(f.folder, r.in) || r.exempts(f.folder) {
		return false
	}
	own, isOwn := strings.CutPrefix(imported, module)
	if isOwn && own == f.folder {
		return false // a test from outside of the package that it tests
	}
	if within(own, r.deny) && !slices.Contains(harmless, imported) {
		return true
	}
	if r.allow == nil {
		return false
	}
	if !isOwn && !strings.Contains(strings.SplitN(imported, "/", 2)[0], ".") {
		return !slices.Contains(r.allow, std)
	}
	return !within(own, r.allow)
}

// exempts says whether folder is an exception. The folder of a main package is
// one only for itself, not for what is below it.
func (r rule) exempts(folder string) bool {
	for _, e := range r.except {
		if folder == e || strings.Contains(e, "/") && within(folder, []string{e}) {
			return true
		}
	}
	return false
}

// harmless are packages below forbidden ones that only compute.
var harmless = []string{"net/netip", "net/url"}

// within says whether name is one of the paths or below one.
func within(name string, paths []string) bool {
	return slices.ContainsFunc(paths, func(p string) bool { return name == p || strings.HasPrefix(name, p+"/") })
}

// undocumented lists packages that do not have exactly one package comment.
func undocumented(files []file) []string {
	docs, comments := map[string][]string{}, map[string]bool{}
	for _, f := range files {
		if f.doc {
			docs[f.folder] = append(docs[f.folder], f.name)
		}
		comments[f.folder] = true
	}
	var problems []string
	for folder := range comments {
		if n := len(docs[folder]); n != 1 {
			problems = append(problems, fmt.Sprintf("%s has %d package comments, not one: %s", folder, n, strings.Join(docs[folder], ", ")))
		}
	}
	slices.Sort(problems)
	return problems
}

// load reads the Go files of this module in its folders (not in its root).
func load(t *testing.T, root string) []file {
	t.Helper()
	var files []file
	require.NoError(t, filepath.WalkDir(root, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		if entry.IsDir() {
			_, err := os.Stat(filepath.Join(name, "go.mod"))
			if hidden := strings.HasPrefix(entry.Name(), ".") && relative != "."; hidden || entry.Name() == "testdata" || entry.Name() == "bin" || err == nil && relative != "." {
				return filepath.SkipDir
			}
			return nil
		}
		if filepath.Ext(name) != ".go" || filepath.Dir(relative) == "." {
			return nil
		}
		f, err := read(name, filepath.ToSlash(relative), nil)
		files = append(files, f)
		return err
	}))
	return files
}

// read parses a file; source is its content, or nil to read it from name.
func read(name, relative string, source any) (file, error) {
	parsed, err := parser.ParseFile(token.NewFileSet(), name, source, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return file{}, err
	}
	f := file{folder: path.Dir(relative), name: path.Base(relative), test: strings.HasSuffix(relative, "_test.go"), doc: parsed.Doc.Text() != ""}
	for _, spec := range parsed.Imports {
		imported, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return file{}, err
		}
		f.imports = append(f.imports, imported)
	}
	ast.Inspect(parsed, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok {
			if x, ok := s.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains(clocks, s.Sel.Name) {
				f.clocks = append(f.clocks, s.Sel.Name)
			}
		}
		return true
	})
	return f, nil
}

// TestRules breaks each rule on purpose.
func TestRules(t *testing.T) {
	for name, c := range map[string]struct {
		file, imported string
		want           bool
	}{
		"shared computes":                  {"shared/bundle/a.go", "encoding/json", false},
		"shared knows addresses":           {"shared/bundle/a.go", "net/netip", false},
		"shared has no network":            {"shared/bundle/a.go", "net/http", true},
		"shared has no files":              {"shared/bundle/a.go", "os", true},
		"shared runs nothing":              {"shared/bundle/a.go", "os/exec", true},
		"shared does not log":              {"shared/bundle/a.go", "log/slog", true},
		"shared has types":                 {"shared/bundle/a.go", "k8s.io/api/core/v1", false},
		"shared has no client":             {"shared/bundle/a.go", "k8s.io/client-go/kubernetes", true},
		"shared uses itself":               {"shared/bundle/a.go", module + "shared/seal", false},
		"shared is below":                  {"shared/bundle/a.go", module + "cluster-shim/podsync", true},
		"tests of shared read files":       {"shared/bundle/a_test.go", "os", false},
		"tests of shared are below, too":   {"shared/bundle/a_test.go", module + "device-agent/plan", true},
		"helpers in admit":                 {"shared/admit/a.go", "k8s.io/component-helpers/resource", false},
		"other helpers in admit":           {"shared/admit/a.go", "k8s.io/component-helpers/apps", true},
		"helpers elsewhere":                {"shared/seal/a.go", "k8s.io/component-helpers/resource", true},
		"no files in admit":                {"shared/admit/a.go", "os", true},
		"shim to agent":                    {"cluster-shim/podsync/a.go", module + "device-agent/plan", true},
		"agent to shim, in a test":         {"device-agent/plan/a_test.go", module + "cluster-shim/podsync", true},
		"a name that only looks alike":     {"cluster-shim/podsync/a.go", module + "device-agents", false},
		"pure to pure":                     {"device-agent/plan/a.go", module + "device-agent/unit", false},
		"pure to worker":                   {"device-agent/plan/a.go", module + "device-agent/apply", true},
		"pure to client":                   {"cluster-shim/podstatus/a.go", "k8s.io/client-go/kubernetes", true},
		"pure to log":                      {"cluster-shim/podstatus/a.go", "log/slog", true},
		"worker to pure":                   {"device-agent/apply/a.go", module + "device-agent/plan", false},
		"worker to worker":                 {"cluster-shim/podsync/a.go", module + "cluster-shim/delivery", true},
		"main to config":                   {"cluster-shim/main.go", module + "cluster-shim/config", false},
		"package to config":                {"cluster-shim/podsync/a.go", module + "cluster-shim/config", true},
		"config's own tests":               {"cluster-shim/config/a_test.go", module + "cluster-shim/config", false},
		"tests of others to config":        {"cluster-shim/podsync/a_test.go", module + "cluster-shim/config", true},
		"viper in config":                  {"device-agent/config/a.go", "github.com/spf13/viper", false},
		"viper elsewhere":                  {"device-agent/main.go", "github.com/spf13/viper", true},
		"Flightctl in flightapi":           {"cluster-shim/flightapi/a.go", "github.com/flightctl/flightctl/client", false},
		"Flightctl elsewhere":              {"cluster-shim/inventory/a.go", "github.com/flightctl/flightctl/client", true},
		"podman in podman":                 {"device-agent/podman/a.go", "github.com/containers/podman/v5/pkg/bindings", false},
		"podman elsewhere":                 {"device-agent/apply/a.go", "github.com/containers/podman/v5/pkg/bindings", true},
		"D-Bus elsewhere":                  {"device-agent/apply/a.go", "github.com/coreos/go-systemd/v22/dbus", true},
		"notifying systemd is no D-Bus":    {"device-agent/main.go", "github.com/coreos/go-systemd/v22/daemon", false},
		"product does not depend on tests": {"device-agent/apply/a.go", module + "test/lab", true},
		"no testify in the product":        {"device-agent/apply/a.go", "github.com/stretchr/testify/assert", true},
		"testify in tests":                 {"device-agent/apply/a_test.go", "github.com/stretchr/testify/assert", false},
		"tests do as they like":            {"test/lab/a.go", "github.com/flightctl/flightctl/client", false},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := read("a.go", c.file, "// Package a is an example.\npackage a\nimport _ "+strconv.Quote(c.imported))
			require.NoError(t, err)
			problems := violations([]file{f})
			assert.Equal(t, c.want, len(problems) > 0, "%v", problems)
		})
	}
}

func TestClocks(t *testing.T) {
	const source = "// Package a is an example.\npackage a\nimport \"time\"\nvar now = time.Now()\nvar second = time.Second"
	for place, want := range map[string]int{
		"shared/a/a.go": 1, "device-agent/plan/a.go": 1,
		"shared/a/a_test.go": 0, "device-agent/apply/a.go": 0,
	} {
		f, err := read("a.go", place, source)
		require.NoError(t, err)
		assert.Len(t, violations([]file{f}), want, place)
	}
}

func TestUndocumented(t *testing.T) {
	assert.Empty(t, undocumented([]file{{folder: "a", doc: true}, {folder: "a"}}))
	assert.Len(t, undocumented([]file{{folder: "a"}, {folder: "a"}}), 1)
	assert.Len(t, undocumented([]file{{folder: "a", doc: true}, {folder: "a", doc: true}}), 1)
}
