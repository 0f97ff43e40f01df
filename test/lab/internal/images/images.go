// Package images builds the lab's own container images and pushes images to
// its registry.
package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// File is a file of an image. A Link instead of content is a symbolic link; a
// name that ends in "/" is a folder.
type File struct {
	Name    string
	Content []byte
	Link    string
	Mode    int64
}

// epoch is the time of everything in an image: the same content is the same digest.
func epoch() time.Time { return time.Unix(0, 0).UTC() }

// New makes an image of one layer with these files, in this order.
func New(files []File, config v1.Config) (v1.Image, error) {
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		b, err := pack(files)
		return io.NopCloser(bytes.NewReader(b)), err
	}, tarball.WithCompressionLevel(gzip.BestSpeed))
	if err != nil {
		return nil, fmt.Errorf("cannot make layer: %w", err)
	}
	image, err := mutate.Append(empty.Image, mutate.Addendum{Layer: layer, History: v1.History{Created: v1.Time{Time: epoch()}, CreatedBy: "lab"}})
	if err != nil {
		return nil, fmt.Errorf("cannot make image: %w", err)
	}
	file, err := image.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("cannot configure image: %w", err)
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", runtime.GOARCH
	file.Created = v1.Time{Time: epoch()}
	file.Config = config
	image, err = mutate.ConfigFile(image, file)
	if err != nil {
		return nil, fmt.Errorf("cannot configure image: %w", err)
	}
	return image, nil
}

func pack(files []File) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range files {
		header := &tar.Header{Name: f.Name, Mode: f.Mode, Size: int64(len(f.Content)), ModTime: epoch(), Typeflag: tar.TypeReg, Format: tar.FormatUSTAR}
		switch {
		case f.Link != "":
			header.Typeflag, header.Linkname, header.Mode = tar.TypeSymlink, f.Link, 0o777
		case strings.HasSuffix(f.Name, "/"):
			header.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(header); err != nil {
			return nil, fmt.Errorf("cannot pack %s: %w", f.Name, err)
		}
		if _, err := w.Write(f.Content); err != nil {
			return nil, fmt.Errorf("cannot pack %s: %w", f.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("cannot pack files: %w", err)
	}
	return out.Bytes(), nil
}

// base is what every image has.
func base() []File {
	return []File{
		{Name: "bin/", Mode: 0o755},
		{Name: "etc/", Mode: 0o755},
		{Name: "etc/group", Content: []byte("root:x:0:\nnobody:x:65534:\n"), Mode: 0o644},
		{Name: "etc/passwd", Content: []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"), Mode: 0o644},
		{Name: "root/", Mode: 0o700},
		{Name: "tmp/", Mode: 0o1777},
	}
}

const path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Busybox is an image of the static program with a link for each of its applets.
func Busybox(program []byte, applets []string) (v1.Image, error) {
	files := append(base(), File{Name: "bin/busybox", Content: program, Mode: 0o755})
	for _, applet := range applets {
		if applet != "busybox" {
			files = append(files, File{Name: "bin/" + applet, Link: "busybox"})
		}
	}
	return New(files, v1.Config{Env: []string{path}, Cmd: []string{"sh"}})
}

// Tester is an image of the test program alone.
func Tester(program []byte) (v1.Image, error) {
	files := append(base(), File{Name: "bin/tester", Content: program, Mode: 0o755})
	return New(files, v1.Config{Env: []string{path}, Entrypoint: []string{"/bin/tester"}, Cmd: []string{"help"}})
}

// Registry is a registry as it is reached from here.
type Registry struct {
	Address        string // host:port; devices may know it by another one
	User, Password string
}

// Push pushes an image to a repository and tag ("busybox:1"), and returns its digest.
func (r Registry) Push(ctx context.Context, ref string, image v1.Image) (string, error) {
	tag, err := name.ParseReference(r.Address+"/"+ref, name.Insecure)
	if err != nil {
		return "", fmt.Errorf("cannot push %s: %w", ref, err)
	}
	auth := authn.FromConfig(authn.AuthConfig{Username: r.User, Password: r.Password})
	if err := remote.Write(tag, image, remote.WithContext(ctx), remote.WithAuth(auth)); err != nil {
		return "", fmt.Errorf("cannot push %s: %w", ref, err)
	}
	digest, err := image.Digest()
	if err != nil {
		return "", fmt.Errorf("cannot compute digest of %s: %w", ref, err)
	}
	return digest.String(), nil
}

// Load reads an image from a docker archive or from an OCI layout (a folder).
// Of a layout with several images it takes the one for this machine.
func Load(path string) (v1.Image, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read image: %w", err)
	}
	if !fi.IsDir() {
		image, err := tarball.ImageFromPath(path, nil)
		if err != nil {
			return nil, fmt.Errorf("cannot read docker archive %s: %w", path, err)
		}
		return image, nil
	}
	index, err := layout.ImageIndexFromPath(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read OCI layout %s: %w", path, err)
	}
	image, err := pick(index)
	if err != nil {
		return nil, fmt.Errorf("cannot read OCI layout %s: %w", path, err)
	}
	return image, nil
}

func pick(index v1.ImageIndex) (v1.Image, error) {
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	for _, m := range manifest.Manifests {
		if m.Platform != nil && m.Platform.Architecture != "" && m.Platform.Architecture != runtime.GOARCH {
			continue
		}
		switch {
		case m.MediaType.IsImage():
			return index.Image(m.Digest)
		case m.MediaType.IsIndex():
			inner, err := index.ImageIndex(m.Digest)
			if err != nil {
				return nil, err
			}
			if image, err := pick(inner); err == nil {
				return image, nil
			}
		}
	}
	return nil, errors.New("no image for linux/" + runtime.GOARCH + " is in it")
}

// Repository takes the registry's name off a reference, if it is there: people
// copy references as devices see them.
func Repository(ref, registry string) string {
	return strings.TrimPrefix(ref, registry+"/")
}
