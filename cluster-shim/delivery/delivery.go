// Package delivery brings bundles to devices.
//
// # Record first
//
// What was minted for a device is kept in one Secret, written by
// compare-and-swap before anything is published: so a generation is never
// used twice, and a shim that starts again publishes the very same bytes.
//
// # Carriers
//
// A standalone device gets the bundle as an inline file in its spec. A device
// that a fleet owns gets it by an HTTP reference in the fleet's template, which
// Flightctl fetches from Server when the device's label jetbridge-rev changes.
//
// # A closed loop
//
// Flightctl may lose a render, so a bundle counts as delivered only when the
// device says that it has the generation. Until then it is published again,
// with growing pauses.
package delivery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/util/workqueue"

	"github.com/jetbridge/jetbridge/cluster-shim/device"
	"github.com/jetbridge/jetbridge/cluster-shim/flightapi"
	"github.com/jetbridge/jetbridge/shared/bundle"
	"github.com/jetbridge/jetbridge/shared/seal"
	"github.com/jetbridge/jetbridge/shared/wellknown"
)

const (
	// coalesce is how long changes of one device gather.
	coalesce = 200 * time.Millisecond
	// tokensAge is when fresh tokens alone are reason enough for a bundle.
	tokensAge = 24 * time.Hour
	// retryCap bounds the pause between two publications of one generation.
	retryCap = 10 * time.Minute
	// failMin and failMax bound the pause after an error.
	failMin = 500 * time.Millisecond
	failMax = time.Minute
	// fleetAge is how long a fleet's template counts as right after a look.
	fleetAge   = time.Minute
	bundleMode = 0o600
	// notReadyPause is when to look again for pods that are not all known.
	notReadyPause = 3 * time.Second
	workers       = 4
	pageSize      = 100
)

// API is what delivery needs of Flightctl.
type API interface {
	// SetDeviceFile sets the one file of an inline entry in a device's spec.
	SetDeviceFile(ctx context.Context, device, entry string, f flightapi.File) (bool, error)
	// SetDeviceLabel sets a label of a device.
	SetDeviceLabel(ctx context.Context, device, key, value string) (bool, error)
	// SetFleetRef and HasFleetRef set and look for an entry in a fleet's template.
	SetFleetRef(ctx context.Context, fleet, entry string, ref flightapi.HTTPRef) (bool, error)
	HasFleetRef(ctx context.Context, fleet, entry string, ref flightapi.HTTPRef) (bool, error)
	// PutRepository makes or replaces a repository.
	PutRepository(ctx context.Context, r flightapi.Repository) error
}

// Source says what a device shall run.
type Source interface {
	// Desired returns the pods of a device and their secrets; false while not
	// all of them are known yet: then nothing may be minted.
	Desired(device string) ([]bundle.Pod, bundle.Secrets, bool)
}

// Devices finds a device.
type Devices interface {
	Get(name string) (device.State, bool)
}

// Options of a Delivery.
type Options struct {
	API     API
	Devices Devices
	Source  Source
	// Secrets are those of the shim's namespace.
	Secrets   corev1client.SecretInterface
	Namespace string
	// MAC is the key of the records' MACs.
	MAC []byte
	// Server serves bundles to Flightctl, which knows it by Repository; the
	// latter's URL is empty if fleets are not served.
	Server     *Server
	Repository flightapi.Repository
	// ManageFleets says whether fleets' templates may be changed.
	ManageFleets bool
	// RetryAfter is the first pause before a bundle is published again.
	RetryAfter time.Duration
	// Changed is called for a device of which Held may answer otherwise.
	Changed func(device string)
	// Notice tells people of something about a device, by reason and message.
	Notice func(device, reason, message string)
	// Minted is called for each new bundle.
	Minted func()
	Log    *slog.Logger
	// Now is the clock; time.Now if nil.
	Now func() time.Time
}

