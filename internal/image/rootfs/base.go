package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"

	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
)

// AddEROFS puts what is in an EROFS file, which WriteEROFS has written, over what is in
// the Tree.
func (t *Tree) AddEROFS(ctx context.Context, file io.ReaderAt) error {
	fsys, err := erofs.Open(file)
	if err != nil {
		return fmt.Errorf("open the image: %w", err)
	}
	t.layer++
	known := map[int64]*inode{} // of files with several names
	err = fs.WalkDir(fsys, ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return nestbox.Errorf(nestbox.CodeCanceled, "reading the image: %w", err)
		}
		return t.addFrom(fsys, name, e, known)
	})
	if err != nil {
		return fmt.Errorf("read the image: %w", err)
	}
	return nil
}

func (t *Tree) addFrom(fsys fs.FS, name string, e fs.DirEntry, known map[int64]*inode) error {
	info, err := e.Info()
	if err != nil {
		return err
	}
	stat, ok := info.Sys().(*erofs.Stat)
	if !ok {
		return errors.New("go-erofs tells no attributes")
	}
	in := known[stat.Ino]
	if in == nil {
		in = &inode{mode: unixMode(stat.Mode), uid: stat.UID, gid: stat.GID, mtime: info.ModTime()}
		switch in.mode & unix.S_IFMT {
		case unix.S_IFLNK:
			if in.target, err = fs.ReadLink(fsys, name); err != nil {
				return err
			}
		case unix.S_IFREG:
			if err := t.count(info.Size()); err != nil {
				return err
			}
			in.size, in.data = info.Size(), erofsContent{fsys, name}
		}
		if !info.IsDir() && stat.Nlink > 1 {
			known[stat.Ino] = in
		}
	}
	if name == "." {
		t.root.inode = in
		return nil
	}
	dir, err := t.dir(linkParts(path.Dir(name)))
	if err != nil {
		return err
	}
	base := path.Base(name)
	if old := dir.children[base]; old != nil && old.isDir() && info.IsDir() {
		old.inode, old.layer = in, t.layer
		return nil
	}
	return t.put(dir, &node{name: base, inode: in})
}

// unixMode returns st_mode. What go-erofs tells of a file as fs.FileInfo has no setuid.
func unixMode(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	for flag, bit := range map[fs.FileMode]uint32{fs.ModeSetuid: unix.S_ISUID, fs.ModeSetgid: unix.S_ISGID, fs.ModeSticky: unix.S_ISVTX} {
		if m&flag != 0 {
			mode |= bit
		}
	}
	switch m.Type() {
	case fs.ModeDir:
		mode |= unix.S_IFDIR
	case fs.ModeSymlink:
		mode |= unix.S_IFLNK
	case fs.ModeNamedPipe:
		mode |= unix.S_IFIFO
	default:
		mode |= unix.S_IFREG
	}
	return mode
}

// erofsContent is what is in a file of an EROFS file.
type erofsContent struct {
	fsys fs.FS
	name string
}

func (c erofsContent) Open() io.Reader {
	f, err := c.fsys.Open(c.name)
	if err != nil {
		return failed{err}
	}
	return f
}

// failed is a Reader of what cannot be opened.
type failed struct{ err error }

func (f failed) Read([]byte) (int, error) { return 0, f.err }
