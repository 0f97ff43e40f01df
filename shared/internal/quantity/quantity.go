// Package quantity guards against quantities that package resource of
// apimachinery parses or computes with for hours (1e-999999999), or whose value
// it gives as zero or negative because an int64 cannot hold it (9E in milli).
package quantity

import (
	"fmt"
	"math"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"
)

// maxText is longer than any canonical quantity that fits into an int64.
const maxText = 40

// Check refuses the text of a quantity that is not safe to parse. Whether it
// is a quantity at all is not checked.
func Check(text string) error {
	if len(text) > maxText {
		return fmt.Errorf("quantity of %d characters, at most %d", len(text), maxText)
	}
	if i := strings.LastIndexAny(text, "eE"); i >= 0 && len(strings.TrimLeft(text[i+1:], "+-")) > 2 {
		return fmt.Errorf("quantity %q has too large an exponent", text)
	}
	return nil
}

// Value is q in whole units, Milli in thousandths: rounded up, and
// math.MaxInt64 for all that is more. Both want a q that Check accepts.
func Value(q *resource.Quantity) int64 { return capped(q, q.Value, math.MaxInt64) }

// Milli is q in thousandths, see Value.
func Milli(q *resource.Quantity) int64 { return capped(q, q.MilliValue, math.MaxInt64/1000) }

func capped(q *resource.Quantity, value func() int64, limit int64) int64 {
	if q.CmpInt64(limit) > 0 {
		return math.MaxInt64
	}
	return value()
}