// Delivery is the worker. Make one with New.
type Delivery struct {
	o      Options
	queue  workqueue.TypedRateLimitingInterface[string]
	loaded chan struct{}

	mu     sync.Mutex // guards everything that follows
	states map[string]*state
	fleets map[string]time.Time
	// unreadable are the names of records that could not be read at the start.
	unreadable map[string]bool

	repoMu sync.Mutex // guards repoDone, and is held while it is made
	// repoDone says that Flightctl has the repository.
	repoDone bool
}

// state is what is known of one device.
type state struct {
	// mu guards everything that follows; it is held while minting, but never
	// while Flightctl is asked for something.
	mu sync.Mutex
	// blocked says that there is a record which could not be read: until it
	// can, nothing is known of what the device has.
	blocked bool
	// record is what was minted last; nil if nothing was.
	record *record
	// withdrawn pods are never delivered.
	withdrawn map[types.UID]bool
	published publication

	heldMu sync.Mutex // guards held
	held   map[types.UID]hold
}

type hold struct{ reason, message string }

// publication is what was done last to get a generation to the device.
type publication struct {
	carrier    string
	generation int64
	tries      int
	next       time.Time
}

// New makes a delivery that does nothing before Run.
func New(o Options) *Delivery {
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Delivery{
		o: o, loaded: make(chan struct{}),
		queue:  workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](failMin, failMax)),
		states: map[string]*state{}, fleets: map[string]time.Time{}, unreadable: map[string]bool{},
	}
}

// Changed says that something about a device changed; it does not block.
func (d *Delivery) Changed(device string) { d.queue.AddAfter(device, coalesce) }

// Held says why a pod is kept back from its device, if it is.
func (d *Delivery) Held(device string, uid types.UID) (reason, message string, held bool) {
	st := d.state(device)
	st.heldMu.Lock()
	defer st.heldMu.Unlock()
	h, ok := st.held[uid]
	return h.reason, h.message, ok
}

// Withdraw makes sure that a pod is never delivered, and says whether it could:
// false if the pod is in the device's bundle, or nobody knows yet.
func (d *Delivery) Withdraw(device string, uid types.UID) bool {
	select {
	case <-d.loaded:
	default:
		return false
	}
	st := d.state(device)
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.blocked || st.record != nil && st.record.pods[uid] {
		return false
	}
	st.withdrawn[uid] = true
	return true
}

func (d *Delivery) state(device string) *state {
	d.mu.Lock()
	defer d.mu.Unlock()
	st, ok := d.states[device]
	if !ok {
		st = &state{withdrawn: map[types.UID]bool{}, blocked: d.unreadable[recordName(device)]}
		d.states[device] = st
	}
	return st
}

// Run loads the records, then works until ctx ends and waits for its workers.
func (d *Delivery) Run(ctx context.Context) {
	stop := context.AfterFunc(ctx, d.queue.ShutDown)
	defer stop()
	pause := failMin
	for {
		err := d.load(ctx)
		if err == nil {
			break
		}
		d.o.Log.WarnContext(ctx, "cannot load the records of bundles", "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
			pause = min(2*pause, failMax)
		}
	}
	close(d.loaded)
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			for d.work(ctx) {
			}
		})
	}
	group.Wait()
}

// Loaded says whether the records were read.
func (d *Delivery) Loaded() bool {
	select {
	case <-d.loaded:
		return true
	default:
		return false
	}
}

func (d *Delivery) load(ctx context.Context) error {
	opts := metav1.ListOptions{LabelSelector: labelRecord + "=" + labelRecordTrue, Limit: pageSize}
	for {
		list, err := d.o.Secrets.List(ctx, opts)
		if err != nil {
			return fmt.Errorf("cannot list records: %w", err)
		}
		for i := range list.Items {
			r, err := readRecord(&list.Items[i])
			if err != nil {
				// It shall not keep other devices waiting.
				d.o.Log.ErrorContext(ctx, "record of a bundle is unreadable, its device gets nothing new", "record", list.Items[i].Name, "device", list.Items[i].Annotations[annotationOwner], "error", err)
				d.block(list.Items[i].Name)
				continue
			}
			st := d.state(r.device)
			st.mu.Lock()
			st.record = r
			st.mu.Unlock()
			d.o.Server.set(r.device, r.encoded)
			d.Changed(r.device)
		}
		if list.Continue == "" {
			return nil
		}
		opts.Continue = list.Continue
	}
}

