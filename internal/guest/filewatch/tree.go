package filewatch

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/pseudofs"
)

// node is a directory that is watched.
type node struct {
	parent   *node // nil = the root
	name     string
	wd       int32
	device   uint64
	epoch    int              // in which it was found, see Watch.settle
	children map[string]*node // those that are watched; nil = none
}

// tree is the directories that a source watches.
type tree struct {
	path  string // of the root
	root  *node
	nodes map[int32]*node // by their watch descriptors
}

// pathOf returns where n is.
func (t *tree) pathOf(n *node) string {
	if n.parent == nil {
		return t.path
	}
	names := []string{}
	size := len(t.path)
	for ; n.parent != nil; n = n.parent {
		names = append(names, n.name)
		size += 1 + len(n.name)
	}
	var b strings.Builder
	b.Grow(size)
	b.WriteString(strings.TrimSuffix(t.path, "/"))
	for i := len(names) - 1; i >= 0; i-- {
		b.WriteByte('/')
		b.WriteString(names[i])
	}
	return b.String()
}

// below returns the path of a name in a directory.
func (t *tree) below(n *node, name string) string {
	return strings.TrimSuffix(t.pathOf(n), "/") + "/" + name
}

// place puts n where a directory was made or moved.
func (n *node) place(parent *node, name string) {
	n.unplace()
	n.parent, n.name = parent, name
	if parent.children == nil {
		parent.children = map[string]*node{}
	}
	parent.children[name] = n
}

func (n *node) unplace() {
	if n.parent != nil && n.parent.children[n.name] == n {
		delete(n.parent.children, n.name)
	}
}

// inside reports whether n is dir or below it.
func (n *node) inside(dir *node) bool {
	for ; n != nil; n = n.parent {
		if n == dir {
			return true
		}
	}
	return false
}

// place is a name in a watched directory.
type place struct {
	dir  *node
	name string
}

// begin watches the root and, if all is wanted, what is below it, with a new
// source. Nothing is told of what is there already.
func (w *Watch) begin() error {
	source, err := newSource()
	if err != nil {
		return err
	}
	if err := w.use(source); err != nil {
		return err
	}
	w.tree = &tree{path: w.root, nodes: map[int32]*node{}}
	w.told = map[string]struct{}{}
	w.missed = map[place]struct{}{}
	w.doubts = map[*node]struct{}{}
	dir, err := os.OpenFile(w.root, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	wd, err := source.add(dir)
	if err != nil {
		return err
	}
	w.tree.root = &node{}
	if err := w.adopt(w.tree.root, dir, wd); err != nil || !w.recursive {
		return err
	}
	return w.scan(w.tree.root, dir, 0, false)
}

// use puts source in the place of what is used now.
func (w *Watch) use(source *source) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.source.close()
	w.source = source
	if w.stopped {
		source.close()
		return os.ErrClosed
	}
	return nil
}

// drop ends the watches of the whole tree.
func (w *Watch) drop() {
	w.mu.Lock()
	w.source.close()
	w.mu.Unlock()
	if w.tree != nil {
		w.release(len(w.tree.nodes))
		w.tree = nil
	}
}

// adopt takes a directory, of which wd is the watch, into the tree.
func (w *Watch) adopt(n *node, dir *os.File, wd int32) error {
	if err := w.reserve(); err != nil {
		return err
	}
	n.wd, n.device, n.epoch = wd, deviceOf(dir), w.epoch
	w.tree.nodes[wd] = n
	w.unsettled = true
	return nil
}

// prune ends the watches of a directory and of what is below it. It returns
// errLost if that may be another directory than is meant.
func (w *Watch) prune(n *node) error {
	w.untell(w.tree.pathOf(n))
	n.unplace()
	pruned, doubtful := 0, false
	for todo := []*node{n}; len(todo) > 0; pruned++ {
		n, todo = todo[len(todo)-1], todo[:len(todo)-1]
		_, doubt := w.doubts[n]
		doubtful = doubtful || doubt
		w.source.remove(n.wd)
		delete(w.tree.nodes, n.wd)
		for _, child := range n.children {
			todo = append(todo, child)
		}
	}
	w.release(pruned)
	if doubtful {
		return errLost
	}
	return nil
}

