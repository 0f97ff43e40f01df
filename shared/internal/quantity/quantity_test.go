package quantity_test

import (
	"math"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/jetbridge/jetbridge/shared/internal/quantity"
)

func TestCheck(t *testing.T) {
	for _, good := range []string{"", "0", "1", "-1", "100m", "1.5Gi", "8E", "16Ei", "1e3", "1E3", "12e-9", "1e+18", "9223372036854775807", "no number"} {
		require.NoError(t, quantity.Check(good), good)
	}
	for _, bad := range []string{"1e999", "1e-999999999", "1E+100", strings.Repeat("9", 41)} {
		require.Error(t, quantity.Check(bad), bad)
	}
}

func TestValueAndMilli(t *testing.T) {
	for text, want := range map[string]struct{ value, milli int64 }{
		"0":                   {0, 0},
		"1":                   {1, 1000},
		"1m":                  {1, 1},
		"1500u":               {1, 2},
		"9223372036854775":    {9223372036854775, 9223372036854775000},
		"9223372036854775807": {math.MaxInt64, math.MaxInt64},
		"9223372036854775808": {math.MaxInt64, math.MaxInt64},
		"9E":                  {9e18, math.MaxInt64},
		"10E":                 {math.MaxInt64, math.MaxInt64},
		"16Ei":                {math.MaxInt64, math.MaxInt64},
		"1e99":                {math.MaxInt64, math.MaxInt64},
	} {
		q := resource.MustParse(text)
		assert.Equal(t, want.value, quantity.Value(&q), "value of %s", text)
		assert.Equal(t, want.milli, quantity.Milli(&q), "milli of %s", text)
	}
}
