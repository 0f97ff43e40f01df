package pki

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func load(t *testing.T, dir, name string) *x509.Certificate {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key"))
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(pair.Certificate[0])
	require.NoError(t, err)
	return cert
}

func TestChain(t *testing.T) {
	dir := t.TempDir()
	root, err := NewAuthority(dir, "ca", "root", nil)
	require.NoError(t, err)
	signer, err := NewAuthority(dir, "signer", "signer", root)
	require.NoError(t, err)
	require.NoError(t, root.IssueServer(dir, "server", "localhost", Server{Hosts: []string{"localhost"}, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}}))
	require.NoError(t, signer.IssueClient(dir, "client", "admin", "system:masters"))

	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root.Cert)
	between.AddCert(signer.Cert)
	server := load(t, dir, "server")
	_, err = server.Verify(x509.VerifyOptions{Roots: roots, DNSName: "127.0.0.1"})
	require.NoError(t, err)
	_, err = server.Verify(x509.VerifyOptions{Roots: roots, DNSName: "10.0.0.1"})
	require.Error(t, err)
	client := load(t, dir, "client")
	assert.Equal(t, []string{"system:masters"}, client.Subject.Organization)
	usages := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	_, err = client.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: usages})
	require.NoError(t, err)
	_, err = client.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: usages})
	require.Error(t, err, "without the intermediate")
}

func TestKeysAreSecret(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, NewKeyPair(dir, "sa"))
	_, err := NewAuthority(dir, "ca", "root", nil)
	require.NoError(t, err)
	for _, name := range []string{"sa.key", "ca.key"} {
		fi, err := os.Stat(filepath.Join(dir, name))
		require.NoError(t, err)
		assert.Equal(t, os.FileMode(0o600), fi.Mode().Perm(), name)
	}
}
