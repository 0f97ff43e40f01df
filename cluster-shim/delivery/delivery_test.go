package delivery

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"github.com/jetbridge/jetbridge/cluster-shim/device"
	"github.com/jetbridge/jetbridge/cluster-shim/flightapi"
	"github.com/jetbridge/jetbridge/shared/bundle"
	"github.com/jetbridge/jetbridge/shared/report"
	"github.com/jetbridge/jetbridge/shared/seal"
	"github.com/jetbridge/jetbridge/shared/wellknown"
)

// world is one device "d", its Flightctl and its source of pods.
type world struct {
	t       *testing.T
	dev     device.State
	key     seal.PrivateKey
	pods    []bundle.Pod
	secrets bundle.Secrets
	ready   bool
	now     time.Time

	file   *flightapi.File
	labels []string
	refs   int
	repos  int
	fail   error
	// during is called within each change of the device's spec.
	during func()

	cluster *fake.Clientset
	d       *Delivery
}

func (w *world) Get(string) (device.State, bool) { return w.dev, true }
func (w *world) Desired(string) ([]bundle.Pod, bundle.Secrets, bool) {
	return w.pods, w.secrets, w.ready
}
func (w *world) SetDeviceFile(_ context.Context, _, _ string, f flightapi.File) (bool, error) {
	if w.during != nil {
		w.during()
	}
	changed := w.file == nil || *w.file != f
	w.file = &f
	return changed, w.fail
}
func (w *world) SetDeviceLabel(_ context.Context, _, key, value string) (bool, error) {
	assert.Equal(w.t, wellknown.DeviceLabelRevision, key)
	w.labels = append(w.labels, value)
	w.dev.Labels = map[string]string{key: value}
	return true, w.fail
}
func (w *world) SetFleetRef(context.Context, string, string, flightapi.HTTPRef) (bool, error) {
	w.refs++
	return true, w.fail
}
func (w *world) HasFleetRef(context.Context, string, string, flightapi.HTTPRef) (bool, error) {
	return w.refs > 0, w.fail
}
func (w *world) PutRepository(context.Context, flightapi.Repository) error {
	w.repos++
	return w.fail
}

func newWorld(t *testing.T) *world {
	t.Helper()
	key, err := seal.NewPrivateKey()
	require.NoError(t, err)
	w := &world{t: t, key: key, ready: true, now: time.Unix(1000, 0), cluster: fake.NewClientset(), secrets: bundle.Secrets{}}
	w.dev = device.State{Name: "d", Connection: device.Connected, Report: &report.Report{Device: "d", PublicKey: w.public()}}
	w.restart()
	return w
}

func (w *world) public() []byte {
	pub, err := w.key.Public()
	require.NoError(w.t, err)
	return pub.Bytes()
}

// restart is what a new shim process finds.
func (w *world) restart() {
	w.d = New(Options{
		API: w, Devices: w, Source: w, Secrets: w.cluster.CoreV1().Secrets("ns"), Namespace: "ns", MAC: []byte("key"),
		Server: NewServer("u", "p"), Repository: flightapi.Repository{Name: "jetbridge", URL: "https://shim"}, ManageFleets: true,
		RetryAfter: time.Minute, Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return w.now },
	})
	require.NoError(w.t, w.d.load(w.t.Context()))
	close(w.d.loaded)
}

func (w *world) sync() time.Duration {
	w.t.Helper()
	again, err := w.d.sync(w.t.Context(), "d")
	require.NoError(w.t, err)
	return again
}

func (w *world) record() *record { return w.d.state("d").record }

func pod(uid string) bundle.Pod {
	return bundle.Pod{Metadata: metav1.ObjectMeta{Name: "p-" + uid, Namespace: "ns", UID: types.UID(uid), CreationTimestamp: metav1.Unix(100, 0)}}
}

