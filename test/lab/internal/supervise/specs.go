package supervise

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/jetbridge/jetbridge/test/lab/internal/kube"
	"github.com/jetbridge/jetbridge/test/lab/internal/layout"
	"github.com/jetbridge/jetbridge/test/lab/internal/nsinit"
)

// Names of the components.
const (
	Etcd              = "etcd"
	APIServer         = "apiserver"
	ControllerManager = "controller-manager"
	Scheduler         = "scheduler"
	Postgres          = "postgres"
	Redis             = "redis"
	Registry          = "registry"
	FlightctlAPI      = "flightctl-api"
	FlightctlWorker   = "flightctl-worker"
	FlightctlPeriodic = "flightctl-periodic"
	Shim              = "jetbridge-shim"
)

// ServiceCIDR are the cluster's service addresses.
const ServiceCIDR = "10.96.0.0/16"

// postgresBin is where the tree has PostgreSQL's programs.
const postgresBin = "/usr/lib/postgresql/17/bin/"

// specs are all components, in no order that matters.
func specs(c layout.Config, client *kube.Client) ([]Spec, error) {
	lab := c.Lab()
	root := lab.Root()
	uid, gid, err := nsinit.User(root, "postgres")
	if err != nil {
		return nil, err
	}
	all := kubernetes(c, client)
	all = append(all,
		postgres(c, uint32(uid), uint32(gid)),
		Spec{
			Name: Redis, Path: "/usr/bin/redis-server", Args: []string{lab.Path("redis.conf")},
			Ready: dials("127.0.0.1:6379"),
		},
		Spec{
			Name: Registry, Path: filepath.Join(c.RegistryBin, "registry"), Args: []string{layout.RegistryAddress, lab.Path("registry")},
			Env:   []string{"REGISTRY_USER=" + c.RegistryUser, "REGISTRY_PASS=" + c.RegistryPassword, "OTEL_TRACES_EXPORTER=none"},
			Ready: answers("http://" + layout.RegistryAddress + "/v2/"),
		},
	)
	for _, name := range []string{FlightctlAPI, FlightctlWorker, FlightctlPeriodic} {
		s := Spec{
			Name: name, Path: filepath.Join(c.FlightctlBin, name),
			Env: flightctlEnv(lab, name),
			// Only the API has an endpoint for its health; of the others it shows in what they do.
		}
		if name == FlightctlAPI {
			s.Before = migrate(c)
			s.Ready = answers("https://127.0.0.1:3443/readyz")
		}
		all = append(all, s)
	}
	all = append(all, Spec{
		Name: Shim, Path: filepath.Join(lab.Bin(), "jetbridge-shim"), Args: []string{"--config", lab.Path("shim.yaml")},
		Ready: answers("http://127.0.0.1:8080/readyz"),
	})
	for i := range all {
		all[i].Chroot = root
	}
	return all, nil
}

func kubernetes(c layout.Config, client *kube.Client) []Spec {
	lab := c.Lab()
	program := filepath.Join(c.KubeBin, "kube")
	pki := func(name string) string { return filepath.Join(lab.PKI(), name) }
	return []Spec{
		{
			Name: Etcd, Path: program,
			Args: []string{
				"etcd", "--data-dir=" + lab.Path("etcd"), "--listen-client-urls=http://127.0.0.1:2379",
				"--advertise-client-urls=http://127.0.0.1:2379", "--listen-peer-urls=http://127.0.0.1:2380",
				"--initial-advertise-peer-urls=http://127.0.0.1:2380", "--initial-cluster=default=http://127.0.0.1:2380",
				"--unsafe-no-fsync",
			},
			Ready: answers("http://127.0.0.1:2379/health"),
		},
		{
			Name: APIServer, Path: program,
			Args: []string{
				"kube-apiserver", "--etcd-servers=http://127.0.0.1:2379",
				"--bind-address=0.0.0.0", "--advertise-address=" + layout.Gateway, "--secure-port=6443",
				"--tls-cert-file=" + pki("apiserver.crt"), "--tls-private-key-file=" + pki("apiserver.key"),
				"--client-ca-file=" + pki("ca.crt"),
				"--kubelet-client-certificate=" + pki("kubelet-client.crt"), "--kubelet-client-key=" + pki("kubelet-client.key"),
				"--kubelet-certificate-authority=" + pki("ca.crt"),
				"--service-account-issuer=https://kubernetes.default.svc",
				"--service-account-signing-key-file=" + pki("sa.key"), "--service-account-key-file=" + pki("sa.pub"),
				"--service-cluster-ip-range=" + ServiceCIDR,
				"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
			},
			Ready: client.Ready,
		},
		{
			Name: ControllerManager, Path: program,
			Args: []string{
				"kube-controller-manager", "--kubeconfig=" + pki("controller-manager.kubeconfig"), "--leader-elect=false",
				"--bind-address=127.0.0.1", "--service-account-private-key-file=" + pki("sa.key"), "--root-ca-file=" + pki("ca.crt"),
				"--use-service-account-credentials", "--cluster-signing-cert-file=" + pki("ca.crt"),
				"--cluster-signing-key-file=" + pki("ca.key"),
			},
			Ready: answers("https://127.0.0.1:10257/healthz"),
		},
		{
			Name: Scheduler, Path: program,
			Args:  []string{"kube-scheduler", "--kubeconfig=" + pki("scheduler.kubeconfig"), "--leader-elect=false", "--bind-address=127.0.0.1"},
			Ready: answers("https://127.0.0.1:10259/readyz"),
		},
	}
}

