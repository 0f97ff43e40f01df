package virtualnode

import (
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/jetbridge/jetbridge/cluster-shim/device"
	"github.com/jetbridge/jetbridge/shared/report"
)

var update = flag.Bool("update", false, "rewrite golden files")

func settings() Settings {
	return Settings{Version: "v0.1.0+dirty", KubernetesVersion: "v1.37.2", Reserve: corev1.ResourceList{
		corev1.ResourceCPU: resource.MustParse("100m"), corev1.ResourceMemory: resource.MustParse("128Mi"),
	}}
}

func reporting() *report.Report {
	return &report.Report{
		Capacity: corev1.ResourceList{
			corev1.ResourceCPU: resource.MustParse("2"), corev1.ResourceMemory: resource.MustParse("64Mi"),
			corev1.ResourcePods: resource.MustParse("20"), "example.com/gpu": resource.MustParse("4"),
		},
		System: corev1.NodeSystemInfo{Architecture: "arm64", OperatingSystem: "linux", KernelVersion: "6.12", KubeletVersion: "v9"},
	}
}

func TestBuildGolden(t *testing.T) {
	labels := map[string]string{"alias": "shop-1", "site": "berlin", "jetbridge-rev": "4", "a/b": "c", "bad": "not a label value"}
	for name, d := range map[string]device.State{
		"unheard":      {Name: "dev1", Labels: labels, Connection: device.Unheard},
		"connected":    {Name: "dev1", Labels: labels, Fleet: "kiosks", Connection: device.Connected, Report: reporting()},
		"disconnected": {Name: "dev1", Connection: device.Disconnected, Report: reporting()},
	} {
		t.Run(name, func(t *testing.T) {
			now := metav1.NewTime(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC))
			got, err := yaml.Marshal(settings().Build("shop-1", d, nil, now))
			require.NoError(t, err)
			file := filepath.Join("testdata", name+".yaml")
			if *update {
				require.NoError(t, os.WriteFile(file, got, 0o644))
			}
			want, err := os.ReadFile(file)
			require.NoError(t, err)
			assert.Equal(t, string(want), string(got))
		})
	}
}

func TestTransitionTimesStay(t *testing.T) {
	early, late := metav1.NewTime(time.Unix(100, 0)), metav1.NewTime(time.Unix(200, 0))
	d := device.State{Name: "dev1", Connection: device.Connected, Report: reporting()}
	first := settings().Build("n", d, nil, early)
	second := settings().Build("n", d, first.Status.Conditions, late)
	assert.Equal(t, early, second.Status.Conditions[0].LastTransitionTime)
	assert.False(t, differs(first, second), "a heartbeat is no change")
	d.Connection = device.Disconnected
	third := settings().Build("n", d, second.Status.Conditions, late)
	assert.Equal(t, late, third.Status.Conditions[0].LastTransitionTime)
	assert.True(t, differs(second, third))
}

func TestName(t *testing.T) {
	free := func(string) bool { return true }
	taken := func(string) bool { return false }
	assert.Equal(t, "shop-1", Name(device.State{Name: "d", Alias: "shop-1"}, free))
	assert.Equal(t, "d", Name(device.State{Name: "d", Alias: "shop-1"}, taken))
	assert.Equal(t, "d", Name(device.State{Name: "d", Alias: "Shop 1"}, free))
	assert.Equal(t, "d", Name(device.State{Name: "d"}, free))
}

func TestMetaPatch(t *testing.T) {
	d := device.State{Name: "dev1", Fleet: "a", Labels: map[string]string{"x": "1"}, Connection: device.Connected}
	have := settings().Build("n", d, nil, metav1.Time{})
	have.ResourceVersion = "7"
	have.Labels["mine"] = "kept"
	have.Spec.Taints = append(have.Spec.Taints, corev1.Taint{Key: "operator", Effect: corev1.TaintEffectNoExecute})
	assert.Nil(t, metaPatch(have, settings().Build("n", d, nil, metav1.Time{})))

	d.Fleet, d.Labels = "", map[string]string{"x": "2"}
	patch := metaPatch(have, settings().Build("n", d, nil, metav1.Time{}))
	assert.Equal(t, map[string]any{"metadata": map[string]any{"labels": map[string]any{
		"jetbridge.dev/fleet": nil, "label.jetbridge.dev/x": "2",
	}}}, patch)

	have.Spec.Taints = have.Spec.Taints[1:]
	patch = metaPatch(have, settings().Build("n", d, nil, metav1.Time{}))
	taints := patch["spec"].(map[string]any)["taints"].([]corev1.Taint)
	require.Len(t, taints, 2, "the operator's taint stays")
	assert.Equal(t, "7", patch["metadata"].(map[string]any)["resourceVersion"])
}
