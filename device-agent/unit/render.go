// Package unit turns a pod into systemd units that run podman. It is pure.
//
// # Units of a pod
//
// A slice, a service for the podman pod (network and other namespaces), one
// oneshot for each init container and one service for each container. A unit
// whose content differs has another name, so systemd need never be reloaded.
// Containers require the pod's service, and systemd stops what nothing needs
// any more: a finished Job leaves nothing behind, with the agent or without.
//
// # What is not in a unit
//
// Environment variables: they may be secret, and change. Each start reads them
// from files that the agent and the units' ExecStartPre write.
package unit

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// File is one unit file.
type File struct {
	Name    string
	Content string
}

// Mount is one volume as a container sees it.
type Mount struct {
	Source, Target string
	ReadOnly       bool
}

// Host is what units need to know of their device.
type Host struct {
	// Agent and Podman are the absolute paths of the programs.
	Agent, Podman string
	// Flags are passed to the agent's helpers, before their own.
	Flags []string
	// StateDir and RunDir are the pod's own folders.
	StateDir, RunDir string
}

// Input is a pod with all that its units depend on.
type Input struct {
	Pod  *corev1.Pod
	Host Host
	// Sources are the folders or files of the pod's volumes, by name.
	Sources map[string]string
	// Expand gives the value of a container's variable for $(VAR) in command
	// and args; ok is false if there is none. An error refuses it.
	Expand func(container, name string) (value string, ok bool, err error)
}

// Render makes all units of a pod. Errors name the field that cannot be
// rendered, and then there are no files.
func Render(in Input) ([]File, field.ErrorList) {
	r := renderer{in: in, names: NamesFor(in.Pod)}
	files := []File{r.slice(), r.pod()}
	previous := r.names.Pod
	var before []string
	for i := range in.Pod.Spec.InitContainers {
		files = append(files, r.init(i, []string{r.names.Pod, previous}))
		previous = r.names.Inits[i].Unit
		before = append(before, previous)
	}
	for i := range in.Pod.Spec.Containers {
		files = append(files, r.main(i, before))
	}
	if len(r.errs) > 0 {
		return nil, r.errs
	}
	return files, nil
}

type renderer struct {
	in    Input
	names Names
	errs  field.ErrorList
}

// text is a unit file that grows.
type text struct{ strings.Builder }

func (t *text) section(name string) {
	if t.Len() > 0 {
		t.WriteByte('\n')
	}
	t.WriteString("[" + name + "]\n")
}

func (t *text) set(key string, value any) { fmt.Fprintf(t, "%s=%v\n", key, value) }

// exec adds a command; prefix is "" or "-".
func (r *renderer) exec(t *text, path *field.Path, key, prefix string, argv ...string) {
	line, err := commandLine(argv)
	if err != nil {
		r.errs = append(r.errs, field.Invalid(path, field.OmitValueType{}, err.Error()))
		return
	}
	// systemd reads lines of at most 1 MiB.
	if len(line) > 1<<20-64 {
		r.errs = append(r.errs, field.TooLong(path, "", 1<<20-64))
		return
	}
	t.set(key, prefix+line)
}

func (r *renderer) unitSection(t *text, what string) {
	t.section("Unit")
	// Names of pods and containers are DNS labels: nothing to quote.
	t.set("Description", fmt.Sprintf("Pod %s/%s%s", r.in.Pod.Namespace, r.in.Pod.Name, what))
	t.set("DefaultDependencies", "no")
	t.set("Conflicts", "shutdown.target")
	t.set("Before", "shutdown.target")
	t.set("StartLimitIntervalSec", 0)
}

func (r *renderer) slice() File {
	var t text
	t.section("Unit")
	t.set("Description", fmt.Sprintf("Slice of pod %s/%s", r.in.Pod.Namespace, r.in.Pod.Name))
	t.set("DefaultDependencies", "no")
	t.set("Conflicts", "shutdown.target")
	t.set("Before", "shutdown.target")
	t.set("StopWhenUnneeded", "yes")
	return File{Name: r.names.Slice, Content: t.String()}
}

func (r *renderer) idFile() string { return r.in.Host.RunDir + "/pod.id" }

