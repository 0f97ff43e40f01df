package host

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
)

func TestNameFromCommonName(t *testing.T) {
	assert.Equal(t, "abc", NameFromCommonName("device:abc"))
	assert.Equal(t, "abc", NameFromCommonName("abc"))
}

func TestCapacity(t *testing.T) {
	c, err := Capacity(t.TempDir(), 42)
	require.NoError(t, err)
	for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory, corev1.ResourceEphemeralStorage} {
		q := c[name]
		assert.Positive(t, q.Sign(), name)
	}
	assert.EqualValues(t, 42, c.Pods().Value())
}

func TestDeviceNameNeedsACertificate(t *testing.T) {
	_, err := DeviceName("/etc/hostname")
	require.Error(t, err)
}
