// Package resolve finds all that a pod needs to run offline: its ConfigMaps,
// Secrets, pull secrets and service account tokens.
//
// # Rights
//
// Everything is read as the pod's node (user system:node:NAME), by constrained
// impersonation: so the cluster's node authorizer gives exactly the objects
// that pods of that node name, and nothing else.
//
// # Watches
//
// Each object is followed by a watch of its own as long as a pod needs it. An
// object that was there and is gone keeps its last content for the pods that
// have it, as with a kubelet.
package resolve

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/jetbridge/jetbridge/shared/bundle"
)

// tokenAge is when a token is asked for anew, if somebody asks: half of the
// day that passes at most between two bundles with fresh tokens.
const tokenAge = 12 * time.Hour

// Options of a Resolver.
type Options struct {
	// Client returns a client that acts as a node.
	Client func(node string) (corev1client.CoreV1Interface, error)
	Log    *slog.Logger
	// Now is the clock; time.Now if nil.
	Now func() time.Time
}

// Result is what was found for a pod.
type Result struct {
	Pod     bundle.Pod
	Secrets bundle.PodSecrets
	// Missing names the objects that the pod cannot start without and that
	// do not exist, such as `ConfigMap "app"`.
	Missing []string
	// Loading says that some object was not read yet; the pod's function
	// Changed is called when it was.
	Loading bool
}

// Resolver finds and follows. Make one with New, and Close it.
type Resolver struct {
	o      Options
	ctx    context.Context
	cancel context.CancelFunc
	group  sync.WaitGroup

	mu sync.Mutex // guards everything that follows
	// objects are the watches, pods the objects of each pod.
	objects map[object]*follower
	pods    map[types.UID]map[object]bool
	tokens  map[types.UID]map[tokenRef]issued
}

type issued struct {
	token bundle.Token
	at    time.Time
}

// follower is the watch of one object.
type follower struct {
	stop    context.CancelFunc
	holders holders
	// read says that the object was looked at; data and typ are its last
	// content, found whether it ever existed, gone that it is deleted.
	read, found, gone bool
	data              map[string][]byte
	typ               corev1.SecretType
	// failed is why it cannot be read.
	failed error
}

// New makes a resolver; its watches end with ctx or by Close.
func New(ctx context.Context, o Options) *Resolver {
	if o.Now == nil {
		o.Now = time.Now
	}
	r := &Resolver{o: o, objects: map[object]*follower{}, pods: map[types.UID]map[object]bool{}, tokens: map[types.UID]map[tokenRef]issued{}}
	r.ctx, r.cancel = context.WithCancel(ctx)
	return r
}

// Close ends all watches and waits for them.
func (r *Resolver) Close() {
	r.cancel()
	r.group.Wait()
}

// Resolve gathers what pod needs. changed is called, and must not block,
// whenever the answer may be another one, until Forget. Lenient is for a pod
// that was delivered or shall stop: what is known to be missing is left out,
// and no new token is asked for if it is stopping. What could not be read is
// no reason to take something from a pod that runs, but an error, unless the
// pod is stopping. An error is worth a retry.
func (r *Resolver) Resolve(ctx context.Context, pod *corev1.Pod, lenient bool, changed func()) (Result, error) {
	refs, tokens := references(&pod.Spec)
	res := Result{Pod: manifest(pod)}
	if err := r.follow(pod, refs, changed); err != nil { //nolint:contextcheck // watches outlive this call and end with the resolver
		return res, err
	}
	r.mu.Lock()
	var failed error
	for _, ref := range refs {
		f := r.objects[ref.object(pod)]
		switch {
		case f.found && (!f.gone || lenient):
			if ref.kind == configMaps {
				res.Pod.ConfigMaps = append(res.Pod.ConfigMaps, bundle.ConfigMap{Name: ref.name, Data: f.data})
			} else {
				res.Secrets.Secrets = append(res.Secrets.Secrets, bundle.Secret{Name: ref.name, Type: f.typ, Data: f.data})
			}
		case f.failed != nil && !f.read && !stopping(pod) && (!ref.optional || !apierrors.IsForbidden(f.failed)):
			failed = fmt.Errorf("cannot read %s %q: %w", ref.kind, ref.name, f.failed)
		case !f.read && f.failed == nil:
			res.Loading = true
		case !ref.optional:
			res.Missing = append(res.Missing, fmt.Sprintf("%s %q", ref.kind, ref.name))
		}
	}
	r.mu.Unlock()
	if failed != nil {
		return res, failed
	}
	if res.Loading || len(res.Missing) > 0 && !lenient {
		return res, nil
	}
	for _, t := range tokens {
		token, ok, err := r.token(ctx, pod, t)
		if err != nil && (!lenient || !ok && !apierrors.IsNotFound(err)) {
			return res, err
		}
		if err != nil {
			r.o.Log.WarnContext(ctx, "cannot renew token of pod", "namespace", pod.Namespace, "pod", pod.Name, "error", err)
		}
		if ok {
			res.Secrets.Tokens = append(res.Secrets.Tokens, token)
		}
	}
	return res, nil
}

