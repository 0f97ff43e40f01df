package delivery

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/jetbridge/jetbridge/shared/bundle"
)

const (
	recordType      = corev1.SecretType("jetbridge.dev/bundle")
	labelRecord     = "jetbridge.dev/record"
	labelRecordTrue = "bundle"
	annotationOwner = "jetbridge.dev/device"

	keyGeneration = "generation"
	keyKeyID      = "keyID"
	keyMAC        = "mac"
	keyMinted     = "minted"
	keyBundle     = "bundle"
)

// record is what was minted last for a device: one Secret in the cluster.
type record struct {
	device     string
	generation int64
	keyID      string
	mac        string
	minted     time.Time
	encoded    []byte
	// pods are the UIDs in the bundle.
	pods map[types.UID]bool
	// exists says that the Secret does, version is its resourceVersion.
	exists  bool
	version string
}

// recordName is the name of a device's Secret.
func recordName(device string) string {
	sum := sha256.Sum256([]byte(device))
	return "jetbridge-bundle-" + hex.EncodeToString(sum[:10])
}

func (r *record) secret(namespace string) *corev1.Secret {
	return &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{
			Name: recordName(r.device), Namespace: namespace, ResourceVersion: r.version,
			Labels:      map[string]string{labelRecord: labelRecordTrue},
			Annotations: map[string]string{annotationOwner: r.device},
		},
		Type: recordType,
		Data: map[string][]byte{
			keyGeneration: []byte(strconv.FormatInt(r.generation, 10)),
			keyKeyID:      []byte(r.keyID),
			keyMAC:        []byte(r.mac),
			keyMinted:     []byte(r.minted.UTC().Format(time.RFC3339)),
			keyBundle:     r.encoded,
		},
	}
}

func readRecord(s *corev1.Secret) (*record, error) {
	fail := func(err error) (*record, error) { return nil, fmt.Errorf("cannot read record %s: %w", s.Name, err) }
	r := &record{
		device: s.Annotations[annotationOwner], keyID: string(s.Data[keyKeyID]), mac: string(s.Data[keyMAC]),
		encoded: s.Data[keyBundle], exists: true, version: s.ResourceVersion, pods: map[types.UID]bool{},
	}
	var err error
	if r.generation, err = strconv.ParseInt(string(s.Data[keyGeneration]), 10, 64); err != nil {
		return fail(err)
	}
	if r.minted, err = time.Parse(time.RFC3339, string(s.Data[keyMinted])); err != nil {
		return fail(err)
	}
	if r.generation <= 0 {
		return fail(fmt.Errorf("generation %d is not positive", r.generation))
	}
	b, err := bundle.Decode(r.encoded, r.device)
	if err != nil {
		return fail(err)
	}
	if b.Generation != r.generation {
		return fail(fmt.Errorf("its bundle has generation %d, not %d", b.Generation, r.generation))
	}
	for _, p := range b.Pods {
		r.pods[p.Metadata.UID] = true
	}
	return r, nil
}

// store writes the record if nobody else did since it was read.
func (r *record) store(ctx context.Context, secrets corev1client.SecretInterface, namespace string) error {
	if r.generation <= 0 {
		return fmt.Errorf("generation %d is not positive", r.generation)
	}
	var s *corev1.Secret
	var err error
	if !r.exists {
		s, err = secrets.Create(ctx, r.secret(namespace), metav1.CreateOptions{})
	} else {
		s, err = secrets.Update(ctx, r.secret(namespace), metav1.UpdateOptions{})
	}
	if err != nil {
		return err
	}
	r.exists, r.version = true, s.ResourceVersion
	return nil
}