// block keeps the device of an unreadable record, which its name tells, from
// getting anything.
func (d *Delivery) block(record string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.unreadable[record] = true
	for name, st := range d.states {
		if recordName(name) == record {
			st.mu.Lock()
			st.blocked = true
			st.mu.Unlock()
		}
	}
}

// unblock reads the record of a blocked device again. The lock of st is held.
func (d *Delivery) unblock(ctx context.Context, name string, st *state) error {
	s, err := d.o.Secrets.Get(ctx, recordName(name), metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err): // somebody removed it to begin anew
	case err != nil:
		return fmt.Errorf("cannot get the unreadable record of device %s again: %w", name, err)
	default:
		r, err := readRecord(s)
		if err != nil {
			return fmt.Errorf("device %s gets nothing new: %w", name, err)
		}
		st.record = r
		d.o.Server.set(name, r.encoded)
	}
	st.blocked = false
	d.o.Log.InfoContext(ctx, "record of a bundle is readable again or gone", "device", name)
	return nil
}

func (d *Delivery) work(ctx context.Context) bool {
	name, quit := d.queue.Get()
	if quit {
		return false
	}
	defer d.queue.Done(name)
	again, err := d.sync(ctx, name)
	if err != nil {
		if ctx.Err() == nil {
			d.o.Log.WarnContext(ctx, "cannot deliver to device, trying again", "device", name, "error", err)
		}
		d.queue.AddRateLimited(name)
		return true
	}
	d.queue.Forget(name)
	if again > 0 {
		d.queue.AddAfter(name, again)
	}
	return true
}

