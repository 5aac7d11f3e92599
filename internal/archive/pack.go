package archive

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/pseudofs"
)

// PackOptions say what is packed, and how.
type PackOptions struct {
	// Contents packs a directory as "./", and what is in it without the directory's
	// name. It follows a symlink to one.
	Contents    bool
	Name        string              // of the top entry; "" = as in the path
	Compression nestbox.Compression // "" = none
	// UserName and GroupName name owners; nil = by their numbers only.
	UserName, GroupName func(id uint32) string
	// Progress is told of each entry and of the bytes of its content; nil = nobody.
	Progress func(name string, bytes int64)
}

// Pack writes a tar archive of path to w: of a file or symlink itself, or of a
// directory and all below it. Symlinks are not followed. Sockets, and what vanishes
// meanwhile, are left out. It returns what was not packed as it was. begin is
// called before anything is written, when it is known that path is there; nil = not.
//
// CodeNotFound: nothing is there. CodeInvalid: Contents of something that is no
// directory. An error of w is returned as it is.
func Pack(ctx context.Context, p string, opts PackOptions, w io.Writer, begin func() error) ([]string, error) {
	top, name, err := openTop(p, opts)
	if err != nil {
		return nil, pathError(p, err)
	}
	defer top.Close()
	if begin != nil {
		if err := begin(); err != nil {
			return nil, err
		}
	}
	out := &destination{w: w}
	buffered := bufio.NewWriterSize(out, packBuffer)
	compressed, err := compressor(buffered, opts.Compression)
	if err != nil {
		return nil, err
	}
	k := &packer{ctx: ctx, opts: opts, raw: compressed, tar: tar.NewWriter(compressed), links: map[inode]string{}, buf: make([]byte, smallFile)}
	if opts.Contents {
		err = k.all(top, "./", "")
	} else {
		err = k.entry(top, name, topName(name, opts))
	}
	if err == nil {
		err = errors.Join(k.tar.Close(), compressed.Close(), buffered.Flush())
	}
	switch {
	case out.err != nil:
		return k.warnings, out.err
	case err != nil:
		return k.warnings, pathError(p, err)
	}
	return k.warnings, nil
}

// packBuffer is how much is written at once, and smallFile how large a file may be
// that is read before it is described, so that it cannot change in between.
const (
	packBuffer = 256 << 10
	smallFile  = 256 << 10
)

// destination remembers an error of its own, which is nobody's else.
type destination struct {
	w   io.Writer
	err error
}

// Write implements io.Writer.
func (d *destination) Write(p []byte) (int, error) {
	n, err := d.w.Write(p)
	if err != nil {
		d.err = err
	}
	return n, err
}

type nopCloser struct{ io.Writer }

// Close implements io.Closer.
func (nopCloser) Close() error { return nil }

func compressor(w io.Writer, c nestbox.Compression) (io.WriteCloser, error) {
	switch c {
	case "":
		return nopCloser{w}, nil
	case nestbox.CompressionGzip:
		return gzip.NewWriterLevel(w, gzip.BestSpeed)
	case nestbox.CompressionZstd:
		return zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20))
	}
	return nil, nestbox.Errorf(nestbox.CodeInvalid, "unknown compression %.40q: there are gzip and zstd", c)
}