// Forget ends what was followed for a pod only.
func (r *Resolver) Forget(uid types.UID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for o := range r.pods[uid] {
		r.release(o, uid)
	}
	delete(r.pods, uid)
	delete(r.tokens, uid)
}

func (r *Resolver) release(o object, uid types.UID) {
	f := r.objects[o]
	delete(f.holders, uid)
	if len(f.holders) == 0 {
		f.stop()
		delete(r.objects, o)
	}
}

// follow makes sure that all refs are watched, and others no more.
func (r *Resolver) follow(pod *corev1.Pod, refs []ref, changed func()) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	want := map[object]bool{}
	for _, ref := range refs {
		o := ref.object(pod)
		want[o] = true
		f, ok := r.objects[o]
		if !ok {
			client, err := r.o.Client(o.node)
			if err != nil {
				return fmt.Errorf("cannot act as node %s: %w", o.node, err)
			}
			ctx, stop := context.WithCancel(r.ctx)
			f = &follower{stop: stop, holders: holders{}}
			r.objects[o] = f
			r.group.Go(func() { defer stop(); r.run(ctx, o, f, client) })
		}
		f.holders[pod.UID] = changed
	}
	for o := range r.pods[pod.UID] {
		if !want[o] {
			r.release(o, pod.UID)
		}
	}
	r.pods[pod.UID] = want
	return nil
}

// run follows one object until ctx ends.
func (r *Resolver) run(ctx context.Context, o object, f *follower, client corev1client.CoreV1Interface) {
	only := fields.OneTermEqualSelector(metav1.ObjectNameField, o.name).String()
	var lw *cache.ListWatch
	var example runtime.Object
	if o.kind == configMaps {
		example = &corev1.ConfigMap{}
		lw = &cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) {
				opts.FieldSelector = only
				return client.ConfigMaps(o.namespace).List(ctx, opts)
			},
			WatchFuncWithContext: func(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
				opts.FieldSelector = only
				return client.ConfigMaps(o.namespace).Watch(ctx, opts)
			},
		}
	} else {
		example = &corev1.Secret{}
		lw = &cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) {
				opts.FieldSelector = only
				return client.Secrets(o.namespace).List(ctx, opts)
			},
			WatchFuncWithContext: func(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
				opts.FieldSelector = only
				return client.Secrets(o.namespace).Watch(ctx, opts)
			},
		}
	}
	informer := cache.NewSharedIndexInformer(cache.ToListWatcherWithWatchListSemantics(lw, client), example, 0, cache.Indexers{})
	_ = informer.SetWatchErrorHandlerWithContext(func(ctx context.Context, _ *cache.Reflector, err error) { // fails only if started
		if ctx.Err() == nil {
			r.update(o, f, func() bool { was := f.failed; f.failed = err; return was == nil && !f.read })
		}
	})
	reg, err := informer.AddEventHandler(cache.FilteringResourceEventHandler{
		// A server that does not honour the selector shall not make one
		// object pass for another.
		FilterFunc: func(obj any) bool {
			name, err := cache.DeletionHandlingObjectToName(obj)
			return err == nil && name.Name == o.name
		},
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    func(obj any) { r.store(o, f, obj) },
			UpdateFunc: func(_, obj any) { r.store(o, f, obj) },
			DeleteFunc: func(any) { r.update(o, f, func() bool { f.gone = true; return true }) },
		},
	})
	if err != nil {
		r.update(o, f, func() bool { f.failed = err; return true })
		return
	}
	var synced sync.WaitGroup
	synced.Go(func() {
		select {
		case <-ctx.Done():
		case <-reg.HasSyncedChecker().Done():
			r.update(o, f, func() bool { f.read, f.failed = true, nil; return true })
		}
	})
	informer.RunWithContext(ctx)
	synced.Wait()
}