func flightctlEnv(lab layout.Lab, service string) []string {
	return []string{
		"HOME=" + filepath.Join(lab.Home(), service), "KUBERNETES_SERVICE_HOST=127.0.0.1", "KUBERNETES_SERVICE_PORT=6443",
	}
}

// migrate brings the database's tables to what the services expect.
func migrate(c layout.Config) func(context.Context, *os.File) error {
	return func(ctx context.Context, log *os.File) error {
		s := Spec{
			Path: filepath.Join(c.FlightctlBin, "flightctl-db-migrate"), Chroot: c.Lab().Root(),
			Env: flightctlEnv(c.Lab(), FlightctlAPI),
		}
		if err := s.command(ctx, log).Run(); err != nil {
			return fmt.Errorf("cannot migrate database: %w", err)
		}
		return nil
	}
}

// PostgreSQL's data folder and sockets, inside the services' root.
const (
	postgresData   = "/var/lib/postgresql/lab"
	postgresSocket = "/run/postgresql"
)

func postgres(c layout.Config, uid, gid uint32) Spec {
	s := Spec{
		Name: Postgres, Path: postgresBin + "postgres",
		Args: []string{
			"-D", postgresData, "-k", postgresSocket, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off",
			"-c", "synchronous_commit=off", "-c", "full_page_writes=off", "-c", "max_connections=300", "-c", "shared_buffers=64MB",
		},
		Chroot: c.Lab().Root(), UID: uid, GID: gid,
	}
	tool := func(ctx context.Context, log *os.File, stdin io.Reader, name string, args ...string) error {
		cmd := Spec{Path: postgresBin + name, Args: args, Chroot: s.Chroot, UID: uid, GID: gid}.command(ctx, log)
		cmd.Stdin = stdin
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	}
	s.Before = func(ctx context.Context, log *os.File) error {
		data := filepath.Join(s.Chroot, postgresData)
		if _, err := os.Stat(filepath.Join(data, "PG_VERSION")); err == nil {
			return nil
		}
		// An interrupted initdb leaves a folder that the next one would refuse.
		if err := os.RemoveAll(data); err != nil {
			return fmt.Errorf("cannot remove unfinished data: %w", err)
		}
		if err := tool(ctx, log, nil, "initdb", "-D", postgresData, "-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8",
			"--no-sync", "--auth-local=trust", "--auth-host=scram-sha-256"); err != nil {
			return err
		}
		sql := fmt.Sprintf("CREATE ROLE flightctl SUPERUSER LOGIN PASSWORD '%s';\n\nCREATE DATABASE flightctl OWNER flightctl;\n\n", c.DatabasePassword)
		// Alone on the data, before the server opens to others.
		return tool(ctx, log, bytes.NewReader([]byte(sql)), "postgres", "--single", "-j", "-D", postgresData, "postgres")
	}
	s.Ready = func(ctx context.Context) error {
		null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		if err != nil {
			return fmt.Errorf("cannot open %s: %w", os.DevNull, err)
		}
		defer null.Close()
		return tool(ctx, null, nil, "pg_isready", "-q", "-h", "127.0.0.1")
	}
	return s
}

func dials(address string) func(context.Context) error {
	return func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		return conn.Close()
	}
}

// answers asks an address of the lab's own network for status 200.
func answers(url string) func(context.Context) error {
	// Health is not a secret, and these certificates are the components' own.
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true} //nolint:gosec // see above
	client := &http.Client{Transport: transport, Timeout: 5 * time.Second}
	return func(ctx context.Context) (err error) {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, response.Body.Close()) }()
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("%s answers %s", url, response.Status)
		}
		return nil
	}
}
