// Package host is the part of the lab that runs on the host, once for each
// command: it builds, starts, asks and ends labs. Nothing of it stays.
package host

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/jetbridge/jetbridge/test/lab/internal/binaries"
	"github.com/jetbridge/jetbridge/test/lab/internal/control"
	"github.com/jetbridge/jetbridge/test/lab/internal/images"
	"github.com/jetbridge/jetbridge/test/lab/internal/kube"
	"github.com/jetbridge/jetbridge/test/lab/internal/layout"
	"github.com/jetbridge/jetbridge/test/lab/internal/pki"
	"github.com/jetbridge/jetbridge/test/lab/internal/supervise"
	"github.com/jetbridge/jetbridge/test/lab/rootfs"
)

// UpOptions say what a lab is to have.
type UpOptions struct {
	Lab         layout.Lab
	Checkout    string // folder of the project's go.mod
	Devices     int    // edge-1, edge-2, ...: the odd ones alone, the even ones in fleet edge
	WithoutShim bool
	Progress    io.Writer // a line for each thing that is done
}

// Fleet is the fleet that every lab has.
const Fleet = "edge"

// upper brings one lab up.
type upper struct {
	UpOptions
	config layout.Config
	client *control.Client
	begun  time.Time
}

// Up brings a lab up, or adds to a lab that is up what it does not have yet.
func Up(ctx context.Context, o UpOptions) error {
	o.Progress = &syncWriter{w: o.Progress}
	unlock, err := lockLab(ctx, o.Lab)
	if err != nil {
		return err
	}
	defer unlock()
	u := &upper{UpOptions: o, client: control.NewClient(o.Lab), begun: time.Now()}
	u.config, err = o.Lab.Load()
	running := err == nil && alive(u.config.Init)
	if err != nil && !errors.Is(err, layout.ErrNoLab) {
		fmt.Fprintln(o.Progress, "removing a broken lab:", err)
	}
	if running {
		if _, err := u.client.Status(ctx); err != nil {
			running = false
			fmt.Fprintln(o.Progress, "removing a lab that does not answer:", err)
		}
	}
	if !running {
		if err := end(ctx, u.config.OrDefault(o.Lab)); err != nil {
			return err
		}
		u.config = layout.Config{Name: o.Lab.Name, Dir: o.Lab.Dir}
	}
	steps := []struct {
		what string
		need bool
		do   func(context.Context) error
	}{
		{"third-party programs and Debian trees", true, u.build},
		{"certificates and configuration", !running, u.prepare},
		{"namespaces and supervisor", !running, u.start},
		{"etcd, PostgreSQL, Redis, registry", true, u.starts(supervise.Etcd, supervise.Postgres, supervise.Redis, supervise.Registry)},
		{"Kubernetes", true, u.starts(supervise.APIServer)},
		{"namespaces and rights", true, u.bootstrap},
		{"test images", true, u.pushImages},
		{"controllers and Flight Control's API", true, u.starts(supervise.ControllerManager, supervise.Scheduler, supervise.FlightctlAPI)},
		{"Flight Control", true, u.starts(supervise.FlightctlWorker, supervise.FlightctlPeriodic)},
		{"flightctl login, fleet " + Fleet, true, u.login},
		{"jetbridge-shim", !o.WithoutShim, u.shim},
		{"devices", o.Devices > 0, u.devices},
	}
	for i, s := range steps {
		if !s.need {
			continue
		}
		begun := time.Now()
		if err := s.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", s.what, err)
		}
		fmt.Fprintf(o.Progress, "[%d/%d] %s: %.1fs\n", i+1, len(steps), s.what, time.Since(begun).Seconds())
	}
	fmt.Fprintf(o.Progress, "lab %s is up after %s\n", o.Lab.Name, time.Since(u.begun).Round(100*time.Millisecond))
	return nil
}

// syncWriter lets several builds tell their progress at once.
type syncWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (s *syncWriter) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.w.Write(p)
}