func (r *renderer) pod() File {
	pod, podman := r.in.Pod, r.in.Host.Podman
	spec := field.NewPath("spec")
	pidFile := r.in.Host.RunDir + "/pod.pid"
	var t text
	r.unitSection(&t, "")
	t.set("StopWhenUnneeded", "yes")
	t.section("Service")
	t.set("Type", "forking")
	t.set("PIDFile", pidFile)
	t.set("Slice", r.names.Slice)
	t.set("Restart", "always")
	t.set("RestartSec", 1)
	t.set("TimeoutStartSec", 120)
	t.set("TimeoutStopSec", 60)
	t.set("Environment", "PODMAN_SYSTEMD_UNIT=%n")
	argv := []string{
		podman, "pod", "create", "--replace", "--name", r.names.PodmanPod(), "--infra-name", r.names.PodmanPod() + "-infra",
		"--cgroup-parent=" + r.names.Slice, "--infra-conmon-pidfile=" + pidFile, "--pod-id-file=" + r.idFile(),
		"--exit-policy=continue", "--hostname", Hostname(pod), "--label", "jetbridge.dev/uid=" + string(pod.UID),
	}
	for i := range pod.Spec.Containers {
		for j, p := range pod.Spec.Containers[i].Ports {
			if p.HostPort == 0 {
				continue
			}
			publish := strconv.Itoa(int(p.HostPort)) + ":" + strconv.Itoa(int(p.ContainerPort))
			if p.HostIP != "" {
				if a, err := netip.ParseAddr(p.HostIP); err != nil || a.Zone() != "" {
					r.errs = append(r.errs, field.Invalid(spec.Child("containers").Index(i).Child("ports").Index(j).Child("hostIP"), p.HostIP, "must be an IP address"))
					continue
				}
				host := p.HostIP
				if strings.Contains(host, ":") {
					host = "[" + host + "]"
				}
				publish = host + ":" + publish
			}
			if p.Protocol != "" {
				publish += "/" + strings.ToLower(string(p.Protocol))
			}
			argv = append(argv, "--publish="+publish)
		}
	}
	r.exec(&t, spec, "ExecStartPre", "", argv...)
	r.exec(&t, spec, "ExecStart", "", podman, "pod", "start", "--pod-id-file="+r.idFile())
	r.exec(&t, spec, "ExecStop", "", podman, "pod", "stop", "--ignore", "--time=1", "--pod-id-file="+r.idFile())
	r.exec(&t, spec, "ExecStopPost", "-", podman, "pod", "stop", "--ignore", "--time=1", "--pod-id-file="+r.idFile())
	return File{Name: r.names.Pod, Content: t.String()}
}

// Hostname is the pod's host name, as the kubelet cuts it.
func Hostname(pod *corev1.Pod) string {
	name := pod.Spec.Hostname
	if name == "" {
		name = pod.Name
	}
	if len(name) > 63 {
		name = strings.TrimRight(name[:63], "-.")
	}
	return name
}

// Grace is the pod's grace period in seconds, at least 1.
func Grace(pod *corev1.Pod) int64 {
	grace := int64(30)
	if g := pod.Spec.TerminationGracePeriodSeconds; g != nil {
		grace = *g
	}
	return max(grace, 1)
}

func (r *renderer) common(t *text, c *corev1.Container) {
	t.set("Slice", r.names.Slice)
	t.set("Delegate", "yes")
	t.set("KillMode", "mixed")
	t.set("NotifyAccess", "all")
	t.set("TimeoutStopSec", Grace(r.in.Pod)+30)
	t.set("Environment", "PODMAN_SYSTEMD_UNIT=%n")
	t.set("EnvironmentFile", "-"+r.in.Host.RunDir+"/env/"+c.Name+".service")
}

func (r *renderer) helper(name string, c Container) []string {
	argv := append([]string{r.in.Host.Agent, name}, r.in.Host.Flags...)
	return append(argv, "--pod="+string(r.in.Pod.UID), "--container="+c.Container, "--name="+c.Podman())
}

func (r *renderer) init(i int, after []string) File {
	c, name := &r.in.Pod.Spec.InitContainers[i], r.names.Inits[i]
	path := field.NewPath("spec", "initContainers").Index(i)
	after = slices.Compact(after)
	var t text
	r.unitSection(&t, ", init container "+c.Name)
	t.set("Requires", strings.Join(after, " "))
	t.set("After", strings.Join(after, " "))
	t.set("StopWhenUnneeded", "yes")
	t.section("Service")
	t.set("Type", "oneshot")
	t.set("RemainAfterExit", "yes")
	t.set("TimeoutStartSec", "infinity")
	r.common(&t, c)
	argv := r.helper("run-init", name)
	argv = append(argv, "--restart-policy="+string(r.in.Pod.Spec.RestartPolicy), fmt.Sprintf("--grace=%d", Grace(r.in.Pod)), "--")
	argv = append(argv, r.run(path, c, name, "--sdnotify=ignore")...)
	r.exec(&t, path, "ExecStart", "", argv...)
	r.exec(&t, path, "ExecStopPost", "-", r.in.Host.Podman, "rm", "-v", "-f", "-i", "-t", "1", name.Podman())
	return File{Name: name.Unit, Content: t.String()}
}

