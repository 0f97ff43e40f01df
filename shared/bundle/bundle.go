// Package bundle is the desired state of one device as one document: what the
// shim writes and the device-agent runs.
//
// # Format
//
// A bundle travels as base64 over gzip over canonical JSON (keys in a fixed order, pods by
// namespace, name and UID, no insignificant white space). What is secret
// (Secrets, pull secrets, service account tokens) is one sealed blob, see
// package seal. ContentHash covers everything else in the document, so that a
// damaged bundle is told apart from a good one.
//
// # Compatibility
//
// FormatVersion grows when an older reader would misunderstand a document.
// A reader refuses versions that it does not know, fields that it does not
// know, and documents of other devices, and then changes nothing.
package bundle

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/jetbridge/jetbridge/shared/internal/codec"
	"github.com/jetbridge/jetbridge/shared/seal"
)

const (
	// FormatVersion is the only format that this package reads and writes.
	FormatVersion = 1
	// MaxEncodedSize limits an encoded bundle, in bytes. A Secret and a file
	// in a Flightctl device both hold 1 MiB, with other things around it.
	MaxEncodedSize = 900 << 10
	// MaxDecodedSize limits what an encoded bundle may expand to, in bytes.
	MaxDecodedSize = 16 << 20
)

// Why a bundle is refused. Decode wraps exactly one of them.
var (
	ErrTooLarge       = errors.New("bundle is too large")
	ErrTruncated      = errors.New("bundle is truncated")
	ErrCorrupt        = errors.New("bundle is corrupt")
	ErrUnknownVersion = errors.New("bundle has an unknown format version")
	ErrForeignDevice  = errors.New("bundle belongs to another device")
)

// Bundle is the document.
type Bundle struct {
	// FormatVersion is the version of this layout.
	FormatVersion int `json:"formatVersion"`
	// Device is the name in Flightctl of the only device that may use it.
	Device string `json:"device"`
	// KeyID names the device's key that Sealed is for; empty without Sealed.
	KeyID string `json:"keyID,omitempty"`
	// Generation only grows for a device. 0 is the document that a device
	// gets for which nothing was ever minted: it asks for nothing, and no
	// device acts on it.
	Generation int64 `json:"generation"`
	// ContentHash is the hexadecimal SHA-256 of the canonical JSON of the
	// bundle with an empty ContentHash.
	ContentHash string `json:"contentHash"`
	// Pods are all pods that shall run; what is not in here is stopped.
	Pods []Pod `json:"pods"`
	// Sealed is the sealed canonical JSON of Secrets, if there are any.
	Sealed []byte `json:"sealed,omitempty"`
}

// Pod is one pod with all that it needs to run offline, but its secrets.
type Pod struct {
	// Metadata has name, namespace, uid, labels, annotations, generation,
	// creationTimestamp and, for a pod that shall stop, deletionTimestamp
	// and deletionGracePeriodSeconds.
	Metadata metav1.ObjectMeta `json:"metadata"`
	Spec     corev1.PodSpec    `json:"spec"`
	// ConfigMaps are those that the spec refers to and that exist.
	ConfigMaps []ConfigMap `json:"configMaps,omitempty"`
}

// Terminating says that the pod shall be stopped, and its end be reported.
func (p *Pod) Terminating() bool { return p.Metadata.DeletionTimestamp != nil }

// ConfigMap is the content of a ConfigMap: data and binaryData together.
type ConfigMap struct {
	Name string            `json:"name"`
	Data map[string][]byte `json:"data,omitempty"`
}

// Secrets is all that is secret in a bundle, by pod.
type Secrets map[types.UID]PodSecrets

// PodSecrets is what is secret of one pod.
type PodSecrets struct {
	// Secrets are those that the spec refers to (volumes, env, pull
	// secrets) and that exist.
	Secrets []Secret `json:"secrets,omitempty"`
	// Tokens are the bound service account tokens of projected volumes.
	Tokens []Token `json:"tokens,omitempty"`
}

// Secret is the content of a Secret.
type Secret struct {
	Name string            `json:"name"`
	Type corev1.SecretType `json:"type,omitempty"`
	Data map[string][]byte `json:"data,omitempty"`
}

// Token is a service account token for the projected sources that ask for
// this audience and lifetime.
type Token struct {
	Audience          string    `json:"audience,omitempty"`
	ExpirationSeconds int64     `json:"expirationSeconds"`
	Value             string    `json:"value"`
	Expires           time.Time `json:"expires"`
}

// Desired is a bundle before it has a generation and is sealed.
type Desired struct {
	Device  string
	Pods    []Pod
	Secrets Secrets
}

// HasSecrets says whether there is anything to seal.
func (d *Desired) HasSecrets() bool {
	for _, s := range d.Secrets {
		if len(s.Secrets) > 0 || len(s.Tokens) > 0 {
			return true
		}
	}
	return false
}

// MAC is the hexadecimal HMAC-SHA-256 of what d asks for. Sealing is
// randomized, so the MAC decides whether anything changed. Token values and
// expiry stay out: a rotation alone is no change.
func (d *Desired) MAC(key []byte, keyID string) (string, error) {
	secrets := make(Secrets, len(d.Secrets))
	for uid, s := range d.Secrets {
		tokens := slices.Clone(s.Tokens)
		for i := range tokens {
			tokens[i].Value, tokens[i].Expires = "", time.Time{}
		}
		secrets[uid] = PodSecrets{Secrets: s.Secrets, Tokens: tokens}.sorted()
	}
	text, err := json.Marshal(struct {
		FormatVersion int
		Device, KeyID string
		Pods          []Pod
		Secrets       Secrets
	}{FormatVersion, d.Device, keyID, sortedPods(d.Pods), secrets})
	if err != nil {
		return "", fmt.Errorf("cannot encode desired state of device %s: %w", d.Device, err)
	}
	mac := hmac.New(sha256.New, key)
	mac.Write(text)
	return hex.EncodeToString(mac.Sum(nil)), nil
}

