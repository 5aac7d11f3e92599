package rootfs

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
)

// MaxImage is how large the file of an image can be: EROFS counts blocks of 4 KiB in 32
// bits.
const MaxImage = 1 << 44

// EnvdPath is where a driver shows envd in a sandbox. Every root has an empty
// file there.
const EnvdPath = "/.envd"

// Complete adds what every capsule needs and the layers have not brought.
func (t *Tree) Complete() error {
	t.layer++
	for _, d := range []struct {
		path string
		mode uint32
	}{
		{"dev", 0o755}, {"etc", 0o755}, {"proc", 0o555}, {"root", 0o700}, {"run", 0o755}, {"sys", 0o555},
		{"tmp", 0o1777}, {"var/tmp", 0o1777},
		// gVisor puts a tmpfs, which counts as memory, over a /tmp that is empty.
		{"tmp/.X11-unix", 0o1777},
	} {
		parts := linkParts(d.path)
		if t.find(parts) != nil {
			continue
		}
		n, err := t.dir(parts)
		if err != nil {
			return err
		}
		n.mode = unix.S_IFDIR | d.mode
	}
	envd := linkParts(EnvdPath)
	return t.put(t.root, &node{name: envd[0], inode: &inode{mode: unix.S_IFREG | 0o755}})
}

// MakeDir makes a directory, as far as it is not there. CodeInvalid: something else is.
func (t *Tree) MakeDir(path string) error {
	parts, err := split(path)
	if err == nil {
		t.layer++
		_, err = t.dir(parts)
	}
	return err
}

// Size is how many bytes there are in all files, those that were replaced too.
func (t *Tree) Size() int64 { return t.size }

// each calls do for everything below the root, directories before what is in them and
// otherwise in the order of names. first is the first path with the same inode, if that
// is another one.
func (t *Tree) each(ctx context.Context, do func(path string, n *node, first string) error) error {
	seen := map[*inode]string{}
	var walk func(dir *node, at string) error
	walk = func(dir *node, at string) error {
		for _, name := range slices.Sorted(maps.Keys(dir.children)) {
			if err := ctx.Err(); err != nil {
				return nestbox.Errorf(nestbox.CodeCanceled, "writing the image: %w", err)
			}
			n, p := dir.children[name], path.Join(at, name)
			first := seen[n.inode]
			if first == "" {
				seen[n.inode] = p
			}
			if err := do(p, n, first); err != nil {
				return fmt.Errorf("%s: %w", p, err)
			}
			if n.isDir() {
				if err := walk(n, p); err != nil {
					return err
				}
			}
		}
		return nil
	}
	return walk(t.root, "/")
}

// WriteEROFS writes the Tree as an EROFS file, not compressed, in the layouts that gVisor
// reads. The same Tree gives the same bytes. Extended attributes are left out, since
// gVisor cannot read those: see WriteUpper. scratch is a directory for a file without a
// name that is as large as all files together.
func (t *Tree) WriteEROFS(ctx context.Context, out *os.File, scratch string) error {
	gate := &gate{WriteSeeker: out}
	w := erofs.Create(gate, erofs.WithBuildTime(0, 0), erofs.WithTempDir(scratch))
	links, err := t.writeAll(ctx, w)
	if err != nil {
		gate.err = err
		_ = w.Close() // closes its file in scratch, and fails with err
		return err
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("write the image: %w", err)
	}
	return finish(out, links)
}

// gate is what go-erofs writes to, until there is an error.
type gate struct {
	io.WriteSeeker
	err error
}

func (g *gate) Write(b []byte) (int, error) {
	if g.err != nil {
		return 0, g.err
	}
	return g.WriteSeeker.Write(b)
}

// writeAll hands everything over, and returns the links that remain to be made.
func (t *Tree) writeAll(ctx context.Context, w *erofs.Writer) ([]link, error) {
	var links []link
	names := map[*inode]uint32{}
	if err := t.each(ctx, func(p string, n *node, first string) error {
		names[n.inode]++
		if first != "" {
			links = append(links, link{name: p, target: first})
			return place(w, p)
		}
		return t.writeNode(ctx, w, p, n)
	}); err != nil {
		return nil, err
	}
	if err := setAttributes(w, "/", t.root.inode); err != nil {
		return nil, err
	}
	for _, l := range links {
		n := t.find(linkParts(l.target))
		if err := w.SetNlink(l.target, names[n.inode]); err != nil {
			return nil, err
		}
	}
	return links, nil
}

