package bundle_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/jetbridge/jetbridge/shared/bundle"
	"github.com/jetbridge/jetbridge/shared/seal"
)

var update = flag.Bool("update", false, "rewrite golden files")

const device = "a1b2c3"

// testKey is a fixed key, for golden files only.
func testKey(t testing.TB) (seal.PrivateKey, seal.PublicKey) {
	t.Helper()
	private, err := seal.ParsePrivateKey(bytes.Repeat([]byte{7}, 32))
	require.NoError(t, err)
	public, err := private.Public()
	require.NoError(t, err)
	return private, public
}

func desired() *bundle.Desired {
	deleted, grace := metav1.NewTime(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)), int64(30)
	return &bundle.Desired{
		Device: device,
		Pods: []bundle.Pod{
			{
				Metadata: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "uid-web", Labels: map[string]string{"b": "2", "a": "1"}},
				Spec: corev1.PodSpec{
					Containers: []corev1.Container{{
						Name: "web", Image: "registry.example/web:1", Args: []string{"--text=<&>\u2028"},
						Resources: corev1.ResourceRequirements{Limits: corev1.ResourceList{"cpu": resource.MustParse("100m"), "memory": resource.MustParse("64Mi")}},
					}},
				},
				ConfigMaps: []bundle.ConfigMap{
					{Name: "second", Data: map[string][]byte{"k": []byte("v")}},
					{Name: "first", Data: map[string][]byte{"z": {0, 255}, "a": []byte("text")}},
				},
			},
			{
				Metadata: metav1.ObjectMeta{Namespace: "ops", Name: "agent", UID: "uid-agent", DeletionTimestamp: &deleted, DeletionGracePeriodSeconds: &grace},
				Spec:     corev1.PodSpec{Containers: []corev1.Container{{Name: "agent", Image: "registry.example/agent:1"}}},
			},
		},
		Secrets: bundle.Secrets{
			"uid-web": {
				Secrets: []bundle.Secret{
					{Name: "tls", Type: corev1.SecretTypeTLS, Data: map[string][]byte{"tls.key": []byte("top secret")}},
					{Name: "db", Type: corev1.SecretTypeOpaque, Data: map[string][]byte{"password": []byte("hunter2")}},
				},
				Tokens: []bundle.Token{
					{Audience: "b", ExpirationSeconds: 3607, Value: "token-b", Expires: time.Date(2026, 1, 2, 4, 0, 0, 0, time.UTC)},
					{ExpirationSeconds: 3607, Value: "token-a", Expires: time.Date(2026, 1, 2, 4, 0, 0, 0, time.UTC)},
				},
			},
		},
	}
}

func mint(t testing.TB, d *bundle.Desired) *bundle.Bundle {
	t.Helper()
	_, public := testKey(t)
	b, err := d.Mint(3, &public)
	require.NoError(t, err)
	return b
}

func encode(t testing.TB, b *bundle.Bundle) []byte {
	t.Helper()
	packed, err := b.Encode()
	require.NoError(t, err)
	return packed
}

// TestGolden_json pins the canonical JSON. A change means that devices and
// shims of different versions no longer agree on hashes: FormatVersion grows.
func TestGolden_json(t *testing.T) {
	d := desired()
	d.Secrets = nil // sealing is randomized
	text, err := json.Marshal(mint(t, d))
	require.NoError(t, err)
	var have bytes.Buffer
	require.NoError(t, json.Indent(&have, text, "", "  "))
	have.WriteByte('\n')
	golden(t, "testdata/bundle.json", have.Bytes())

	mac, err := desired().MAC([]byte("key"), "key-id")
	require.NoError(t, err)
	golden(t, "testdata/mac.txt", []byte(mac+"\n"))
}

