// Package host reads what the agent must know of its device: its name in
// Flightctl, capacity, versions and address.
package host

import (
	"bufio"
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// DeviceName is the name that Flightctl gave the device: the common name of
// the certificate that its agent got at enrolment, less the prefix of the
// authority.
func DeviceName(certificate string) (string, error) {
	data, err := os.ReadFile(certificate)
	if err != nil {
		return "", fmt.Errorf("cannot find the device's name: %w", err)
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return "", fmt.Errorf("cannot find the device's name: %s has no certificate", certificate)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return "", fmt.Errorf("cannot find the device's name: %w", err)
	}
	if cert.Subject.CommonName == "" {
		return "", fmt.Errorf("cannot find the device's name: %s has no common name", certificate)
	}
	return NameFromCommonName(cert.Subject.CommonName), nil
}

// BootID is the kernel's random ID of this boot.
func BootID() (string, error) { return line("/proc/sys/kernel/random/boot_id") }

func line(path string) (string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("cannot read the system's information: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}

// Capacity is what the device has; disk is a folder on the disk that pods use.
func Capacity(disk string, pods int64) (corev1.ResourceList, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(disk, &fs); err != nil {
		return nil, fmt.Errorf("cannot measure the disk: %w", err)
	}
	memory, err := memTotal()
	if err != nil {
		return nil, err
	}
	return corev1.ResourceList{
		corev1.ResourceCPU:              *resource.NewQuantity(int64(runtime.NumCPU()), resource.DecimalSI),
		corev1.ResourceMemory:           *resource.NewQuantity(memory, resource.BinarySI),
		corev1.ResourceEphemeralStorage: *resource.NewQuantity(int64(fs.Blocks)*fs.Bsize, resource.BinarySI),
		corev1.ResourcePods:             *resource.NewQuantity(pods, resource.DecimalSI),
	}, nil
}

// memTotal is in bytes.
func memTotal() (int64, error) {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("cannot measure the memory: %w", err)
	}
	s := bufio.NewScanner(bytes.NewReader(data))
	for s.Scan() {
		if words := strings.Fields(s.Text()); len(words) >= 2 && words[0] == "MemTotal:" {
			kb, err := strconv.ParseInt(words[1], 10, 64)
			if err != nil {
				return 0, fmt.Errorf("cannot measure the memory: %w", err)
			}
			return kb << 10, nil
		}
	}
	return 0, errors.New("cannot measure the memory: /proc/meminfo lacks MemTotal")
}

// System describes the device as a node's nodeInfo does.
func System(bootID, runtimeVersion string) (corev1.NodeSystemInfo, error) {
	machine, err := line("/etc/machine-id")
	if err != nil {
		return corev1.NodeSystemInfo{}, err
	}
	kernel, err := line("/proc/sys/kernel/osrelease")
	if err != nil {
		return corev1.NodeSystemInfo{}, err
	}
	return corev1.NodeSystemInfo{
		MachineID: machine, SystemUUID: systemUUID(machine), BootID: bootID, KernelVersion: kernel, OSImage: osImage(),
		ContainerRuntimeVersion: runtimeVersion, OperatingSystem: runtime.GOOS, Architecture: runtime.GOARCH,
	}, nil
}

// systemUUID is the firmware's, where there is one.
func systemUUID(otherwise string) string {
	if uuid, err := line("/sys/class/dmi/id/product_uuid"); err == nil && uuid != "" {
		return uuid
	}
	return otherwise
}

func osImage() string {
	for _, path := range []string{"/etc/os-release", "/usr/lib/os-release"} {
		data, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		for l := range strings.Lines(string(data)) {
			if v, ok := strings.CutPrefix(strings.TrimSpace(l), "PRETTY_NAME="); ok {
				return strings.Trim(v, `"'`)
			}
		}
	}
	return "Linux"
}

// IP is the device's address: that of the interface of its default route, or
// else the first one that is not local. Empty if there is none.
func IP() string {
	interfaces, err := net.Interfaces()
	if err != nil {
		return ""
	}
	best := defaultInterface()
	var fallback string
	for _, i := range interfaces {
		if i.Flags&net.FlagLoopback != 0 || strings.HasPrefix(i.Name, "podman") || strings.HasPrefix(i.Name, "veth") {
			continue
		}
		addresses, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addresses {
			n, ok := a.(*net.IPNet)
			if !ok || n.IP.To4() == nil || !n.IP.IsGlobalUnicast() {
				continue
			}
			if i.Name == best {
				return n.IP.String()
			}
			if fallback == "" {
				fallback = n.IP.String()
			}
		}
	}
	return fallback
}

func defaultInterface() string {
	data, err := os.ReadFile("/proc/net/route")
	if err != nil {
		return ""
	}
	for l := range strings.Lines(string(data)) {
		if words := strings.Fields(l); len(words) > 2 && words[1] == "00000000" {
			return words[0]
		}
	}
	return ""
}

// Certificate is where Flightctl's agent keeps its certificate.
func Certificate(dataDir string) string { return filepath.Join(dataDir, "certs", "agent.crt") }

// NameFromCommonName takes the device's name from the common name of its
// certificate, before which Flightctl's authority puts "device:".
func NameFromCommonName(cn string) string { return cn[strings.LastIndexByte(cn, ':')+1:] }
