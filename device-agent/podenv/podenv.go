// Package podenv computes what a pod's containers learn from their environment
// variables and from the downward API. It is pure.
package podenv

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/jetbridge/jetbridge/device-agent/unit"
	"github.com/jetbridge/jetbridge/shared/bundle"
)

// ErrMissing says that a ConfigMap, a Secret or a key is not there (yet).
var ErrMissing = errors.New("not found")

// Facts are what the device adds.
type Facts struct {
	NodeName, HostIP string
	// PodIP is empty before the pod runs.
	PodIP       string
	Allocatable corev1.ResourceList
	// Service host and port of the API server, given to all pods; empty: none.
	KubernetesHost, KubernetesPort string
}

// Var is one environment variable.
type Var struct {
	Name  string `json:"name"`
	Value string `json:"value"`
	// Secret says that (part of) the value comes from a Secret.
	Secret bool `json:"secret,omitempty"`
	// Runtime says that the value has the pod's address in it, which is
	// known only when the pod runs.
	Runtime bool `json:"runtime,omitempty"`
}

// Content finds what the pod refers to.
type Content struct {
	Pod     *bundle.Pod
	Secrets bundle.PodSecrets
}

// ConfigMap returns its content.
func (c Content) ConfigMap(name string) (map[string][]byte, bool) {
	for _, m := range c.Pod.ConfigMaps {
		if m.Name == name {
			return m.Data, true
		}
	}
	return nil, false
}

// Secret returns its content.
func (c Content) Secret(name string) (map[string][]byte, bool) {
	for _, s := range c.Secrets.Secrets {
		if s.Name == name {
			return s.Data, true
		}
	}
	return nil, false
}

// Resolve computes a container's variables in order, each name once.
func Resolve(content Content, c *corev1.Container, f Facts) ([]Var, error) {
	r := resolver{content: content, container: c, facts: f, at: map[string]int{}}
	if f.KubernetesHost != "" {
		address := "tcp://" + f.KubernetesHost + ":" + f.KubernetesPort
		for _, v := range [][2]string{
			{"KUBERNETES_SERVICE_HOST", f.KubernetesHost}, {"KUBERNETES_SERVICE_PORT", f.KubernetesPort},
			{"KUBERNETES_SERVICE_PORT_HTTPS", f.KubernetesPort}, {"KUBERNETES_PORT", address},
		} {
			r.set(Var{Name: v[0], Value: v[1]})
		}
	}
	r.set(Var{Name: "HOSTNAME", Value: unit.Hostname(&corev1.Pod{ObjectMeta: content.Pod.Metadata, Spec: content.Pod.Spec})})
	for _, from := range c.EnvFrom {
		if err := r.from(from); err != nil {
			return nil, err
		}
	}
	for _, e := range c.Env {
		if err := r.one(e); err != nil {
			return nil, fmt.Errorf("variable %s: %w", e.Name, err)
		}
	}
	return r.vars, nil
}

type resolver struct {
	content   Content
	container *corev1.Container
	facts     Facts
	vars      []Var
	at        map[string]int // by name, in vars
}

func (r *resolver) set(v Var) {
	if i, ok := r.at[v.Name]; ok {
		r.vars[i] = v
		return
	}
	r.at[v.Name] = len(r.vars)
	r.vars = append(r.vars, v)
}

func (r *resolver) from(from corev1.EnvFromSource) error {
	var data map[string][]byte
	var found, optional, secret bool
	var what string
	switch {
	case from.ConfigMapRef != nil:
		data, found = r.content.ConfigMap(from.ConfigMapRef.Name)
		optional, what = truth(from.ConfigMapRef.Optional), fmt.Sprintf("configmap %q", from.ConfigMapRef.Name)
	case from.SecretRef != nil:
		data, found = r.content.Secret(from.SecretRef.Name)
		optional, what, secret = truth(from.SecretRef.Optional), fmt.Sprintf("secret %q", from.SecretRef.Name), true
	}
	if !found {
		if optional {
			return nil
		}
		return fmt.Errorf("%s %w", what, ErrMissing)
	}
	for _, k := range slices.Sorted(maps.Keys(data)) {
		r.set(Var{Name: from.Prefix + k, Value: string(data[k]), Secret: secret})
	}
	return nil
}

func (r *resolver) one(e corev1.EnvVar) error {
	v := Var{Name: e.Name}
	if e.ValueFrom == nil {
		v.Value = unit.Expand(e.Value, func(name string) (string, bool) {
			i, ok := r.at[name]
			if !ok {
				return "", false
			}
			v.Secret = v.Secret || r.vars[i].Secret
			v.Runtime = v.Runtime || r.vars[i].Runtime
			return r.vars[i].Value, true
		})
		r.set(v)
		return nil
	}
	var err error
	switch from := e.ValueFrom; {
	case from.FieldRef != nil:
		v.Value, err = Field(r.content.Pod, from.FieldRef.FieldPath, r.facts)
		v.Runtime = strings.HasPrefix(from.FieldRef.FieldPath, "status.podIP")
	case from.ResourceFieldRef != nil:
		v.Value, err = Resource(r.content.Pod, r.container.Name, from.ResourceFieldRef, r.facts)
	case from.ConfigMapKeyRef != nil:
		k := from.ConfigMapKeyRef
		data, found := r.content.ConfigMap(k.Name)
		return r.key(v, data, found, k.Key, truth(k.Optional), "configmap", k.Name)
	case from.SecretKeyRef != nil:
		k := from.SecretKeyRef
		v.Secret = true
		data, found := r.content.Secret(k.Name)
		return r.key(v, data, found, k.Key, truth(k.Optional), "secret", k.Name)
	default:
		err = errors.New("valueFrom has no known source")
	}
	if err != nil {
		return err
	}
	r.set(v)
	return nil
}

