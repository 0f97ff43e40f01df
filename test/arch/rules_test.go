package arch_test

// module is the path that precedes all of the project's own imports.
const module = "github.com/jetbridge/jetbridge/"

// std stands for all of the standard library in a rule's list.
const std = "std"

// rule says what the packages in some folders may import. Folders and imports
// match as whole path elements and include everything below them; imports of
// the project itself are written without its module path. Packages that do not
// exist yet are no error.
type rule struct {
	// in are the folders that the rule is for.
	in []string
	// allow are the only imports; nil allows all.
	allow []string
	// deny are forbidden, even if allowed above.
	deny []string
	// except are folders below in that the rule is not for.
	except []string
	// tests says that the rule is for test files as well.
	tests bool
	// why is what to tell the one who broke it.
	why string
}

var (
	kubernetesTypes = []string{"k8s.io/api", "k8s.io/apimachinery"}
	// pure packages compute and do nothing else.
	pure = []string{
		"cluster-shim/device", "cluster-shim/disconnect", "cluster-shim/podstatus",
		"device-agent/feature", "device-agent/lifecycle", "device-agent/plan", "device-agent/podenv", "device-agent/status", "device-agent/unit",
	}
	// workers have goroutines and decide when things happen.
	shimWorkers  = []string{"cluster-shim/delivery", "cluster-shim/inventory", "cluster-shim/podsync", "cluster-shim/shard", "cluster-shim/virtualnode"}
	agentWorkers = []string{"device-agent/apply", "device-agent/intake", "device-agent/probe", "device-agent/report", "device-agent/stream"}
	// effects reach beyond the process, or make results depend on more than the arguments.
	effects = []string{"log", "net", "os", "plugin", "syscall", "unsafe", "math/rand", "testing"}
	product = []string{"cluster-shim", "device-agent", "shared"}
)

var rules = []rule{
	{in: []string{"shared"}, allow: append([]string{std, "shared"}, kubernetesTypes...), deny: effects, except: []string{"shared/admit"},
		why: "both halves build on shared: it depends on the types of Kubernetes and does nothing but compute"},
	{in: []string{"shared/admit"}, allow: append([]string{std, "shared", "k8s.io/component-helpers/resource"}, kubernetesTypes...), deny: effects,
		why: "admit counts a pod's requests as Kubernetes does, and computes the rest by itself"},
	{in: pure, allow: append(append([]string{std, "shared"}, pure...), kubernetesTypes...), deny: effects,
		why: "pure packages get clock, versions and host facts as arguments, and return what others shall do (net/netip parses addresses)"},

	{in: []string{"cluster-shim"}, deny: []string{"device-agent"}, tests: true,
		why: "the halves are released apart from each other and share only what is in shared"},
	{in: []string{"device-agent"}, deny: []string{"cluster-shim"}, tests: true,
		why: "the halves are released apart from each other and share only what is in shared"},
	{in: []string{"shared"}, deny: []string{"cluster-shim", "device-agent"}, tests: true,
		why: "shared is below both halves"},
	{in: product, deny: []string{"test"},
		why: "nothing that is delivered depends on tests"},

	{in: product, deny: []string{"cluster-shim/config", "device-agent/config"}, except: []string{"cluster-shim", "device-agent"}, tests: true,
		why: "only main imports config: packages take small options"},
	{in: product, deny: []string{"github.com/spf13/viper"}, except: []string{"cluster-shim/config", "device-agent/config"},
		why: "config alone reads settings, and hands on a validated struct"},

	{in: product, deny: []string{"github.com/flightctl/flightctl"}, except: []string{"cluster-shim/flightapi", "cluster-shim/console"},
		why: "flightapi and console hide Flightctl's library behind structs of their own"},
	{in: product, deny: []string{"github.com/virtual-kubelet/virtual-kubelet"}, except: []string{"cluster-shim/virtualnode", "cluster-shim/kubeletapi"},
		why: "Virtual Kubelet runs nodes and serves the kubelet's endpoints, nothing else"},
	{in: product, deny: []string{"github.com/containers/podman", "github.com/containers/common", "github.com/containers/image"}, except: []string{"device-agent/podman"},
		why: "the package podman alone knows podman's bindings"},
	{in: product, deny: []string{"github.com/coreos/go-systemd/v22/dbus", "github.com/godbus/dbus"}, except: []string{"device-agent/systemd"},
		why: "the package systemd alone talks D-Bus"},
	{in: product, deny: []string{"github.com/fsnotify/fsnotify"}, except: []string{"cluster-shim/config", "device-agent/intake"},
		why: "intake alone watches the bundle's folder"},

	{in: product, deny: []string{"github.com/pkg/errors", "io/ioutil", "k8s.io/klog", "github.com/sirupsen/logrus", "github.com/stretchr/testify"},
		why: "errors are wrapped with fmt, logs are written with log/slog, and testify is for tests"},
}

// clocks are functions of package time that make a result depend on the moment;
// pure packages and shared call none of them.
var clocks = []string{"After", "AfterFunc", "NewTicker", "NewTimer", "Now", "Since", "Sleep", "Tick", "Until"}
