// Package flightapi is the only client of Flightctl's API in the shim.
//
// It speaks the REST API version v1beta1 and edits documents as they were
// read, so that fields it does not know survive. Requests are paced below
// Flightctl's default limit of 300 a minute; an answer 429 stops all of them
// for a while. Errors wrap ErrNotFound, ErrConflict, ErrOwned or
// ErrRateLimited where a caller may act on it.
package flightapi

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
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// What a caller may act on.
var (
	// ErrNotFound says that the resource does not exist.
	ErrNotFound = errors.New("not found")
	// ErrConflict says that somebody else changed the resource: read it again.
	ErrConflict = errors.New("changed meanwhile")
	// ErrOwned says that the resource belongs to another one and is read-only.
	ErrOwned = errors.New("owned by another resource")
	// ErrRateLimited says that Flightctl refused the request for now.
	ErrRateLimited = errors.New("rate limited")
)

const (
	maxAnswer    = 64 << 20
	pageSize     = 200
	perSecond    = 4
	burst        = 20
	defaultPause = 10 * time.Second
	longestPause = 2 * time.Minute
)

// Options say how to reach Flightctl.
type Options struct {
	// URL is the base of the user API, such as https://flightctl.example:3443.
	URL string
	// CAFile is a PEM file of trusted authorities; empty for the system's.
	CAFile string
	// TokenFile holds the bearer token; it is read again for each request
	// when its content may have rotated.
	TokenFile string
	// InsecureSkipVerify trusts any certificate; for tests only.
	InsecureSkipVerify bool
	// Organization is the ID of an organization; empty for the default one.
	Organization string
	// Timeout limits one request; 30 s if zero.
	Timeout time.Duration
	// Observe is told of each request, code 0 for none; may be nil.
	Observe func(method string, code int, took time.Duration)
}

// Client talks to one Flightctl.
type Client struct {
	base    *url.URL
	opts    Options
	http    *http.Client
	limiter *rate.Limiter

	mu sync.Mutex // guards everything that follows
	// pausedUntil is when requests may go on after an answer 429.
	pausedUntil time.Time
}

// New makes a client; it does not connect.
func New(o Options) (*Client, error) {
	base, err := url.Parse(strings.TrimSuffix(o.URL, "/"))
	if err != nil || base.Host == "" {
		return nil, fmt.Errorf("cannot use Flightctl's URL %q: not an absolute URL", o.URL)
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: o.InsecureSkipVerify}
	if o.CAFile != "" {
		pem, err := os.ReadFile(o.CAFile)
		if err != nil {
			return nil, fmt.Errorf("cannot read Flightctl's CA: %w", err)
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("cannot read Flightctl's CA: no certificate in %s", o.CAFile)
		}
	}
	if o.Timeout == 0 {
		o.Timeout = 30 * time.Second
	}
	return &Client{
		base: base, opts: o,
		http: &http.Client{Timeout: o.Timeout, Transport: &http.Transport{
			TLSClientConfig: t, Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true,
			MaxIdleConnsPerHost: 4, IdleConnTimeout: 90 * time.Second,
		}},
		limiter: rate.NewLimiter(perSecond, burst),
	}, nil
}

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func (c *Client) wait(ctx context.Context) error {
	c.mu.Lock()
	pause := time.Until(c.pausedUntil)
	c.mu.Unlock()
	if pause > 0 {
		timer := time.NewTimer(pause)
		defer timer.Stop()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		}
	}
	return c.limiter.Wait(ctx)
}

// answer is what came back.
type answer struct {
	code int
	date time.Time
	body []byte
}

func (c *Client) do(ctx context.Context, method, path string, query url.Values, body any) (*answer, error) {
	what := method + " " + path
	if err := c.wait(ctx); err != nil {
		return nil, fmt.Errorf("cannot %s: %w", what, err)
	}
	var payload io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("cannot encode %s: %w", what, err)
		}
		payload = bytes.NewReader(text)
	}
	u := c.base.JoinPath("/api/v1", path)
	if c.opts.Organization != "" {
		if query == nil {
			query = url.Values{}
		}
		query.Set("org_id", c.opts.Organization)
	}
	u.RawQuery = query.Encode()
	req, err := http.NewRequestWithContext(ctx, method, u.String(), payload)
	if err != nil {
		return nil, fmt.Errorf("cannot %s: %w", what, err)
	}
	req.Header.Set("Accept", "application/json")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.opts.TokenFile != "" {
		token, err := os.ReadFile(c.opts.TokenFile)
		if err != nil {
			return nil, fmt.Errorf("cannot read Flightctl's token: %w", err)
		}
		req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	}
	start := time.Now()
	resp, err := c.http.Do(req)
	if err != nil {
		c.observe(method, 0, time.Since(start))
		return nil, fmt.Errorf("cannot %s: %w", what, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	c.observe(method, resp.StatusCode, time.Since(start))
	if err != nil {
		return nil, fmt.Errorf("cannot read answer to %s: %w", what, err)
	}
	a := &answer{code: resp.StatusCode, body: text, date: time.Now()}
	if d, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
		a.date = d
	}
	if err := c.check(resp, text); err != nil {
		return nil, fmt.Errorf("cannot %s: %w", what, err)
	}
	return a, nil
}

func (c *Client) observe(method string, code int, took time.Duration) {
	if c.opts.Observe != nil {
		c.opts.Observe(method, code, took)
	}
}

// check turns an answer that is no success into an error.
func (c *Client) check(resp *http.Response, text []byte) error {
	if resp.StatusCode < 300 {
		return nil
	}
	var status struct {
		Message string `json:"message"`
	}
	message := resp.Status
	if json.Unmarshal(text, &status) == nil && status.Message != "" {
		message += ": " + status.Message
	}
	switch resp.StatusCode {
	case http.StatusNotFound:
		return fmt.Errorf("%w: %s", ErrNotFound, message)
	case http.StatusConflict:
		if strings.Contains(status.Message, "owner") {
			return fmt.Errorf("%w: %s", ErrOwned, message)
		}
		return fmt.Errorf("%w: %s", ErrConflict, message)
	case http.StatusTooManyRequests:
		pause := defaultPause
		if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s >= 0 {
			pause = min(time.Duration(s)*time.Second, longestPause)
		}
		c.mu.Lock()
		c.pausedUntil = time.Now().Add(pause)
		c.mu.Unlock()
		return fmt.Errorf("%w for %s: %s", ErrRateLimited, pause, message)
	}
	return errors.New(message)
}