func (r *renderer) main(i int, inits []string) File {
	c, name := &r.in.Pod.Spec.Containers[i], r.names.Mains[i]
	path := field.NewPath("spec", "containers").Index(i)
	needs := strings.Join(append([]string{r.names.Pod}, inits...), " ")
	var t text
	r.unitSection(&t, ", container "+c.Name)
	t.set("Requires", needs)
	t.set("After", needs)
	t.section("Service")
	t.set("Type", "notify")
	switch r.in.Pod.Spec.RestartPolicy {
	case corev1.RestartPolicyNever:
		t.set("Restart", "no")
	case corev1.RestartPolicyOnFailure:
		t.set("Restart", "always")
		t.set("RestartPreventExitStatus", 0)
	default:
		t.set("Restart", "always")
	}
	t.set("RestartSec", "100ms")
	t.set("TimeoutStartSec", 330)
	r.common(&t, c)
	r.exec(&t, path, "ExecStartPre", "", r.helper("backoff", name)...)
	r.exec(&t, path, "ExecStart", "", r.run(path, c, name, "--sdnotify=conmon")...)
	r.exec(&t, path, "ExecStop", "", append(r.helper("stop", name), fmt.Sprintf("--grace=%d", Grace(r.in.Pod)))...)
	r.exec(&t, path, "ExecStopPost", "-", r.helper("record", name)...)
	r.exec(&t, path, "ExecStopPost", "-", r.in.Host.Podman, "rm", "-v", "-f", "-i", "-t", "1", name.Podman())
	return File{Name: name.Unit, Content: t.String()}
}

// run is the podman command of a container.
func (r *renderer) run(path *field.Path, c *corev1.Container, name Container, notify string) []string {
	pod, host := r.in.Pod, r.in.Host
	argv := []string{
		host.Podman, "run", "--detach", "--replace", "--name", name.Podman(), "--pod-id-file=" + r.idFile(),
		"--cgroups=split", "--pull=never", notify, "--stop-timeout=" + strconv.FormatInt(Grace(pod), 10),
		"--log-driver=k8s-file", "--log-opt=path=" + host.StateDir + "/log/" + c.Name + ".log", "--log-opt=max-size=10mb",
		"--systemd=false", "--http-proxy=false", "--no-healthcheck",
		"--label=jetbridge.dev/uid=" + string(pod.UID), "--label=jetbridge.dev/container=" + c.Name,
		"--env-file=" + host.RunDir + "/env/" + c.Name + ".podman",
	}
	argv = append(argv, r.resources(c)...)
	argv = append(argv, r.security(path, c)...)
	if c.WorkingDir != "" {
		argv = append(argv, "--workdir="+c.WorkingDir)
	}
	for j, m := range c.VolumeMounts {
		at := path.Child("volumeMounts").Index(j)
		source, ok := r.in.Sources[m.Name]
		if !ok {
			r.errs = append(r.errs, field.NotFound(at.Child("name"), m.Name))
			continue
		}
		target := m.MountPath
		if !strings.HasPrefix(target, "/") {
			target = "/" + target
		}
		argv = append(argv, r.mount(at, Mount{Source: source, Target: target, ReadOnly: m.ReadOnly || r.readOnlyVolume(m.Name)}))
	}
	termination := c.TerminationMessagePath
	if termination == "" {
		termination = corev1.TerminationMessagePathDefault
	}
	argv = append(argv, r.mount(path.Child("terminationMessagePath"), Mount{Source: TerminationFile(host.StateDir, c.Name), Target: termination}))
	command, args := r.expand(path.Child("command"), c.Name, c.Command), r.expand(path.Child("args"), c.Name, c.Args)
	if len(command) > 0 {
		entrypoint, err := json.Marshal(command)
		if err != nil {
			r.errs = append(r.errs, field.Invalid(path.Child("command"), command, err.Error()))
		}
		argv = append(argv, "--entrypoint="+string(entrypoint))
	}
	if c.Image == "" || strings.HasPrefix(c.Image, "-") {
		r.errs = append(r.errs, field.Invalid(path.Child("image"), c.Image, "must be an image reference"))
	}
	return append(append(argv, c.Image), args...)
}

// TerminationFile is where the container's termination message is on the host.
func TerminationFile(stateDir, container string) string {
	return stateDir + "/termination/" + container
}

