// Package pki makes the certificates of a lab: authorities, servers and clients.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// validity of everything; a lab is meant for days.
const validity = 365 * 24 * time.Hour

// Authority signs certificates.
type Authority struct {
	Cert *x509.Certificate
	key  crypto.Signer
}

// Server says which hosts and addresses a server's certificate is for.
type Server struct {
	Hosts []string
	IPs   []net.IP
}

// NewAuthority makes an authority that signs itself, or is signed by parent
// unless that is nil, and writes dir/name.crt and dir/name.key.
func NewAuthority(dir, name, commonName string, parent *Authority) (*Authority, error) {
	template, err := newTemplate(pkix.Name{CommonName: commonName})
	if err != nil {
		return nil, err
	}
	template.IsCA = true
	template.BasicConstraintsValid = true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature
	cert, key, err := issue(dir, name, template, parent)
	if err != nil {
		return nil, err
	}
	return &Authority{Cert: cert, key: key}, nil
}

// IssueServer writes dir/name.crt and dir/name.key for a server.
func (a *Authority) IssueServer(dir, name, commonName string, s Server) error {
	template, err := newTemplate(pkix.Name{CommonName: commonName})
	if err != nil {
		return err
	}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	template.DNSNames, template.IPAddresses = s.Hosts, s.IPs
	_, _, err = issue(dir, name, template, a)
	return err
}

// IssueClient writes dir/name.crt and dir/name.key for a user and its groups.
func (a *Authority) IssueClient(dir, name, user string, groups ...string) error {
	template, err := newTemplate(pkix.Name{CommonName: user, Organization: groups})
	if err != nil {
		return err
	}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	_, _, err = issue(dir, name, template, a)
	return err
}

// NewKeyPair writes an RSA key to dir/name.key and its public half to dir/name.pub.
func NewKeyPair(dir, name string) error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return fmt.Errorf("cannot make key %s: %w", name, err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return fmt.Errorf("cannot encode key %s: %w", name, err)
	}
	return errors.Join(writeKey(dir, name, key), writePEM(filepath.Join(dir, name+".pub"), "PUBLIC KEY", public, 0o644))
}

func newTemplate(subject pkix.Name) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, fmt.Errorf("cannot make serial number: %w", err)
	}
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      subject,
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.Add(validity),
	}, nil
}

func issue(dir, name string, template *x509.Certificate, parent *Authority) (*x509.Certificate, crypto.Signer, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, nil, fmt.Errorf("cannot make folder: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot make key %s: %w", name, err)
	}
	signer, signerKey := template, crypto.Signer(key)
	if parent != nil {
		signer, signerKey = parent.Cert, parent.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer, key.Public(), signerKey)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot sign certificate %s: %w", name, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read certificate %s: %w", name, err)
	}
	if err := writePEM(filepath.Join(dir, name+".crt"), "CERTIFICATE", der, 0o644); err != nil {
		return nil, nil, err
	}
	return cert, key, writeKey(dir, name, key)
}

func writeKey(dir, name string, key crypto.Signer) error {
	// Each kind in its own traditional form, which every reader knows.
	switch key := key.(type) {
	case *rsa.PrivateKey:
		return writePEM(filepath.Join(dir, name+".key"), "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(key), 0o600)
	case *ecdsa.PrivateKey:
		der, err := x509.MarshalECPrivateKey(key)
		if err != nil {
			return fmt.Errorf("cannot encode key %s: %w", name, err)
		}
		return writePEM(filepath.Join(dir, name+".key"), "EC PRIVATE KEY", der, 0o600)
	}
	return fmt.Errorf("cannot encode key %s: unknown kind %T", name, key)
}

func writePEM(path, kind string, der []byte, mode os.FileMode) error {
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), mode); err != nil {
		return fmt.Errorf("cannot write %s: %w", filepath.Base(path), err)
	}
	return nil
}

// Bundle is the certificates of authorities in PEM, one after the other.
func Bundle(all ...*Authority) []byte {
	var b []byte
	for _, a := range all {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Cert.Raw})...)
	}
	return b
}
