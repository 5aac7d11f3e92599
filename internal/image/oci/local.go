package oci

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/image/rootfs"
)

// Options choose among the images of a source.
type Options struct {
	Platform v1.Platform // of an index; zero = this machine's
	Tag      string      // of a folder or a file with several images; "" = the only one
}

// OpenFolder returns the image in an OCI image layout (OCI image specification, "Image
// Layout"). CodeInvalid: there is none, or more than one that Options leave.
func OpenFolder(dir string, o Options) (*Image, error) {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "%s is no OCI image layout: %w", dir, err)
	}
	img, err := choose(index, o, 0)
	if err != nil {
		return nil, err
	}
	return fromImage(img, filepath.Base(dir), nil)
}

// maxNesting is how many indexes may be in one another.
const maxNesting = 4

// refName is the annotation with the tag of an image in a layout.
const refName = "org.opencontainers.image.ref.name"

// choose returns the one image of an index that Options leave.
func choose(index v1.ImageIndex, o Options, depth int) (v1.Image, error) {
	if depth > maxNesting {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "there are more than %d indexes in one another", maxNesting)
	}
	m, err := index.IndexManifest()
	if err != nil {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "the index of the image cannot be read: %w", err)
	}
	var fit []v1.Descriptor
	for _, d := range m.Manifests {
		if depth == 0 && o.Tag != "" && !sameTag(d.Annotations[refName], o.Tag) {
			continue
		}
		if d.MediaType.IsIndex() || d.MediaType.IsImage() && (d.Platform == nil || d.Platform.Satisfies(o.platform())) {
			fit = append(fit, d)
		}
	}
	switch {
	case len(fit) == 0:
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "there is no image for %s%s; there are: %s", o.platform(), ofTag(o.Tag), list(m.Manifests))
	case len(fit) > 1 && !sameImage(fit):
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "there are several images; choose one by its tag: %s", list(fit))
	}
	if fit[0].MediaType.IsIndex() {
		inner, err := index.ImageIndex(fit[0].Digest)
		if err != nil {
			return nil, nestbox.Errorf(nestbox.CodeInvalid, "the index of the image cannot be read: %w", err)
		}
		return choose(inner, o, depth+1)
	}
	img, err := index.Image(fit[0].Digest)
	if err != nil {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "the image cannot be read: %w", err)
	}
	return img, nil
}

func (o Options) platform() v1.Platform {
	if o.Platform.OS != "" {
		return o.Platform
	}
	return v1.Platform{OS: "linux", Architecture: runtime.GOARCH}
}

func ofTag(tag string) string {
	if tag == "" {
		return ""
	}
	return " with the tag " + tag
}

func sameTag(have, want string) bool { return have == want || strings.HasSuffix(have, ":"+want) }

func sameImage(list []v1.Descriptor) bool {
	return !slices.ContainsFunc(list, func(d v1.Descriptor) bool { return d.Digest != list[0].Digest })
}

func list(manifests []v1.Descriptor) string {
	var names []string
	for _, d := range manifests[:min(len(manifests), 20)] {
		text := d.Annotations[refName]
		if d.Platform != nil {
			text = strings.TrimSpace(text + " " + d.Platform.String())
		}
		if text == "" {
			text = d.Digest.String()
		}
		names = append(names, text)
	}
	return strings.Join(names, ", ")
}

// OpenFile returns the image in a file: what docker save writes, or an archive of a root
// file system, which has no defaults. Either may be compressed. scratch is a directory for
// what is in it, needed as long as the image.
func OpenFile(ctx context.Context, file, scratch string, o Options) (*Image, error) {
	plain, err := unpackFile(ctx, file, scratch)
	if err != nil {
		return nil, err
	}
	kind, err := kindOf(plain)
	if err != nil {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "%s is not a readable tar archive: %w", filepath.Base(file), err)
	}
	if kind == ofDocker {
		return openDocker(plain, filepath.Base(file), o)
	}
	if kind == ofLayout {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "%s is an archive of an OCI image layout; unpack it, and import the folder", filepath.Base(file))
	}
	return &Image{Reference: filepath.Base(file), layers: []layer{{
		name: filepath.Base(file), dialect: rootfs.Plain,
		open: func(context.Context, func(int64)) (io.ReadCloser, error) { return os.Open(plain) },
	}}}, nil
}

// unpackFile writes a file, not compressed, into scratch.
func unpackFile(ctx context.Context, file, scratch string) (string, error) {
	from, err := os.Open(file)
	if err != nil {
		return "", nestbox.Errorf(nestbox.CodeInvalid, "open the image: %w", err)
	}
	defer from.Close()
	to, err := os.CreateTemp(scratch, "image-*.tar")
	if err != nil {
		return "", err
	}
	defer to.Close()
	whole := layer{name: filepath.Base(file)}
	if _, err := whole.unpack(ctx, from, to, func(int64) {}); err != nil {
		return "", err
	}
	return to.Name(), nil
}