func (r *resolver) key(v Var, data map[string][]byte, found bool, key string, optional bool, kind, name string) error {
	value, ok := data[key]
	switch {
	case ok:
		v.Value = string(value)
		r.set(v)
		return nil
	case optional:
		return nil
	case !found:
		return fmt.Errorf("%s %q %w", kind, name, ErrMissing)
	default:
		return fmt.Errorf("key %q in %s %q %w", key, kind, name, ErrMissing)
	}
}

// Field is the value of a downward API field.
func Field(p *bundle.Pod, path string, f Facts) (string, error) {
	switch path {
	case "metadata.name":
		return p.Metadata.Name, nil
	case "metadata.namespace":
		return p.Metadata.Namespace, nil
	case "metadata.uid":
		return string(p.Metadata.UID), nil
	case "metadata.labels":
		return list(p.Metadata.Labels), nil
	case "metadata.annotations":
		return list(p.Metadata.Annotations), nil
	case "spec.nodeName":
		return p.Spec.NodeName, nil
	case "spec.serviceAccountName":
		return p.Spec.ServiceAccountName, nil
	case "status.hostIP", "status.hostIPs":
		return f.HostIP, nil
	case "status.podIP", "status.podIPs":
		return f.PodIP, nil
	}
	for prefix, m := range map[string]map[string]string{"metadata.labels": p.Metadata.Labels, "metadata.annotations": p.Metadata.Annotations} {
		if key, ok := strings.CutPrefix(path, prefix+"['"); ok {
			if key, ok = strings.CutSuffix(key, "']"); ok {
				return m[key], nil
			}
		}
	}
	return "", fmt.Errorf("field %q is not known", path)
}

// list writes labels or annotations as the downward API does.
func list(m map[string]string) string {
	lines := make([]string, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		lines = append(lines, k+"="+strconv.Quote(m[k]))
	}
	return strings.Join(lines, "\n")
}

// Resource is the value of a container's request or limit, rounded up to the
// divisor. A limit that is not set is what the device has.
func Resource(p *bundle.Pod, container string, ref *corev1.ResourceFieldSelector, f Facts) (string, error) {
	if ref.ContainerName != "" {
		container = ref.ContainerName
	}
	all := slices.Concat(p.Spec.InitContainers, p.Spec.Containers)
	i := slices.IndexFunc(all, func(c corev1.Container) bool { return c.Name == container })
	if i < 0 {
		return "", fmt.Errorf("container %q is not in the pod", container)
	}
	kind, name, _ := strings.Cut(ref.Resource, ".")
	res := corev1.ResourceName(name)
	var q resource.Quantity
	switch kind {
	case "limits":
		var ok bool
		if q, ok = all[i].Resources.Limits[res]; !ok || q.IsZero() {
			q = f.Allocatable[res]
		}
	case "requests":
		q = all[i].Resources.Requests[res]
	default:
		return "", fmt.Errorf("resource %q is not known", ref.Resource)
	}
	divisor := ref.Divisor
	if divisor.IsZero() {
		divisor = resource.MustParse("1")
	}
	if res == corev1.ResourceCPU {
		return strconv.FormatInt(int64(math.Ceil(float64(q.MilliValue())/float64(max(divisor.MilliValue(), 1)))), 10), nil
	}
	return strconv.FormatInt(int64(math.Ceil(float64(q.Value())/float64(max(divisor.Value(), 1)))), 10), nil
}

func truth(b *bool) bool { return b != nil && *b }

// Files are the variables in the two forms in which podman run reads them:
// lines for its --env-file, and, for values that such a line cannot hold,
// systemd's EnvironmentFile, from which the lines take them by name.
func Files(vars []Var) (podman, service string, err error) {
	var p, s strings.Builder
	for _, v := range vars {
		switch {
		case v.Name == "" || strings.ContainsAny(v.Name, "=\x00\n\r") || strings.TrimLeft(v.Name, " \t#") != v.Name || strings.HasSuffix(v.Name, "*"):
			return "", "", fmt.Errorf("variable name %q is not supported", v.Name)
		case strings.IndexByte(v.Value, 0) >= 0:
			return "", "", fmt.Errorf("variable %s has a NUL character", v.Name)
		case !strings.ContainsAny(v.Value, "\r\n") && len(v.Value) < 60000:
			p.WriteString(v.Name + "=" + v.Value + "\n")
		case !passable(v.Name):
			return "", "", fmt.Errorf("variable %s may not have several lines: podman itself would read it", v.Name)
		default:
			p.WriteString(v.Name + "\n")
			s.WriteString(v.Name + `="` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "$", `\$`, "`", "\\`").Replace(v.Value) + "\"\n")
		}
	}
	return p.String(), s.String(), nil
}

// passable says whether a variable may be in the environment of podman itself,
// and has a name that systemd accepts.
func passable(name string) bool {
	for i, c := range name {
		if c != '_' && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') && (c < '0' || c > '9' || i == 0) {
			return false
		}
	}
	for _, prefix := range []string{"LD_", "GO", "GLIBC_", "PODMAN", "CONTAINER", "REGISTRY", "STORAGE", "BUILDAH", "XDG_", "NOTIFY_", "LISTEN_", "DBUS_", "TMP", "SSL_", "HTTP", "NO_PROXY"} {
		if strings.HasPrefix(strings.ToUpper(name), prefix) {
			return false
		}
	}
	return !slices.Contains([]string{"PATH", "HOME", "USER", "SHELL", "LANG", "TERM"}, name)
}