func (r *Resolver) store(o object, f *follower, obj any) {
	data := map[string][]byte{}
	var typ corev1.SecretType
	switch v := obj.(type) {
	case *corev1.ConfigMap:
		maps.Copy(data, v.BinaryData)
		for k, s := range v.Data {
			data[k] = []byte(s)
		}
	case *corev1.Secret:
		maps.Copy(data, v.Data)
		typ = v.Type
	}
	r.update(o, f, func() bool {
		f.read, f.found, f.gone, f.failed, f.data, f.typ = true, true, false, nil, data, typ
		return true
	})
}

// update changes a follower under the lock and tells its holders if change
// says so.
func (r *Resolver) update(o object, f *follower, change func() bool) {
	var tell []func()
	r.mu.Lock()
	if change() && r.objects[o] == f {
		for _, changed := range f.holders {
			tell = append(tell, changed)
		}
	}
	r.mu.Unlock()
	for _, changed := range tell {
		changed()
	}
}

// token returns a token for the pod, from memory if it is young enough. A
// stopping pod gets none that it does not have; with an error there may still
// be an old one.
func (r *Resolver) token(ctx context.Context, pod *corev1.Pod, t tokenRef) (bundle.Token, bool, error) {
	r.mu.Lock()
	have, ok := r.tokens[pod.UID][t]
	r.mu.Unlock()
	if stopping(pod) || ok && r.o.Now().Sub(have.at) < tokenAge {
		return have.token, ok, nil
	}
	client, err := r.o.Client(pod.Spec.NodeName)
	if err != nil {
		return have.token, ok, fmt.Errorf("cannot act as node %s: %w", pod.Spec.NodeName, err)
	}
	req := &authv1.TokenRequest{Spec: authv1.TokenRequestSpec{
		ExpirationSeconds: &t.expirationSeconds,
		BoundObjectRef:    &authv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
	}}
	if t.audience != "" {
		req.Spec.Audiences = []string{t.audience}
	}
	account := pod.Spec.ServiceAccountName
	if account == "" {
		account = "default"
	}
	got, err := client.ServiceAccounts(pod.Namespace).CreateToken(ctx, account, req, metav1.CreateOptions{})
	if err != nil {
		return have.token, ok, fmt.Errorf("cannot get a token of service account %s: %w", account, err)
	}
	token := bundle.Token{Audience: t.audience, ExpirationSeconds: t.expirationSeconds, Value: got.Status.Token, Expires: got.Status.ExpirationTimestamp.UTC()}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.tokens[pod.UID] == nil {
		r.tokens[pod.UID] = map[tokenRef]issued{}
	}
	r.tokens[pod.UID][t] = issued{token: token, at: r.o.Now()}
	return token, true, nil
}

// stopping says that the pod ended or shall end.
func stopping(pod *corev1.Pod) bool {
	return pod.DeletionTimestamp != nil || pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

// manifest is the part of a pod that its device needs. What changes while the
// pod runs and does not concern the device stays out, else each change would
// make a new bundle.
func manifest(pod *corev1.Pod) bundle.Pod {
	p := pod.DeepCopy()
	m := metav1.ObjectMeta{
		Name: p.Name, Namespace: p.Namespace, UID: p.UID, Labels: p.Labels, Annotations: p.Annotations,
		CreationTimestamp: utc(p.CreationTimestamp), Generation: p.Generation,
		DeletionGracePeriodSeconds: p.DeletionGracePeriodSeconds,
	}
	if p.DeletionTimestamp != nil {
		t := utc(*p.DeletionTimestamp)
		m.DeletionTimestamp = &t
	}
	p.Spec.Tolerations = nil // the node lifecycle's, not the device's
	return bundle.Pod{Metadata: m, Spec: p.Spec}
}

// utc makes times look alike wherever the shim runs.
func utc(t metav1.Time) metav1.Time { return metav1.NewTime(t.UTC()) }
