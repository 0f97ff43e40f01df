package report

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// SanitizeText makes text that a device sent fit for terminals and logs:
// without control characters (but line feeds and tabs) and characters that
// change the direction of writing, as valid UTF-8, and cut to at most limit
// bytes, with an ellipsis where it fits. A limit that is not positive leaves
// nothing.
func SanitizeText(s string, limit int) string {
	const ellipsis = "…"
	limit = max(limit, 0)
	// Beyond that nothing is looked at, so that a long text costs nothing.
	whole := len(s) <= 4*limit
	if !whole {
		s = s[:4*limit]
	}
	s = strings.Map(func(r rune) rune {
		if r != '\n' && r != '\t' && (unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r)) {
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, string(utf8.RuneError)))
	if whole && len(s) <= limit {
		return s
	}
	end := limit - len(ellipsis)
	if end < 0 {
		return cut(s, limit)
	}
	return cut(s, end) + ellipsis
}

// cut shortens s to at most n bytes without splitting a character.
func cut(s string, n int) string {
	if n >= len(s) {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