// build makes what is not in the cache: the trees beside the programs.
func (u *upper) build(ctx context.Context) error {
	cache, err := layout.CacheDir()
	if err != nil {
		return err
	}
	c := &u.config
	c.CacheDir = cache
	bin := filepath.Join(cache, "bin")
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var trees sync.WaitGroup
	var treeErr error
	trees.Go(func() {
		for _, t := range []struct {
			spec rootfs.Spec
			to   *string
		}{{rootfs.Services(), &c.ServicesTree}, {rootfs.Device(), &c.DeviceTree}} {
			if *t.to, treeErr = rootfs.Ensure(ctx, t.spec, filepath.Join(cache, "rootfs"), u.Progress); treeErr != nil {
				cancel()
				return
			}
		}
	})
	var buildErr error
	for _, b := range []struct {
		set binaries.Set
		to  *string
	}{
		{binaries.Kube(u.Checkout), &c.KubeBin},
		{binaries.Flightctl(u.Checkout), &c.FlightctlBin},
		{binaries.Registry(u.Checkout), &c.RegistryBin},
	} {
		if *b.to, buildErr = b.set.Ensure(ctx, bin, u.Progress); buildErr != nil {
			cancel()
			break
		}
	}
	trees.Wait()
	return errors.Join(treeErr, buildErr)
}

// start launches the lab's namespaces with the supervisor in them.
func (u *upper) start(ctx context.Context) error {
	listeners, err := listen(ctx, &u.config)
	defer func() {
		for _, l := range listeners {
			l.Close()
		}
	}()
	if err != nil {
		return err
	}
	if err := u.kubeconfigs(); err != nil {
		return err
	}
	return launch(ctx, &u.config, listeners)
}

// starts has components started together and waits until they are ready.
func (u *upper) starts(names ...string) func(context.Context) error {
	return func(ctx context.Context) error {
		errs := make([]error, len(names))
		var all sync.WaitGroup
		for i, name := range names {
			all.Go(func() { errs[i] = u.client.Component(ctx, name, "start") })
		}
		all.Wait()
		return errors.Join(errs...)
	}
}

// prepare writes everything that the components read.
func (u *upper) prepare(context.Context) error {
	lab := u.Lab
	for _, dir := range []string{lab.Dir, lab.Path("logs"), lab.Bin(), lab.Path("etcd"), lab.Path("registry"), lab.Path("devices"), lab.Path("tokens"), lab.CLIConfig()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("cannot make folder: %w", err)
		}
	}
	c := &u.config
	c.RegistryUser = "lab"
	c.RegistryPassword, c.DatabasePassword, c.KVPassword = rand.Text(), rand.Text(), rand.Text()
	if err := u.kubePKI(); err != nil {
		return err
	}
	redis := "bind 127.0.0.1\nport 6379\nsave \"\"\nappendonly no\ndir /tmp\nrequirepass " + c.KVPassword + "\n"
	if err := layout.WriteFile(lab.Path("redis.conf"), []byte(redis), 0o600); err != nil {
		return err
	}
	if err := u.flightctlConfig(); err != nil {
		return err
	}
	kubectl := "#!/bin/sh\nexec " + quote(filepath.Join(c.KubeBin, "kube")) + " kubectl \"$@\"\n"
	flightctl := "#!/bin/sh\nXDG_CONFIG_HOME=" + quote(lab.CLIConfig()) + " exec " + quote(filepath.Join(c.FlightctlBin, "flightctl")) + " \"$@\"\n"
	return errors.Join(
		layout.WriteFile(filepath.Join(lab.Bin(), "kubectl"), []byte(kubectl), 0o755),
		layout.WriteFile(filepath.Join(lab.Bin(), "flightctl"), []byte(flightctl), 0o755),
	)
}

func (u *upper) kubePKI() error {
	dir := u.Lab.PKI()
	ca, err := pki.NewAuthority(dir, "ca", "kubernetes-ca", nil)
	if err != nil {
		return err
	}
	return errors.Join(
		pki.NewKeyPair(dir, "sa"),
		ca.IssueServer(dir, "apiserver", "kube-apiserver", pki.Server{
			Hosts: []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
			IPs:   []net.IP{net.IPv4(127, 0, 0, 1), net.ParseIP(layout.Gateway), net.IPv4(10, 96, 0, 1)},
		}),
		ca.IssueClient(dir, "admin", "lab-admin", "system:masters"),
		ca.IssueClient(dir, "kubelet-client", "kube-apiserver-kubelet-client", "system:masters"),
		ca.IssueClient(dir, "controller-manager", "system:kube-controller-manager"),
		ca.IssueClient(dir, "scheduler", "system:kube-scheduler"),
	)
}

