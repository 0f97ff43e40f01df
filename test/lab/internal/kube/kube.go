// Package kube is the little of the Kubernetes API that the lab itself needs.
package kube

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"sigs.k8s.io/yaml"
)

// Client speaks to the API server as the lab's administrator.
type Client struct {
	server string
	http   *http.Client
}

// NewClient takes the server's URL and the folder with ca.crt, admin.crt and admin.key.
func NewClient(server, pki string) (*Client, error) {
	tlsConfig, err := TLS(filepath.Join(pki, "ca.crt"))
	if err != nil {
		return nil, err
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(pki, "admin.crt"), filepath.Join(pki, "admin.key"))
	if err != nil {
		return nil, fmt.Errorf("cannot read administrator's certificate: %w", err)
	}
	tlsConfig.Certificates = []tls.Certificate{pair}
	transport := &http.Transport{TLSClientConfig: tlsConfig}
	return &Client{server: server, http: &http.Client{Transport: transport, Timeout: 10 * time.Second}}, nil
}

// TLS trusts the authorities of a file.
func TLS(caFile string) (*tls.Config, error) {
	ca, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("cannot read authority: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("cannot read authority %s: no certificate in it", caFile)
	}
	return &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, nil
}

// Ready tells whether the API server answers that it is ready.
func (c *Client) Ready(ctx context.Context) error {
	_, err := c.do(ctx, http.MethodGet, "/readyz", nil)
	return err
}

// Token asks for a token of a service account, valid for ttl.
func (c *Client) Token(ctx context.Context, namespace, serviceAccount string, ttl time.Duration) (string, error) {
	body := map[string]any{
		"apiVersion": "authentication.k8s.io/v1",
		"kind":       "TokenRequest",
		"spec":       map[string]any{"expirationSeconds": int64(ttl.Seconds())},
	}
	answer, err := c.do(ctx, http.MethodPost, "/api/v1/namespaces/"+namespace+"/serviceaccounts/"+serviceAccount+"/token", body)
	if err != nil {
		return "", fmt.Errorf("cannot get token of %s/%s: %w", namespace, serviceAccount, err)
	}
	var request struct {
		Status struct {
			Token string `json:"token"`
		} `json:"status"`
	}
	if err := json.Unmarshal(answer, &request); err != nil {
		return "", fmt.Errorf("cannot read token of %s/%s: %w", namespace, serviceAccount, err)
	}
	if request.Status.Token == "" {
		return "", fmt.Errorf("cannot get token of %s/%s: the answer has none", namespace, serviceAccount)
	}
	return request.Status.Token, nil
}

func (c *Client) do(ctx context.Context, method, path string, body any) (_ []byte, err error) {
	var reader io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("cannot encode request: %w", err)
		}
		reader = bytes.NewReader(b)
	}
	request, err := http.NewRequestWithContext(ctx, method, c.server+path, reader)
	if err != nil {
		return nil, fmt.Errorf("cannot make request: %w", err)
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := c.http.Do(request)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, response.Body.Close()) }()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, fmt.Errorf("cannot read answer: %w", err)
	}
	if response.StatusCode >= 300 {
		return nil, fmt.Errorf("%s: %s", response.Status, bytes.TrimSpace(answer[:min(len(answer), 500)]))
	}
	return answer, nil
}

// User is how a kubeconfig authenticates: by a certificate or by a token that is
// read from a file again and again.
type User struct {
	CertFile, KeyFile string
	TokenFile         string
}

// Kubeconfig renders a kubeconfig of one cluster and one user.
func Kubeconfig(server, caFile string, u User) ([]byte, error) {
	user := map[string]string{}
	if u.TokenFile != "" {
		user["tokenFile"] = u.TokenFile
	} else {
		user["client-certificate"], user["client-key"] = u.CertFile, u.KeyFile
	}
	const name = "jetbridge-lab"
	b, err := yaml.Marshal(map[string]any{
		"apiVersion":      "v1",
		"kind":            "Config",
		"clusters":        []any{map[string]any{"name": name, "cluster": map[string]any{"server": server, "certificate-authority": caFile}}},
		"users":           []any{map[string]any{"name": name, "user": user}},
		"contexts":        []any{map[string]any{"name": name, "context": map[string]any{"cluster": name, "user": name}}},
		"current-context": name,
	})
	if err != nil {
		return nil, fmt.Errorf("cannot encode kubeconfig: %w", err)
	}
	return b, nil
}
