package supervise

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/jetbridge/jetbridge/test/lab/internal/kube"
	"github.com/jetbridge/jetbridge/test/lab/internal/layout"
)

// Namespaces and service accounts whose tokens the lab keeps fresh.
const (
	FlightctlNamespace = "flightctl"
	FlightctlAccount   = "flightctl-services"
	ShimNamespace      = "jetbridge-system"
	ShimAccount        = "jetbridge-shim"
)

// ShimTokenFile is where the shim finds its token.
func ShimTokenFile(lab layout.Lab) string { return lab.Path("tokens", "jetbridge-shim") }

// Tokens are short-lived, as a cluster's are, and renewed long before their end.
const (
	tokenTTL   = time.Hour
	tokenRenew = 20 * time.Minute
	tokenRetry = 10 * time.Second
)

// tokens writes service account tokens to files.
type tokens struct {
	client *kube.Client
	lab    layout.Lab
	log    *slog.Logger

	mu     sync.Mutex // one renewal at a time; guards wanted
	wanted bool       // somebody asked once: the accounts exist
}

// renew writes all tokens.
func (t *tokens) renew(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.wanted = true
	in := func(path string) string { return filepath.Join(t.lab.Root(), path) }
	ca, err := os.ReadFile(filepath.Join(t.lab.PKI(), "ca.crt"))
	if err != nil {
		return fmt.Errorf("cannot read the cluster's authority: %w", err)
	}
	return errors.Join(
		layout.WriteFile(in("/run/secrets/kubernetes.io/serviceaccount/ca.crt"), ca, 0o644),
		t.write(ctx, FlightctlNamespace, FlightctlAccount,
			in("/var/flightctl/k8s/token"), in("/run/secrets/kubernetes.io/serviceaccount/token")),
		t.write(ctx, ShimNamespace, ShimAccount, ShimTokenFile(t.lab)),
	)
}

func (t *tokens) write(ctx context.Context, namespace, account string, files ...string) error {
	token, err := t.client.Token(ctx, namespace, account, tokenTTL)
	if err != nil {
		return err
	}
	for _, file := range files {
		if err := layout.WriteFile(file, []byte(token), 0o600); err != nil {
			return fmt.Errorf("cannot write token of %s/%s: %w", namespace, account, err)
		}
	}
	return nil
}

func (t *tokens) asked() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.wanted
}

// keep renews the tokens until ctx ends, from the first call of renew on.
func (t *tokens) keep(ctx context.Context) {
	timer := time.NewTimer(tokenRenew)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		next := tokenRenew
		if t.asked() {
			if err := t.renew(ctx); err != nil {
				t.log.Error("cannot renew tokens", "error", err)
				next = tokenRetry
			}
		}
		timer.Reset(next)
	}
}