// readOnlyVolume says whether the kubelet mounts such a volume read-only
// whatever the mount says.
func (r *renderer) readOnlyVolume(name string) bool {
	for _, v := range r.in.Pod.Spec.Volumes {
		if v.Name == name {
			return v.ConfigMap != nil || v.Secret != nil || v.DownwardAPI != nil || v.Projected != nil
		}
	}
	return false
}

func (r *renderer) mount(path *field.Path, m Mount) string {
	options := []string{"type=bind", "source=" + m.Source, "destination=" + m.Target}
	if m.ReadOnly {
		options = append(options, "ro=true")
	}
	var b strings.Builder
	w := csv.NewWriter(&b)
	if err := w.Write(options); err != nil {
		r.errs = append(r.errs, field.Invalid(path, m.Target, err.Error()))
	}
	w.Flush()
	return "--mount=" + strings.TrimSuffix(b.String(), "\n")
}

func (r *renderer) resources(c *corev1.Container) []string {
	var argv []string
	if q, ok := c.Resources.Limits[corev1.ResourceMemory]; ok && !q.IsZero() {
		argv = append(argv, fmt.Sprintf("--memory=%db", q.Value()), fmt.Sprintf("--memory-swap=%db", q.Value()))
	}
	if q, ok := c.Resources.Limits[corev1.ResourceCPU]; ok && !q.IsZero() {
		// Below 10 m the kernel cannot go.
		argv = append(argv, "--cpus="+strconv.FormatFloat(float64(max(q.MilliValue(), 10))/1000, 'f', -1, 64))
	}
	if q, ok := c.Resources.Requests[corev1.ResourceCPU]; ok && !q.IsZero() {
		argv = append(argv, fmt.Sprintf("--cpu-shares=%d", min(max(q.MilliValue()*1024/1000, 2), 262144)))
	}
	return argv
}

func (r *renderer) security(path *field.Path, c *corev1.Container) []string {
	var argv []string
	var user, group *int64
	if p := r.in.Pod.Spec.SecurityContext; p != nil {
		user, group = p.RunAsUser, p.RunAsGroup
	}
	s := c.SecurityContext
	if s == nil {
		s = &corev1.SecurityContext{}
	}
	if s.RunAsUser != nil {
		user = s.RunAsUser
	}
	if s.RunAsGroup != nil {
		group = s.RunAsGroup
	}
	switch {
	case user != nil && group != nil:
		argv = append(argv, fmt.Sprintf("--user=%d:%d", *user, *group))
	case user != nil:
		argv = append(argv, fmt.Sprintf("--user=%d", *user))
	case group != nil:
		r.errs = append(r.errs, field.Forbidden(path.Child("securityContext", "runAsGroup"), "needs runAsUser"))
	}
	if s.Privileged != nil && *s.Privileged {
		argv = append(argv, "--privileged")
	}
	if s.ReadOnlyRootFilesystem != nil && *s.ReadOnlyRootFilesystem {
		argv = append(argv, "--read-only", "--read-only-tmpfs=false")
	}
	if s.AllowPrivilegeEscalation != nil && !*s.AllowPrivilegeEscalation {
		argv = append(argv, "--security-opt=no-new-privileges")
	}
	if s.Capabilities != nil {
		for _, d := range s.Capabilities.Drop {
			argv = append(argv, "--cap-drop="+string(d))
		}
		for _, a := range s.Capabilities.Add {
			argv = append(argv, "--cap-add="+string(a))
		}
	}
	return argv
}

func (r *renderer) expand(path *field.Path, container string, words []string) []string {
	out := make([]string, len(words))
	for i, w := range words {
		var failed error
		out[i] = Expand(w, func(name string) (string, bool) {
			v, ok, err := r.in.Expand(container, name)
			if err != nil {
				failed = err
			}
			return v, ok
		})
		if failed != nil {
			r.errs = append(r.errs, field.Forbidden(path.Index(i), failed.Error()))
		}
	}
	return out
}

// Expand replaces $(NAME) by its value as Kubernetes does: unknown names stay,
// and $$ is one $.
func Expand(s string, value func(string) (string, bool)) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '$' || i+1 == len(s) {
			b.WriteByte(s[i])
			continue
		}
		switch s[i+1] {
		case '$':
			b.WriteByte('$')
			i++
		case '(':
			end := strings.IndexByte(s[i+2:], ')')
			if end < 0 {
				b.WriteString("$(")
				i++
				continue
			}
			name := s[i+2 : i+2+end]
			if v, ok := value(name); ok {
				b.WriteString(v)
			} else {
				b.WriteString("$(" + name + ")")
			}
			i += 2 + end
		default:
			b.WriteByte('$')
		}
	}
	return b.String()
}
