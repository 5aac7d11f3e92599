package rootfs

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
)

// Dialect is how a layer says what it takes away from those below it.
type Dialect int

// The dialects.
const (
	// Plain: it takes nothing away.
	Plain Dialect = iota
	// OCI: by names that begin with .wh. (OCI image specification, "Whiteouts").
	OCI
	// Overlay: by character devices 0:0 and the attribute trusted.overlay.opaque, as in
	// the upper layer of an overlay (docs.kernel.org, overlayfs). So says gVisor, which
	// writes a second whiteout as a hard link to the first.
	Overlay
)

// Layer is a tar archive, not compressed, that a Tree is made of.
type Layer struct {
	Name    string // for errors: of the layer, as the user knows it
	Archive io.ReaderAt
	Size    int64
	Dialect Dialect

	// Spare is an empty file for what is not in one piece in the archive (files with
	// holes). It is needed as long as the Tree.
	Spare *os.File

	// Leave are paths, with a slash at the beginning, that are not taken from the layer.
	Leave []string
}

// Whiteouts as OCI layers have them.
const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
)

// Extended attributes.
const (
	paxXattr      = "SCHILY.xattr."
	overlayXattrs = "trusted.overlay."
	opaqueXattr   = overlayXattrs + "opaque"
)

// keptXattrs begin the names of the attributes that are kept: capabilities of files, lists
// of who may use them, and what programs note. Others mean something on one machine only.
var keptXattrs = []string{"security.capability", "system.posix_acl_", "user."}

// adder adds one layer.
type adder struct {
	*Tree
	Layer
	ctx      context.Context
	pos      position
	archive  *tar.Reader
	spare    int64 // bytes in Spare
	whiteout map[string]bool
}

// Add puts a layer over what is in the Tree. Errors name the layer and the entry in it:
// CodeInvalid for what cannot be in an image (device nodes, paths that leave the root),
// CodeExhausted for what is over a bound. After an error the Tree is not to be used.
func (t *Tree) Add(ctx context.Context, l Layer) error {
	t.layer++
	a := &adder{Tree: t, Layer: l, ctx: ctx, whiteout: map[string]bool{}}
	a.pos.from = io.NewSectionReader(l.Archive, 0, l.Size)
	a.archive = tar.NewReader(&a.pos)
	for {
		if err := ctx.Err(); err != nil {
			return nestbox.Errorf(nestbox.CodeCanceled, "reading layer %s: %w", l.Name, err)
		}
		h, err := a.archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return nestbox.Errorf(nestbox.CodeInvalid, "layer %s is not a readable tar archive: %w", l.Name, err)
		}
		if err := a.add(h); err != nil {
			return &nestbox.Error{Code: nestbox.CodeOf(err), Message: fmt.Sprintf("layer %s, entry %.200q: %s", l.Name, h.Name, nestbox.MessageOf(err)), Err: err}
		}
	}
}

// position counts what is read, and skips by seeking.
type position struct{ from *io.SectionReader }

func (p *position) Read(b []byte) (int, error) { return p.from.Read(b) }

func (p *position) Seek(off int64, whence int) (int64, error) { return p.from.Seek(off, whence) }

func (p *position) at() int64 {
	off, _ := p.from.Seek(0, io.SeekCurrent) // a SectionReader always can
	return off
}

func (a *adder) add(h *tar.Header) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	parts, err := split(h.Name)
	if err != nil {
		return err
	}
	if a.left(parts) {
		return nil
	}
	if len(parts) == 0 {
		return a.addRoot(h)
	}
	dir, err := a.dir(parts[:len(parts)-1])
	if err != nil {
		return err
	}
	name := parts[len(parts)-1]
	if a.Dialect == OCI && strings.HasPrefix(name, whiteoutPrefix) {
		return a.takeAway(dir, name)
	}
	if a.isWhiteout(h, parts) {
		a.whiteout["/"+path.Join(parts...)] = true
		a.hideChild(dir, name)
		return nil
	}
	return a.addNode(dir, name, h)
}

func (a *adder) left(parts []string) bool {
	name := "/" + path.Join(parts...)
	for _, l := range a.Leave {
		if name == l {
			return true
		}
	}
	return false
}

func (a *adder) addRoot(h *tar.Header) error {
	if h.Typeflag != tar.TypeDir {
		return nestbox.Errorf(nestbox.CodeInvalid, "the root is not a directory")
	}
	in, err := newInode(h)
	if err != nil {
		return err
	}
	a.root.inode = in
	if a.Dialect == Overlay && h.PAXRecords[paxXattr+opaqueXattr] == "y" {
		a.root.layer = a.layer
		a.hide(a.root)
	}
	return nil
}

// takeAway does what a whiteout of OCI says.
func (a *adder) takeAway(dir *node, name string) error {
	if name == opaqueName {
		a.hide(dir)
		return nil
	}
	victim := strings.TrimPrefix(name, whiteoutPrefix)
	if victim == "" || victim == "." || victim == ".." || strings.HasPrefix(victim, whiteoutPrefix) {
		return nestbox.Errorf(nestbox.CodeInvalid, "the whiteout names nothing that can be taken away")
	}
	a.hideChild(dir, victim)
	return nil
}

func (a *adder) hideChild(dir *node, name string) {
	if c := dir.children[name]; c != nil && !a.hide(c) {
		delete(dir.children, name)
	}
}