func TestStandaloneClosedLoop(t *testing.T) {
	w := newWorld(t)
	assert.Zero(t, w.sync())
	assert.Nil(t, w.record(), "nothing is minted for a device without pods")

	w.ready = false
	w.pods = []bundle.Pod{pod("1")}
	w.sync()
	assert.Nil(t, w.record(), "nothing is minted before all is known")

	w.ready = true
	assert.Equal(t, time.Minute, w.sync())
	require.NotNil(t, w.file)
	assert.Equal(t, wellknown.BundlePath, w.file.Path)
	b, err := bundle.Decode([]byte(w.file.Content), "d")
	require.NoError(t, err)
	assert.EqualValues(t, 1, b.Generation)

	w.file = nil
	w.now = w.now.Add(30 * time.Second)
	assert.Equal(t, 30*time.Second, w.sync())
	assert.Nil(t, w.file, "not yet due")
	w.now = w.now.Add(31 * time.Second)
	assert.Equal(t, 2*time.Minute, w.sync(), "the pauses grow")
	assert.NotNil(t, w.file)

	w.dev.Report.Observed = 1
	w.file = nil
	assert.Zero(t, w.sync())
	assert.Nil(t, w.file)
	assert.EqualValues(t, 1, w.record().generation)

	w.restart()
	w.sync()
	assert.EqualValues(t, 1, w.record().generation, "a new shim mints nothing by itself")
}

func TestGenerationExceedsWhatTheDeviceSaw(t *testing.T) {
	w := newWorld(t)
	w.pods = []bundle.Pod{pod("1")}
	w.dev.Report.Observed = 41
	w.sync()
	assert.EqualValues(t, 42, w.record().generation)
	w.dev.Report.Observed = 50 // the record comes from an old backup
	w.sync()
	assert.EqualValues(t, 51, w.record().generation)
}

func TestFleetAndBack(t *testing.T) {
	w := newWorld(t)
	w.dev.Fleet = "f"
	w.pods = []bundle.Pod{pod("1")}
	w.sync()
	assert.Equal(t, []string{"1"}, w.labels)
	assert.Equal(t, 1, w.repos)
	assert.Equal(t, 1, w.refs)
	assert.Nil(t, w.file)
	w.now = w.now.Add(2 * time.Minute)
	w.sync()
	w.now = w.now.Add(3 * time.Minute)
	w.sync()
	assert.Equal(t, []string{"1", "1.1", "1.2"}, w.labels, "a lost render is asked for again")
	w.dev.Connection = device.Disconnected
	w.now = w.now.Add(time.Hour)
	assert.Zero(t, w.sync())
	assert.Len(t, w.labels, 3, "nobody is there")

	w.dev.Connection, w.dev.Report.Observed = device.Connected, 1
	w.restart()
	w.sync()
	assert.Len(t, w.labels, 3, "a new shim finds its work done")

	w.dev.Fleet = ""
	w.sync()
	assert.NotNil(t, w.file, "the other carrier takes over")
}

func TestFleetThatMayNotBeChanged(t *testing.T) {
	w := newWorld(t)
	w.d.o.ManageFleets = false
	var noticed string
	w.d.o.Notice = func(_, reason, _ string) { noticed = reason }
	w.dev.Fleet = "f"
	w.pods = []bundle.Pod{pod("1")}
	_, err := w.d.sync(t.Context(), "d")
	require.Error(t, err)
	assert.Equal(t, wellknown.ReasonFleetNotManaged, noticed)
	assert.Empty(t, w.labels)
}

func TestSecretsWaitForAKey(t *testing.T) {
	w := newWorld(t)
	w.dev.Report.PublicKey = nil
	w.pods = []bundle.Pod{pod("1"), pod("2")}
	w.secrets["2"] = bundle.PodSecrets{Tokens: []bundle.Token{{Value: "t"}}}
	w.sync()
	assert.Equal(t, map[types.UID]bool{"1": true}, w.record().pods)
	reason, _, held := w.d.Held("d", "2")
	assert.True(t, held)
	assert.Equal(t, wellknown.ReasonNoSealingKey, reason)
	assert.True(t, w.d.Withdraw("d", "2"))
	assert.False(t, w.d.Withdraw("d", "1"), "it is in the bundle")

	w.dev.Report.PublicKey = w.public()
	w.sync()
	assert.NotContains(t, w.record().pods, types.UID("2"), "what was withdrawn stays away")
	_, _, held = w.d.Held("d", "2")
	assert.False(t, held)
}

