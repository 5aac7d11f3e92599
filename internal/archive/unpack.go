package archive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"syscall"
	"unsafe"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
)

// Owner is who owns what is unpacked.
type Owner struct{ UID, GID int }

// UnpackOptions say how an archive is unpacked.
type UnpackOptions struct {
	Owner      *Owner // of everything; nil = the user that unpacks
	KeepOwners bool   // those that the archive names, by their numbers; Owner does not count then
	// KeepKind refuses to put a file where a directory is, or a directory where
	// a file is. Without, what is there is removed.
	KeepKind bool
	// New says that the directory was just made: it gets the attributes that the
	// archive has for it.
	New bool
	// TempPrefix begins the names of files that will replace others; "" = ".unpack-".
	TempPrefix string
	// Progress is told of each entry and of the bytes of its content; nil = nobody.
	Progress func(name string, bytes int64)
}

// Unpack unpacks the tar archive r, which may be compressed by gzip or zstd, into
// the directory dir. Nothing outside of dir is made or changed: not by names such as
// ../x, nor through symlinks that the archive has, or that are there. A file that is
// there is replaced once the new one is whole.
//
// It is an error (CodeInvalid) if r is no archive or ends before it does; an error of
// r itself is returned if it has a code. The message says what was unpacked by then,
// which stays: all entries before the last are whole.
func Unpack(ctx context.Context, dir string, r io.Reader, opts UnpackOptions) (nestbox.Unpacked, error) {
	root, err := os.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		if errors.Is(err, syscall.ENOTDIR) {
			err = nestbox.Errorf(nestbox.CodeConflict, "%s is not a directory", dir)
		}
		return nestbox.Unpacked{}, pathError(dir, err)
	}
	defer root.Close()
	if opts.TempPrefix == "" {
		opts.TempPrefix = ".unpack-"
	}
	src := &source{ctx: ctx, r: r}
	u := &unpacker{src: src, opts: opts, root: int(root.Fd()), parent: -1, buf: make([]byte, unpackBuffer)}
	defer u.leaveParent()
	plain, done, err := decompressor(src)
	if err == nil {
		defer done()
		u.tar = tar.NewReader(plain)
		err = u.all()
	}
	if err == nil {
		_, err = io.CopyBuffer(io.Discard, plain, u.buf) // what pads the end, so that its sender can end
	}
	u.done.Warnings = u.warnings
	if err != nil {
		return u.done, u.explain(err)
	}
	return u.done, nil
}

const unpackBuffer = 256 << 10

// source is the archive. It ends with its context, and remembers an error of its own.
type source struct {
	ctx context.Context //nolint:containedctx // of Unpack
	r   io.Reader
	err error
}