// flightctlServices are those that read a configuration of their own.
func flightctlServices() []string {
	return []string{supervise.FlightctlAPI, supervise.FlightctlWorker, supervise.FlightctlPeriodic}
}

func (u *upper) flightctlConfig() error {
	c, lab := u.config, u.Lab
	certs := filepath.Join(lab.Home(), "certs")
	ca, err := pki.NewAuthority(certs, "ca", "flightctl-ca", nil)
	if err != nil {
		return err
	}
	signer, err := pki.NewAuthority(certs, "client-signer", "flightctl-client-signer", ca)
	if err != nil {
		return err
	}
	if err := ca.IssueServer(certs, "server", "flightctl", pki.Server{
		Hosts: []string{"localhost"},
		IPs:   []net.IP{net.IPv4(127, 0, 0, 1), net.ParseIP(layout.Gateway)},
	}); err != nil {
		return err
	}
	bundle := pki.Bundle(ca, signer)
	if err := layout.WriteFile(filepath.Join(certs, "ca-bundle.crt"), bundle, 0o644); err != nil {
		return err
	}
	for _, service := range flightctlServices() {
		config, err := yaml.Marshal(map[string]any{
			"database": map[string]any{
				"type": "pgsql", "hostname": "127.0.0.1", "port": 5432, "name": "flightctl",
				"user": "flightctl", "password": c.DatabasePassword,
				"migrationUser": "flightctl", "migrationPassword": c.DatabasePassword,
			},
			"service": map[string]any{
				"address": ":3443", "agentEndpointAddress": ":7443", "cert": certs,
				"baseUrl": "https://" + layout.Gateway + ":3443/", "baseAgentEndpointUrl": "https://" + layout.Gateway + ":7443/",
				"altNames": []string{"localhost", "127.0.0.1", layout.Gateway}, "logLevel": "info",
				// How long a device's poll waits, and so how fine lastSeen is.
				"renderedWaitTimeout": "10s",
				// What Flight Control's Helm chart sets by default.
				"rateLimit": map[string]any{"enabled": true, "requests": 300, "window": "1m", "authRequests": 20, "authWindow": "1h"},
			},
			"kv": map[string]any{"hostname": "127.0.0.1", "port": 6379, "password": c.KVPassword},
			"auth": map[string]any{
				"insecureSkipTlsVerify": true,
				"k8s": map[string]any{
					"providerType": "k8s", "enabled": true, "apiUrl": "https://127.0.0.1:6443", "rbacNs": supervise.FlightctlNamespace,
				},
			},
			"organizations": map[string]any{"enabled": false},
			"periodic":      map[string]any{"clusterLevelSecretAccess": true, "releaseNamespace": supervise.FlightctlNamespace, "consumers": 5},
			// All services would take the same port, each of them twice.
			"metrics": map[string]any{"enabled": false},
		})
		if err != nil {
			return fmt.Errorf("cannot encode configuration of %s: %w", service, err)
		}
		home := filepath.Join(lab.Home(), service, ".flightctl")
		if err := layout.WriteFile(filepath.Join(home, "config.yaml"), config, 0o600); err != nil {
			return err
		}
		if err := os.Symlink(certs, filepath.Join(home, "certs")); err != nil {
			return fmt.Errorf("cannot give %s its certificates: %w", service, err)
		}
	}
	return nil
}