// TestGolden_encoded opens a bundle that an earlier build encoded and sealed.
func TestGolden_encoded(t *testing.T) {
	const file = "testdata/bundle.v1"
	if *update {
		require.NoError(t, os.WriteFile(file, encode(t, mint(t, desired())), 0o644))
	}
	data, err := os.ReadFile(file)
	require.NoError(t, err)
	b, err := bundle.Decode(data, device)
	require.NoError(t, err)
	assert.EqualValues(t, 3, b.Generation)
	private, _ := testKey(t)
	secrets, err := b.OpenSecrets(private)
	require.NoError(t, err)
	assert.Equal(t, "hunter2", string(secrets["uid-web"].Secrets[0].Data["password"]), "sorted by name: db, tls")
	assert.Equal(t, "token-a", secrets["uid-web"].Tokens[0].Value)
}

func golden(t *testing.T, file string, have []byte) {
	t.Helper()
	if *update {
		require.NoError(t, os.WriteFile(file, have, 0o644))
	}
	want, err := os.ReadFile(file)
	require.NoError(t, err)
	assert.Equal(t, string(want), string(have), "if this is meant: go test ./shared/bundle -update")
}

func TestRoundTrip(t *testing.T) {
	in := mint(t, desired())
	packed := encode(t, in)
	assert.NotContains(t, string(packed), "hunter2")
	out, err := bundle.Decode(packed, device)
	require.NoError(t, err)
	assert.Equal(t, packed, encode(t, out), "encodes to the same bytes again")

	private, _ := testKey(t)
	secrets, err := out.OpenSecrets(private)
	require.NoError(t, err)
	assert.Len(t, secrets["uid-web"].Secrets, 2)

	var names []string
	for _, p := range out.Pods {
		names = append(names, p.Metadata.Name)
	}
	assert.Equal(t, []string{"agent", "web"}, names, "by namespace")
	assert.True(t, out.Pods[0].Terminating())
	assert.False(t, out.Pods[1].Terminating())
}

func TestMint_canonical(t *testing.T) {
	d := desired()
	d.Secrets = nil
	want := encode(t, mint(t, d))
	slices.Reverse(d.Pods)
	for i := range d.Pods {
		slices.Reverse(d.Pods[i].ConfigMaps)
	}
	before := d.Pods[0].Metadata.Name
	assert.Equal(t, want, encode(t, mint(t, d)), "the order of the input does not matter")
	assert.Equal(t, before, d.Pods[0].Metadata.Name, "the input is left alone")
}

func TestMint_withoutKey(t *testing.T) {
	d := desired()
	_, err := d.Mint(1, nil)
	require.ErrorContains(t, err, "no sealing key")
	for _, secrets := range []bundle.Secrets{nil, {}, {"uid-web": {}}} {
		d.Secrets = secrets
		assert.False(t, d.HasSecrets())
		b, err := d.Mint(1, nil)
		require.NoError(t, err)
		assert.Empty(t, b.KeyID)
		private, _ := testKey(t)
		opened, err := b.OpenSecrets(private)
		require.NoError(t, err)
		assert.Empty(t, opened)
	}
}

func TestMint_empty(t *testing.T) {
	d := &bundle.Desired{Device: device}
	b, err := d.Mint(0, nil)
	require.NoError(t, err)
	out, err := bundle.Decode(encode(t, b), device)
	require.NoError(t, err)
	assert.Zero(t, out.Generation)
	assert.Empty(t, out.Pods)
}