// Read implements io.Reader.
func (s *source) Read(p []byte) (int, error) {
	if s.err == nil && s.ctx.Err() != nil {
		s.err = contextError(s.ctx)
	}
	if s.err != nil {
		return 0, s.err
	}
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// maxWindow bounds what a zstd stream may have kept in memory, as its own program does by default.
const maxWindow = 128 << 20

// decompressor returns what r holds, by its first bytes.
func decompressor(r io.Reader) (plain io.Reader, done func(), err error) {
	buffered := bufio.NewReaderSize(r, unpackBuffer)
	magic, err := buffered.Peek(4)
	if err != nil && err != io.EOF {
		return nil, nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(buffered)
		return z, func() {}, err
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(buffered, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	}
	return buffered, func() {}, nil
}

// unpacker unpacks one archive.
type unpacker struct {
	src      *source
	tar      *tar.Reader
	opts     UnpackOptions
	root     int
	at       string // the directory that parent is open for
	parent   int    // -1 = none
	open     []directory
	last     string // the entry under way, or done
	done     nestbox.Unpacked
	warnings warnings
	buf      []byte
}

// directory is one of the archive whose attributes are set when nothing more is
// put into it: in the order of a tree that is soon.
type directory struct {
	path   string
	header *tar.Header
}

// explain says what was unpacked before err.
func (u *unpacker) explain(err error) error {
	if u.src.err != nil {
		err = u.src.err
	}
	var e *nestbox.Error
	switch {
	case errors.As(err, &e):
	case u.src.err != nil:
		e = nestbox.Errorf(nestbox.CodeCanceled, "the archive broke off: %w", err)
	case errors.Is(err, io.ErrUnexpectedEOF) && u.last == "":
		e = nestbox.Errorf(nestbox.CodeInvalid, "this is no tar archive, or only the beginning of one")
	case errors.Is(err, io.ErrUnexpectedEOF):
		e = nestbox.Errorf(nestbox.CodeInvalid, "the archive is cut off")
	default:
		e = nestbox.Errorf(nestbox.CodeInvalid, "this is no tar archive, or a broken one: %w", err)
	}
	said := *e
	said.Message = fmt.Sprintf("%s (unpacked before: %d entries", e.Message, u.done.Entries)
	if u.last != "" {
		said.Message += fmt.Sprintf("; stopped at %q", u.last)
	}
	said.Message += ")"
	return &said
}

func (u *unpacker) all() error {
	for {
		h, err := u.tar.Next()
		if err == io.EOF {
			return u.leave("")
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return err
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		u.last = h.Name
		name, err := localName(h.Name)
		if err == nil {
			err = u.leave(name)
		}
		if err == nil {
			err = u.entry(name, h)
		}
		if _, ofSystem := errors.AsType[syscall.Errno](err); ofSystem {
			return pathError(h.Name, err)
		}
		if err != nil { // of the archive
			return err
		}
		u.done.Entries++
		u.done.Bytes += h.Size
		if u.opts.Progress != nil {
			u.opts.Progress(h.Name, h.Size)
		}
	}
}

// localName returns an entry's path below the directory. Names that begin at the
// root begin at the directory instead, as with GNU tar.
func localName(name string) (string, error) {
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", nestbox.Errorf(nestbox.CodeInvalid, "the entry %.200q leads out of the directory", name)
		}
	}
	clean := strings.TrimPrefix(path.Clean("/"+name), "/")
	if strings.ContainsRune(clean, 0) {
		return "", nestbox.Errorf(nestbox.CodeInvalid, "the entry %.200q has a NUL byte in its name", name)
	}
	return clean, nil
}

// leave sets the attributes of the directories that name is not in.
func (u *unpacker) leave(name string) error {
	for len(u.open) > 0 {
		d := u.open[len(u.open)-1]
		if d.path == "" && name != "" || strings.HasPrefix(name, d.path+"/") {
			return nil
		}
		u.open = u.open[:len(u.open)-1]
		fd, err := u.openDir(d.path, unix.O_NOFOLLOW)
		if vanished(err) { // somebody else's doing
			continue
		}
		if err != nil {
			return pathError(d.path, err)
		}
		err = u.describe(fd, d.header)
		_ = unix.Close(fd)
		if err != nil {
			return pathError(d.path, err)
		}
	}
	return nil
}

// openDir opens a directory below the root. It never leads out of it.
func (u *unpacker) openDir(name string, flags uint64) (int, error) {
	if name == "" {
		name = "."
	}
	how := &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC | flags, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		fd, err := unix.Openat2(u.root, name, how)
		if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) { // EAGAIN: somebody renamed something meanwhile
			return fd, err
		}
		if u.src.ctx.Err() != nil {
			return -1, contextError(u.src.ctx)
		}
	}
}

// enter opens the directory that name is in, which it makes if it is missing.
func (u *unpacker) enter(name string) (dir int, base string, err error) {
	parent, base := path.Split(name)
	parent = strings.TrimSuffix(parent, "/")
	if u.parent >= 0 && u.at == parent {
		return u.parent, base, nil
	}
	u.leaveParent()
	fd, err := u.openDir(parent, 0)
	if errors.Is(err, unix.ENOENT) {
		if err = u.makeDirs(parent); err == nil {
			fd, err = u.openDir(parent, 0)
		}
	}
	if err != nil {
		return -1, "", err
	}
	u.parent, u.at = fd, parent
	return fd, base, nil
}

func (u *unpacker) leaveParent() {
	if u.parent >= 0 {
		_ = unix.Close(u.parent)
		u.parent = -1
	}
}