func TestTokensAloneMintOnceADay(t *testing.T) {
	w := newWorld(t)
	w.pods = []bundle.Pod{pod("1")}
	w.secrets["1"] = bundle.PodSecrets{Tokens: []bundle.Token{{Value: "a"}}}
	w.sync()
	w.secrets["1"] = bundle.PodSecrets{Tokens: []bundle.Token{{Value: "b"}}}
	w.sync()
	assert.EqualValues(t, 1, w.record().generation)
	w.now = w.now.Add(25 * time.Hour)
	w.sync()
	assert.EqualValues(t, 2, w.record().generation)
	b, err := bundle.Decode(w.record().encoded, "d")
	require.NoError(t, err)
	opened, err := b.OpenSecrets(w.key)
	require.NoError(t, err)
	assert.Equal(t, "b", opened["1"].Tokens[0].Value)
}

func TestTooLargeIsRefusedPodByPod(t *testing.T) {
	w := newWorld(t)
	big := pod("big")
	noise := make([]byte, bundle.MaxEncodedSize)
	r := rand.NewChaCha8([32]byte{})
	_, err := r.Read(noise)
	require.NoError(t, err)
	big.Metadata.CreationTimestamp = metav1.Unix(200, 0)
	big.ConfigMaps = []bundle.ConfigMap{{Name: "c", Data: map[string][]byte{"k": noise}}}
	w.pods = []bundle.Pod{big, pod("1")}
	w.sync()
	assert.Equal(t, map[types.UID]bool{"1": true}, w.record().pods)
	reason, _, _ := w.d.Held("d", "big")
	assert.Equal(t, wellknown.ReasonBundleTooLarge, reason)
	generation := w.record().generation
	w.sync()
	assert.Equal(t, generation, w.record().generation)
}

func TestSomebodyElseWroteTheRecord(t *testing.T) {
	w := newWorld(t)
	w.pods = []bundle.Pod{pod("1")}
	w.sync()
	stale := w.d
	w.restart()
	w.pods = []bundle.Pod{pod("1"), pod("2")}
	w.sync()
	w.cluster.PrependReactor("update", "secrets", func(k8stesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewConflict(corev1.Resource("secrets"), "x", errors.New("changed"))
	})
	w.pods = []bundle.Pod{pod("3")}
	_, err := stale.sync(t.Context(), "d")
	require.Error(t, err)
	assert.EqualValues(t, 2, stale.state("d").record.generation, "it learned what counts")
}

func TestADeviceWithoutReportKeepsWhatItHas(t *testing.T) {
	w := newWorld(t)
	w.pods = []bundle.Pod{pod("1")}
	w.sync()
	w.dev.Report = nil
	w.pods = nil
	w.sync()
	assert.EqualValues(t, 1, w.record().generation)
}

func TestServer(t *testing.T) {
	s := NewServer("u", "p")
	get := func(method, path, etag string, auth bool) *httptest.ResponseRecorder {
		r := httptest.NewRequest(method, path, nil)
		if auth {
			r.SetBasicAuth("u", "p")
		}
		r.Header.Set("If-None-Match", etag)
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		return w
	}
	const path = "/v1/devices/d/bundle/3"
	assert.Equal(t, http.StatusUnauthorized, get("GET", path, "", false).Code)
	assert.Equal(t, http.StatusOK, get("GET", ValidationSuffix, "", true).Code)

	empty := get("GET", path, "", true)
	b, err := bundle.Decode(empty.Body.Bytes(), "d")
	require.NoError(t, err)
	assert.Zero(t, b.Generation)

	s.set("d", []byte("content"))
	got := get("GET", path, "", true)
	etag := got.Header().Get("ETag")
	assert.NotEqual(t, empty.Header().Get("ETag"), etag)
	head := get("HEAD", path, "", true)
	assert.Equal(t, etag, head.Header().Get("ETag"))
	assert.Equal(t, strconv.Itoa(len("content")), head.Header().Get("Content-Length"))
	assert.Equal(t, http.StatusNotModified, get("GET", path, etag, true).Code)
	assert.Equal(t, http.StatusMethodNotAllowed, get("POST", path, "", true).Code)
}

