// Package filewatch tells what happens to the files below a path: a tree of
// inotify watches that follows the directories as they are made, moved and
// removed, and a bounded queue of events.
//
// It may import the root package, the guest contract and internal/pseudofs. See inotify(7) for what the kernel
// promises, and docs/adr/0017-watching-files.md for what gVisor does not.
package filewatch

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/pseudofs"
)

// Limits bound what watches hold; zero fields mean the defaults.
type Limits struct {
	Watches     int // at a time; default 64
	Directories int // of all of them together; default 65,536
	Events      int // of one watch, that nobody has read yet; default 8,192
}

func (l Limits) withDefaults() Limits {
	if l.Watches <= 0 {
		l.Watches = 64
	}
	if l.Directories <= 0 {
		l.Directories = 1 << 16
	}
	if l.Events <= 0 {
		l.Events = 8 << 10
	}
	return l
}

// Names of files that are being written, and whose change is told as one of the
// file that they are renamed to.
const (
	TempCreate = ".nestbox-new-" // of a file that is new
	TempWrite  = ".nestbox-old-" // of one that replaces another
)

func isTemp(name string) bool {
	return strings.HasPrefix(name, TempCreate) || strings.HasPrefix(name, TempWrite)
}

// Watcher makes watches, within limits that they share. It is safe for
// concurrent use.
type Watcher struct {
	limits Limits

	mu          sync.Mutex
	watches     map[*Watch]struct{} // nil once closed
	directories int
}

// New returns a Watcher without watches.
func New(limits Limits) *Watcher {
	return &Watcher{limits: limits.withDefaults(), watches: map[*Watch]struct{}{}}
}

// Close ends all watches, whose readers get CodeUnavailable, and lets none be made.
func (r *Watcher) Close() {
	r.mu.Lock()
	watches := r.watches
	r.watches = nil
	r.mu.Unlock()
	for w := range watches {
		w.stop(errClosed())
	}
}

func errClosed() error {
	return nestbox.Errorf(nestbox.CodeUnavailable, "the capsule's daemon is stopping")
}

// Watch watches a clean, absolute path, from before it returns: a file, a directory and what is
// in it, or with recursive the whole tree below it, also what is made there
// later. A symlink at path is followed, those below are not. Of a file it is the
// name that is watched, so that one that takes its place is seen as well.
//
// CodeNotFound: nothing is there. CodeInvalid: the kernel reports no changes
// there, as in /proc. CodeExhausted: that are too many watches, or directories.
func (r *Watcher) Watch(path string, recursive bool) (*Watch, error) {
	w, err := r.newWatch(path, recursive)
	if err != nil {
		return nil, err
	}
	if err := w.begin(); err != nil {
		w.finish(err)
		return nil, w.queue.reason()
	}
	go w.run()
	return w, nil
}

func (r *Watcher) newWatch(path string, recursive bool) (*Watch, error) {
	root, only, err := locate(path)
	if err != nil {
		return nil, explain(path, err)
	}
	w := &Watch{
		watcher: r, path: path, root: root, only: only, recursive: recursive && only == "",
		queue: newQueue(r.limits.Events), ended: make(chan struct{}),
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.watches == nil {
		return nil, errClosed()
	}
	if len(r.watches) == r.limits.Watches {
		return nil, nestbox.Errorf(nestbox.CodeExhausted, "too many watches of this capsule at a time: %d", r.limits.Watches)
	}
	r.watches[w] = struct{}{}
	return w, nil
}

// locate returns the directory to watch for path, and if path is no directory,
// the only name in it that is of interest.
func locate(path string) (root, only string, err error) {
	st, err := os.Stat(path)
	if err != nil {
		return "", "", err
	}
	root = path
	if !st.IsDir() {
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			return "", "", err
		}
		root, only = filepath.Dir(real), filepath.Base(real)
	}
	if pseudofs.At(root) {
		return "", "", nestbox.Errorf(nestbox.CodeInvalid, "%s cannot be watched: the kernel reports no changes there", path)
	}
	return root, only, nil
}

