package podstatus_test

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/jetbridge/jetbridge/cluster-shim/device"
	"github.com/jetbridge/jetbridge/cluster-shim/podstatus"
	"github.com/jetbridge/jetbridge/shared/report"
)

var update = flag.Bool("update", false, "rewrite golden files")

func at(minute int) metav1.Time {
	return metav1.NewTime(time.Date(2026, 1, 2, 3, minute, 0, 0, time.UTC))
}

func pod(status corev1.PodStatus) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop", UID: "u1"},
		Spec: corev1.PodSpec{
			InitContainers: []corev1.Container{{Name: "init", Image: "init:1"}},
			Containers:     []corev1.Container{{Name: "app", Image: "app:1"}, {Name: "side", Image: "side:1"}},
		},
		Status: status,
	}
}

func scheduled() corev1.PodStatus {
	return corev1.PodStatus{Phase: corev1.PodPending, QOSClass: corev1.PodQOSBestEffort,
		Conditions: []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionTrue, LastTransitionTime: at(0)}}}
}

func running(restarts int32) *report.Pod {
	start := at(1)
	return &report.Pod{Namespace: "shop", Name: "web", UID: "u1", Status: corev1.PodStatus{
		Phase: corev1.PodRunning, StartTime: &start, PodIP: "10.88.0.2", HostIP: "192.168.0.1", QOSClass: corev1.PodQOSGuaranteed,
		Conditions: []corev1.PodCondition{
			{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: at(2)},
			{Type: corev1.PodScheduled, Status: corev1.ConditionFalse},
			{Type: "example.com/own", Status: corev1.ConditionTrue},
		},
		ContainerStatuses: []corev1.ContainerStatus{
			{Name: "stranger", Ready: true},
			{Name: "app", Image: "app@sha256:1", Ready: true, RestartCount: restarts, Started: new(true),
				State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: at(2)}}},
		},
	}}
}

func TestBuildGolden(t *testing.T) {
	ready := scheduled()
	ready.Phase = corev1.PodRunning
	ready.Conditions = append(ready.Conditions, corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: at(1)})
	ready.ContainerStatuses = []corev1.ContainerStatus{{Name: "app", Image: "app:1", Ready: true, RestartCount: 7, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: at(1)}}}}
	failed := ready
	failed.Phase, failed.Reason = corev1.PodFailed, "Evicted"
	hostile := running(-5)
	hostile.Status.Phase = "Sleeping"
	hostile.Status.Message = "bell \a escape \x1b[31m bad \xff" + strings.Repeat("ü", 4096)
	for name, in := range map[string]podstatus.Input{
		"unreported":   {Pod: pod(scheduled()), Connection: device.Connected},
		"waiting":      {Pod: pod(scheduled()), Connection: device.Connected, Waiting: &podstatus.Waiting{Reason: "NoSealingKey", Message: "no key"}},
		"running":      {Pod: pod(scheduled()), Reported: running(2), Connection: device.Connected},
		"disconnected": {Pod: pod(ready), Reported: running(8), Connection: device.Disconnected},
		"forgotten":    {Pod: pod(ready), Connection: device.Connected},
		"terminal":     {Pod: pod(failed), Reported: running(1), Connection: device.Disconnected},
		"hostile":      {Pod: pod(ready), Reported: hostile, Connection: device.Connected},
	} {
		t.Run(name, func(t *testing.T) {
			in.Now = at(30)
			before, err := json.Marshal(in.Pod)
			require.NoError(t, err)
			got, err := yaml.Marshal(podstatus.Build(in))
			require.NoError(t, err)
			file := filepath.Join("testdata", name+".yaml")
			if *update {
				require.NoError(t, os.WriteFile(file, got, 0o644))
			}
			want, err := os.ReadFile(file)
			require.NoError(t, err)
			assert.Equal(t, string(want), string(got))
			after, err := json.Marshal(in.Pod)
			require.NoError(t, err)
			assert.Equal(t, string(before), string(after), "the input is left alone")
		})
	}
}

func TestBuildSettles(t *testing.T) {
	in := podstatus.Input{Pod: pod(scheduled()), Reported: running(2), Connection: device.Connected, Now: at(30)}
	first := podstatus.Build(in)
	in.Pod, in.Now = pod(first), at(40)
	assert.Equal(t, first, podstatus.Build(in), "nothing new gives nothing new")
	in.Connection = device.Disconnected
	lost := podstatus.Build(in)
	in.Pod, in.Now = pod(lost), at(50)
	assert.Equal(t, lost, podstatus.Build(in))
}

func TestRestartCountsNeverDecrease(t *testing.T) {
	in := podstatus.Input{Pod: pod(scheduled()), Reported: running(9), Connection: device.Connected}
	in.Pod = pod(podstatus.Build(in))
	in.Reported = running(3)
	assert.EqualValues(t, 9, podstatus.Build(in).ContainerStatuses[0].RestartCount)
}

func TestAnEndThatIsFinalStays(t *testing.T) {
	for _, c := range []struct {
		policy corev1.RestartPolicy
		code   int32
		stays  bool
	}{
		{corev1.RestartPolicyNever, 1, true}, {corev1.RestartPolicyOnFailure, 0, true},
		{corev1.RestartPolicyOnFailure, 1, false}, {corev1.RestartPolicyAlways, 0, false},
	} {
		old := scheduled()
		old.ContainerStatuses = []corev1.ContainerStatus{{Name: "app", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: c.code}}}}
		in := podstatus.Input{Pod: pod(old), Reported: running(0), Connection: device.Connected, Now: at(30)}
		in.Pod.Spec.RestartPolicy = c.policy
		got := podstatus.Build(in).ContainerStatuses[0]
		assert.Equal(t, c.stays, got.State.Terminated != nil, "%+v", c)
		assert.Equal(t, c.stays, got.State.Running == nil, "%+v", c)
		assert.Equal(t, !c.stays, got.Ready, "%+v", c)
	}
}
