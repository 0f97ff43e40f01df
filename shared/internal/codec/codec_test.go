package codec_test

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"errors"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/jetbridge/jetbridge/shared/internal/codec"
)

type document struct {
	FormatVersion int                 `json:"formatVersion"`
	Device        string              `json:"device"`
	Pods          []corev1.Pod        `json:"pods,omitempty"`
	Capacity      corev1.ResourceList `json:"capacity,omitempty"`
	Data          map[string][]byte   `json:"data,omitempty"`
}

var (
	errTooLarge       = errors.New("too large")
	errTruncated      = errors.New("truncated")
	errCorrupt        = errors.New("corrupt")
	errUnknownVersion = errors.New("unknown version")
	errForeignDevice  = errors.New("foreign device")

	format = codec.Format{
		Name: "document", Version: 1, MaxPacked: 64 << 10, MaxPlain: 4 << 20,
		TooLarge: errTooLarge, Truncated: errTruncated, Corrupt: errCorrupt, UnknownVersion: errUnknownVersion, ForeignDevice: errForeignDevice,
	}
)

func zip(t *testing.T, text string) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, err := w.Write([]byte(text))
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return base64.StdEncoding.AppendEncode(nil, out.Bytes())
}

// wrap is a document with this text inside.
func wrap(text string) string { return `{"formatVersion":1,"device":"d",` + text + `}` }

func TestDecode_errors(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		want error
	}{
		"good":                     {wrap(`"pods":[{"spec":{"containers":[{"name":"a"}]}}]`), nil},
		"no JSON":                  {`x`, errCorrupt},
		"empty":                    {``, errCorrupt},
		"other type":               {`[]`, errCorrupt},
		"null":                     {`null`, errUnknownVersion},
		"version as text":          {`{"formatVersion":"1"}`, errCorrupt},
		"newer version":            {`{"formatVersion":2,"device":"d","strange":{}}`, errUnknownVersion},
		"other device":             {`{"formatVersion":1,"device":"e","strange":{}}`, errForeignDevice},
		"no device":                {`{"formatVersion":1}`, errForeignDevice},
		"unknown field":            {wrap(`"strange":1`), errCorrupt},
		"unknown field inside":     {wrap(`"pods":[{"spec":{"strange":1}}]`), errCorrupt},
		"misspelt field":           {wrap(`"Pods":[]`), errCorrupt},
		"data after it":            {wrap(`"pods":[]`) + `{}`, errCorrupt},
		"cut JSON":                 {wrap(`"pods":[]`)[:20], errCorrupt},
		"wrong type inside":        {wrap(`"pods":[0]`), errCorrupt},
		"plain too large":          {wrap(`"data":{"a":"` + strings.Repeat("A", 4<<20) + `"}`), errTooLarge},
		"list bomb":                {wrap(`"pods":[{}` + strings.Repeat(",{}", 1<<17) + `]`), errTooLarge},
		"list bomb of nulls":       {wrap(`"pods":[null` + strings.Repeat(",null", 1<<17) + `]`), errTooLarge},
		"map bomb":                 {wrap(`"data":{"a":""` + strings.Repeat(`,"":""`, 1<<19) + `}`), errTooLarge},
		"depth bomb":               {strings.Repeat("[", 1<<20), errCorrupt},
		"depth bomb inside":        {wrap(`"pods":` + strings.Repeat("[", 9000) + strings.Repeat("]", 9000)), errCorrupt},
		"depth in a free form":     {wrap(`"pods":[{"metadata":{"managedFields":[{"fieldsV1":` + strings.Repeat(`{"a":`, 80) + `1` + strings.Repeat("}", 80) + `}]}}]`), errCorrupt},
		"quantity that is endless": {wrap(`"capacity":{"cpu":"1e-999999999"}`), errCorrupt},
		"the same as a number":     {wrap(`"capacity":{"cpu":1e-999999999}`), errCorrupt},
		"the same, misspelt":       {wrap(`"Capacity":{"cpu":"1e-999999999"}`), errCorrupt},
		"the same, embedded deep":  {wrap(`"pods":[{"spec":{"volumes":[{"emptyDir":{"sizeLimit":"1e-999999999"}}]}}]`), errCorrupt},
		"the same, with spaces":    {wrap(`"capacity":{"cpu":"  1e-999999999  "}`), errCorrupt},
		"no quantity":              {wrap(`"capacity":{"cpu":"much"}`), errCorrupt},
		"such a text elsewhere":    {wrap(`"pods":[{"spec":{"containers":[{"args":["1e-999999999"]}]}}]`), nil},
	} {
		t.Run(name, func(t *testing.T) {
			var d document
			err := format.Decode(zip(t, c.text), "d", &d)
			if c.want == nil {
				require.NoError(t, err)
				return
			}
			require.ErrorIs(t, err, c.want)
			for _, other := range []error{errTooLarge, errTruncated, errCorrupt, errUnknownVersion, errForeignDevice} {
				if !errors.Is(c.want, other) {
					require.NotErrorIs(t, err, other, "one error only")
				}
			}
			assert.Less(t, len(err.Error()), 500, "a message, no dump")
		})
	}
}

func TestDecode_container(t *testing.T) {
	good := zip(t, wrap(`"pods":[]`))
	zipped, err := base64.StdEncoding.AppendDecode(nil, good)
	require.NoError(t, err)
	with := func(more string) []byte {
		return base64.StdEncoding.AppendEncode(nil, append(bytes.Clone(zipped), more...))
	}
	var d document
	require.ErrorIs(t, format.Decode(make([]byte, format.MaxPacked+1), "d", &d), errTooLarge)
	require.ErrorIs(t, format.Decode([]byte("no base64 at all"), "d", &d), errCorrupt)
	require.ErrorIs(t, format.Decode(base64.StdEncoding.AppendEncode(nil, []byte("no gzip at all")), "d", &d), errCorrupt)
	require.ErrorIs(t, format.Decode(with("more"), "d", &d), errTruncated, "looks like the start of another part")
	require.ErrorIs(t, format.Decode(with(strings.Repeat("more", 10)), "d", &d), errCorrupt)
	require.ErrorIs(t, format.Decode(with(string(zipped)), "d", &d), errCorrupt, "two documents")
}

func TestEncode(t *testing.T) {
	in := document{FormatVersion: 1, Device: "d", Pods: []corev1.Pod{{ObjectMeta: metav1.ObjectMeta{Name: "a"}}}}
	packed, err := format.Encode(&in)
	require.NoError(t, err)
	again, err := format.Encode(&in)
	require.NoError(t, err)
	assert.Equal(t, packed, again, "the same bytes for the same document")
	var out document
	require.NoError(t, format.Decode(packed, "d", &out))
	assert.Equal(t, in, out)
}

// TestEncode_refusesWhatDecodeRefuses: no side sends what the other rejects.
func TestEncode_refusesWhatDecodeRefuses(t *testing.T) {
	random := make([]byte, 80<<10)
	for i, x := 0, uint32(1); i < len(random); i++ {
		x = x*1664525 + 1013904223
		random[i] = byte(x >> 24)
	}
	for name, d := range map[string]document{
		"packed":   {Data: map[string][]byte{"a": random}},
		"plain":    {Data: map[string][]byte{"a": make([]byte, 4<<20)}},
		"elements": {Pods: []corev1.Pod{{Spec: corev1.PodSpec{Containers: []corev1.Container{{Args: make([]string, 1<<16)}}}}}},
	} {
		_, err := format.Encode(&d)
		require.ErrorIs(t, err, errTooLarge, name)
	}
}
