package report_test

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"

	"github.com/jetbridge/jetbridge/shared/report"
)

func TestSanitizeText(t *testing.T) {
	for _, c := range []struct {
		name  string
		in    string
		limit int
		want  string
	}{
		{"plain", "exit code 1", 100, "exit code 1"},
		{"lines and tabs stay", "a\n\tb", 100, "a\n\tb"},
		{"other alphabets stay", "Grüße, 世界 🚀", 100, "Grüße, 世界 🚀"},
		{"colours", "\x1b[31mred\x1b[0m", 100, "[31mred[0m"},
		{"title of the window", "\x1b]0;pwned\x07x", 100, "]0;pwnedx"},
		{"8-bit control sequence", "a\u009b31mb", 100, "a31mb"},
		{"carriage return", "good\rbad\r\n", 100, "goodbad\n"},
		{"NUL, backspace and delete", "a\x00b\bc\x7f", 100, "abc"},
		{"direction of writing", "a\u202eb\u2066c\u200f", 100, "abc"},
		{"invalid UTF-8", "a\xff\xfeb", 100, "a\ufffdb"},
		{"exact", "12345", 5, "12345"},
		{"too long", "123456", 5, "12…"},
		{"no character is split", "ää…ää", 8, "ää…"},
		{"no room for an ellipsis", "äääää", 1, ""},
		{"two bytes", "äääää", 2, "ä"},
		{"nothing", "abc", 0, ""},
		{"less than nothing", "abc", -1, ""},
		{"nothing but control", strings.Repeat("\x1b", 100), 5, "…"},
	} {
		t.Run(c.name, func(t *testing.T) {
			assert.Equal(t, c.want, report.SanitizeText(c.in, c.limit))
		})
	}
}

func FuzzSanitizeText(f *testing.F) {
	f.Add("\x1b[31mred\xff", 5)
	f.Add(strings.Repeat("ä", 20), 7)
	f.Fuzz(func(t *testing.T, s string, limit int) {
		limit %= 1 << 20
		out := report.SanitizeText(s, limit)
		assert.LessOrEqual(t, len(out), max(limit, 0))
		assert.True(t, utf8.ValidString(out))
		assert.NotContains(t, out, "\x1b")
		assert.Equal(t, out, report.SanitizeText(out, limit), "clean text stays")
	})
}