// makeDirs makes a directory that the archive does not have, and its parents.
func (u *unpacker) makeDirs(name string) error {
	parent, base := path.Split(name)
	parent = strings.TrimSuffix(parent, "/")
	dir, err := u.openDir(parent, 0)
	if errors.Is(err, unix.ENOENT) && parent != "" {
		if err = u.makeDirs(parent); err == nil {
			dir, err = u.openDir(parent, 0)
		}
	}
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(dir) }()
	if err := unix.Mkdirat(dir, base, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	if o := u.opts.Owner; o != nil && !u.opts.KeepOwners {
		return unix.Fchownat(dir, base, o.UID, o.GID, unix.AT_SYMLINK_NOFOLLOW)
	}
	return nil
}

// entry makes one entry.
func (u *unpacker) entry(name string, h *tar.Header) error {
	if name == "" { // of the directory itself
		if h.Typeflag == tar.TypeDir && u.opts.New {
			u.open = append(u.open, directory{"", h})
		}
		return nil
	}
	dir, base, err := u.enter(name)
	if err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return u.directory(dir, base, name, h)
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		return u.file(dir, base, h)
	case tar.TypeSymlink:
		return u.make(dir, base, h, func() error { return unix.Symlinkat(h.Linkname, dir, base) })
	case tar.TypeLink:
		return u.link(dir, base, h)
	case tar.TypeFifo:
		return u.make(dir, base, h, func() error { return unix.Mkfifoat(dir, base, 0o600) })
	case tar.TypeChar, tar.TypeBlock:
		return u.device(dir, base, h)
	}
	u.warnings.add("%s is of a kind that is not known here (%q) and was left out", h.Name, h.Typeflag)
	return nil
}

// clear removes what is in the way of something that is no directory.
func (u *unpacker) clear(dir int, base string) error {
	err := unix.Unlinkat(dir, base, 0)
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return err
	}
	if u.opts.KeepKind {
		return nestbox.Errorf(nestbox.CodeConflict, "%s is a directory, and something else in the archive", u.last)
	}
	root, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", dir))
	if err != nil {
		return err
	}
	defer root.Close()
	return root.RemoveAll(base)
}

// make makes something that has no content with do, in the place of what is there.
func (u *unpacker) make(dir int, base string, h *tar.Header, do func() error) error {
	err := do()
	if errors.Is(err, unix.EEXIST) {
		if err = u.clear(dir, base); err == nil {
			err = do()
		}
	}
	if err != nil {
		return err
	}
	if uid, gid, ok := u.owner(h); ok {
		if err := unix.Fchownat(dir, base, uid, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
	}
	if h.Typeflag != tar.TypeSymlink { // which have no mode
		if err := unix.Fchmodat(dir, base, modeOf(h), 0); err != nil {
			return err
		}
	}
	return unix.UtimesNanoAt(dir, base, timesOf(h), unix.AT_SYMLINK_NOFOLLOW)
}

func (u *unpacker) device(dir int, base string, h *tar.Header) error {
	kind := uint32(unix.S_IFCHR)
	if h.Typeflag == tar.TypeBlock {
		kind = unix.S_IFBLK
	}
	number := unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
	err := u.make(dir, base, h, func() error { return unix.Mknodat(dir, base, kind|0o600, int(number)) })
	if errors.Is(err, unix.EPERM) {
		u.warnings.add("%s is a device and was left out", h.Name)
		return nil
	}
	return err
}

// link makes another name of a file that was unpacked, or was there, below the root.
func (u *unpacker) link(dir int, base string, h *tar.Header) error {
	target, err := localName(h.Linkname)
	if err != nil {
		return err
	}
	parent, name := path.Split(target)
	from, err := u.openDir(strings.TrimSuffix(parent, "/"), 0)
	if err != nil {
		return pathError(h.Linkname, err)
	}
	defer func() { _ = unix.Close(from) }()
	var a, b unix.Stat_t
	if unix.Fstatat(from, name, &a, unix.AT_SYMLINK_NOFOLLOW) == nil && unix.Fstatat(dir, base, &b, unix.AT_SYMLINK_NOFOLLOW) == nil &&
		a.Dev == b.Dev && a.Ino == b.Ino {
		return nil // as it is to be
	}
	err = unix.Linkat(from, name, dir, base, 0)
	if errors.Is(err, unix.EEXIST) {
		if err = u.clear(dir, base); err == nil {
			err = unix.Linkat(from, name, dir, base, 0)
		}
	}
	return err
}

// directory makes a directory, or takes the one that is there. A symlink to one
// stays, if it leads to below the root.
func (u *unpacker) directory(dir int, base, name string, h *tar.Header) error {
	err := unix.Mkdirat(dir, base, modeOf(h)|0o700)
	if errors.Is(err, unix.EEXIST) {
		var st unix.Stat_t
		if err := unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			err = nil
		case unix.S_IFLNK:
			fd, openErr := u.openDir(name, 0)
			if openErr == nil {
				return unix.Close(fd)
			}
		}
	}
	if errors.Is(err, unix.EEXIST) {
		if u.opts.KeepKind {
			return nestbox.Errorf(nestbox.CodeConflict, "%s is a directory in the archive, and something else is there", h.Name)
		}
		if err = u.clear(dir, base); err == nil {
			err = unix.Mkdirat(dir, base, modeOf(h)|0o700)
		}
	}
	if err != nil {
		return err
	}
	u.open = append(u.open, directory{name, h})
	return nil
}