// Watch is what is watched for one reader.
type Watch struct {
	watcher   *Watcher
	path      string // as it was asked for
	root      string // the directory that is watched for it
	only      string // the name in root that is of interest; "" = all
	recursive bool
	queue     *queue
	ended     chan struct{} // nothing goes on any more

	mu      sync.Mutex
	source  *source // replaced by rebuild
	stopped bool

	// What follows belongs to begin, and then to run.
	tree      *tree
	told      map[string]struct{} // paths whose creation was told before its event was read
	missed    map[place]struct{}  // directories that are still to be found
	doubts    map[*node]struct{}  // directories that may be others than they are thought to be
	epoch     int                 // counts the calls of settle
	settling  bool                // settle runs
	unsettled bool                // there is something for settle to do
}

var _ guest.FileWatch = (*Watch)(nil)

// Next implements guest.FileWatch.
func (w *Watch) Next(ctx context.Context) ([]nestbox.FileEvent, error) {
	return w.queue.next(ctx, guest.MaxWatchBatch)
}

// Close ends the watch and waits until nothing of it is left.
func (w *Watch) Close() error {
	w.stop(nestbox.Errorf(nestbox.CodeCanceled, "the watch is closed"))
	return nil
}

// stop ends the watch; its reader gets why.
func (w *Watch) stop(why error) {
	w.queue.end(why)
	w.mu.Lock()
	w.stopped = true
	w.source.close()
	w.mu.Unlock()
	<-w.ended
}

// run reads the kernel's events until the watch is stopped, or has nothing more to tell.
func (w *Watch) run() { w.finish(w.follow()) }

// finish gives back all that the watch holds, whose reader gets err unless there
// was a reason before.
func (w *Watch) finish(err error) {
	w.queue.end(w.explain(err))
	w.drop()
	w.watcher.forget(w)
	close(w.ended)
}

// follow returns why nothing follows.
func (w *Watch) follow() error {
	for {
		err := w.step()
		if errors.Is(err, errLost) {
			err = w.rebuild()
		}
		if err != nil {
			return err
		}
	}
}

func (w *Watch) step() error {
	if w.unsettled && w.source.empty() {
		if err := w.settle(); err != nil {
			return err
		}
	}
	event, err := w.source.next()
	if err != nil {
		return err
	}
	return w.handle(event)
}

func (r *Watcher) forget(w *Watch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.watches, w) // of a nil map, too
}

// reserve takes a directory's place among those that may be watched.
func (w *Watch) reserve() error {
	r := w.watcher
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.directories >= r.limits.Directories {
		return nestbox.Errorf(nestbox.CodeExhausted, "too many directories are watched in this capsule: %d", r.limits.Directories)
	}
	r.directories++
	return nil
}

func (w *Watch) release(directories int) {
	w.watcher.mu.Lock()
	defer w.watcher.mu.Unlock()
	w.watcher.directories -= directories
}

func (w *Watch) explain(err error) error { return explain(w.path, err) }

// explain gives an operating system's error its code and a message.
func explain(path string, err error) error {
	if _, ours := errors.AsType[*nestbox.Error](err); ours || err == io.EOF {
		return err
	}
	errno, _ := errors.AsType[syscall.Errno](err)
	switch errno {
	case syscall.ENOENT, syscall.ENOTDIR:
		return &nestbox.Error{Code: nestbox.CodeNotFound, Message: "no such file or directory: " + path, Err: errno}
	case syscall.ENOSPC, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM:
		return nestbox.Errorf(nestbox.CodeExhausted, "the capsule's kernel watches no more: %w", errno)
	case syscall.ENAMETOOLONG:
		return nestbox.Errorf(nestbox.CodeTooLarge, "below %s are paths that are too long to be watched", path)
	case syscall.ELOOP:
		return nestbox.Errorf(nestbox.CodeInvalid, "%s: %w", path, errno)
	}
	return nestbox.Errorf(nestbox.CodeGuest, "watching %s: %w", path, err)
}
