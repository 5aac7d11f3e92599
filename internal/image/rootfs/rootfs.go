// Package rootfs makes the root file system of an image: it puts layers, which are tar
// archives, one over the other in memory, and writes the result as one EROFS file.
//
// Nothing is unpacked on the host: a name in an archive is a name in a Tree and nothing
// else, so that there is no path and no link to follow out of it. It is a leaf: it may
// import the root package and leaf packages only.
package rootfs

import (
	"io"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
)

// Bounds of what a Tree takes.
const (
	MaxEntries   = 4 << 20 // files, directories and links
	maxName      = 255     // bytes of one element of a path, as Linux has it
	maxPath      = 4095    // bytes of a path and of a link's target
	maxDepth     = 512     // directories in one another
	maxLinks     = 40      // symbolic links on the way to one directory, as Linux has it
	maxFile      = 1 << 40 // bytes
	maxXattrSize = 64 << 10
)

// Tree is a file system that is put together in memory. What is in its files stays where
// it was read from. It is used by one goroutine.
type Tree struct {
	root    *node
	layer   int // the layer that is being added; those from before have lower numbers
	entries int
	limit   int64 // bytes of all files
	size    int64 // of all files ever added
}

// New returns a Tree with nothing in it, which takes files of limit bytes in all.
func New(limit int64) *Tree {
	t := &Tree{limit: limit}
	t.root = &node{inode: &inode{mode: unix.S_IFDIR | 0o755}, children: map[string]*node{}}
	t.root.parent = t.root
	return t
}

// node is a name in a Tree. Hard links are nodes with one inode.
type node struct {
	name     string
	parent   *node // of the root: itself
	layer    int   // which added it, or something below it, last
	depth    int   // of the root: 0
	children map[string]*node
	*inode
}

type inode struct {
	mode     uint32 // st_mode: type and permissions
	uid, gid uint32
	mtime    time.Time
	xattrs   map[string]string
	target   string  // of a symbolic link
	data     content // of a file; nil = it is empty
	size     int64
}

// content is what is in a file.
type content interface {
	Open() io.Reader
}

// section is content that is in one piece in something that can be read anywhere.
type section struct {
	from      io.ReaderAt
	off, size int64
}

func (s section) Open() io.Reader { return io.NewSectionReader(s.from, s.off, s.size) }

func (n *node) isDir() bool { return n.mode&unix.S_IFMT == unix.S_IFDIR }

func (n *node) path() string {
	if n.parent == n {
		return "/"
	}
	var names []string
	for ; n.parent != n; n = n.parent {
		names = append(names, n.name)
	}
	var b strings.Builder
	for i := len(names) - 1; i >= 0; i-- {
		b.WriteByte('/')
		b.WriteString(names[i])
	}
	return b.String()
}

// split returns the elements of a name in an archive, which may begin with / or ./ and
// must not lead upwards.
func split(name string) ([]string, error) {
	if len(name) > maxPath {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "the path is longer than %d bytes", maxPath)
	}
	var parts []string
	for part := range strings.SplitSeq(name, "/") {
		switch {
		case part == "" || part == ".":
			continue
		case part == "..":
			return nil, nestbox.Errorf(nestbox.CodeInvalid, "the path leaves the root")
		case len(part) > maxName:
			return nil, nestbox.Errorf(nestbox.CodeInvalid, "a name in the path is longer than %d bytes", maxName)
		case strings.ContainsRune(part, 0):
			return nil, nestbox.Errorf(nestbox.CodeInvalid, "the path has a NUL byte")
		}
		parts = append(parts, part)
	}
	return parts, nil
}

// dir returns the directory with this path, which is made as far as it is not there.
// Symbolic links on the way are followed, inside the Tree; the root is above itself.
func (t *Tree) dir(parts []string) (*node, error) {
	at, links := t.root, 0
	for len(parts) > 0 {
		name := parts[0]
		parts = parts[1:]
		if name == ".." {
			at = at.parent
			continue
		}
		next := at.children[name]
		switch {
		case next == nil:
			next = &node{name: name, inode: &inode{mode: unix.S_IFDIR | 0o755}}
			if err := t.put(at, next); err != nil {
				return nil, err
			}
		case next.mode&unix.S_IFMT == unix.S_IFLNK:
			if links++; links > maxLinks {
				return nil, nestbox.Errorf(nestbox.CodeInvalid, "there are too many symbolic links on the way")
			}
			at, parts = t.through(next, parts)
			continue
		case !next.isDir():
			return nil, nestbox.Errorf(nestbox.CodeInvalid, "%s is not a directory", next.path())
		}
		next.layer = t.layer
		at = next
	}
	return at, nil
}

// through returns from where to go on behind a symbolic link, and by which names.
func (t *Tree) through(link *node, rest []string) (*node, []string) {
	from := link.parent
	if strings.HasPrefix(link.target, "/") {
		from = t.root
	}
	return from, append(linkParts(link.target), rest...)
}

func linkParts(target string) []string {
	var parts []string
	for part := range strings.SplitSeq(target, "/") {
		if part != "" && part != "." {
			parts = append(parts, part)
		}
	}
	return parts
}

// find returns what has this name, without following the name itself if it is a link;
// nil = there is nothing.
func (t *Tree) find(parts []string) *node {
	at, links := t.root, 0
	for len(parts) > 0 {
		name := parts[0]
		parts = parts[1:]
		if name == ".." {
			at = at.parent
			continue
		}
		next := at.children[name]
		if next == nil {
			return nil
		}
		if len(parts) > 0 && next.mode&unix.S_IFMT == unix.S_IFLNK {
			if links++; links > maxLinks {
				return nil
			}
			at, parts = t.through(next, parts)
			continue
		}
		at = next
	}
	return at
}

// put adds a node to a directory, in place of what has its name.
func (t *Tree) put(dir, n *node) error {
	if t.entries++; t.entries > MaxEntries {
		return nestbox.Errorf(nestbox.CodeExhausted, "there are more than %d entries", MaxEntries)
	}
	if n.isDir() && n.children == nil {
		n.children = map[string]*node{}
	}
	n.parent, n.layer, n.depth = dir, t.layer, dir.depth+1
	if n.depth > maxDepth {
		return nestbox.Errorf(nestbox.CodeInvalid, "the path has more than %d directories", maxDepth)
	}
	dir.children[n.name] = n
	return nil
}

// hide removes what is below a node from layers before the present one, and reports
// whether something of the present one keeps the node.
func (t *Tree) hide(n *node) (stays bool) {
	for name, c := range n.children {
		if !t.hide(c) {
			delete(n.children, name)
		}
	}
	return len(n.children) > 0 || n.layer == t.layer
}

// count adds the size of a file to that of all.
func (t *Tree) count(size int64) error {
	if size < 0 || size > maxFile {
		return nestbox.Errorf(nestbox.CodeInvalid, "the file has a size of %d bytes", size)
	}
	if t.size += size; t.size > t.limit {
		return nestbox.Errorf(nestbox.CodeExhausted, "the files have more than %d bytes", t.limit)
	}
	return nil
}