func TestMAC(t *testing.T) {
	mac := func(keyID string, change func(*bundle.Desired)) string {
		d := desired()
		change(d)
		m, err := d.MAC([]byte("key"), keyID)
		require.NoError(t, err)
		return m
	}
	web := func(d *bundle.Desired) *bundle.PodSecrets {
		s := d.Secrets["uid-web"]
		return &s
	}
	base := mac("id", func(*bundle.Desired) {})

	for name, change := range map[string]func(*bundle.Desired){
		"order of pods":       func(d *bundle.Desired) { slices.Reverse(d.Pods) },
		"order of ConfigMaps": func(d *bundle.Desired) { slices.Reverse(d.Pods[0].ConfigMaps) },
		"order of Secrets":    func(d *bundle.Desired) { slices.Reverse(web(d).Secrets) },
		"order of tokens":     func(d *bundle.Desired) { slices.Reverse(web(d).Tokens) },
		"rotated token": func(d *bundle.Desired) {
			web(d).Tokens[0].Value, web(d).Tokens[0].Expires = "other", time.Unix(1e9, 0)
		},
	} {
		assert.Equal(t, base, mac("id", change), name)
	}
	for name, change := range map[string]func(*bundle.Desired){
		"device":         func(d *bundle.Desired) { d.Device = "other" },
		"secret's value": func(d *bundle.Desired) { web(d).Secrets[0].Data["tls.key"] = []byte("other") },
		"secret's type":  func(d *bundle.Desired) { web(d).Secrets[0].Type = corev1.SecretTypeOpaque },
		"secret gone":    func(d *bundle.Desired) { d.Secrets["uid-web"] = bundle.PodSecrets{Tokens: web(d).Tokens} },
		"token gone":     func(d *bundle.Desired) { d.Secrets["uid-web"] = bundle.PodSecrets{Secrets: web(d).Secrets} },
		"audience":       func(d *bundle.Desired) { web(d).Tokens[0].Audience = "other" },
		"ConfigMap":      func(d *bundle.Desired) { d.Pods[0].ConfigMaps[0].Data["k"] = []byte("other") },
		"spec":           func(d *bundle.Desired) { d.Pods[0].Spec.Containers[0].Image = "other" },
		"deletion":       func(d *bundle.Desired) { d.Pods[1].Metadata.DeletionTimestamp = nil },
		"pod gone":       func(d *bundle.Desired) { d.Pods = d.Pods[:1] },
	} {
		assert.NotEqual(t, base, mac("id", change), name)
	}
	assert.NotEqual(t, base, mac("other", func(*bundle.Desired) {}), "key ID")
	other, err := desired().MAC([]byte("other key"), "id")
	require.NoError(t, err)
	assert.NotEqual(t, base, other, "key")

	d := desired()
	_, err = d.MAC([]byte("key"), "id")
	require.NoError(t, err)
	assert.Equal(t, desired(), d, "the input is left alone")
}

func TestOpenSecrets_refuses(t *testing.T) {
	private, _ := testKey(t)
	stranger, err := seal.NewPrivateKey()
	require.NoError(t, err)
	_, err = mint(t, desired()).OpenSecrets(stranger)
	require.ErrorIs(t, err, seal.ErrOpen, "a re-imaged device")
	for name, change := range map[string]func(*bundle.Bundle){
		"device":     func(b *bundle.Bundle) { b.Device = "other" },
		"key ID":     func(b *bundle.Bundle) { b.KeyID = "other" },
		"generation": func(b *bundle.Bundle) { b.Generation++ },
	} {
		b := mint(t, desired())
		change(b)
		_, err := b.OpenSecrets(private)
		require.ErrorIs(t, err, seal.ErrOpen, name)
	}
}

func TestDecode_truncated(t *testing.T) {
	packed := encode(t, mint(t, desired()))
	for n := range packed {
		_, err := bundle.Decode(packed[:n], device)
		require.ErrorIs(t, err, bundle.ErrTruncated, "cut to %d of %d bytes", n, len(packed))
	}
}

// TestDecode_flipped: a changed byte is an error, or one that means nothing.
func TestDecode_flipped(t *testing.T) {
	in := mint(t, desired())
	packed := encode(t, in)
	for n := range packed {
		for _, bits := range []byte{1 << (n % 8), 0xff} {
			changed := bytes.Clone(packed)
			changed[n] ^= bits
			out, err := bundle.Decode(changed, device)
			if err == nil {
				require.Equal(t, packed, encode(t, out), "%08b of byte %d", bits, n)
			}
		}
	}
}

