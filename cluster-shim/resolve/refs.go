package resolve

import (
	"cmp"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// kind is what a reference points to.
type kind string

const (
	configMaps kind = "ConfigMap"
	secrets    kind = "Secret"
)

// ref is one object that a pod names.
type ref struct {
	kind kind
	name string
	// optional says that the pod runs without it.
	optional bool
}

// tokenRef is one token that a pod asks for.
type tokenRef struct {
	audience          string
	expirationSeconds int64
}

// defaultExpiration is what the API gives a token source without a lifetime.
const defaultExpiration = 3600

// references lists what a pod names, each object once and sorted: it is
// optional if all who name it say so.
func references(spec *corev1.PodSpec) ([]ref, []tokenRef) {
	found := map[ref]bool{}
	tokens := map[tokenRef]bool{}
	add := func(k kind, name string, optional *bool) {
		if name == "" {
			return
		}
		key := ref{kind: k, name: name}
		opt := optional != nil && *optional
		if was, ok := found[key]; ok {
			opt = opt && was
		}
		found[key] = opt
	}
	always := new(bool)
	*always = true
	for _, s := range spec.ImagePullSecrets {
		add(secrets, s.Name, always) // as for the kubelet, pulling decides
	}
	for _, v := range spec.Volumes {
		if v.ConfigMap != nil {
			add(configMaps, v.ConfigMap.Name, v.ConfigMap.Optional)
		}
		if v.Secret != nil {
			add(secrets, v.Secret.SecretName, v.Secret.Optional)
		}
		if v.Projected == nil {
			continue
		}
		for _, s := range v.Projected.Sources {
			if s.ConfigMap != nil {
				add(configMaps, s.ConfigMap.Name, s.ConfigMap.Optional)
			}
			if s.Secret != nil {
				add(secrets, s.Secret.Name, s.Secret.Optional)
			}
			if t := s.ServiceAccountToken; t != nil {
				r := tokenRef{audience: t.Audience, expirationSeconds: defaultExpiration}
				if t.ExpirationSeconds != nil {
					r.expirationSeconds = *t.ExpirationSeconds
				}
				tokens[r] = true
			}
		}
	}
	for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
		for _, f := range c.EnvFrom {
			if f.ConfigMapRef != nil {
				add(configMaps, f.ConfigMapRef.Name, f.ConfigMapRef.Optional)
			}
			if f.SecretRef != nil {
				add(secrets, f.SecretRef.Name, f.SecretRef.Optional)
			}
		}
		for _, e := range c.Env {
			if e.ValueFrom == nil {
				continue
			}
			if r := e.ValueFrom.ConfigMapKeyRef; r != nil {
				add(configMaps, r.Name, r.Optional)
			}
			if r := e.ValueFrom.SecretKeyRef; r != nil {
				add(secrets, r.Name, r.Optional)
			}
		}
	}
	var refs []ref
	for r, optional := range found {
		r.optional = optional
		refs = append(refs, r)
	}
	slices.SortFunc(refs, func(a, b ref) int { return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.name, b.name)) })
	var asked []tokenRef
	for t := range tokens {
		asked = append(asked, t)
	}
	slices.SortFunc(asked, func(a, b tokenRef) int {
		return cmp.Or(cmp.Compare(a.audience, b.audience), cmp.Compare(a.expirationSeconds, b.expirationSeconds))
	})
	return refs, asked
}

// object names one object in the cluster, as one node may read it.
type object struct {
	node      string
	kind      kind
	namespace string
	name      string
}

func (r ref) object(pod *corev1.Pod) object {
	return object{node: pod.Spec.NodeName, kind: r.kind, namespace: pod.Namespace, name: r.name}
}

// holders are the pods that need an object.
type holders map[types.UID]func()