// openTop opens the directory that is packed, or the one that what is packed is in.
func openTop(p string, opts PackOptions) (dir *os.File, name string, err error) {
	if opts.Contents || path.Clean(p) == "/" {
		dir, err = os.OpenFile(p, os.O_RDONLY|syscall.O_DIRECTORY, 0)
		if errors.Is(err, syscall.ENOTDIR) {
			if _, statErr := os.Stat(p); statErr == nil {
				err = nestbox.Errorf(nestbox.CodeInvalid, "%s is not a directory", p)
			} else {
				err = syscall.ENOENT
			}
		}
		return dir, ".", err
	}
	parent, name := path.Split(path.Clean(p))
	if parent == "" {
		parent = "."
	}
	dir, err = os.OpenFile(parent, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if errors.Is(err, syscall.ENOTDIR) {
		return nil, "", syscall.ENOENT
	}
	if err != nil {
		return nil, "", err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		_ = dir.Close()
		return nil, "", err
	}
	return dir, name, nil
}

func topName(name string, opts PackOptions) string {
	if opts.Name != "" {
		return opts.Name
	}
	return name
}

type inode struct{ device, number uint64 }

// maxLinks bounds how many files with several names are remembered. What is more is
// packed once for each name.
const maxLinks = 1 << 20

// packer packs one tree.
type packer struct {
	ctx      context.Context //nolint:containedctx // of Pack
	opts     PackOptions
	raw      io.Writer // what tar writes to
	tar      *tar.Writer
	links    map[inode]string // first names of files that have several
	buf      []byte
	warnings warnings
}

// contents packs what is in dir.
func (k *packer) contents(dir *os.File, below string) error {
	names, err := dir.Readdirnames(-1)
	if err != nil && !vanished(err) {
		return err
	}
	slices.Sort(names)
	for _, name := range names {
		if err := k.entry(dir, name, below+name); err != nil {
			return err
		}
	}
	return nil
}

// entry packs what is in dir under that name, as the archive's entry as.
func (k *packer) entry(dir *os.File, name, as string) error {
	if k.ctx.Err() != nil {
		return contextError(k.ctx)
	}
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if vanished(err) {
		return nil
	}
	if err != nil {
		return pathError(as, err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return k.directory(dir, name, as)
	case unix.S_IFREG:
		return k.file(dir, name, as, &st)
	}
	h := k.header(as, &st)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
		if h.Linkname, err = readLink(int(dir.Fd()), name); vanished(err) {
			return nil
		}
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	default:
		k.warnings.add("%s is a socket and was left out", as)
		return nil
	}
	if err != nil {
		return pathError(as, err)
	}
	return k.write(h)
}

func readLink(dir int, name string) (string, error) {
	buf := make([]byte, nestbox.MaxPathBytes)
	n, err := unix.Readlinkat(dir, name, buf)
	return string(buf[:max(n, 0)]), err
}

// header describes an entry, except for its type and content.
func (k *packer) header(as string, st *unix.Stat_t) *tar.Header {
	h := &tar.Header{
		Name: as, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: time.Unix(st.Mtim.Unix()), Format: tar.FormatPAX,
	}
	if k.opts.UserName != nil {
		h.Uname = k.opts.UserName(st.Uid)
	}
	if k.opts.GroupName != nil {
		h.Gname = k.opts.GroupName(st.Gid)
	}
	return h
}

func (k *packer) write(h *tar.Header) error {
	if err := k.tar.WriteHeader(h); err != nil {
		return pathError(h.Name, err)
	}
	if k.opts.Progress != nil {
		k.opts.Progress(h.Name, h.Size)
	}
	return nil
}

func (k *packer) directory(parent *os.File, name, as string) error {
	fd, err := unix.Openat(int(parent.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if vanished(err) {
		return nil
	}
	if err != nil {
		return pathError(as, err)
	}
	dir := os.NewFile(uintptr(fd), as)
	defer dir.Close()
	below := strings.TrimSuffix(as, "/") + "/"
	return k.all(dir, below, below)
}

// all packs a directory and what is in it.
func (k *packer) all(dir *os.File, as, below string) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return pathError(as, err)
	}
	h := k.header(as, &st)
	h.Typeflag = tar.TypeDir
	if err := k.write(h); err != nil || pseudofs.Open(int(dir.Fd())) {
		return err
	}
	return k.contents(dir, below)
}

// file packs a regular file, or the fact that it is another name of one.
func (k *packer) file(dir *os.File, name, as string, st *unix.Stat_t) error {
	if st.Nlink > 1 {
		id := inode{uint64(st.Dev), st.Ino} //nolint:unconvert // not uint64 everywhere
		if first, ok := k.links[id]; ok {
			h := k.header(as, st)
			h.Typeflag, h.Linkname = tar.TypeLink, first
			return k.write(h)
		}
		if len(k.links) < maxLinks {
			k.links[id] = as
		}
	}
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if vanished(err) {
		return nil
	}
	if err != nil {
		return pathError(as, err)
	}
	defer func() { _ = unix.Close(fd) }()
	h := k.header(as, st)
	h.Typeflag = tar.TypeReg
	if st.Size < int64(len(k.buf)) {
		return k.smallFile(fd, h)
	}
	return k.largeFile(fd, h)
}

// smallFile packs a file as it is when it is read. One that seems empty, as in
// /proc, or that grows, is read as far as the buffer goes.
func (k *packer) smallFile(fd int, h *tar.Header) error {
	n := 0
	for n < len(k.buf) {
		m, err := unix.Read(fd, k.buf[n:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return pathError(h.Name, err)
		}
		if m == 0 {
			break
		}
		n += m
	}
	h.Size = int64(n)
	if err := k.write(h); err != nil {
		return err
	}
	_, err := k.tar.Write(k.buf[:n])
	return err
}

// largeFile packs a file of the size that it has now. Of one that shrinks, the rest
// is zeros.
func (k *packer) largeFile(fd int, h *tar.Header) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return pathError(h.Name, err)
	}
	h.Size = st.Size
	data := []extent{{0, st.Size}}
	if st.Blocks*512 < st.Size {
		var err error
		if data, err = extentsOf(fd, st.Size); err != nil {
			return pathError(h.Name, err)
		}
	}
	if len(data) == 1 && data[0].length == st.Size {
		if err := k.write(h); err != nil {
			return err
		}
	} else if err := k.sparseHeader(h, data); err != nil {
		return err
	}
	shrunk := false
	for _, e := range data {
		missing, err := k.copy(fd, h.Name, e)
		if err != nil {
			return err
		}
		shrunk = shrunk || missing
	}
	if shrunk {
		k.warnings.add("%s became shorter while it was read; zeros are in the place of the rest", h.Name)
	}
	return nil
}

// copy packs a part of a file, and reports whether some of it was no longer there.
func (k *packer) copy(fd int, name string, e extent) (missing bool, err error) {
	for e.length > 0 {
		if k.ctx.Err() != nil {
			return missing, contextError(k.ctx)
		}
		piece := k.buf[:min(e.length, int64(len(k.buf)))]
		n, err := unix.Pread(fd, piece, e.offset)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return missing, pathError(name, err)
		case n == 0:
			clear(piece)
			n, missing = len(piece), true
		}
		if _, err := k.tar.Write(piece[:n]); err != nil {
			return missing, err
		}
		e.offset, e.length = e.offset+int64(n), e.length-int64(n)
	}
	return missing, nil
}
