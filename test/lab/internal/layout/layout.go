// Package layout knows where a lab and its cache keep their files, and what a
// lab remembers about itself.
package layout

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"github.com/jetbridge/jetbridge/test/lab/internal/cgroup"
)

// DefaultState is the folder of all labs' state, unless StateEnv names another.
const DefaultState = "/var/lib/jetbridge-lab"

// StateEnv is the environment variable that names the folder of all labs' state.
const StateEnv = "JETBRIDGE_LAB_STATE"

// Addresses inside every lab's own network.
const (
	Bridge          = "edge0"
	Gateway         = "10.77.0.1"
	RegistryAddress = Gateway + ":5000"
)

// The host's relays, by what they lead to.
const (
	RelayAPI       = "apiserver"
	RelayFlightctl = "flightctl-api"
	RelayRegistry  = "registry"
	RelayShim      = "jetbridge-shim"
)

// Relay is a listener on the host's loopback, and the address inside the lab
// that its connections go to.
type Relay struct {
	Name   string
	Target string
}

// Relays are what the host reaches of a lab, in the order in which their
// listeners are handed to the lab's first process.
func Relays() []Relay {
	return []Relay{
		{RelayAPI, "127.0.0.1:6443"},
		{RelayFlightctl, "127.0.0.1:3443"},
		{RelayRegistry, RegistryAddress},
		{RelayShim, "127.0.0.1:8080"},
	}
}

// Lab is a lab's name and folder.
type Lab struct {
	Name string
	Dir  string
}

var validName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`)

// CheckName refuses names of labs and devices that cannot be host names.
func CheckName(name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("the name %q is not 1 to 32 lower case letters, digits and inner dashes", name)
	}
	return nil
}

// New finds the folder of the lab of that name. It need not exist.
func New(name string) (Lab, error) {
	if err := CheckName(name); err != nil {
		return Lab{}, err
	}
	root := os.Getenv(StateEnv)
	if root == "" {
		root = DefaultState
	}
	root, err := filepath.Abs(root)
	if err != nil {
		return Lab{}, fmt.Errorf("cannot find state folder: %w", err)
	}
	return Lab{Name: name, Dir: filepath.Join(root, name)}, nil
}

// Path is a path in the lab's folder.
func (l Lab) Path(elements ...string) string {
	return filepath.Join(append([]string{l.Dir}, elements...)...)
}

// Socket is where the supervisor is controlled.
func (l Lab) Socket() string { return l.Path("control.sock") }

// ExecSocket is where the supervisor takes commands to run on devices.
func (l Lab) ExecSocket() string { return l.Path("exec.sock") }

// Log is the file that a component or device logs to.
func (l Lab) Log(name string) string { return l.Path("logs", name+".log") }

// Bin is the folder of what users of the lab run.
func (l Lab) Bin() string { return l.Path("bin") }

// PKI is the folder of the cluster's certificates and keys.
func (l Lab) PKI() string { return l.Path("pki") }

// Kubeconfig is the administrator's, with the host's relay as its server.
func (l Lab) Kubeconfig() string { return l.Path("kubeconfig") }

// Root is where the services' own root is mounted, inside the lab only.
func (l Lab) Root() string { return l.Path("services", "root") }

// Home is the home folder of Flight Control's services.
func (l Lab) Home() string { return l.Path("flightctl") }

// CLIConfig is the folder that flightctl takes as XDG_CONFIG_HOME.
func (l Lab) CLIConfig() string { return l.Path("cli") }

// CacheDir is the folder of what labs share and keep.
func CacheDir() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("cannot find cache folder: %w", err)
	}
	return filepath.Join(dir, "jetbridge"), nil
}

// Process is a process that cannot be mistaken for a later one of the same number.
type Process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks after the kernel's boot
}

// Config is what a lab remembers about itself.
type Config struct {
	Name     string `json:"name"`
	Dir      string `json:"dir"`
	CacheDir string `json:"cacheDir"`

	// What was built: folders of trees and programs.
	ServicesTree string `json:"servicesTree"`
	DeviceTree   string `json:"deviceTree"`
	KubeBin      string `json:"kubeBin"`
	FlightctlBin string `json:"flightctlBin"`
	RegistryBin  string `json:"registryBin"`

	// Ports are the host's relays, by name.
	Ports map[string]int `json:"ports"`

	RegistryUser     string `json:"registryUser"`
	RegistryPassword string `json:"registryPassword"`
	DatabasePassword string `json:"databasePassword"`
	KVPassword       string `json:"kvPassword"`

	// Cgroups are the lab's own, as the host sees them.
	Cgroups []cgroup.Hierarchy `json:"cgroups"`
	// Init is the first process of the lab's PID namespace, as the host sees it.
	Init Process `json:"init"`

	// ImageBusybox and ImageTester are references by digest, as devices see them.
	ImageBusybox string `json:"imageBusybox,omitempty"`
	ImageTester  string `json:"imageTester,omitempty"`
}

// Lab is the lab that the configuration belongs to.
func (c Config) Lab() Lab { return Lab{Name: c.Name, Dir: c.Dir} }

// ErrNoLab says that there is no such lab.
var ErrNoLab = errors.New("no such lab")

// Load reads what the lab remembers; ErrNoLab if there is nothing.
func (l Lab) Load() (Config, error) {
	var c Config
	b, err := os.ReadFile(l.Path("lab.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return c, fmt.Errorf("%s: %w", l.Name, ErrNoLab)
	}
	if err != nil {
		return c, fmt.Errorf("cannot read the lab's configuration: %w", err)
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return c, fmt.Errorf("cannot read the lab's configuration: %w", err)
	}
	return c, nil
}

// Save writes what the lab remembers.
func (c Config) Save() error {
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return fmt.Errorf("cannot write the lab's configuration: %w", err)
	}
	return WriteFile(c.Lab().Path("lab.json"), b, 0o600)
}

// WriteFile replaces a file at once, and makes its folder if need be.
func WriteFile(path string, content []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("cannot make folder: %w", err)
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, content, mode); err != nil {
		return fmt.Errorf("cannot write file: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("cannot replace file: %w", err)
	}
	return nil
}

// OrDefault is the configuration, or if there is none one with all that is
// known of a lab that has not written anything down.
func (c Config) OrDefault(lab Lab) Config {
	if c.Name == "" {
		c.Name, c.Dir = lab.Name, lab.Dir
	}
	return c
}