// kubeconfigs writes those of the administrator on the host and of the components.
func (u *upper) kubeconfigs() error {
	dir := u.Lab.PKI()
	ca := filepath.Join(dir, "ca.crt")
	user := func(name string) kube.User {
		return kube.User{CertFile: filepath.Join(dir, name+".crt"), KeyFile: filepath.Join(dir, name+".key")}
	}
	const inside = "https://127.0.0.1:6443"
	for _, k := range []struct {
		path, server string
		user         kube.User
	}{
		{u.Lab.Kubeconfig(), u.url(layout.RelayAPI, "https"), user("admin")},
		{filepath.Join(dir, "controller-manager.kubeconfig"), inside, user("controller-manager")},
		{filepath.Join(dir, "scheduler.kubeconfig"), inside, user("scheduler")},
		{filepath.Join(dir, "shim.kubeconfig"), inside, kube.User{TokenFile: supervise.ShimTokenFile(u.Lab)}},
	} {
		b, err := kube.Kubeconfig(k.server, ca, k.user)
		if err != nil {
			return err
		}
		if err := layout.WriteFile(k.path, b, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// url is a relay's, as the host reaches it.
func (u *upper) url(relay, scheme string) string {
	return fmt.Sprintf("%s://127.0.0.1:%d", scheme, u.config.Ports[relay])
}

// run runs a tool of the lab on the host.
func (u *upper) run(ctx context.Context, stdin []byte, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(u.Lab.Bin(), name), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+u.Lab.Kubeconfig())
	cmd.Stdin = bytes.NewReader(stdin)
	var out, problem bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problem
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", name, args[0], err, strings.TrimSpace(problem.String()))
	}
	return out.Bytes(), nil
}

// login logs the CLI in and makes the fleet.
func (u *upper) login(ctx context.Context) error {
	if _, err := u.run(ctx, nil, "flightctl", "get", "fleet/"+Fleet); err == nil {
		return nil
	}
	// A lab lasts for days, and logins are limited.
	token, err := u.run(ctx, nil, "kubectl", "-n", supervise.FlightctlNamespace, "create", "token", operatorAccount, "--duration=720h")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(u.Lab.CLIConfig(), "flightctl"), 0o700); err != nil {
		return fmt.Errorf("cannot make folder: %w", err)
	}
	_, err = u.run(ctx, nil, "flightctl", "login", u.url(layout.RelayFlightctl, "https"),
		"--certificate-authority", filepath.Join(u.Lab.Home(), "certs", "ca.crt"), "--token", strings.TrimSpace(string(token)))
	if err != nil {
		return err
	}
	if _, err = u.run(ctx, []byte(fleetManifest), "flightctl", "apply", "-f", "-"); err != nil {
		return err
	}
	return u.fleetValid(ctx)
}

// fleetValid waits until Flight Control's worker has looked at the fleet: then it works.
func (u *upper) fleetValid(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tick := time.NewTicker(time.Second) // requests are limited
	defer tick.Stop()
	for {
		out, err := u.run(ctx, nil, "flightctl", "get", "fleet/"+Fleet, "-o", "json")
		if err == nil && isValid(out) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("flightctl-worker does not validate fleet %s (see its log): %w", Fleet, ctx.Err())
		case <-tick.C:
		}
	}
}

// isValid tells whether a fleet has the condition Valid.
func isValid(fleet []byte) bool {
	var f struct {
		Status struct {
			Conditions []struct {
				Type   string `json:"type"`
				Status string `json:"status"`
			} `json:"conditions"`
		} `json:"status"`
	}
	if json.Unmarshal(fleet, &f) != nil {
		return false
	}
	for _, c := range f.Status.Conditions {
		if c.Type == "Valid" && c.Status == "True" {
			return true
		}
	}
	return false
}

// pushImages builds the test images and pushes them.
func (u *upper) pushImages(ctx context.Context) error {
	if u.config.ImageTester != "" {
		return nil
	}
	registry := images.Registry{
		Address: fmt.Sprintf("127.0.0.1:%d", u.config.Ports[layout.RelayRegistry]),
		User:    u.config.RegistryUser, Password: u.config.RegistryPassword,
	}
	program := filepath.Join(u.Lab.Bin(), "tester")
	if err := goBuild(ctx, u.Checkout, program, "./test/images/tester", ""); err != nil {
		return err
	}
	testerProgram, err := os.ReadFile(program)
	if err != nil {
		return fmt.Errorf("cannot read tester: %w", err)
	}
	tester, err := images.Tester(testerProgram)
	if err != nil {
		return err
	}
	static := filepath.Join(u.config.ServicesTree, "usr/bin/busybox")
	busyboxProgram, err := os.ReadFile(static)
	if err != nil {
		return fmt.Errorf("cannot read busybox: %w", err)
	}
	applets, err := exec.CommandContext(ctx, static, "--list").Output()
	if err != nil {
		return fmt.Errorf("cannot list busybox's applets: %w", err)
	}
	busybox, err := images.Busybox(busyboxProgram, strings.Fields(string(applets)))
	if err != nil {
		return err
	}
	// Devices take this registry for Docker Hub too, where it has this name.
	if _, err := registry.Push(ctx, "library/busybox:1", busybox); err != nil {
		return err
	}
	busyboxDigest, err := registry.Push(ctx, "busybox:1", busybox)
	if err != nil {
		return err
	}
	testerDigest, err := registry.Push(ctx, "tester:1", tester)
	if err != nil {
		return err
	}
	if _, err := registry.Push(ctx, "private/tester:1", tester); err != nil {
		return err
	}
	u.config.ImageBusybox = layout.RegistryAddress + "/busybox@" + busyboxDigest
	u.config.ImageTester = layout.RegistryAddress + "/tester@" + testerDigest
	return u.config.Save()
}

