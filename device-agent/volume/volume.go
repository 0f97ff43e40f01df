// Package volume makes a pod's volumes on the device: folders for emptyDir,
// files of ConfigMaps, Secrets, the downward API and tokens, and the checks of
// hostPath.
//
// Files are replaced as the kubelet does it: all are written to a new folder,
// and one symbolic link, ..data, is swapped. A container never sees a mix.
package volume

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/jetbridge/jetbridge/device-agent/podenv"
)

// Dirs are the pod's own folders: State survives reboots, Run is in memory.
type Dirs struct{ State, Run string }

// File is one file of a volume, with a path relative to it.
type File struct {
	Path string
	Data []byte
	Mode fs.FileMode
}

// Source is the folder or file of a volume on the device.
func Source(d Dirs, v *corev1.Volume) string {
	switch {
	case v.HostPath != nil:
		return v.HostPath.Path
	case v.EmptyDir != nil:
		return filepath.Join(d.State, "volumes", v.Name)
	default:
		return filepath.Join(d.Run, "volumes", v.Name)
	}
}

// Ensure makes all volumes of a pod, or brings them up to date.
func Ensure(d Dirs, c podenv.Content, f podenv.Facts) error {
	for i := range c.Pod.Spec.Volumes {
		v := &c.Pod.Spec.Volumes[i]
		var err error
		switch {
		case v.HostPath != nil:
			err = hostPath(v.HostPath)
		case v.EmptyDir != nil:
			err = emptyDir(Source(d, v))
		default:
			var files []File
			if files, err = Files(c, v, f); err == nil {
				err = replace(Source(d, v), files)
			}
		}
		if err != nil {
			return fmt.Errorf("cannot set up volume %q: %w", v.Name, err)
		}
	}
	return nil
}

func emptyDir(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	err := os.Mkdir(path, 0o777)
	if errors.Is(err, fs.ErrExist) {
		return nil // its mode is the containers' by now
	}
	if err != nil {
		return err
	}
	return os.Chmod(path, 0o777)
}

