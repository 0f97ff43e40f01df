package unit

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// safe are the characters that need no quotes in a command line of a unit.
const safe = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./:=,@+-"

// Quote writes one argument of Exec…= so that systemd passes on exactly arg:
// no specifier, variable, quote or escape in it has a meaning. NUL, which no
// argument can hold, is an error.
func Quote(arg string) (string, error) {
	if strings.IndexByte(arg, 0) >= 0 {
		return "", fmt.Errorf("%q has a NUL character", arg)
	}
	if arg != "" && strings.Trim(arg, safe) == "" && onlySafe(arg) {
		return arg, nil
	}
	var b strings.Builder
	b.WriteByte('"')
	for i := 0; i < len(arg); {
		r, size := utf8.DecodeRuneInString(arg[i:])
		switch {
		case r == utf8.RuneError && size == 1: // systemd refuses lines that are not UTF-8
			fmt.Fprintf(&b, `\x%02x`, arg[i])
		case r == '\\' || r == '"':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r == '%':
			b.WriteString("%%")
		case r == '$':
			b.WriteString("$$")
		case r == '\n':
			b.WriteString(`\n`)
		case r < 0x20 || r == 0x7f:
			fmt.Fprintf(&b, `\x%02x`, r)
		default:
			b.WriteString(arg[i : i+size])
		}
		i += size
	}
	b.WriteByte('"')
	return b.String(), nil
}

func onlySafe(s string) bool {
	for i := range len(s) {
		if strings.IndexByte(safe, s[i]) < 0 {
			return false
		}
	}
	return true
}

// commandLine quotes a whole command. Its first word is a path of ours.
func commandLine(argv []string) (string, error) {
	words := make([]string, len(argv))
	for i, a := range argv {
		q, err := Quote(a)
		if err != nil {
			return "", err
		}
		words[i] = q
	}
	return strings.Join(words, " "), nil
}
