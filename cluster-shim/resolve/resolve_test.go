package resolve

import (
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	k8stesting "k8s.io/client-go/testing"

	"github.com/jetbridge/jetbridge/shared/bundle"
)

func pod() *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "ns", UID: "u", ResourceVersion: "9"},
		Spec: corev1.PodSpec{
			NodeName: "n", ServiceAccountName: "app", ImagePullSecrets: []corev1.LocalObjectReference{{Name: "pull"}},
			Containers: []corev1.Container{{
				EnvFrom: []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "cm"}}}},
				Env: []corev1.EnvVar{{ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{
					LocalObjectReference: corev1.LocalObjectReference{Name: "maybe"}, Key: "k", Optional: new(true)}}}},
			}},
			Volumes: []corev1.Volume{
				{VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "sec"}}},
				{VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "cm"}, Optional: new(true)}}},
				{VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
					{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token"}},
				}}}},
			},
		},
	}
}

func TestReferences(t *testing.T) {
	refs, tokens := references(&pod().Spec)
	assert.Equal(t, []ref{
		{configMaps, "cm", false}, {secrets, "maybe", true}, {secrets, "pull", true}, {secrets, "sec", false},
	}, refs, "who needs it decides over who may do without")
	assert.Equal(t, []tokenRef{{"", 3600}}, tokens)
}

// listing says what the fake cluster cannot do.
type listing struct{ corev1client.CoreV1Interface }

func (listing) IsWatchListSemanticsUnSupported() bool { return true }

func object1(name, value string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "ns"}, Data: map[string]string{"k": value}}
}

func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cluster := fake.NewClientset(object1("cm", "one"))
		issuedTokens := 0
		cluster.PrependReactor("create", "serviceaccounts/token", func(a k8stesting.Action) (bool, runtime.Object, error) {
			if a.GetSubresource() != "token" {
				return false, nil, nil
			}
			issuedTokens++
			req := a.(k8stesting.CreateAction).GetObject().(*authv1.TokenRequest).DeepCopy()
			assert.EqualValues(t, "u", req.Spec.BoundObjectRef.UID)
			req.Status.Token = "secret"
			return true, req, nil
		})
		var asked string
		r := New(t.Context(), Options{Log: slog.New(slog.DiscardHandler), Client: func(node string) (corev1client.CoreV1Interface, error) {
			asked = node
			return listing{cluster.CoreV1()}, nil
		}})
		defer r.Close()
		var changes atomic.Int32 // watches call from goroutines of their own
		resolve := func(lenient bool) Result {
			t.Helper()
			res, err := r.Resolve(t.Context(), pod(), lenient, func() { changes.Add(1) })
			require.NoError(t, err)
			return res
		}
		assert.True(t, resolve(false).Loading)
		assert.Equal(t, "n", asked)
		synctest.Wait()
		assert.Positive(t, changes.Load())
		res := resolve(false)
		assert.Equal(t, []string{`Secret "sec"`}, res.Missing)
		assert.Zero(t, issuedTokens, "no token before it can start")

		changes.Store(0)
		_, err := cluster.CoreV1().Secrets("ns").Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "sec", Namespace: "ns"}, Data: map[string][]byte{"a": []byte("b")}}, metav1.CreateOptions{})
		require.NoError(t, err)
		synctest.Wait()
		assert.Positive(t, changes.Load())
		res = resolve(false)
		assert.Empty(t, res.Missing)
		assert.Equal(t, []bundle.ConfigMap{{Name: "cm", Data: map[string][]byte{"k": []byte("one")}}}, res.Pod.ConfigMaps)
		require.NotEmpty(t, res.Secrets.Secrets, "%+v", res)
		assert.Equal(t, "sec", res.Secrets.Secrets[0].Name)
		require.NotEmpty(t, res.Secrets.Tokens, "%+v", res)
		assert.Equal(t, "secret", res.Secrets.Tokens[0].Value)
		resolve(false)
		assert.Equal(t, 1, issuedTokens, "the token is kept")
		time.Sleep(13 * time.Hour) //nolint:forbidigo // fake time
		resolve(false)
		assert.Equal(t, 2, issuedTokens)

		require.NoError(t, cluster.CoreV1().ConfigMaps("ns").Delete(t.Context(), "cm", metav1.DeleteOptions{}))
		synctest.Wait()
		assert.Len(t, resolve(true).Pod.ConfigMaps, 1, "who has it keeps the last content")
		assert.Equal(t, []string{`ConfigMap "cm"`}, resolve(false).Missing)

		r.Forget("u")
		changes.Store(0)
		_, err = cluster.CoreV1().ConfigMaps("ns").Create(t.Context(), object1("cm", "two"), metav1.CreateOptions{})
		require.NoError(t, err)
		synctest.Wait()
		assert.Zero(t, changes.Load())
	})
}

func TestWithoutRights(t *testing.T) {
	r := New(t.Context(), Options{Log: slog.New(slog.DiscardHandler), Client: func(string) (corev1client.CoreV1Interface, error) {
		return nil, errors.New("not allowed")
	}})
	defer r.Close()
	_, err := r.Resolve(t.Context(), pod(), false, func() {})
	assert.ErrorContains(t, err, "not allowed")
}

func TestManifestHasNoNoise(t *testing.T) {
	p := pod()
	p.Spec.Tolerations = []corev1.Toleration{{Key: "x"}}
	m := manifest(p)
	assert.Empty(t, m.Metadata.ResourceVersion)
	assert.Empty(t, m.Spec.Tolerations)
	assert.False(t, m.Terminating())
	now := metav1.Now()
	p.DeletionTimestamp = &now
	stopping := manifest(p)
	assert.True(t, stopping.Terminating())
}

func TestWhatCannotBeReadIsNotMissing(t *testing.T) {
	r := New(t.Context(), Options{Log: slog.New(slog.DiscardHandler)})
	defer r.Close()
	p := pod()
	refs, _ := references(&p.Spec)
	set := func(f follower) {
		for _, ref := range refs {
			next := f
			next.stop, next.holders = func() {}, holders{}
			r.objects[ref.object(p)] = &next
		}
	}
	set(follower{failed: errors.New("connection refused")})
	_, err := r.Resolve(t.Context(), p, true, func() {})
	require.ErrorContains(t, err, "connection refused", "it runs with what it has")
	ended := p.DeepCopy()
	ended.Status.Phase = corev1.PodFailed
	res, err := r.Resolve(t.Context(), ended, true, func() {})
	require.NoError(t, err)
	assert.NotEmpty(t, res.Missing, "it needs nothing any more")

	set(follower{read: true, found: true})
	cluster := fake.NewClientset()
	var refused error
	cluster.PrependReactor("create", "serviceaccounts", func(k8stesting.Action) (bool, runtime.Object, error) { return true, nil, refused })
	r.o.Client = func(string) (corev1client.CoreV1Interface, error) { return cluster.CoreV1(), nil }
	refused = errors.New("timed out")
	_, err = r.Resolve(t.Context(), p, true, func() {})
	require.ErrorContains(t, err, "timed out", "there is no older token")
	refused = apierrors.NewNotFound(corev1.Resource("serviceaccounts"), "app")
	_, err = r.Resolve(t.Context(), p, true, func() {})
	require.NoError(t, err, "the account is gone for good")
	r.tokens[p.UID] = map[tokenRef]issued{{"", 3600}: {token: bundle.Token{Value: "old"}}}
	refused = errors.New("timed out")
	res, err = r.Resolve(t.Context(), p, true, func() {})
	require.NoError(t, err)
	assert.Equal(t, "old", res.Secrets.Tokens[0].Value)
}
