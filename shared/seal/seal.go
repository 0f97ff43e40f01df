// Package seal encrypts the secret part of a bundle to one device.
//
// It is HPKE (RFC 9180) with DHKEM(X25519, HKDF-SHA256), HKDF-SHA256 and
// ChaCha20-Poly1305, in base mode. The context binds each ciphertext to the
// device, its key and the bundle's generation: a re-imaged device, another
// device or another generation cannot open it.
package seal

import (
	"crypto/ecdh"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
)

// PublicKeySize is the length of an encoded public key in bytes.
const PublicKeySize = 32

// ErrOpen says that a ciphertext does not belong to this key and binding, or
// was changed.
var ErrOpen = errors.New("cannot unseal: not sealed to this device, key and generation")

// Binding is what a ciphertext belongs to.
type Binding struct {
	Device     string
	KeyID      string
	Generation int64
}

// info is the binding as HPKE's info; the lengths keep two bindings from
// looking alike.
func (b Binding) info() []byte {
	return fmt.Appendf(nil, "jetbridge bundle v1\x00%d:%s%d:%s%d", len(b.Device), b.Device, len(b.KeyID), b.KeyID, b.Generation)
}

// PublicKey is the half of a device's key that it reports.
type PublicKey struct {
	key hpke.PublicKey
	raw []byte
}

// ParsePublicKey reads the 32 bytes of an X25519 public key.
func ParsePublicKey(raw []byte) (PublicKey, error) {
	pub, err := ecdh.X25519().NewPublicKey(raw)
	if err != nil {
		return PublicKey{}, fmt.Errorf("cannot read sealing key: %w", err)
	}
	key, err := hpke.NewDHKEMPublicKey(pub)
	if err != nil {
		return PublicKey{}, fmt.Errorf("cannot use sealing key: %w", err)
	}
	return PublicKey{key: key, raw: pub.Bytes()}, nil
}

// Bytes returns the key's encoding.
func (p PublicKey) Bytes() []byte { return p.raw }

// ID is a short, stable name of the key: 16 hex digits of its SHA-256.
func (p PublicKey) ID() string {
	sum := sha256.Sum256(p.raw)
	return hex.EncodeToString(sum[:8])
}

// Seal encrypts plaintext to the key, bound to b. Each call gives other bytes.
func (p PublicKey) Seal(b Binding, plaintext []byte) ([]byte, error) {
	sealed, err := hpke.Seal(p.key, hpke.HKDFSHA256(), hpke.ChaCha20Poly1305(), b.info(), plaintext)
	if err != nil {
		return nil, fmt.Errorf("cannot seal for device %s: %w", b.Device, err)
	}
	return sealed, nil
}

// PrivateKey is the half that never leaves the device.
type PrivateKey struct {
	key *ecdh.PrivateKey
}

// NewPrivateKey makes a key from the system's randomness.
func NewPrivateKey() (PrivateKey, error) {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return PrivateKey{}, fmt.Errorf("cannot make a sealing key: %w", err)
	}
	return PrivateKey{key: key}, nil
}

// ParsePrivateKey reads what Bytes returned.
func ParsePrivateKey(raw []byte) (PrivateKey, error) {
	key, err := ecdh.X25519().NewPrivateKey(raw)
	if err != nil {
		return PrivateKey{}, fmt.Errorf("cannot read private sealing key: %w", err)
	}
	return PrivateKey{key: key}, nil
}

// Bytes returns the key's encoding, to be stored in a file of mode 0600.
func (k PrivateKey) Bytes() []byte { return k.key.Bytes() }

// Public returns the other half.
func (k PrivateKey) Public() (PublicKey, error) { return ParsePublicKey(k.key.PublicKey().Bytes()) }

// Open decrypts what Seal made for the same binding; ErrOpen if it cannot.
func (k PrivateKey) Open(b Binding, sealed []byte) ([]byte, error) {
	key, err := hpke.NewDHKEMPrivateKey(k.key)
	if err != nil {
		return nil, fmt.Errorf("cannot use private sealing key: %w", err)
	}
	plaintext, err := hpke.Open(key, hpke.HKDFSHA256(), hpke.ChaCha20Poly1305(), b.info(), sealed)
	if err != nil {
		return nil, ErrOpen
	}
	return plaintext, nil
}
