package delivery

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/jetbridge/jetbridge/shared/bundle"
)

// ValidationSuffix is the path by which Flightctl may test the bundle server.
const ValidationSuffix = "/v1/ready"

// Server answers Flightctl's requests for bundles: GET and HEAD of
// /v1/devices/NAME/bundle/REV, whatever the revision, with the newest bundle
// of the device, from memory. A device for which nothing was minted gets the
// empty document of generation 0, on which no device acts.
type Server struct {
	user, password string
	mux            *http.ServeMux

	mu      sync.RWMutex // guards everything that follows
	bundles map[string]served
}

type served struct {
	data []byte
	etag string
}

// NewServer makes a server that wants these credentials.
func NewServer(user, password string) *Server {
	s := &Server{user: user, password: password, mux: http.NewServeMux(), bundles: map[string]served{}}
	s.mux.HandleFunc("GET "+ValidationSuffix, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) })
	s.mux.HandleFunc("GET /v1/devices/{name}/bundle/{revision}", s.bundle)
	return s
}

// set makes data the bundle of a device.
func (s *Server) set(device string, data []byte) {
	sum := sha256.Sum256(data)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bundles[device] = served{data: data, etag: strconv.Quote(hex.EncodeToString(sum[:16]))}
}

// ServeHTTP authenticates and answers.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	user, password, ok := r.BasicAuth()
	if !ok || subtle.ConstantTimeCompare([]byte(user), []byte(s.user)) != 1 || subtle.ConstantTimeCompare([]byte(password), []byte(s.password)) != 1 {
		w.Header().Set("WWW-Authenticate", `Basic realm="jetbridge"`)
		http.Error(w, "credentials are missing or wrong", http.StatusUnauthorized)
		return
	}
	s.mux.ServeHTTP(w, r)
}

func (s *Server) bundle(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	s.mu.RLock()
	b, ok := s.bundles[name]
	s.mu.RUnlock()
	if !ok {
		empty, err := (&bundle.Desired{Device: name}).Mint(0, nil)
		var data []byte
		if err == nil {
			data, err = empty.Encode()
		}
		if err != nil {
			http.Error(w, "cannot make an empty bundle", http.StatusInternalServerError)
			return
		}
		sum := sha256.Sum256(data)
		b = served{data: data, etag: strconv.Quote(hex.EncodeToString(sum[:16]))}
	}
	w.Header().Set("ETag", b.etag)
	w.Header().Set("Content-Type", "application/octet-stream")
	if r.Header.Get("If-None-Match") == b.etag {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(b.data)))
	if r.Method != http.MethodHead {
		_, _ = w.Write(b.data) // the other side is gone if this fails
	}
}

// Keys are what the shim keeps for itself in its namespace.
type Keys struct {
	// MAC is the key of the records' MACs.
	MAC []byte
	// User and Password are what Flightctl shows the bundle server.
	User, Password string
	// CertPEM and KeyPEM are the bundle server's certificate.
	CertPEM, KeyPEM []byte
}

// Certificate is the pair of CertPEM and KeyPEM.
func (k *Keys) Certificate() (tls.Certificate, error) {
	c, err := tls.X509KeyPair(k.CertPEM, k.KeyPEM)
	if err != nil {
		return c, fmt.Errorf("cannot use the bundle server's certificate: %w", err)
	}
	return c, nil
}

const (
	keysName         = "jetbridge-keys"
	certificateYears = 10
	keySize          = 32
)

// EnsureKeys reads the shim's keys from a Secret, and makes it at the first
// start, with a self-signed certificate for these host names and addresses.
func EnsureKeys(ctx context.Context, secrets corev1client.SecretInterface, hosts []string) (*Keys, error) {
	s, err := secrets.Get(ctx, keysName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		var data map[string][]byte
		if data, err = newKeys(hosts); err != nil {
			return nil, err
		}
		s, err = secrets.Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: keysName}, Data: data}, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			s, err = secrets.Get(ctx, keysName, metav1.GetOptions{})
		}
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read or make secret %s: %w", keysName, err)
	}
	k := &Keys{MAC: s.Data["mac"], User: string(s.Data["user"]), Password: string(s.Data["password"]), CertPEM: s.Data[corev1.TLSCertKey], KeyPEM: s.Data[corev1.TLSPrivateKeyKey]}
	if len(k.MAC) < keySize || k.User == "" || k.Password == "" {
		return nil, fmt.Errorf("secret %s is incomplete", keysName)
	}
	cert, err := k.Certificate()
	if err != nil {
		return nil, err
	}
	for _, h := range hosts {
		if cert.Leaf.VerifyHostname(h) == nil {
			continue
		}
		// Another address is wanted: a new certificate, the keys stay.
		if s.Data[corev1.TLSCertKey], s.Data[corev1.TLSPrivateKeyKey], err = selfSigned(hosts); err != nil {
			return nil, err
		}
		if _, err := secrets.Update(ctx, s, metav1.UpdateOptions{}); err != nil {
			return nil, fmt.Errorf("cannot renew certificate in secret %s: %w", keysName, err)
		}
		k.CertPEM, k.KeyPEM = s.Data[corev1.TLSCertKey], s.Data[corev1.TLSPrivateKeyKey]
		break
	}
	return k, nil
}

func newKeys(hosts []string) (map[string][]byte, error) {
	cert, key, err := selfSigned(hosts)
	if err != nil {
		return nil, err
	}
	mac, password := make([]byte, keySize), make([]byte, keySize)
	rand.Read(mac) // it never fails
	rand.Read(password)
	return map[string][]byte{
		"mac": mac, "user": []byte("flightctl"), "password": []byte(hex.EncodeToString(password)),
		corev1.TLSCertKey: cert, corev1.TLSPrivateKeyKey: key,
	}, nil
}

// selfSigned makes a certificate, and its key, that is its own authority.
func selfSigned(hosts []string) (cert, key []byte, err error) {
	fail := func(err error) ([]byte, []byte, error) {
		return nil, nil, fmt.Errorf("cannot make a certificate for the bundle server: %w", err)
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fail(err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return fail(err)
	}
	t := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "jetbridge-bundle-server"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(certificateYears, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IsCA: true, BasicConstraintsValid: true,
	}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, h)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, private.Public(), private)
	if err != nil {
		return fail(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return fail(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}), nil
}