// kind is what an archive holds.
type kind int

const (
	ofRoot kind = iota
	ofDocker
	ofLayout
)

// kindOf looks at the names at the top of an archive.
func kindOf(file string) (kind, error) {
	f, err := os.Open(file)
	if err != nil {
		return ofRoot, err
	}
	defer f.Close()
	found := ofRoot
	r := tar.NewReader(f)
	for entries := 0; ; entries++ {
		h, err := r.Next()
		if errors.Is(err, io.EOF) && entries > 0 {
			return found, nil
		}
		if err != nil {
			return ofRoot, err
		}
		switch path.Clean(h.Name) {
		case "manifest.json":
			return ofDocker, nil
		case "oci-layout":
			found = ofLayout // a later manifest.json would be Docker's
		}
	}
}

// members are the files in an archive, by name.
type members struct {
	file  *os.File
	files map[string]*io.SectionReader
	links map[string]string // of symbolic links, which docker save used to write
}

func openMembers(file string) (*members, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	m := &members{file: f, files: map[string]*io.SectionReader{}, links: map[string]string{}}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return m, nil
		}
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		switch name := path.Clean(h.Name); h.Typeflag {
		case tar.TypeReg:
			at, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, errors.Join(err, f.Close())
			}
			m.files[name] = io.NewSectionReader(f, at, h.Size)
		case tar.TypeSymlink:
			m.links[name] = path.Join(path.Dir(name), h.Linkname)
		}
	}
}

func (m *members) open(name string) (*io.SectionReader, error) {
	name = path.Clean(name)
	if target, ok := m.links[name]; ok {
		name = target
	}
	if f := m.files[name]; f != nil {
		return io.NewSectionReader(f, 0, f.Size()), nil
	}
	return nil, nestbox.Errorf(nestbox.CodeInvalid, "the archive has no file %.200q, which it names", name)
}

// maxConfig bounds what describes an image, in bytes; go-containerregistry has the same for
// manifests.
const maxConfig = 4 << 20

func (m *members) decode(name string, into any) error {
	f, err := m.open(name)
	if err != nil {
		return err
	}
	if err := json.NewDecoder(io.LimitReader(f, maxConfig)).Decode(into); err != nil {
		return nestbox.Errorf(nestbox.CodeInvalid, "%s in the archive cannot be read: %w", name, err)
	}
	return nil
}

// openDocker opens what docker save has written. (tarball.Image would compress each layer
// to know its digest.)
func openDocker(file, reference string, o Options) (_ *Image, err error) {
	m, err := openMembers(file)
	if err != nil {
		return nil, err
	}
	img := &Image{Reference: reference, files: []*os.File{m.file}}
	defer func() {
		if err != nil {
			_ = img.Close()
		}
	}()
	var manifests []tarball.Descriptor
	if err := m.decode("manifest.json", &manifests); err != nil {
		return nil, err
	}
	chosen, err := chooseDocker(manifests, o)
	if err != nil {
		return nil, err
	}
	var config v1.ConfigFile
	if err := m.decode(chosen.Config, &config); err != nil {
		return nil, err
	}
	if len(chosen.Layers) != len(config.RootFS.DiffIDs) || len(chosen.Layers) > maxLayers {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "%s has %d layers and describes %d", reference, len(chosen.Layers), len(config.RootFS.DiffIDs))
	}
	img.Defaults = defaults(config.Config)
	if err := img.Defaults.Validate(); err != nil {
		return nil, err
	}
	for n, name := range chosen.Layers {
		f, err := m.open(name)
		if err != nil {
			return nil, err
		}
		img.layers = append(img.layers, layer{
			name: name, diffID: config.RootFS.DiffIDs[n].Hex, dialect: rootfs.OCI, size: f.Size(),
			open: func(context.Context, func(int64)) (io.ReadCloser, error) { return io.NopCloser(f), nil },
		})
	}
	return img, nil
}

func chooseDocker(manifests []tarball.Descriptor, o Options) (tarball.Descriptor, error) {
	var fit []tarball.Descriptor
	var tags []string
	for _, d := range manifests {
		tags = append(tags, d.RepoTags...)
		if o.Tag == "" || slices.ContainsFunc(d.RepoTags, func(t string) bool { return sameTag(t, o.Tag) }) {
			fit = append(fit, d)
		}
	}
	if len(fit) != 1 {
		return tarball.Descriptor{}, nestbox.Errorf(nestbox.CodeInvalid, "there are %d images%s; choose one by its tag: %s", len(fit), ofTag(o.Tag), strings.Join(tags, ", "))
	}
	return fit[0], nil
}