// sync does what is due for one device, and says when to look again; 0 for
// when something changes.
func (d *Delivery) sync(ctx context.Context, name string) (time.Duration, error) {
	dev, ok := d.o.Devices.Get(name)
	if !ok || dev.Gone {
		return 0, nil
	}
	st := d.state(name)
	r, p, ready, err := d.prepare(ctx, dev, st)
	if err != nil {
		return 0, err
	}
	if !ready {
		return notReadyPause, nil
	}
	if r == nil {
		return 0, nil
	}
	// The queue has one worker at a time for a device, so nobody else
	// publishes while the lock is free.
	p, again, idle, err := d.publish(ctx, dev, r, p)
	if err != nil {
		return 0, err
	}
	if idle && p.tries > 1 && dev.Report != nil {
		// Flightctl renders nothing for a spec that stays the same.
		if r, err = d.remint(ctx, dev, st); err != nil {
			return 0, err
		}
		p = publication{carrier: p.carrier, generation: r.generation, tries: p.tries - 1}
		if p, again, _, err = d.publish(ctx, dev, r, p); err != nil {
			return 0, err
		}
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	st.published = p
	return again, nil
}

// prepare mints what is due and returns what to publish, nil if nothing, and
// whether all that the device shall have is known.
func (d *Delivery) prepare(ctx context.Context, dev device.State, st *state) (*record, publication, bool, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.blocked {
		if err := d.unblock(ctx, dev.Name, st); err != nil {
			return nil, publication{}, false, err
		}
	}
	pods, secrets, ready := d.o.Source.Desired(dev.Name) // under the lock, for Withdraw's sake
	if !ready || st.record == nil && len(pods) == 0 {
		return nil, publication{}, ready, nil
	}
	// A device with a record did report once: without its word neither its
	// key nor its generation is known, so what it has stays.
	if st.record == nil || dev.Report != nil {
		if err := d.mint(ctx, dev, st, pods, secrets, false); err != nil {
			return nil, publication{}, false, err
		}
	}
	return st.record, st.published, true, nil
}

// remint makes the next generation of a desired state that did not change.
func (d *Delivery) remint(ctx context.Context, dev device.State, st *state) (*record, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	pods, secrets, ready := d.o.Source.Desired(dev.Name)
	if !ready {
		return st.record, nil
	}
	if err := d.mint(ctx, dev, st, pods, secrets, true); err != nil {
		return nil, err
	}
	return st.record, nil
}

// mint makes and records a new bundle if there is reason for one, or anyway.
func (d *Delivery) mint(ctx context.Context, dev device.State, st *state, pods []bundle.Pod, secrets bundle.Secrets, anyway bool) error {
	var key *seal.PublicKey
	var keyID string
	if dev.Report != nil && len(dev.Report.PublicKey) > 0 {
		k, err := seal.ParsePublicKey(dev.Report.PublicKey)
		if err != nil {
			return fmt.Errorf("cannot use key of device %s: %w", dev.Name, err)
		}
		key, keyID = &k, k.ID()
	}
	held := map[types.UID]hold{}
	listed := map[types.UID]bool{}
	want := &bundle.Desired{Device: dev.Name, Secrets: bundle.Secrets{}}
	for _, p := range pods {
		uid := p.Metadata.UID
		listed[uid] = true
		s := secrets[uid]
		secret := len(s.Secrets) > 0 || len(s.Tokens) > 0
		switch {
		case st.withdrawn[uid]:
		case secret && key == nil && p.Terminating():
			want.Pods = append(want.Pods, p) // it needs none to stop
		case secret && key == nil:
			held[uid] = hold{wellknown.ReasonNoSealingKey, "The device has not reported a key yet to which the pod's secrets can be sealed."}
		default:
			want.Pods = append(want.Pods, p)
			if secret {
				want.Secrets[uid] = s
			}
		}
	}
	for uid := range st.withdrawn {
		if !listed[uid] {
			delete(st.withdrawn, uid) // its object is gone
		}
	}
	defer func() { d.setHeld(dev.Name, st, held) }()
	if st.record == nil && len(want.Pods) == 0 {
		return nil
	}
	for {
		mac, err := want.MAC(d.o.MAC, keyID)
		if err != nil {
			return err
		}
		if !anyway && d.unchanged(st.record, mac, dev.Observed(), want) {
			return nil
		}
		generation := dev.Observed() + 1
		if st.record != nil {
			generation = max(st.record.generation, dev.Observed()) + 1
		}
		b, err := want.Mint(generation, key)
		if err != nil {
			return err
		}
		encoded, err := b.Encode()
		if errors.Is(err, bundle.ErrTooLarge) {
			if !dropNewest(want, st.record, held) {
				return fmt.Errorf("cannot update device %s, whose pods grew too large: %w", dev.Name, err)
			}
			continue
		}
		if err != nil {
			return err
		}
		next := &record{device: dev.Name, generation: generation, keyID: b.KeyID, mac: mac, minted: d.o.Now(), encoded: encoded, pods: map[types.UID]bool{}}
		for _, p := range want.Pods {
			next.pods[p.Metadata.UID] = true
		}
		return d.swap(ctx, st, next)
	}
}

// unchanged says that the record still is what the device needs.
func (d *Delivery) unchanged(r *record, mac string, observed int64, want *bundle.Desired) bool {
	return r != nil && r.mac == mac && observed <= r.generation && (!hasTokens(want) || d.o.Now().Sub(r.minted) < tokensAge)
}

func hasTokens(want *bundle.Desired) bool {
	for _, s := range want.Secrets {
		if len(s.Tokens) > 0 {
			return true
		}
	}
	return false
}

// dropNewest takes the youngest pod out that the device does not have yet.
func dropNewest(want *bundle.Desired, r *record, held map[types.UID]hold) bool {
	newest := -1
	for i, p := range want.Pods {
		if r != nil && r.pods[p.Metadata.UID] {
			continue
		}
		if newest < 0 || want.Pods[newest].Metadata.CreationTimestamp.Before(&p.Metadata.CreationTimestamp) {
			newest = i
		}
	}
	if newest < 0 {
		return false
	}
	uid := want.Pods[newest].Metadata.UID
	held[uid] = hold{wellknown.ReasonBundleTooLarge, fmt.Sprintf("With this pod the device's bundle would exceed %d bytes.", bundle.MaxEncodedSize)}
	delete(want.Secrets, uid)
	want.Pods = slices.Delete(want.Pods, newest, newest+1)
	return true
}

// swap writes the record if nobody else did, then shows it to the server.
func (d *Delivery) swap(ctx context.Context, st *state, next *record) error {
	if st.record != nil {
		next.exists, next.version = st.record.exists, st.record.version
	}
	err := next.store(ctx, d.o.Secrets, d.o.Namespace)
	if err != nil {
		// Whatever came of the write: only the cluster knows what counts.
		s, readErr := d.o.Secrets.Get(ctx, recordName(next.device), metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(readErr):
			if st.record != nil {
				st.record.exists, st.record.version = false, ""
			}
		case readErr == nil:
			if have, err := readRecord(s); err == nil {
				st.record = have
				d.o.Server.set(have.device, have.encoded)
			}
		}
		return fmt.Errorf("cannot record bundle %d of device %s: %w", next.generation, next.device, err)
	}
	st.record = next
	d.o.Server.set(next.device, next.encoded)
	if d.o.Minted != nil {
		d.o.Minted()
	}
	d.o.Log.InfoContext(ctx, "minted bundle", "device", next.device, "generation", next.generation, "pods", len(next.pods), "bytes", len(next.encoded))
	return nil
}

func (d *Delivery) setHeld(name string, st *state, held map[types.UID]hold) {
	st.heldMu.Lock()
	changed := len(held) != len(st.held)
	for uid, h := range held {
		changed = changed || st.held[uid] != h
	}
	st.held = held
	st.heldMu.Unlock()
	if changed && d.o.Changed != nil {
		d.o.Changed(name)
	}
}

// publish puts the record on the device's carrier if that is due. It returns
// what was done, when to look again, and whether it changed nothing at all.
func (d *Delivery) publish(ctx context.Context, dev device.State, r *record, p publication) (done publication, again time.Duration, idle bool, err error) {
	carrier := "device"
	if dev.Fleet != "" {
		carrier = "fleet/" + dev.Fleet
	}
	fresh := p.generation != r.generation || p.carrier != carrier
	now := d.o.Now()
	if !fresh {
		switch {
		case dev.Observed() >= r.generation, dev.Connection == device.Disconnected:
			return p, 0, false, nil // delivered, or nobody to deliver to
		case now.Before(p.next):
			return p, p.next.Sub(now), false, nil
		}
	} else {
		p = publication{carrier: carrier, generation: r.generation}
	}
	if dev.Fleet == "" {
		var changed bool
		changed, err = d.o.API.SetDeviceFile(ctx, dev.Name, wellknown.ConfigEntry, flightapi.File{Path: wellknown.BundlePath, Content: string(r.encoded), Mode: bundleMode})
		idle = !changed
	} else {
		err = d.publishByFleet(ctx, dev, r, p.tries)
	}
	if err != nil {
		return p, 0, false, fmt.Errorf("cannot publish bundle %d: %w", r.generation, err)
	}
	pause := retryCap
	if p.tries < 6 { // beyond, doubling is past the cap in any case
		pause = min(d.o.RetryAfter<<p.tries, retryCap)
	}
	p.tries++
	p.next = now.Add(pause)
	d.o.Log.InfoContext(ctx, "published bundle", "device", dev.Name, "generation", r.generation, "carrier", carrier, "try", p.tries)
	if dev.Observed() >= r.generation {
		return p, 0, false, nil
	}
	return p, pause, idle, nil
}

// Ref is the entry that a fleet's template needs.
func Ref() flightapi.HTTPRef {
	return flightapi.HTTPRef{
		Repository: wellknown.RepositoryName, FilePath: wellknown.BundlePath,
		Suffix: `/v1/devices/{{ .metadata.name }}/bundle/{{ getOrDefault .metadata.labels "` + wellknown.DeviceLabelRevision + `" "0" }}`,
	}
}

// publishByFleet makes Flightctl fetch the bundle of one device.
func (d *Delivery) publishByFleet(ctx context.Context, dev device.State, r *record, tries int) error {
	if err := d.ensureRepository(ctx); err != nil {
		return err
	}
	if err := d.ensureFleet(ctx, dev); err != nil {
		return err
	}
	revision := strconv.FormatInt(r.generation, 10)
	have := dev.Labels[wellknown.DeviceLabelRevision]
	base, suffix, _ := strings.Cut(have, ".")
	switch {
	case base != revision:
	case tries == 0 && dev.Observed() >= r.generation:
		return nil // a shim that started again finds its work done
	default:
		n, err := strconv.Atoi(suffix)
		if err != nil {
			n = 0
		}
		revision += "." + strconv.Itoa(n+1)
	}
	_, err := d.o.API.SetDeviceLabel(ctx, dev.Name, wellknown.DeviceLabelRevision, revision)
	return err
}

func (d *Delivery) ensureRepository(ctx context.Context) error {
	if d.o.Repository.URL == "" {
		return errors.New("no bundle server is configured, so fleets cannot be served")
	}
	d.repoMu.Lock()
	defer d.repoMu.Unlock()
	if d.repoDone {
		return nil
	}
	if err := d.o.API.PutRepository(ctx, d.o.Repository); err != nil {
		return fmt.Errorf("cannot make repository %s: %w", d.o.Repository.Name, err)
	}
	d.repoDone = true
	return nil
}

// ensureFleet makes sure that the template of the device's fleet has our entry.
func (d *Delivery) ensureFleet(ctx context.Context, dev device.State) error {
	d.mu.Lock()
	at, ok := d.fleets[dev.Fleet]
	d.mu.Unlock()
	if ok && d.o.Now().Sub(at) < fleetAge {
		return nil
	}
	var has bool
	var err error
	if d.o.ManageFleets {
		var changed bool
		changed, err = d.o.API.SetFleetRef(ctx, dev.Fleet, wellknown.ConfigEntry, Ref())
		if changed {
			d.o.Log.InfoContext(ctx, "added our entry to fleet", "fleet", dev.Fleet)
		}
		has = err == nil
		if errors.Is(err, flightapi.ErrOwned) {
			has, err = d.o.API.HasFleetRef(ctx, dev.Fleet, wellknown.ConfigEntry, Ref())
		}
	} else {
		has, err = d.o.API.HasFleetRef(ctx, dev.Fleet, wellknown.ConfigEntry, Ref())
	}
	if err != nil {
		return fmt.Errorf("cannot look after fleet %s: %w", dev.Fleet, err)
	}
	if !has {
		message := fmt.Sprintf("The template of fleet %s lacks the configuration entry %s, and the shim may not add it.", dev.Fleet, wellknown.ConfigEntry)
		if d.o.Notice != nil {
			d.o.Notice(dev.Name, wellknown.ReasonFleetNotManaged, message)
		}
		return fmt.Errorf("fleet %s lacks the configuration entry %s", dev.Fleet, wellknown.ConfigEntry)
	}
	d.mu.Lock()
	d.fleets[dev.Fleet] = d.o.Now()
	d.mu.Unlock()
	return nil
}