func (a *adder) isWhiteout(h *tar.Header, parts []string) bool {
	if a.Dialect != Overlay {
		return false
	}
	switch h.Typeflag {
	case tar.TypeChar:
		return h.Devmajor == 0 && h.Devminor == 0
	case tar.TypeLink:
		target, err := split(h.Linkname)
		return err == nil && a.whiteout["/"+path.Join(target...)]
	}
	return false
}

func (a *adder) addNode(dir *node, name string, h *tar.Header) error {
	old := dir.children[name]
	if h.Typeflag == tar.TypeLink {
		return a.addLink(dir, name, h)
	}
	in, err := newInode(h)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeDir && old != nil && old.isDir() {
		old.inode, old.layer = in, a.layer
		if a.Dialect == Overlay && h.PAXRecords[paxXattr+opaqueXattr] == "y" {
			a.hide(old)
		}
		return nil
	}
	if in.mode&unix.S_IFMT == unix.S_IFREG {
		if in.data, err = a.content(h); err != nil {
			return err
		}
		in.size = h.Size
	}
	return a.put(dir, &node{name: name, inode: in})
}

func (a *adder) addLink(dir *node, name string, h *tar.Header) error {
	parts, err := split(h.Linkname)
	if err != nil {
		return nestbox.Errorf(nestbox.CodeInvalid, "the link's target %.200q: %s", h.Linkname, nestbox.MessageOf(err))
	}
	target := a.find(parts)
	switch {
	case target == nil:
		return nestbox.Errorf(nestbox.CodeInvalid, "it is a hard link to %.200q, which is not there", h.Linkname)
	case target.isDir():
		return nestbox.Errorf(nestbox.CodeInvalid, "it is a hard link to the directory %.200q", h.Linkname)
	case target == dir.children[name]:
		return nil
	}
	return a.put(dir, &node{name: name, inode: target.inode})
}

// newInode returns what a header says, without what is in a file.
func newInode(h *tar.Header) (*inode, error) {
	in := &inode{mtime: h.ModTime, target: h.Linkname}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeRegA, tar.TypeGNUSparse, tar.TypeCont: //nolint:staticcheck // old archives have it
		in.mode, in.target = unix.S_IFREG, ""
	case tar.TypeDir:
		in.mode, in.target = unix.S_IFDIR, ""
	case tar.TypeSymlink:
		in.mode = unix.S_IFLNK
		if in.target == "" || len(in.target) > maxPath || strings.ContainsRune(in.target, 0) {
			return nil, nestbox.Errorf(nestbox.CodeInvalid, "the target of the symbolic link is empty, longer than %d bytes or has a NUL byte", maxPath)
		}
	case tar.TypeFifo:
		in.mode, in.target = unix.S_IFIFO, ""
	case tar.TypeChar, tar.TypeBlock:
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "it is a device node, which an image cannot have")
	default:
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "it is of the unknown type %q", h.Typeflag)
	}
	in.mode |= uint32(h.Mode) & 0o7777
	const maxID = 1<<16 - 1 // as many users as a capsule has
	if h.Uid < 0 || h.Uid > maxID || h.Gid < 0 || h.Gid > maxID {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "it belongs to %d:%d; a capsule has the users and groups 0 to %d", h.Uid, h.Gid, maxID)
	}
	in.uid, in.gid = uint32(h.Uid), uint32(h.Gid)
	return in, in.takeXattrs(h)
}

func (in *inode) takeXattrs(h *tar.Header) error {
	size := 0
	for record, value := range maps.All(h.PAXRecords) {
		name, ok := strings.CutPrefix(record, paxXattr)
		if !ok {
			continue
		}
		for _, kept := range keptXattrs {
			if !strings.HasPrefix(name, kept) {
				continue
			}
			if in.xattrs == nil {
				in.xattrs = map[string]string{}
			}
			in.xattrs[name] = value
			size += len(name) + len(value)
		}
	}
	if size > maxXattrSize {
		return nestbox.Errorf(nestbox.CodeInvalid, "it has more than %d bytes of extended attributes", maxXattrSize)
	}
	return nil
}

// content returns where what is in a file is: in the archive itself, if it is there in
// one piece.
func (a *adder) content(h *tar.Header) (content, error) {
	if err := a.count(h.Size); err != nil {
		return nil, err
	}
	if h.Size == 0 {
		return nil, nil
	}
	if !sparse(h) {
		at := a.pos.at()
		if at+h.Size > a.Layer.Size {
			return nil, nestbox.Errorf(nestbox.CodeInvalid, "the archive ends within it")
		}
		return section{a.Archive, at, h.Size}, nil
	}
	at := a.spare
	n, err := io.Copy(io.NewOffsetWriter(a.Spare, at), readerOf(a.ctx, a.archive))
	a.spare += n
	if err != nil {
		return nil, fmt.Errorf("read it: %w", err)
	}
	return section{a.Spare, at, n}, nil
}

// sparse reports whether a file is in the archive without its holes.
func sparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for record := range h.PAXRecords {
		if strings.HasPrefix(record, "GNU.sparse.") {
			return true
		}
	}
	return false
}

type contextReader struct {
	ctx  context.Context
	from io.Reader
}

func readerOf(ctx context.Context, from io.Reader) io.Reader { return contextReader{ctx, from} }

func (r contextReader) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.from.Read(b)
}