func hostPath(h *corev1.HostPathVolumeSource) error {
	kind := corev1.HostPathUnset
	if h.Type != nil {
		kind = *h.Type
	}
	info, err := os.Stat(h.Path)
	missing := errors.Is(err, fs.ErrNotExist)
	if err != nil && !missing {
		return err
	}
	is := func(want fs.FileMode) bool { return !missing && info.Mode()&fs.ModeType == want }
	var ok bool
	switch kind {
	case corev1.HostPathUnset:
		ok = !missing
	case corev1.HostPathDirectoryOrCreate:
		if missing {
			return os.MkdirAll(h.Path, 0o755)
		}
		ok = is(fs.ModeDir)
	case corev1.HostPathDirectory:
		ok = is(fs.ModeDir)
	case corev1.HostPathFileOrCreate:
		if missing {
			file, err := os.OpenFile(h.Path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
			if err != nil {
				return err
			}
			return file.Close()
		}
		ok = is(0)
	case corev1.HostPathFile:
		ok = is(0)
	case corev1.HostPathSocket:
		ok = is(fs.ModeSocket)
	case corev1.HostPathCharDev:
		ok = is(fs.ModeDevice | fs.ModeCharDevice)
	case corev1.HostPathBlockDev:
		ok = is(fs.ModeDevice)
	default:
		return fmt.Errorf("hostPath type %q is not known", kind)
	}
	if !ok {
		return fmt.Errorf("hostPath type check failed: %s is not %q", h.Path, kind)
	}
	return nil
}

// Files computes the files of a ConfigMap, Secret, downward API or projected
// volume. It is pure.
func Files(c podenv.Content, v *corev1.Volume, f podenv.Facts) ([]File, error) {
	var p projection
	switch {
	case v.ConfigMap != nil:
		s := v.ConfigMap
		p = projection{c: c, f: f, mode: mode(s.DefaultMode)}
		data, found := c.ConfigMap(s.Name)
		p.keys("configmap", s.Name, data, found, s.Items, s.Optional)
	case v.Secret != nil:
		s := v.Secret
		p = projection{c: c, f: f, mode: mode(s.DefaultMode)}
		data, found := c.Secret(s.SecretName)
		p.keys("secret", s.SecretName, data, found, s.Items, s.Optional)
	case v.DownwardAPI != nil:
		p = projection{c: c, f: f, mode: mode(v.DownwardAPI.DefaultMode)}
		p.downward(v.DownwardAPI.Items)
	case v.Projected != nil:
		p = projection{c: c, f: f, mode: mode(v.Projected.DefaultMode)}
		for _, s := range v.Projected.Sources {
			switch {
			case s.ConfigMap != nil:
				data, found := c.ConfigMap(s.ConfigMap.Name)
				p.keys("configmap", s.ConfigMap.Name, data, found, s.ConfigMap.Items, s.ConfigMap.Optional)
			case s.Secret != nil:
				data, found := c.Secret(s.Secret.Name)
				p.keys("secret", s.Secret.Name, data, found, s.Secret.Items, s.Secret.Optional)
			case s.DownwardAPI != nil:
				p.downward(s.DownwardAPI.Items)
			case s.ServiceAccountToken != nil:
				p.token(s.ServiceAccountToken)
			default:
				p.err = errors.New("a projected source is not known")
			}
		}
	default:
		return nil, errors.New("its kind is not known")
	}
	if p.err != nil {
		return nil, p.err
	}
	// A later source replaces an earlier one's file.
	byPath := map[string]File{}
	for _, file := range p.files {
		byPath[file.Path] = file
	}
	out := make([]File, 0, len(byPath))
	for _, path := range slices.Sorted(maps.Keys(byPath)) {
		out = append(out, byPath[path])
	}
	return out, nil
}

func mode(m *int32) fs.FileMode {
	if m == nil {
		return 0o644
	}
	return fs.FileMode(*m) & 0o777
}

type projection struct {
	c     podenv.Content
	f     podenv.Facts
	mode  fs.FileMode
	files []File
	err   error
}

func (p *projection) add(path string, data []byte, m *int32) {
	clean := filepath.Clean(path)
	if !filepath.IsLocal(path) || strings.HasPrefix(clean, "..") || clean == "." || strings.ContainsRune(path, 0) {
		p.err = fmt.Errorf("path %q is not allowed", path)
		return
	}
	file := File{Path: clean, Data: data, Mode: p.mode}
	if m != nil {
		file.Mode = mode(m)
	}
	p.files = append(p.files, file)
}

func (p *projection) keys(kind, name string, data map[string][]byte, found bool, items []corev1.KeyToPath, optional *bool) {
	may := optional != nil && *optional
	if !found {
		if !may {
			p.err = fmt.Errorf("%s %q %w", kind, name, podenv.ErrMissing)
		}
		return
	}
	if len(items) == 0 {
		for _, k := range slices.Sorted(maps.Keys(data)) {
			p.add(k, data[k], nil)
		}
		return
	}
	for _, item := range items {
		value, ok := data[item.Key]
		if !ok {
			if !may {
				p.err = fmt.Errorf("%s %q references non-existent key %q: %w", kind, name, item.Key, podenv.ErrMissing)
			}
			continue
		}
		p.add(item.Path, value, item.Mode)
	}
}

func (p *projection) downward(items []corev1.DownwardAPIVolumeFile) {
	for _, item := range items {
		var value string
		var err error
		switch {
		case item.FieldRef != nil:
			value, err = podenv.Field(p.c.Pod, item.FieldRef.FieldPath, p.f)
		case item.ResourceFieldRef != nil:
			value, err = podenv.Resource(p.c.Pod, item.ResourceFieldRef.ContainerName, item.ResourceFieldRef, p.f)
		}
		if err != nil {
			p.err = err
			return
		}
		p.add(item.Path, []byte(value), item.Mode)
	}
}

func (p *projection) token(t *corev1.ServiceAccountTokenProjection) {
	lifetime := int64(3600)
	if t.ExpirationSeconds != nil {
		lifetime = *t.ExpirationSeconds
	}
	for _, token := range p.c.Secrets.Tokens {
		if token.Audience == t.Audience && token.ExpirationSeconds == lifetime {
			// The kubelet's mode, whatever defaultMode says, is 0600 for the
			// pod's own user and 0644 where that is not known.
			p.add(t.Path, []byte(token.Value), nil)
			return
		}
	}
	p.err = fmt.Errorf("service account token for audience %q %w", t.Audience, podenv.ErrMissing)
}

const (
	dataLink = "..data"
	newLink  = "..data_tmp"
)

// replace makes the folder show exactly these files.
func replace(dir string, files []File) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	old, err := os.Readlink(filepath.Join(dir, dataLink))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if old != "" && same(filepath.Join(dir, old), files) {
		return links(dir, files)
	}
	fresh, err := os.MkdirTemp(dir, "..")
	if err != nil {
		return err
	}
	if err := os.Chmod(fresh, 0o755); err != nil {
		return err
	}
	for _, f := range files {
		path := filepath.Join(fresh, f.Path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, f.Data, 0o600); err != nil {
			return err
		}
		if err := os.Chmod(path, f.Mode); err != nil {
			return err
		}
	}
	if err := os.Remove(filepath.Join(dir, newLink)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(filepath.Base(fresh), filepath.Join(dir, newLink)); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(dir, newLink), filepath.Join(dir, dataLink)); err != nil {
		return err
	}
	if err := links(dir, files); err != nil {
		return err
	}
	// What a crash left goes too.
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "..") && e.IsDir() && e.Name() != filepath.Base(fresh) {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// links makes the visible names point into ..data, and removes old ones.
func links(dir string, files []File) error {
	want := map[string]bool{}
	for _, f := range files {
		top, _, _ := strings.Cut(f.Path, "/")
		want[top] = true
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "..") {
			continue
		}
		if want[e.Name()] {
			delete(want, e.Name())
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	for name := range want {
		if err := os.Symlink(filepath.Join(dataLink, name), filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// same says whether a folder has exactly these files.
func same(dir string, files []File) bool {
	count := 0
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			count++
		}
		return err
	})
	if err != nil || count != len(files) {
		return false
	}
	for _, f := range files {
		path := filepath.Join(dir, f.Path)
		info, err := os.Lstat(path)
		if err != nil || info.Mode() != f.Mode {
			return false
		}
		data, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(data, f.Data) {
			return false
		}
	}
	return true
}
