package bundle_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/types"

	"github.com/jetbridge/jetbridge/shared/bundle"
)

// manyPods is the desired state of a device with this many pods.
func manyPods(count int) *bundle.Desired {
	one := desired()
	d := &bundle.Desired{Device: device, Secrets: bundle.Secrets{}}
	for i := range count {
		p := one.Pods[0]
		p.Metadata.Name = fmt.Sprintf("web-%d", i)
		p.Metadata.UID = types.UID(fmt.Sprintf("uid-%d", i))
		d.Pods = append(d.Pods, p)
		d.Secrets[p.Metadata.UID] = one.Secrets["uid-web"]
	}
	return d
}

func BenchmarkMintAndEncode(b *testing.B) {
	_, key := testKey(b)
	for _, count := range []int{1, 30, 110} {
		b.Run(fmt.Sprintf("pods=%d", count), func(b *testing.B) {
			d := manyPods(count)
			b.ReportAllocs()
			for b.Loop() {
				minted, err := d.Mint(1, &key)
				require.NoError(b, err)
				packed, err := minted.Encode()
				require.NoError(b, err)
				b.ReportMetric(float64(len(packed)), "encoded-bytes")
			}
		})
	}
}

func BenchmarkDecodeAndOpen(b *testing.B) {
	private, key := testKey(b)
	for _, count := range []int{1, 30, 110} {
		b.Run(fmt.Sprintf("pods=%d", count), func(b *testing.B) {
			minted, err := manyPods(count).Mint(1, &key)
			require.NoError(b, err)
			packed, err := minted.Encode()
			require.NoError(b, err)
			b.ReportAllocs()
			for b.Loop() {
				got, err := bundle.Decode(packed, device)
				require.NoError(b, err)
				_, err = got.OpenSecrets(private)
				require.NoError(b, err)
			}
		})
	}
}
