// Package oci reads images of containers, wherever they come from (a registry, a folder,
// a file of docker save, an archive of a root file system), into a rootfs.Tree. It is a
// leaf: it may import the root package and leaf packages only.
package oci

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/image/rootfs"
)

// Image is an image that can be read.
type Image struct {
	Reference string // what was asked for, with the digest that it had: for people
	Digest    string // of the manifest; "" = an archive, which has none
	Defaults  nestbox.ImageDefaults

	layers []layer // from the lowest up
	files  []*os.File
}

// Close lets go of the files that the image, and trees made of it, are read from.
func (i *Image) Close() error {
	var errs []error
	for _, f := range i.files {
		errs = append(errs, f.Close())
	}
	i.files = nil
	return errors.Join(errs...)
}

// layer is one archive of an image, as it is stored.
type layer struct {
	name    string // for people
	diffID  string // SHA-256 of the archive when it is not compressed, in hex; "" = not known
	dialect rootfs.Dialect
	size    int64 // as it is stored; 0 = not known
	open    func(ctx context.Context, progress func(done int64)) (io.ReadCloser, error)
}

// Progress tells how far the reading of an image is.
type Progress struct {
	Layer, Layers int   // which is being read, from 1 on
	Done, Total   int64 // bytes of it, as stored; Total 0 = not known
}

// Fill puts the layers of the image into a tree. scratch is a directory for them. The
// tree can be read until Close, and as long as scratch is there. progress is called often,
// by this goroutine; it may be nil.
//
// CodeInvalid: the image is not what it says, or cannot be one; the message names the
// layer. CodeUnavailable: the source failed, again and again.
func (i *Image) Fill(ctx context.Context, tree *rootfs.Tree, scratch string, progress func(Progress)) error {
	if progress == nil {
		progress = func(Progress) {}
	}
	for n, l := range i.layers {
		tell := func(done int64) { progress(Progress{Layer: n + 1, Layers: len(i.layers), Done: done, Total: l.size}) }
		tell(0)
		if err := i.fill(ctx, tree, l, scratch, tell); err != nil {
			return err
		}
	}
	// Processes start there, whether a layer has it or not, as with Docker.
	if err := tree.MakeDir(i.Defaults.Cwd); err != nil {
		return nestbox.Errorf(nestbox.CodeInvalid, "the working directory %.200q of %s: %w", i.Defaults.Cwd, i.Reference, err)
	}
	return nil
}

func (i *Image) fill(ctx context.Context, tree *rootfs.Tree, l layer, scratch string, tell func(int64)) error {
	from, err := l.open(ctx, tell)
	if err != nil {
		return err
	}
	defer from.Close()
	archive, err := i.unnamed(scratch)
	if err != nil {
		return err
	}
	spare, err := i.unnamed(scratch)
	if err != nil {
		return err
	}
	size, err := l.unpack(ctx, from, archive, tell)
	if err != nil {
		return err
	}
	return tree.Add(ctx, rootfs.Layer{Name: l.name, Archive: archive, Size: size, Dialect: l.dialect, Spare: spare})
}

// unnamed makes a file without a name, for as long as the image is open.
func (i *Image) unnamed(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, "")
	if err != nil {
		return nil, err
	}
	i.files = append(i.files, f)
	return f, os.Remove(f.Name())
}

// maxArchive bounds the archive of a layer, in bytes: what its files may have, and as much
// again for small ones and their headers.
const maxArchive = 128 << 30

// unpack writes the archive, not compressed, and compares it with what the image says.
func (l layer) unpack(ctx context.Context, from io.Reader, to *os.File, tell func(int64)) (int64, error) {
	counted := &counter{ctx: ctx, from: from, tell: tell}
	plain, err := decompress(counted)
	if ctx.Err() != nil {
		return 0, nestbox.Errorf(nestbox.CodeCanceled, "layer %s: %w", l.name, ctx.Err())
	}
	if err != nil {
		return 0, nestbox.Errorf(nestbox.CodeInvalid, "layer %s: %w", l.name, err)
	}
	defer plain.Close()
	sum := sha256.New()
	size, err := io.Copy(io.MultiWriter(to, sum), io.LimitReader(plain, maxArchive+1))
	switch {
	case noSpaceLeft(err) != nil:
		return 0, err
	case ctx.Err() != nil:
		return 0, nestbox.Errorf(nestbox.CodeCanceled, "layer %s: %w", l.name, ctx.Err())
	case err != nil:
		return 0, nestbox.Errorf(nestbox.CodeInvalid, "layer %s cannot be read: %w", l.name, err)
	case size > maxArchive:
		return 0, nestbox.Errorf(nestbox.CodeExhausted, "layer %s has more than %d bytes", l.name, int64(maxArchive))
	}
	if got := hex.EncodeToString(sum.Sum(nil)); l.diffID != "" && got != l.diffID {
		return 0, nestbox.Errorf(nestbox.CodeInvalid, "layer %s is not what the image says: its SHA-256 is %s instead of %s", l.name, got, l.diffID)
	}
	return size, nil
}

