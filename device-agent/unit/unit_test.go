package unit

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/tools/txtar"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// readWords splits a command line by systemd's rules for Exec…=: quotes, C
// escapes, %% and, in the resulting words, $$. Anything else with a meaning
// to systemd fails the test.
func readWords(t *testing.T, line string) []string {
	t.Helper()
	var words []string
	for i := 0; i < len(line); {
		if line[i] == ' ' {
			i++
			continue
		}
		var raw strings.Builder
		quoted := line[i] == '"'
		if quoted {
			i++
		}
		for {
			if i == len(line) {
				require.False(t, quoted, "quote is not closed")
				break
			}
			c := line[i]
			if quoted && c == '"' {
				i++
				break
			}
			if !quoted && c == ' ' {
				break
			}
			require.True(t, quoted || c != '"' && c != '\'' && c != '\\' && c != ';', "bare %q", c)
			require.True(t, c >= 0x20 && c != 0x7f, "control character in a unit file")
			switch c {
			case '\\':
				require.Less(t, i+1, len(line))
				switch line[i+1] {
				case '\\', '"':
					raw.WriteByte(line[i+1])
					i += 2
				case 'n':
					raw.WriteByte('\n')
					i += 2
				case 'x':
					n, err := strconv.ParseUint(line[i+2:i+4], 16, 8)
					require.NoError(t, err)
					raw.WriteByte(byte(n))
					i += 4
				default:
					require.Fail(t, "unknown escape", line[i:])
				}
			default:
				raw.WriteByte(c)
				i++
			}
		}
		word := raw.String()
		for _, special := range []string{"%", "$"} {
			require.NotContains(t, strings.ReplaceAll(word, special+special, ""), special)
			word = strings.ReplaceAll(word, special+special, special)
		}
		words = append(words, word)
	}
	return words
}

func FuzzQuote(f *testing.F) {
	for _, s := range []string{"", "plain", "a b", `"`, `'`, `\`, `ends in \`, "%h", "${HOME}", "$$", "$", "a\nExecStartPre=/bin/x", "\r\t\x01\x7f", "\xff\xfe", ";", "-x", "@!+", "ü…", "#", "a\x00b"} {
		f.Add(s, "second")
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		line, err := commandLine([]string{a, b})
		if strings.ContainsRune(a+b, 0) {
			require.Error(t, err)
			return
		}
		require.NoError(t, err)
		require.Equal(t, []string{a, b}, readWords(t, line))
	})
}

func testInput(pod *corev1.Pod) Input {
	in := Input{
		Pod:     pod,
		Host:    Host{Agent: "/usr/bin/jetbridge-agent", Podman: "/usr/bin/podman", StateDir: "/var/lib/jetbridge/pods/" + string(pod.UID), RunDir: "/run/jetbridge/pods/" + string(pod.UID)},
		Sources: map[string]string{},
		Expand: func(_, name string) (string, bool, error) {
			if name == "SECRET" {
				return "", false, errors.New("is secret")
			}
			return "value-of-" + name, name != "MISSING", nil
		},
	}
	for _, v := range pod.Spec.Volumes {
		in.Sources[v.Name] = "/volumes/" + v.Name
	}
	return in
}

func TestRenderGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			archive, err := txtar.ParseFile(file)
			require.NoError(t, err)
			require.Equal(t, "pod.yaml", archive.Files[0].Name)
			var pod corev1.Pod
			require.NoError(t, yaml.UnmarshalStrict(archive.Files[0].Data, &pod))
			units, errs := Render(testInput(&pod))
			got := txtar.Archive{Comment: archive.Comment, Files: archive.Files[:1]}
			for _, u := range units {
				got.Files = append(got.Files, txtar.File{Name: u.Name, Data: []byte(u.Content)})
			}
			if len(errs) > 0 {
				got.Files = append(got.Files, txtar.File{Name: "errors", Data: []byte(errs.ToAggregate().Error() + "\n")})
			}
			text := txtar.Format(&got)
			if *update {
				require.NoError(t, os.WriteFile(file, text, 0o644))
			}
			want, err := os.ReadFile(file)
			require.NoError(t, err)
			assert.Equal(t, string(want), string(text))
		})
	}
}

func TestNames(t *testing.T) {
	pod := &corev1.Pod{}
	pod.Namespace, pod.Name, pod.UID = strings.Repeat("n", 63), strings.Repeat("p", 253), "uid"
	pod.Spec.InitContainers = []corev1.Container{{Name: "i", Image: "a"}}
	pod.Spec.Containers = []corev1.Container{{Name: strings.Repeat("c", 63), Image: "a"}, {Name: strings.Repeat("c", 62) + "d", Image: "a"}}
	n := NamesFor(pod)
	seen := map[string]bool{n.Pod: true, n.Slice: true}
	for _, c := range n.All() {
		assert.LessOrEqual(t, len(c.Unit), 255)
		assert.False(t, seen[c.Unit], "names are unique")
		seen[c.Unit] = true
	}
	assert.NotContains(t, n.Slice, "-")

	other := pod.DeepCopy()
	other.Spec.Containers[0].Image = "b"
	m := NamesFor(other)
	assert.Equal(t, n.Pod, m.Pod, "a new image does not restart the sandbox")
	assert.NotEqual(t, n.Mains[0], m.Mains[0])
	assert.Equal(t, n.Mains[1], m.Mains[1])

	other = pod.DeepCopy()
	other.Spec.InitContainers[0].Image = "b"
	assert.NotEqual(t, n.Mains[1].Unit, NamesFor(other).Mains[1].Unit, "its unit refers to the init container's")

	other = pod.DeepCopy()
	other.UID = "another"
	assert.NotEqual(t, n.Pod, NamesFor(other).Pod)
}

func TestExpand(t *testing.T) {
	value := func(name string) (string, bool) { return "<" + name + ">", name != "NO" }
	for in, want := range map[string]string{
		"$(A)": "<A>", "x$(A)y$(B)": "x<A>y<B>", "$$(A)": "$(A)", "$(NO)": "$(NO)", "$A": "$A", "$": "$", "$(": "$(", "$(A": "$(A", "$$$(A)": "$<A>", "": "",
	} {
		assert.Equal(t, want, Expand(in, value), in)
	}
}

func TestHostname(t *testing.T) {
	pod := &corev1.Pod{}
	pod.Name = strings.Repeat("a", 62) + ".b"
	assert.Equal(t, strings.Repeat("a", 62), Hostname(pod))
	pod.Spec.Hostname = "h"
	assert.Equal(t, "h", Hostname(pod))
}