// place makes an empty file, for a name that finish gives another file.
func place(w *erofs.Writer, p string) error {
	f, err := w.Create(p)
	if err != nil {
		return err
	}
	return f.Close()
}

func (t *Tree) writeNode(ctx context.Context, w *erofs.Writer, p string, n *node) error {
	var err error
	switch n.mode & unix.S_IFMT {
	case unix.S_IFDIR:
		err = w.Mkdir(p, 0o755)
	case unix.S_IFLNK:
		err = w.Symlink(n.target, p)
	case unix.S_IFIFO:
		err = w.Mknod(p, uint16(n.mode), 0)
	default:
		err = writeFile(ctx, w, p, n)
	}
	if err != nil {
		return err
	}
	return setAttributes(w, p, n.inode)
}

func writeFile(ctx context.Context, w *erofs.Writer, p string, n *node) error {
	f, err := w.Create(p)
	if err != nil {
		return err
	}
	if n.data != nil {
		size, err := f.ReadFrom(readerOf(ctx, n.data.Open()))
		if err != nil {
			return err
		}
		if size != n.size {
			return fmt.Errorf("it has %d bytes instead of %d", size, n.size)
		}
	}
	return f.Close()
}

func setAttributes(w *erofs.Writer, p string, in *inode) error {
	if err := w.Chown(p, int(in.uid), int(in.gid)); err != nil {
		return err
	}
	if in.mode&unix.S_IFMT != unix.S_IFLNK {
		if err := w.Chmod(p, permissions(in.mode)); err != nil {
			return err
		}
	}
	return w.Chtimes(p, in.mtime, in.mtime)
}

// permissions are those of a mode, as io/fs has them.
func permissions(mode uint32) os.FileMode {
	m := os.FileMode(mode & 0o777)
	for bit, flag := range map[uint32]os.FileMode{unix.S_ISUID: os.ModeSetuid, unix.S_ISGID: os.ModeSetgid, unix.S_ISVTX: os.ModeSticky} {
		if mode&bit != 0 {
			m |= flag
		}
	}
	return m
}

// WriteUpper writes a tar archive of what has extended attributes, with the directories
// above, for the layer over the EROFS file, and returns how many have some. It writes
// nothing if none has.
func (t *Tree) WriteUpper(ctx context.Context, out io.Writer) (int, error) {
	above := map[*node]bool{}
	count := 0
	if len(t.root.xattrs) > 0 {
		count++
	}
	_ = t.each(ctx, func(_ string, n *node, _ string) error {
		if len(n.xattrs) == 0 {
			return nil
		}
		count++
		for d := n.parent; ; d = d.parent {
			above[d] = true
			if d == d.parent {
				return nil
			}
		}
	})
	if count == 0 {
		return 0, nil
	}
	w := tar.NewWriter(out)
	if err := w.WriteHeader(header("./", t.root, "")); err != nil {
		return 0, err
	}
	err := t.each(ctx, func(p string, n *node, first string) error {
		if len(n.xattrs) == 0 && !above[n] {
			return nil
		}
		h := header("."+p, n, first)
		if err := w.WriteHeader(h); err != nil || h.Size == 0 {
			return err
		}
		_, err := io.Copy(w, readerOf(ctx, n.data.Open()))
		return err
	})
	if err != nil {
		return 0, err
	}
	return count, w.Close()
}

func header(name string, n *node, first string) *tar.Header {
	h := &tar.Header{
		Name: name, Mode: int64(n.mode & 0o7777), Uid: int(n.uid), Gid: int(n.gid), ModTime: n.mtime,
		Format: tar.FormatPAX, PAXRecords: map[string]string{},
	}
	for attr, value := range n.xattrs {
		h.PAXRecords[paxXattr+attr] = value
	}
	switch n.mode & unix.S_IFMT {
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
		h.Name = strings.TrimSuffix(name, "/") + "/"
	case unix.S_IFLNK:
		h.Typeflag, h.Linkname = tar.TypeSymlink, n.target
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	default:
		h.Typeflag, h.Size = tar.TypeReg, n.size
	}
	if first != "" {
		h.Typeflag, h.Linkname, h.Size, h.PAXRecords = tar.TypeLink, "."+first, 0, nil
	}
	return h
}