// find watches a directory that has come into dir, and what is in it, which it
// tells: that was made before anything could be seen. If dir is not where it was
// when the kernel said so, an event that says where it is now is still to come, and
// until then nothing can be found.
func (w *Watch) find(at place) error {
	dir, err := w.open(at.dir)
	if passable(err) {
		w.missed[at] = struct{}{}
		w.unsettled = true
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	return w.arm(at, dir, depthOf(at.dir), true)
}

func depthOf(n *node) (depth int) {
	for ; n.parent != nil; n = n.parent {
		depth++
	}
	return depth
}

// open opens a directory of the tree. syscall.ENOENT: it is somewhere else.
func (w *Watch) open(n *node) (*os.File, error) {
	dir, err := os.OpenFile(w.tree.pathOf(n), os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	wd, err := w.source.add(dir)
	if err == nil && wd == n.wd {
		return dir, nil
	}
	_ = dir.Close()
	if err == nil {
		err = syscall.ENOENT
		if w.tree.nodes[wd] == nil {
			w.source.remove(wd)
		}
	}
	return nil, err
}

// maxDepth is how many directories below its path a watch reaches: as many are
// open at a time.
const maxDepth = 256

// arm watches a directory in dir, and what is below it. One that is gone again is
// passed over.
func (w *Watch) arm(at place, dir *os.File, depth int, tell bool) error {
	if depth == maxDepth {
		return nestbox.Errorf(nestbox.CodeTooLarge, "a watch reaches no more than %d directories below its path", maxDepth)
	}
	fd, err := unix.Openat(int(dir.Fd()), at.name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if passable(err) {
		return nil
	}
	if err != nil {
		return err
	}
	child := os.NewFile(uintptr(fd), at.name)
	defer child.Close()
	if deviceOf(child) != at.dir.device && pseudofs.Open(fd) {
		return nil
	}
	wd, err := w.source.add(child)
	if passable(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if known := w.tree.nodes[wd]; known != nil {
		return w.elsewhere(known, at)
	}
	if old := at.dir.children[at.name]; old != nil {
		if err := w.prune(old); err != nil {
			return err
		}
	}
	n := &node{}
	if err := w.adopt(n, child, wd); err != nil {
		return err
	}
	n.place(at.dir, at.name)
	return w.scan(n, child, depth+1, tell)
}

// elsewhere is what to do with a directory that was found where it was not
// expected. Unless it is mounted twice, it has moved here from where it was
// known, which is still to be told; then it is looked for again.
func (w *Watch) elsewhere(known *node, at place) error {
	if _, doubtful := w.doubts[known]; doubtful {
		return errLost
	}
	if at.dir.children[at.name] != known && (!w.settling || !w.source.empty()) {
		w.missed[at] = struct{}{}
		w.unsettled = true
	}
	return nil
}

// passable reports whether err says that there is no directory to watch.
func passable(err error) bool {
	return errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.ELOOP)
}

func deviceOf(dir *os.File) uint64 {
	var st unix.Stat_t
	_ = unix.Fstat(int(dir.Fd()), &st) // it is open
	return uint64(st.Dev)              //nolint:unconvert // not uint64 everywhere
}

// scan arms the directories in n, which dir is. With tell, it tells of everything in it.
func (w *Watch) scan(n *node, dir *os.File, depth int, tell bool) error {
	names, err := w.read(n, dir, tell)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := w.arm(place{n, name}, dir, depth, tell); err != nil {
			return err
		}
	}
	return nil
}

// scanBatch is how many names are read from a directory at once.
const scanBatch = 1024

// read returns the names of the directories in n.
func (w *Watch) read(n *node, dir *os.File, tell bool) (names []string, err error) {
	for {
		batch, err := dir.ReadDir(scanBatch)
		if w.isStopped() {
			return nil, os.ErrClosed
		}
		for _, entry := range batch {
			if isTemp(entry.Name()) {
				continue
			}
			if tell {
				w.tellOf(n, dir, entry)
			}
			if entry.IsDir() {
				names = append(names, entry.Name())
			}
		}
		if errors.Is(err, io.EOF) || passable(err) {
			return names, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

func (w *Watch) isStopped() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stopped
}

// tellOf tells of what was found in a new directory. The events of its making
// may still come. What is more than can be remembered until then is not told.
func (w *Watch) tellOf(n *node, dir *os.File, entry fs.DirEntry) {
	path := w.tree.below(n, entry.Name())
	if len(w.told) >= w.watcher.limits.Events {
		w.queue.overflow(w.path)
		return
	}
	w.told[path] = struct{}{}
	w.created(path, entry.IsDir())
	var st unix.Stat_t
	if entry.Type().IsRegular() && unix.Fstatat(int(dir.Fd()), entry.Name(), &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Size > 0 {
		w.wrote(path)
	}
}

// untell forgets what was told of path and below it.
func (w *Watch) untell(path string) {
	delete(w.told, path)
	for told := range w.told {
		if strings.HasPrefix(told, path) && strings.HasPrefix(told[len(path):], "/") {
			delete(w.told, told)
		}
	}
}

// settle is called when all events were read that the kernel had. Until then,
// what was found by looking may be what came after events that are still to be
// read. Now it is certain where everything is.
func (w *Watch) settle() error {
	w.unsettled, w.settling = false, true
	defer func() { w.settling = false }()
	w.epoch++
	clear(w.told)
	doubts, missed := w.doubts, w.missed
	w.doubts, w.missed = map[*node]struct{}{}, map[place]struct{}{}
	for n := range doubts {
		if w.tree.nodes[n.wd] != n {
			continue
		}
		dir, err := w.open(n)
		if err != nil {
			return errLost
		}
		_ = dir.Close()
	}
	for at := range missed {
		if w.tree.nodes[at.dir.wd] != at.dir {
			continue
		}
		if err := w.find(at); err != nil {
			return err
		}
	}
	if len(w.missed) == 0 {
		return nil
	}
	return w.checkRoot()
}

// checkRoot ends the watch if its path leads elsewhere: a directory above was
// moved, which nobody is told of.
func (w *Watch) checkRoot() error {
	dir, err := w.open(w.tree.root)
	if err == nil {
		return dir.Close()
	}
	if passable(err) {
		w.tell(nestbox.FileEvent{Type: nestbox.FileRename, Path: w.path, Directory: true})
		return io.EOF
	}
	return err
}
