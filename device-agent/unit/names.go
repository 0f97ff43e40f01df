package unit

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// Prefix begins the name of every unit of ours.
const Prefix = "jb"

// maxBase limits a unit's name without its suffix; systemd's limit is 255
// with it, and podman adds to the names of pods.
const maxBase = 200

// Names are the units of one pod.
type Names struct {
	Slice string `json:"slice"`
	Pod   string `json:"pod"`
	// Inits and Mains are in the order of the pod's spec.
	Inits []Container `json:"inits,omitempty"`
	Mains []Container `json:"mains"`
}

// Container names what runs one container.
type Container struct {
	// Container is its name in the pod.
	Container string `json:"container"`
	// Unit is its service; the podman container has the same name without
	// the suffix.
	Unit string `json:"unit"`
	// Image is the reference that the unit runs.
	Image string `json:"image"`
}

// Podman is the name of the podman container.
func (c Container) Podman() string { return strings.TrimSuffix(c.Unit, ".service") }

// PodmanPod is the name of the podman pod.
func (n Names) PodmanPod() string { return strings.TrimSuffix(n.Pod, ".service") }

// All are the units of all containers, inits first.
func (n Names) All() []Container {
	return append(append([]Container(nil), n.Inits...), n.Mains...)
}

// NamesFor names the units of a pod. Its UID and images decide them, and its
// name: these are all that may differ between two units. A container's name
// covers the images of the init containers too, which its unit refers to.
func NamesFor(pod *corev1.Pod) Names {
	id := hash(string(pod.UID))
	base := Prefix + "-" + pod.Namespace + "-" + pod.Name
	n := Names{Slice: Prefix + id + ".slice", Pod: fit(base+"-", id) + ".service"}
	before := string(pod.UID)
	name := func(c *corev1.Container) Container {
		return Container{
			Container: c.Name, Image: c.Image,
			Unit: fit(base+"-"+c.Name+"-", hash(before, c.Name, c.Image)) + ".service",
		}
	}
	for i := range pod.Spec.InitContainers {
		c := name(&pod.Spec.InitContainers[i])
		n.Inits = append(n.Inits, c)
		before += "\x00" + c.Unit
	}
	for i := range pod.Spec.Containers {
		n.Mains = append(n.Mains, name(&pod.Spec.Containers[i]))
	}
	return n
}

func hash(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return hex.EncodeToString(sum[:5])
}

// fit cuts a readable name so that the hash, which makes it unique, fits.
func fit(readable, hash string) string {
	return readable[:min(len(readable), maxBase-len(hash))] + hash
}
