package report_test

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/jetbridge/jetbridge/shared/report"
)

var update = flag.Bool("update", false, "rewrite golden files")

const device = "a1b2c3"

func sample() *report.Report {
	started := metav1.NewTime(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC))
	return &report.Report{
		FormatVersion: report.FormatVersion, Device: device, BootID: "boot", Sequence: 12, AgentVersion: "v0.1.0",
		KeyID: "0123456789abcdef", PublicKey: bytes.Repeat([]byte{9}, 32), Observed: 4, Applied: 3,
		LastError: &report.Error{Reason: "InvalidBundle", Message: "bundle is corrupt", Generation: 4},
		Capacity:  corev1.ResourceList{"cpu": resource.MustParse("4"), "memory": resource.MustParse("8Gi"), "pods": resource.MustParse("110")},
		System:    corev1.NodeSystemInfo{Architecture: "arm64", OperatingSystem: "linux", BootID: "boot"},
		Pods: []report.Pod{
			{Namespace: "shop", Name: "web", UID: "uid-web", Status: corev1.PodStatus{
				Phase: corev1.PodRunning, PodIP: "10.88.0.2", StartTime: &started,
				ContainerStatuses: []corev1.ContainerStatus{{Name: "web", Ready: true, RestartCount: 2, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: started}}}},
			}},
			{Namespace: "shop", Name: "job", UID: "uid-job", Stopped: true, Status: corev1.PodStatus{Phase: corev1.PodSucceeded}},
		},
		Tombstones: []types.UID{"uid-old", "uid-web"},
	}
}

func encode(t testing.TB, r *report.Report) string {
	t.Helper()
	text, err := r.Encode()
	require.NoError(t, err)
	return text
}

// pack encodes any JSON, whether it is a report or not.
func pack(t *testing.T, text string) string {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, err := w.Write([]byte(text))
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return base64.StdEncoding.EncodeToString(out.Bytes())
}

func TestGolden_json(t *testing.T) {
	text, err := json.MarshalIndent(sample(), "", "  ")
	require.NoError(t, err)
	golden(t, "testdata/report.json", append(text, '\n'))
}

// TestGolden_encoded reads a report that an earlier build encoded.
func TestGolden_encoded(t *testing.T) {
	const file = "testdata/report.v1"
	if *update {
		require.NoError(t, os.WriteFile(file, []byte(encode(t, sample())+"\n"), 0o644))
	}
	data, err := os.ReadFile(file)
	require.NoError(t, err)
	r, err := report.Decode(string(data), device)
	require.NoError(t, err)
	want, err := json.Marshal(sample())
	require.NoError(t, err)
	have, err := json.Marshal(r)
	require.NoError(t, err)
	assert.JSONEq(t, string(want), string(have))
}

func golden(t *testing.T, file string, have []byte) {
	t.Helper()
	if *update {
		require.NoError(t, os.WriteFile(file, have, 0o644))
	}
	want, err := os.ReadFile(file)
	require.NoError(t, err)
	assert.Equal(t, string(want), string(have), "if this is meant: go test ./shared/report -update")
}

func TestRoundTrip(t *testing.T) {
	text := encode(t, sample())
	assert.Equal(t, text, encode(t, sample()), "byte for byte the same while nothing changes")
	for _, form := range []string{text, text + "\n", " \r\n" + text + "\r\n"} {
		r, err := report.Decode(form, device)
		require.NoError(t, err)
		assert.Equal(t, text, encode(t, r))
	}
}

func TestDecode_errors(t *testing.T) {
	with := func(member string) string {
		return pack(t, fmt.Sprintf(`{"formatVersion":1,"device":%q,%s}`, device, member))
	}
	for name, c := range map[string]struct {
		text string
		want error
	}{
		"nothing":            {"", report.ErrNoData},
		"white space":        {" \n", report.ErrNoData},
		"too large":          {strings.Repeat("A", report.MaxEncodedSize+1), report.ErrTooLarge},
		"50 MB":              {strings.Repeat("A", 50<<20), report.ErrTooLarge},
		"bomb":               {pack(t, strings.Repeat(" ", report.MaxDecodedSize+1)), report.ErrTooLarge},
		"bomb of pods":       {with(`"pods":[{}` + strings.Repeat(",{}", 1<<20) + `]`), report.ErrTooLarge},
		"depth bomb":         {pack(t, strings.Repeat("[", 1<<20)), report.ErrCorrupt},
		"no base64":          {"!!!!", report.ErrCorrupt},
		"loose base64":       {"AB==", report.ErrCorrupt},
		"no gzip":            {base64.StdEncoding.EncodeToString([]byte("no gzip at all")), report.ErrCorrupt},
		"no JSON":            {pack(t, "a: &a [*a]"), report.ErrCorrupt},
		"newer":              {pack(t, `{"formatVersion":2}`), report.ErrUnknownVersion},
		"other device":       {pack(t, `{"formatVersion":1,"device":"other"}`), report.ErrForeignDevice},
		"unknown field":      {with(`"ownerReferences":[]`), report.ErrCorrupt},
		"negative sequence":  {with(`"sequence":-1`), report.ErrCorrupt},
		"negative observed":  {with(`"observed":-1`), report.ErrCorrupt},
		"negative applied":   {with(`"applied":-1`), report.ErrCorrupt},
		"huge sequence":      {with(`"sequence":9223372036854775808`), report.ErrCorrupt},
		"huge capacity":      {with(`"capacity":{"cpu":"9223372036854775808"}`), report.ErrCorrupt},
		"2^63-1 of capacity": {with(`"capacity":{"cpu":"9223372036854775807"}`), report.ErrCorrupt},
		"2^53+1 as sequence": {with(`"sequence":9007199254740993`), report.ErrCorrupt},
		"huge observed":      {with(`"observed":9223372036854775807`), report.ErrCorrupt},
		"huge applied":       {with(`"applied":9007199254740993`), report.ErrCorrupt},
		"negative capacity":  {with(`"capacity":{"cpu":"-1"}`), report.ErrCorrupt},
		"endless quantity":   {with(`"capacity":{"cpu":"1e-999999999"}`), report.ErrCorrupt},
		"one in a status":    {with(`"pods":[{"status":{"containerStatuses":[{"allocatedResources":{"cpu":"1e-999999999"}}]}}]`), report.ErrCorrupt},
		"pod without UID":    {with(`"pods":[{"name":"a"}]`), report.ErrCorrupt},
		"pod twice":          {with(`"pods":[{"uid":"a"},{"uid":"a"}]`), report.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := report.Decode(c.text, device)
			require.ErrorIs(t, err, c.want)
			for _, other := range []error{report.ErrNoData, report.ErrTooLarge, report.ErrTruncated, report.ErrCorrupt, report.ErrUnknownVersion, report.ErrForeignDevice} {
				assert.Equal(t, errors.Is(c.want, other), errors.Is(err, other), "one error only")
			}
			assert.Less(t, len(err.Error()), 500, "a message, no dump")
		})
	}
}

