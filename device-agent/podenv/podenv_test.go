package podenv

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/jetbridge/jetbridge/shared/bundle"
)

func content() Content {
	return Content{
		Pod: &bundle.Pod{
			Metadata: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "u", Labels: map[string]string{"b": "2", "a": "x\"y"}, Annotations: map[string]string{"k/d": "v"}},
			Spec: corev1.PodSpec{NodeName: "n1", ServiceAccountName: "sa", Containers: []corev1.Container{
				{Name: "c", Resources: corev1.ResourceRequirements{Limits: corev1.ResourceList{"memory": resource.MustParse("64Mi"), "cpu": resource.MustParse("1500m")}}}, {Name: "free"},
			}},
			ConfigMaps: []bundle.ConfigMap{{Name: "cm", Data: map[string][]byte{"k": []byte("v"), "l": []byte("w")}}},
		},
		Secrets: bundle.PodSecrets{Secrets: []bundle.Secret{{Name: "s", Data: map[string][]byte{"p": []byte("pw")}}}},
	}
}

func names(vars []Var) map[string]string {
	out := map[string]string{}
	for _, v := range vars {
		out[v.Name] = v.Value
	}
	return out
}

func TestResolve(t *testing.T) {
	c := corev1.Container{
		Name:    "c",
		EnvFrom: []corev1.EnvFromSource{{Prefix: "CM_", ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "cm"}}}},
		Env: []corev1.EnvVar{
			{Name: "A", Value: "1"}, {Name: "B", Value: "$(A)$(CM_k)$(NO)$$(A)"}, {Name: "CM_l", Value: "over"},
			{Name: "PW", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "s"}, Key: "p"}}},
			{Name: "URL", Value: "x:$(PW)"},
			{Name: "IP", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "status.podIP"}}},
			{Name: "OPT", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "no"}, Key: "p", Optional: new(true)}}},
		},
	}
	vars, err := Resolve(content(), &c, Facts{PodIP: "1.2.3.4", KubernetesHost: "10.0.0.1", KubernetesPort: "443"})
	require.NoError(t, err)
	got := names(vars)
	assert.Equal(t, map[string]string{
		"A": "1", "B": "1v$(NO)$(A)", "CM_k": "v", "CM_l": "over", "PW": "pw", "URL": "x:pw", "IP": "1.2.3.4", "HOSTNAME": "web",
		"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443", "KUBERNETES_SERVICE_PORT_HTTPS": "443", "KUBERNETES_PORT": "tcp://10.0.0.1:443",
	}, got)
	for _, v := range vars {
		assert.Equal(t, v.Name == "PW" || v.Name == "URL", v.Secret, v.Name)
		assert.Equal(t, v.Name == "IP", v.Runtime, v.Name)
	}

	c = corev1.Container{Env: []corev1.EnvVar{{Name: "X", ValueFrom: &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "cm"}, Key: "gone"}}}}}
	_, err = Resolve(content(), &c, Facts{})
	require.ErrorIs(t, err, ErrMissing)
}

func TestFieldsAndResources(t *testing.T) {
	c := content()
	f := Facts{HostIP: "10.0.0.2", Allocatable: corev1.ResourceList{"memory": resource.MustParse("1Gi"), "cpu": resource.MustParse("2")}}
	for path, want := range map[string]string{
		"metadata.name": "web", "metadata.namespace": "ns", "metadata.uid": "u", "metadata.labels": "a=\"x\\\"y\"\nb=\"2\"", "metadata.labels['b']": "2",
		"metadata.annotations['k/d']": "v", "metadata.annotations['no']": "", "spec.nodeName": "n1", "spec.serviceAccountName": "sa", "status.hostIP": "10.0.0.2",
	} {
		got, err := Field(c.Pod, path, f)
		require.NoError(t, err, path)
		assert.Equal(t, want, got, path)
	}
	_, err := Field(c.Pod, "status.phase", f)
	require.Error(t, err)
	for _, k := range []struct{ container, res, divisor, want string }{
		{"c", "limits.memory", "1Mi", "64"}, {"c", "limits.memory", "", "67108864"}, {"c", "limits.cpu", "", "2"}, {"c", "limits.cpu", "1m", "1500"},
		{"free", "limits.memory", "1Mi", "1024"}, {"free", "requests.cpu", "", "0"},
	} {
		ref := &corev1.ResourceFieldSelector{Resource: k.res}
		if k.divisor != "" {
			ref.Divisor = resource.MustParse(k.divisor)
		}
		got, err := Resource(c.Pod, k.container, ref, f)
		require.NoError(t, err)
		assert.Equal(t, k.want, got, k)
	}
}

func TestFiles(t *testing.T) {
	podman, service, err := Files([]Var{{Name: "A", Value: " x=\"y\" $Z \\ #"}, {Name: "EMPTY"}, {Name: "CERT", Value: "l1\n\"l2\" $x \\"}})
	require.NoError(t, err)
	assert.Equal(t, "A= x=\"y\" $Z \\ #\nEMPTY=\nCERT\n", podman)
	assert.Equal(t, "CERT=\"l1\n\\\"l2\\\" \\$x \\\\\"\n", service)
	for _, bad := range []Var{{Name: "A", Value: "\x00"}, {Name: "A\nB", Value: "x"}, {Name: "#A"}, {Name: "A*"}, {Name: ""}, {Name: "LD_PRELOAD", Value: "a\nb"}, {Name: "PATH", Value: "a\nb"}, {Name: "a.b", Value: "a\nb"}} {
		_, _, err := Files([]Var{bad})
		require.Error(t, err, "%q", bad)
	}
}