// goBuild builds a program of the project.
func goBuild(ctx context.Context, checkout, out, pkg, tags string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-tags", tags, "-o", out, pkg)
	cmd.Dir = checkout
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot build %s: %w\n%s", pkg, err, text)
	}
	return nil
}

// productTags are the build tags of the shim and the agent.
const productTags = "remote containers_image_openpgp exclude_graphdriver_btrfs exclude_graphdriver_devicemapper"

// shim builds the shim, and starts it anew if it changed.
func (u *upper) shim(ctx context.Context) error {
	program := filepath.Join(u.Lab.Bin(), "jetbridge-shim")
	if err := goBuild(ctx, u.Checkout, program+".new", "./cluster-shim", productTags); err != nil {
		return err
	}
	config, err := shimConfig(u.Lab)
	if err != nil {
		return err
	}
	changed, err := replaceIfChanged(program+".new", program)
	if err != nil {
		return err
	}
	old, err := os.ReadFile(u.Lab.Path("shim.yaml"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot read the shim's configuration: %w", err)
	}
	if !bytes.Equal(old, config) {
		changed = true
		if err := layout.WriteFile(u.Lab.Path("shim.yaml"), config, 0o600); err != nil {
			return err
		}
	}
	action := "start"
	if changed {
		action = "restart"
	}
	return u.client.Component(ctx, supervise.Shim, action)
}

// replaceIfChanged moves a file over another, unless that is the same already.
func replaceIfChanged(from, to string) (bool, error) {
	fresh, err := os.ReadFile(from)
	if err != nil {
		return false, fmt.Errorf("cannot read program: %w", err)
	}
	old, err := os.ReadFile(to)
	if err == nil && bytes.Equal(fresh, old) {
		return false, os.Remove(from)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, fmt.Errorf("cannot read program: %w", err)
	}
	return true, os.Rename(from, to)
}

// shimConfig is what the shim in the lab reads.
func shimConfig(lab layout.Lab) ([]byte, error) {
	b, err := yaml.Marshal(map[string]any{
		"kubeconfig":    filepath.Join(lab.PKI(), "shim.kubeconfig"),
		"namespace":     supervise.ShimNamespace,
		"poll-interval": "2s",
		// Three of the devices' polls, see renderedWaitTimeout.
		"disconnect-after": "30s",
		"retry-after":      "15s",
		"flightctl": map[string]any{
			// Not by loopback, whose budget of requests is the operator's.
			"url": "https://" + layout.Gateway + ":3443", "ca-file": filepath.Join(lab.Home(), "certs", "ca.crt"),
			"token-file": supervise.ShimTokenFile(lab),
		},
		"bundle-server": map[string]any{"listen": layout.Gateway + ":8443", "url": "https://" + layout.Gateway + ":8443"},
		"listen":        "127.0.0.1:8080",
	})
	if err != nil {
		return nil, fmt.Errorf("cannot encode the shim's configuration: %w", err)
	}
	return b, nil
}

// devices adds those of the first that are missing.
func (u *upper) devices(ctx context.Context) error {
	status, err := u.client.Status(ctx)
	if err != nil {
		return err
	}
	have := map[string]bool{}
	for _, d := range status.Devices {
		have[d.Name] = true
	}
	var all sync.WaitGroup
	errs := make([]error, u.Devices)
	overlay, err := overlay(ctx, u.Lab, u.Checkout)
	if err != nil {
		return err
	}
	for i := range u.Devices {
		name := fmt.Sprintf("edge-%d", i+1)
		if have[name] {
			continue
		}
		fleet := ""
		if i%2 == 1 {
			fleet = Fleet
		}
		all.Go(func() {
			begun := time.Now()
			_, errs[i] = addDevice(ctx, u.Lab, overlay, control.AddDevice{Name: name, Fleet: fleet, Enroll: true})
			if errs[i] == nil {
				fmt.Fprintf(u.Progress, "device %s is enrolled after %.1fs\n", name, time.Since(begun).Seconds())
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// quote makes a word of a shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