// counter tells how much was read, and ends with its context.
type counter struct {
	ctx  context.Context
	from io.Reader
	done int64
	tell func(int64)
}

func (c *counter) Read(b []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.from.Read(b)
	c.done += int64(n)
	c.tell(c.done)
	return n, err
}

// maxWindow bounds what a zstd archive makes its reader hold, in bytes.
const maxWindow = 64 << 20

// decompress looks at how an archive begins. What is not compressed in a known way is
// passed on.
func decompress(from io.Reader) (io.ReadCloser, error) {
	r := bufio.NewReaderSize(from, 256<<10)
	magic, err := r.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte("\x1f\x8b")):
		return gzip.NewReader(r)
	case bytes.HasPrefix(magic, []byte("\x28\xb5\x2f\xfd")), bytes.HasPrefix(magic, []byte("\x50\x2a\x4d\x18")):
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	case bytes.HasPrefix(magic, []byte("BZh")):
		return io.NopCloser(bzip2.NewReader(r)), nil
	case bytes.HasPrefix(magic, []byte("\xfd7zXZ")):
		return nil, errors.New("it is compressed with xz, which is not supported: gzip, zstd and bzip2 are")
	}
	return io.NopCloser(r), nil
}

// defaults reads what the image says about processes.
func defaults(c v1.Config) nestbox.ImageDefaults {
	d := nestbox.ImageDefaults{User: c.User, Cwd: c.WorkingDir, Entrypoint: c.Entrypoint, Cmd: c.Cmd, Labels: c.Labels}
	for _, entry := range c.Env {
		if name, value, ok := strings.Cut(entry, "="); ok && name != "" {
			if d.Env == nil {
				d.Env = map[string]string{}
			}
			d.Env[name] = value
		}
	}
	if d.Cwd != "" {
		d.Cwd = filepath.Join("/", d.Cwd)
	}
	return d
}

// fromImage describes an image of go-containerregistry. open returns a layer as it is
// stored; nil = the image's own way.
func fromImage(img v1.Image, reference string, open func(v1.Descriptor) func(context.Context, func(int64)) (io.ReadCloser, error)) (*Image, error) {
	manifest, err := img.Manifest()
	if err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	if config.OS != "" && config.OS != "linux" {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "%s is an image for %s, not linux", reference, config.OS)
	}
	digest, err := img.Digest()
	if err != nil {
		return nil, err
	}
	if len(manifest.Layers) != len(config.RootFS.DiffIDs) {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "%s has %d layers and describes %d", reference, len(manifest.Layers), len(config.RootFS.DiffIDs))
	}
	if len(manifest.Layers) > maxLayers {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "%s has more than %d layers", reference, maxLayers)
	}
	out := &Image{Reference: reference, Digest: digest.String(), Defaults: defaults(config.Config)}
	if err := out.Defaults.Validate(); err != nil {
		return nil, err
	}
	for n, d := range manifest.Layers {
		l := layer{name: d.Digest.String(), diffID: config.RootFS.DiffIDs[n].Hex, dialect: rootfs.OCI, size: d.Size}
		if !d.MediaType.IsDistributable() || !d.MediaType.IsLayer() {
			return nil, nestbox.Errorf(nestbox.CodeInvalid, "layer %s of %s has the type %s, which is not one of a file system", l.name, reference, d.MediaType)
		}
		if open != nil {
			l.open = open(d)
		} else {
			l.open = func(context.Context, func(int64)) (io.ReadCloser, error) {
				stored, err := img.LayerByDigest(d.Digest)
				if err != nil {
					return nil, err
				}
				return stored.Compressed()
			}
		}
		out.layers = append(out.layers, l)
	}
	return out, nil
}

// maxLayers is how many layers an image may have; Docker's own limit is 127.
const maxLayers = 512

// String says which image it is.
func (i *Image) String() string {
	if i.Digest == "" {
		return i.Reference
	}
	return fmt.Sprintf("%s@%s", i.Reference, i.Digest)
}

// noSpaceLeft returns the error of a full disk, if it is one.
func noSpaceLeft(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return err
	}
	return nil
}