func TestKeysAreKept(t *testing.T) {
	secrets := fake.NewClientset().CoreV1().Secrets("ns")
	first, err := EnsureKeys(t.Context(), secrets, []string{"10.0.0.1"})
	require.NoError(t, err)
	second, err := EnsureKeys(t.Context(), secrets, []string{"10.0.0.1"})
	require.NoError(t, err)
	assert.Equal(t, first, second)
	moved, err := EnsureKeys(t.Context(), secrets, []string{"shim.example"})
	require.NoError(t, err)
	assert.Equal(t, first.MAC, moved.MAC)
	cert, err := moved.Certificate()
	require.NoError(t, err)
	assert.NoError(t, cert.Leaf.VerifyHostname("shim.example"))
}

func TestAnUnreadableRecordBlocksItsDeviceOnly(t *testing.T) {
	w := newWorld(t)
	w.pods = []bundle.Pod{pod("1")}
	w.sync()
	secrets := w.cluster.CoreV1().Secrets("ns")
	good, err := secrets.Get(t.Context(), recordName("d"), metav1.GetOptions{})
	require.NoError(t, err)
	bad := good.DeepCopy()
	bad.Data[keyBundle] = []byte("damaged")
	_, err = secrets.Update(t.Context(), bad, metav1.UpdateOptions{})
	require.NoError(t, err)

	w.restart()
	w.file = nil
	w.pods = []bundle.Pod{pod("2")}
	_, err = w.d.sync(t.Context(), "d")
	require.ErrorContains(t, err, "gets nothing new")
	assert.Nil(t, w.record())
	assert.Nil(t, w.file)
	assert.False(t, w.d.Withdraw("d", "1"), "it may be in the bundle")
	assert.True(t, w.d.Withdraw("other", "1"), "others go on")

	_, err = secrets.Update(t.Context(), good, metav1.UpdateOptions{})
	require.NoError(t, err)
	w.sync()
	assert.EqualValues(t, 2, w.record().generation)
}

func TestNoRecordWithoutAPositiveGeneration(t *testing.T) {
	w := newWorld(t)
	for _, generation := range []int64{0, -1} {
		r := &record{device: "d", generation: generation}
		require.Error(t, r.store(t.Context(), w.cluster.CoreV1().Secrets("ns"), "ns"))
	}
	list, err := w.cluster.CoreV1().Secrets("ns").List(t.Context(), metav1.ListOptions{})
	require.NoError(t, err)
	assert.Empty(t, list.Items)
}

func TestNotReadyLeavesTheRecordAlone(t *testing.T) {
	w := newWorld(t)
	w.pods = []bundle.Pod{pod("1")}
	w.sync()
	w.restart()
	before := *w.record()
	w.pods, w.ready = nil, false
	assert.Equal(t, notReadyPause, w.sync(), "nobody else may wake it")
	assert.Equal(t, before, *w.record())
}

func TestWithdrawDoesNotWaitForFlightctl(t *testing.T) {
	w := newWorld(t)
	w.pods = []bundle.Pod{pod("1")}
	called := false
	w.during = func() {
		called = true
		st := w.d.state("d")
		if assert.True(t, st.mu.TryLock()) {
			st.mu.Unlock()
		}
	}
	w.sync()
	assert.True(t, called)
}

func TestARetryThatChangesNothingMintsAgain(t *testing.T) {
	w := newWorld(t)
	w.pods = []bundle.Pod{pod("1")}
	w.sync()
	first := w.file.Content
	w.now = w.now.Add(61 * time.Second)
	assert.Equal(t, 2*time.Minute, w.sync(), "the pauses grow on")
	assert.EqualValues(t, 2, w.record().generation)
	assert.NotEqual(t, first, w.file.Content)
	assert.Equal(t, string(w.record().encoded), w.file.Content)
	w.sync()
	assert.EqualValues(t, 2, w.record().generation, "once in a pause")
	w.now = w.now.Add(2 * time.Minute)
	w.sync()
	assert.EqualValues(t, 3, w.record().generation)
	w.dev.Report.Observed = 3
	w.now = w.now.Add(time.Hour)
	w.sync()
	assert.EqualValues(t, 3, w.record().generation)
}