// file makes a file. One that is there is replaced when the new one is whole; what
// is not whole is removed.
func (u *unpacker) file(dir int, base string, h *tar.Header) error {
	const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC
	made := base
	fd, err := unix.Openat(dir, base, flags, 0o600)
	if errors.Is(err, unix.EEXIST) {
		made = u.opts.TempPrefix + nestbox.RandomHex(8)
		fd, err = unix.Openat(dir, made, flags, 0o600)
	}
	if err != nil {
		return err
	}
	err = u.fill(fd, h)
	if err == nil {
		err = u.describe(fd, h)
	}
	if closeErr := unix.Close(fd); err == nil {
		err = closeErr
	}
	if err == nil && made != base {
		err = unix.Renameat(dir, made, dir, base)
		if errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
			if err = u.clear(dir, base); err == nil {
				err = unix.Renameat(dir, made, dir, base)
			}
		}
	}
	if err != nil {
		_ = unix.Unlinkat(dir, made, 0)
	}
	return err
}

// fill writes the content of the entry under way. Blocks of zeros of an entry that
// has holes become holes.
func (u *unpacker) fill(fd int, h *tar.Header) error {
	_, sparse := h.PAXRecords["GNU.sparse.major"]
	sparse = sparse || h.Typeflag == tar.TypeGNUSparse
	at := int64(0)
	for at < h.Size {
		n, err := io.ReadFull(u.tar, u.buf[:min(h.Size-at, int64(len(u.buf)))])
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		if !sparse || !isZero(u.buf[:n]) {
			if err := writeAt(fd, u.buf[:n], at); err != nil {
				return err
			}
		}
		at += int64(n)
	}
	if sparse {
		return unix.Ftruncate(fd, h.Size)
	}
	return nil
}

func isZero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), len(zeros))
		if !bytes.Equal(b[:n], zeros[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}

var zeros [4096]byte

func writeAt(fd int, b []byte, at int64) error {
	for len(b) > 0 {
		n, err := unix.Pwrite(fd, b, at)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		b, at = b[n:], at+int64(n)
	}
	return nil
}

func (u *unpacker) owner(h *tar.Header) (uid, gid int, ok bool) {
	switch {
	case u.opts.KeepOwners:
		return h.Uid, h.Gid, true
	case u.opts.Owner != nil:
		return u.opts.Owner.UID, u.opts.Owner.GID, true
	}
	return 0, 0, false
}

// describe sets owner, mode and time of what is open. The owner comes first, as
// chown takes setuid away.
func (u *unpacker) describe(fd int, h *tar.Header) error {
	if uid, gid, ok := u.owner(h); ok {
		if err := unix.Fchown(fd, uid, gid); err != nil {
			return err
		}
	}
	if err := unix.Fchmod(fd, modeOf(h)); err != nil {
		return err
	}
	return futimens(fd, timesOf(h))
}

// futimens sets the times of what is open, which golang.org/x/sys has for paths only.
func futimens(fd int, times []unix.Timespec) error {
	_, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&times[0])), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func modeOf(h *tar.Header) uint32 { return uint32(h.Mode) & 0o7777 }

// timesOf are the times of access and of modification, as utimensat has them.
func timesOf(h *tar.Header) []unix.Timespec {
	return []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: h.ModTime.Unix(), Nsec: int64(h.ModTime.Nanosecond())}}
}
