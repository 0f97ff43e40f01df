// Command registry is the lab's image registry: distribution with its images
// in a folder. It lets everybody read and write every repository, except that
// those below private/ demand a user and a password.
//
// Usage: registry ADDRESS FOLDER. The environment variables REGISTRY_USER and
// REGISTRY_PASS hold the credentials.
package main

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry"
	"github.com/distribution/distribution/v3/registry/auth"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
)

// accessName is what the configuration calls this program's access controller.
const accessName = "lab"

// privatePrefix begins the names of repositories that demand credentials.
const privatePrefix = "private/"

const basicChallenge = `Basic realm="lab"`

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "registry:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	user, password := os.Getenv("REGISTRY_USER"), os.Getenv("REGISTRY_PASS")
	if len(args) != 2 || user == "" || password == "" {
		return errors.New("usage: REGISTRY_USER=... REGISTRY_PASS=... registry ADDRESS FOLDER")
	}
	err := auth.Register(accessName, func(map[string]any) (auth.AccessController, error) {
		return access{user: user, password: password}, nil
	})
	if err != nil {
		return fmt.Errorf("cannot register access controller: %w", err)
	}
	config, err := configuration.Parse(strings.NewReader(`version: 0.1
log: {level: info, formatter: text}
storage: {filesystem: {}, delete: {enabled: true}, maintenance: {uploadpurging: {enabled: false}}}
`))
	if err != nil {
		return fmt.Errorf("cannot read configuration: %w", err)
	}
	config.Storage["filesystem"] = configuration.Parameters{"rootdirectory": args[1]}
	config.Auth = configuration.Auth{accessName: configuration.Parameters{}}
	config.HTTP.Addr = args[0]
	// Clients learn from the API's root, which is open to all, that there are
	// credentials to send; without this they would not send theirs anywhere.
	config.HTTP.Headers = http.Header{"Www-Authenticate": {basicChallenge}}
	config.HTTP.Secret = password // one process, so any secret will do
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	r, err := registry.NewRegistry(ctx, config)
	if err != nil {
		return fmt.Errorf("cannot make registry: %w", err)
	}
	if err := r.ListenAndServe(); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("cannot serve: %w", err)
	}
	return nil
}

// access lets requests through that do not touch a private repository, or that
// carry the credentials.
type access struct {
	user, password string
}

// Authorized implements auth.AccessController.
func (a access) Authorized(r *http.Request, wanted ...auth.Access) (*auth.Grant, error) {
	user, password, given := r.BasicAuth()
	known := given && same(user, a.user) && same(password, a.password)
	if known {
		return &auth.Grant{User: auth.UserInfo{Name: user}, Resources: resources(wanted)}, nil
	}
	if given && user != "" { // some clients send an empty user if they know none
		return nil, challenge{auth.ErrAuthenticationFailure}
	}
	for _, w := range wanted {
		if w.Type != "repository" || strings.HasPrefix(w.Name, privatePrefix) {
			return nil, challenge{auth.ErrInvalidCredential}
		}
	}
	return &auth.Grant{User: auth.UserInfo{Name: "anonymous"}, Resources: resources(wanted)}, nil
}

func resources(wanted []auth.Access) []auth.Resource {
	all := make([]auth.Resource, 0, len(wanted))
	for _, w := range wanted {
		all = append(all, w.Resource)
	}
	return all
}

func same(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

// challenge asks for Basic credentials.
type challenge struct{ error }

// SetHeaders implements auth.Challenge.
func (challenge) SetHeaders(_ *http.Request, w http.ResponseWriter) {
	w.Header().Set("WWW-Authenticate", basicChallenge)
}

func (c challenge) Unwrap() error { return c.error }
