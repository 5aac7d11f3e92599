package filewatch

import (
	"io"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
)

// handle tells of one event of the kernel's, and follows the directories. It
// returns errLost if the tree is not what it was thought to be.
func (w *Watch) handle(e rawEvent) error {
	if e.is(unix.IN_Q_OVERFLOW) {
		return errLost
	}
	n := w.tree.nodes[e.wd]
	switch {
	case n == nil: // no longer watched
		return nil
	case n == w.tree.root && e.name == "":
		return w.handleRoot(e)
	case e.is(unix.IN_IGNORED):
		return w.prune(n)
	case e.name == "": // its parent says so, too
		return nil
	case e.is(unix.IN_MOVED_FROM):
		return w.moved(n, e)
	case isTemp(e.name) || w.only != "" && e.name != w.only:
		return nil
	}
	return w.change(n, e)
}

// handleRoot tells what has become of the root. Without it there is nothing more to tell.
func (w *Watch) handleRoot(e rawEvent) error {
	directory := w.only == "" // else what is watched is a file in it
	switch {
	case e.is(unix.IN_MOVE_SELF):
		w.tell(nestbox.FileEvent{Type: nestbox.FileRename, Path: w.path, Directory: directory})
		return io.EOF
	case e.is(unix.IN_DELETE_SELF | unix.IN_UNMOUNT | unix.IN_IGNORED):
		if directory {
			w.tell(nestbox.FileEvent{Type: nestbox.FileRemove, Path: w.path, Directory: true})
		}
		return io.EOF
	case e.is(unix.IN_ATTRIB) && directory:
		w.tell(nestbox.FileEvent{Type: nestbox.FileChmod, Path: w.path, Directory: true})
	}
	return nil
}

// change tells of a change of what has a name in n.
func (w *Watch) change(n *node, e rawEvent) error {
	path, directory := w.shown(n, e.name), e.is(unix.IN_ISDIR)
	_, told := w.told[path]
	delete(w.told, path)
	switch {
	case e.is(unix.IN_CREATE | unix.IN_MOVED_TO):
		if !told {
			w.created(path, directory)
		}
		return w.entered(n, e)
	case e.is(unix.IN_MODIFY):
		w.wrote(path)
	case e.is(unix.IN_ATTRIB):
		w.tell(nestbox.FileEvent{Type: nestbox.FileChmod, Path: path, Directory: directory})
	case e.is(unix.IN_DELETE):
		w.tell(nestbox.FileEvent{Type: nestbox.FileRemove, Path: path, Directory: directory})
		return w.left(n, e)
	}
	return nil
}

// moved tells of what was moved out of n: away, or to another watched place.
func (w *Watch) moved(n *node, e rawEvent) error {
	to, ok := w.source.partner(e.cookie)
	into := w.tree.nodes[to.wd]
	ok = ok && into != nil && (w.only == "" || to.name == w.only)
	switch {
	case isTemp(e.name):
		if ok {
			w.replaced(into, to, e.name)
		}
		return nil
	case ok && w.only != "": // from a name that is of no interest
		w.created(w.path, to.is(unix.IN_ISDIR))
		return nil
	case w.only != "" && e.name != w.only:
		return nil
	}
	path, directory := w.shown(n, e.name), e.is(unix.IN_ISDIR)
	delete(w.told, path)
	if !ok || isTemp(to.name) {
		w.tell(nestbox.FileEvent{Type: nestbox.FileRename, Path: path, Directory: directory})
		return w.left(n, e)
	}
	target := w.shown(into, to.name)
	delete(w.told, target)
	w.tell(nestbox.FileEvent{Type: nestbox.FileRename, Path: path, To: target, Directory: directory})
	return w.follows(n, e, into, to)
}

// replaced tells of a file that was written under another name.
func (w *Watch) replaced(n *node, to rawEvent, temp string) {
	path := w.shown(n, to.name)
	_, told := w.told[path]
	delete(w.told, path)
	if strings.HasPrefix(temp, TempCreate) {
		if told { // with its content
			return
		}
		w.created(path, false)
	}
	w.wrote(path)
}

// entered watches what has come into n, if it is a directory.
func (w *Watch) entered(n *node, e rawEvent) error {
	if !w.recursive || !e.is(unix.IN_ISDIR) {
		return nil
	}
	return w.find(place{n, e.name})
}

// left watches no longer what has left n, if it was a directory.
func (w *Watch) left(n *node, e rawEvent) error {
	if child := n.children[e.name]; child != nil {
		return w.prune(child)
	}
	return nil
}

// follows has a directory that was moved be known by its new place.
func (w *Watch) follows(from *node, e rawEvent, into *node, to rawEvent) error {
	child := from.children[e.name]
	if child == nil {
		return w.entered(into, to)
	}
	if into.inside(child) {
		return errLost
	}
	if old := into.children[to.name]; old != nil {
		if err := w.prune(old); err != nil {
			return err
		}
	}
	w.untell(w.tree.pathOf(child))
	child.place(into, to.name)
	if child.epoch == w.epoch {
		// It was found by its name, which may have been another directory's by then.
		w.doubts[child] = struct{}{}
		w.unsettled = true
	}
	return nil
}

// rebuildEvery is how often, at most, a tree is looked at anew.
const rebuildEvery = 100 * time.Millisecond

// rebuild looks at the tree anew, because what was known of it is not true any
// more, and tells that something was missed.
func (w *Watch) rebuild() error {
	timer := time.NewTimer(rebuildEvery)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-w.queue.ended:
	}
	w.drop()
	err := w.begin()
	w.queue.overflow(w.path) // not before: what its reader then looks at is watched already
	if passable(err) {
		w.tell(nestbox.FileEvent{Type: nestbox.FileRemove, Path: w.path, Directory: w.only == ""})
		return io.EOF
	}
	return err
}

// shown is the path of a name in n, as the reader knows it.
func (w *Watch) shown(n *node, name string) string {
	if w.only != "" {
		return w.path
	}
	return w.tree.below(n, name)
}

func (w *Watch) created(path string, directory bool) {
	w.tell(nestbox.FileEvent{Type: nestbox.FileCreate, Path: path, Directory: directory})
}

func (w *Watch) wrote(path string) { w.tell(nestbox.FileEvent{Type: nestbox.FileWrite, Path: path}) }

func (w *Watch) tell(e nestbox.FileEvent) {
	e.Path = nestbox.PathText(e.Path)
	e.To = nestbox.PathText(e.To)
	w.queue.push(e, w.path)
}