// Mint makes the bundle of this generation, its secrets sealed to key.
// A nil key is an error if there is anything to seal.
func (d *Desired) Mint(generation int64, key *seal.PublicKey) (*Bundle, error) {
	b := &Bundle{FormatVersion: FormatVersion, Device: d.Device, Generation: generation, Pods: sortedPods(d.Pods)}
	if d.HasSecrets() {
		if key == nil {
			return nil, fmt.Errorf("cannot seal the secrets of device %s: it reported no sealing key", d.Device)
		}
		secrets := make(Secrets, len(d.Secrets))
		for uid, s := range d.Secrets {
			secrets[uid] = s.sorted()
		}
		text, err := json.Marshal(secrets)
		if err != nil {
			return nil, fmt.Errorf("cannot encode secrets of device %s: %w", d.Device, err)
		}
		b.KeyID = key.ID()
		if b.Sealed, err = key.Seal(b.binding(), text); err != nil {
			return nil, err
		}
	}
	hash, err := b.hash()
	if err != nil {
		return nil, err
	}
	b.ContentHash = hash
	return b, nil
}

// OpenSecrets unseals what Mint sealed. A bundle without secrets gives none.
func (b *Bundle) OpenSecrets(key seal.PrivateKey) (Secrets, error) {
	if len(b.Sealed) == 0 {
		return nil, nil
	}
	text, err := key.Open(b.binding(), b.Sealed)
	if err != nil {
		return nil, fmt.Errorf("cannot open secrets of bundle generation %d: %w", b.Generation, err)
	}
	var s Secrets
	if err := codec.Strict(text, &s); err != nil {
		return nil, fmt.Errorf("cannot read secrets of bundle generation %d: %w", b.Generation, err)
	}
	return s, nil
}

func (b *Bundle) binding() seal.Binding {
	return seal.Binding{Device: b.Device, KeyID: b.KeyID, Generation: b.Generation}
}

func (b *Bundle) hash() (string, error) {
	c := *b
	c.ContentHash = ""
	text, err := json.Marshal(&c)
	if err != nil {
		return "", fmt.Errorf("cannot encode bundle of device %s: %w", b.Device, err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:]), nil
}

// format is how bundles travel.
func format() codec.Format {
	return codec.Format{
		Name: "bundle", Version: FormatVersion, MaxPacked: MaxEncodedSize, MaxPlain: MaxDecodedSize,
		TooLarge: ErrTooLarge, Truncated: ErrTruncated, Corrupt: ErrCorrupt, UnknownVersion: ErrUnknownVersion, ForeignDevice: ErrForeignDevice,
	}
}

// Encode gives the bytes that travel; ErrTooLarge above MaxEncodedSize.
func (b *Bundle) Encode() ([]byte, error) { return format().Encode(b) }

// Decode reads and checks an encoded bundle of the named device.
func Decode(data []byte, device string) (*Bundle, error) {
	var b Bundle
	if err := format().Decode(data, device, &b); err != nil {
		return nil, err
	}
	if err := b.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return &b, nil
}

func (b *Bundle) check() error {
	if b.Generation < 0 {
		return fmt.Errorf("generation %d is negative", b.Generation)
	}
	hash, err := b.hash()
	if err != nil {
		return err
	}
	if b.ContentHash != hash {
		return fmt.Errorf("contentHash is %q, the content's is %q", b.ContentHash, hash)
	}
	seen := make(map[types.UID]bool, len(b.Pods))
	for i, p := range b.Pods {
		if p.Metadata.UID == "" || p.Metadata.Name == "" || p.Metadata.Namespace == "" {
			return fmt.Errorf("pods[%d] lacks uid, name or namespace", i)
		}
		if seen[p.Metadata.UID] {
			return fmt.Errorf("pods[%d] has the uid %s of another pod", i, p.Metadata.UID)
		}
		seen[p.Metadata.UID] = true
	}
	return nil
}

func sortedPods(pods []Pod) []Pod {
	out := make([]Pod, len(pods))
	for i, p := range pods {
		p.ConfigMaps = slices.SortedFunc(slices.Values(p.ConfigMaps), func(a, b ConfigMap) int { return cmp.Compare(a.Name, b.Name) })
		out[i] = p
	}
	slices.SortFunc(out, func(a, b Pod) int {
		return cmp.Or(
			cmp.Compare(a.Metadata.Namespace, b.Metadata.Namespace),
			cmp.Compare(a.Metadata.Name, b.Metadata.Name),
			cmp.Compare(a.Metadata.UID, b.Metadata.UID))
	})
	return out
}

func (s PodSecrets) sorted() PodSecrets {
	return PodSecrets{
		Secrets: slices.SortedFunc(slices.Values(s.Secrets), func(a, b Secret) int { return cmp.Compare(a.Name, b.Name) }),
		Tokens: slices.SortedFunc(slices.Values(s.Tokens), func(a, b Token) int {
			return cmp.Or(cmp.Compare(a.Audience, b.Audience), cmp.Compare(a.ExpirationSeconds, b.ExpirationSeconds))
		}),
	}
}