func TestDecode_errors(t *testing.T) {
	change := func(change func(map[string]any)) []byte {
		text, err := json.Marshal(mint(t, desired()))
		require.NoError(t, err)
		var m map[string]any
		require.NoError(t, json.Unmarshal(text, &m))
		change(m)
		return pack(t, m)
	}
	same, err := bundle.Decode(encode(t, mint(t, desired())), device)
	require.NoError(t, err)
	same.Pods = append(same.Pods, same.Pods[0])

	for name, c := range map[string]struct {
		data []byte
		want error
	}{
		"unknown version": {change(func(m map[string]any) { m["formatVersion"] = 2 }), bundle.ErrUnknownVersion},
		"foreign device":  {change(func(m map[string]any) { m["device"] = "other" }), bundle.ErrForeignDevice},
		"unknown field":   {change(func(m map[string]any) { m["strange"] = 1 }), bundle.ErrCorrupt},
		"other content":   {change(func(m map[string]any) { m["generation"] = 4 }), bundle.ErrCorrupt},
		"no hash":         {change(func(m map[string]any) { delete(m, "contentHash") }), bundle.ErrCorrupt},
		"no gzip":         {[]byte("{}{}{}{}{}{}"), bundle.ErrCorrupt},
		"too large":       {make([]byte, bundle.MaxEncodedSize+1), bundle.ErrTooLarge},
		"bomb":            {pack(t, strings.Repeat(" ", bundle.MaxDecodedSize)), bundle.ErrTooLarge},
	} {
		_, err := bundle.Decode(c.data, device)
		require.ErrorIs(t, err, c.want, name)
		for _, other := range []error{bundle.ErrTooLarge, bundle.ErrTruncated, bundle.ErrCorrupt, bundle.ErrUnknownVersion, bundle.ErrForeignDevice} {
			assert.Equal(t, errors.Is(c.want, other), errors.Is(err, other), "%s: one error only", name)
		}
	}
}

// TestDecode_inconsistent has bundles with a good hash that make no sense.
func TestDecode_inconsistent(t *testing.T) {
	pod := func(namespace, name string, uid types.UID) bundle.Pod {
		return bundle.Pod{Metadata: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: uid}}
	}
	for want, pods := range map[string][]bundle.Pod{
		"pods[0] lacks uid, name or namespace": {pod("a", "b", "")},
		"lacks uid, name":                      {pod("a", "", "u")},
		"lacks uid":                            {pod("", "b", "u")},
		"has the uid u of another pod":         {pod("a", "b", "u"), pod("a", "c", "u")},
	} {
		d := &bundle.Desired{Device: device, Pods: pods}
		b, err := d.Mint(1, nil)
		require.NoError(t, err)
		_, err = bundle.Decode(encode(t, b), device)
		require.ErrorIs(t, err, bundle.ErrCorrupt)
		require.ErrorContains(t, err, want)
	}
	d := &bundle.Desired{Device: device}
	b, err := d.Mint(-1, nil)
	require.NoError(t, err)
	_, err = bundle.Decode(encode(t, b), device)
	require.ErrorIs(t, err, bundle.ErrCorrupt)
}

func TestEncode_tooLarge(t *testing.T) {
	noise := make([]byte, bundle.MaxEncodedSize)
	for i, x := 0, uint32(1); i < len(noise); i++ {
		x = x*1664525 + 1013904223
		noise[i] = byte(x >> 24)
	}
	for name, data := range map[string][]byte{"encoded": noise, "decoded": make([]byte, bundle.MaxDecodedSize)} {
		d := desired()
		d.Pods[0].ConfigMaps[0].Data["k"] = data
		_, err := mint(t, d).Encode()
		require.ErrorIs(t, err, bundle.ErrTooLarge, name)
	}
}