func TestDecode_truncated(t *testing.T) {
	text := encode(t, sample())
	_, err := report.Decode(text[:0], device)
	require.ErrorIs(t, err, report.ErrNoData)
	for n := 1; n < len(text); n++ {
		_, err := report.Decode(text[:n], device)
		require.ErrorIs(t, err, report.ErrTruncated, "cut to %d of %d characters", n, len(text))
	}
}

// TestDecode_flipped: a changed character is an error, or one that means nothing.
func TestDecode_flipped(t *testing.T) {
	text := encode(t, sample())
	for n := range text {
		for _, bits := range []byte{1 << (n % 8), 0xff} {
			changed := []byte(text)
			changed[n] ^= bits
			r, err := report.Decode(string(changed), device)
			if err == nil {
				require.Equal(t, text, encode(t, r), "%08b of character %d", bits, n)
			}
		}
	}
}

func TestEncode_tooLarge(t *testing.T) {
	r := sample()
	r.LastError.Message = strings.Repeat("x", report.MaxDecodedSize)
	_, err := r.Encode()
	require.ErrorIs(t, err, report.ErrTooLarge)
}

// TestEncode_limit: the largest text that Encode gives is one that Decode takes.
func TestEncode_limit(t *testing.T) {
	noise := make([]byte, report.MaxEncodedSize)
	for i, x := 0, uint32(1); i < len(noise); i++ {
		x = x*1664525 + 1013904223
		noise[i] = byte(x >> 24)
	}
	// The largest PublicKey that fits lies between these; base64 within
	// compression costs a few percent.
	low, high := report.MaxEncodedSize*3/4*96/100, report.MaxEncodedSize*3/4
	var largest string
	for high-low > 64 {
		middle := (low + high) / 2
		r := sample()
		r.PublicKey = noise[:middle]
		text, err := r.Encode()
		if err != nil {
			require.ErrorIs(t, err, report.ErrTooLarge)
			high = middle
			continue
		}
		low, largest = middle, text
	}
	assert.LessOrEqual(t, len(largest), report.MaxEncodedSize)
	assert.Greater(t, len(largest), report.MaxEncodedSize-128)
	_, err := report.Decode(largest, device)
	require.NoError(t, err)
}

func TestNewer(t *testing.T) {
	for _, c := range []struct {
		name     string
		new, old *report.Report
		want     bool
	}{
		{"first", &report.Report{}, nil, true},
		{"later", &report.Report{KeyID: "a", Sequence: 2}, &report.Report{KeyID: "a", Sequence: 1}, true},
		{"the same", &report.Report{KeyID: "a", Sequence: 1}, &report.Report{KeyID: "a", Sequence: 1}, false},
		{"earlier", &report.Report{KeyID: "a", Sequence: 1}, &report.Report{KeyID: "a", Sequence: 2}, false},
		{"earlier, after a reboot", &report.Report{KeyID: "a", BootID: "y", Sequence: 1}, &report.Report{KeyID: "a", BootID: "x", Sequence: 2}, false},
		{"later, after a reboot", &report.Report{KeyID: "a", BootID: "y", Sequence: 3}, &report.Report{KeyID: "a", BootID: "x", Sequence: 2}, true},
		{"set up again", &report.Report{KeyID: "b", Sequence: 1}, &report.Report{KeyID: "a", Sequence: 9}, true},
	} {
		assert.Equal(t, c.want, c.new.Newer(c.old), c.name)
	}
}

func TestConfirmed(t *testing.T) {
	r := sample()
	for uid, want := range map[types.UID]bool{
		"uid-job": true,
		"uid-old": true,
		"uid-web": false, // reported as not stopped: the tombstone does not count
		"uid-new": false,
		"":        false,
	} {
		assert.Equal(t, want, r.Confirmed(uid), string(uid))
	}
	assert.False(t, (&report.Report{}).Confirmed("uid-job"))
}

func TestPod(t *testing.T) {
	r := sample()
	assert.Same(t, &r.Pods[1], r.Pod("uid-job"))
	assert.Nil(t, r.Pod("uid-old"))
}
