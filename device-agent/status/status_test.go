package status

import (
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/jetbridge/jetbridge/device-agent/lifecycle"
	"github.com/jetbridge/jetbridge/shared/bundle"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func at(s int) time.Time { return time.Date(2026, 1, 2, 3, 0, s, 0, time.UTC) }

func end(code int32, reason string, from, to int) *lifecycle.End {
	return &lifecycle.End{ExitCode: code, Reason: reason, Started: at(from), Finished: at(to), ContainerID: "c0ffee", ImageID: "1mage"}
}

func input(phase lifecycle.Phase, policy corev1.RestartPolicy, inits ...string) Input {
	p := bundle.Pod{Metadata: metav1.ObjectMeta{Namespace: "default", Name: "web", UID: "u1"}, Spec: corev1.PodSpec{RestartPolicy: policy, Containers: []corev1.Container{{Name: "main", Image: "a:1"}}}}
	for _, n := range inits {
		p.Spec.InitContainers = append(p.Spec.InitContainers, corev1.Container{Name: n, Image: "i:1"})
	}
	return Input{
		Instance: &lifecycle.Instance{Phase: phase, Pod: p, Started: at(0)}, Records: map[string]lifecycle.Record{}, Containers: map[string]Observed{},
		HostIP: "10.0.0.1", PodIPs: []string{"10.88.0.2"}, PodActive: true, Now: at(50),
	}
}

func TestComputeGolden(t *testing.T) {
	cases := map[string]func() Input{
		"image-pull": func() Input {
			in := input(lifecycle.Starting, corev1.RestartPolicyAlways)
			in.Waiting = map[string]Waiting{"main": {"ErrImagePull", "no such host"}}
			in.PodActive, in.PodIPs = false, nil
			return in
		},
		"creating": func() Input {
			in := input(lifecycle.Running, corev1.RestartPolicyAlways)
			in.Records["main"] = lifecycle.Record{Attempts: 1, Started: at(10)}
			return in
		},
		"initializing": func() Input {
			in := input(lifecycle.Running, corev1.RestartPolicyAlways, "one", "two")
			in.Records["one"] = lifecycle.Record{Attempts: 1, EndedAttempts: 1, Started: at(1), Last: end(0, "Completed", 1, 2)}
			in.Records["two"] = lifecycle.Record{Attempts: 1, Started: at(3)}
			in.Containers["two"] = Observed{ID: "22", ImageID: "1mage", Running: true, Started: at(3)}
			return in
		},
		"running": func() Input {
			in := input(lifecycle.Running, corev1.RestartPolicyAlways, "one")
			in.Records["one"] = lifecycle.Record{Attempts: 1, EndedAttempts: 1, Started: at(1), Last: end(0, "Completed", 1, 2)}
			in.Records["main"] = lifecycle.Record{Attempts: 2, Started: at(10), Last: end(1, "Error", 5, 9)}
			in.Containers["main"] = Observed{ID: "33", ImageID: "1mage", Running: true, Started: at(10)}
			return in
		},
		"crash-loop": func() Input {
			in := input(lifecycle.Running, corev1.RestartPolicyAlways)
			in.Records["main"] = lifecycle.Record{Attempts: 3, EndedAttempts: 3, Started: at(10), Last: end(137, "OOMKilled", 10, 11), Delay: 20 * time.Second, Until: at(31)}
			return in
		},
		"succeeded": func() Input {
			in := input(lifecycle.Running, corev1.RestartPolicyOnFailure)
			in.Records["main"] = lifecycle.Record{Attempts: 2, EndedAttempts: 2, Started: at(10), Last: end(0, "Completed", 10, 11), Before: end(1, "Error", 5, 6), Delay: 20 * time.Second}
			return in
		},
		"failed": func() Input {
			in := input(lifecycle.Running, corev1.RestartPolicyNever)
			in.Records["main"] = lifecycle.Record{Attempts: 1, EndedAttempts: 1, Started: at(10), Last: end(4, "Error", 10, 11)}
			return in
		},
		"init-failed": func() Input {
			in := input(lifecycle.Running, corev1.RestartPolicyNever, "one")
			in.Records["one"] = lifecycle.Record{Attempts: 1, EndedAttempts: 1, Started: at(1), Last: end(9, "Error", 1, 2)}
			return in
		},
		"stopped": func() Input {
			in := input(lifecycle.Stopped, corev1.RestartPolicyAlways)
			in.Records["main"] = lifecycle.Record{Attempts: 1, EndedAttempts: 1, Started: at(10), Last: end(143, "Error", 10, 40)}
			in.PodActive, in.PodIPs = false, nil
			return in
		},
		"stopped-unknown": func() Input {
			in := input(lifecycle.Stopped, corev1.RestartPolicyAlways)
			in.Records["main"] = lifecycle.Record{Attempts: 1, Started: at(10)}
			in.PodActive, in.PodIPs = false, nil
			return in
		},
	}
	for name, make := range cases {
		t.Run(name, func(t *testing.T) {
			got, err := yaml.Marshal(Compute(make()))
			require.NoError(t, err)
			path := filepath.Join("testdata", name+".yaml")
			if *update {
				require.NoError(t, os.MkdirAll("testdata", 0o755))
				require.NoError(t, os.WriteFile(path, got, 0o644))
			}
			want, err := os.ReadFile(path)
			require.NoError(t, err)
			assert.Equal(t, string(want), string(got))
		})
	}
}

func TestConditionTimes(t *testing.T) {
	in := input(lifecycle.Running, corev1.RestartPolicyAlways)
	first := Compute(in)
	in.Now, in.Previous = at(59), &first
	assert.Equal(t, first, Compute(in), "nothing changed, so no time does")
	in.Records["main"] = lifecycle.Record{Attempts: 1, Started: at(58)}
	in.Containers["main"] = Observed{ID: "1", Running: true, Started: at(58)}
	for _, c := range Compute(in).Conditions {
		want := at(50)
		if c.Type == corev1.PodReady || c.Type == corev1.ContainersReady {
			want = at(59)
		}
		assert.Equal(t, want, c.LastTransitionTime.Time, c.Type)
	}
}
