package filewatch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest/guesttest"
)

// TestFollowsTree has writers make, move and remove directories and files, while a
// copy of the tree is kept by what the watch tells. In the end the copy is the
// tree. The fewer the names, the more often do the writers meet.
func TestFollowsTree(t *testing.T) {
	for seed := range uint64(12) {
		writers, names := 1+int(seed%4), 3+int(seed*seed)
		t.Run(fmt.Sprintf("%dWriters%dNames", writers, names), func(t *testing.T) {
			t.Parallel()
			root := filepath.Join(t.TempDir(), "root")
			require.NoError(t, os.Mkdir(root, 0o755))
			newChurn(root, names, seed, 0).run(100)
			w := watch(t, New(Limits{}), root, true)
			c := guesttest.TreeCopy{Entries: lookAt(root)}
			for round := range 4 {
				var running sync.WaitGroup
				for i := range writers {
					running.Go(func() { newChurn(root, names, seed, uint64(10*round+i)).run(300) })
				}
				running.Wait()
				c.Follow(t, w, marker(t, root), func() map[string]bool { return lookAt(root) })
			}
			t.Logf("%d times something was missed", c.Missed)
		})
	}
}

// churn changes a tree at random. What cannot be done is left.
type churn struct {
	root  string
	names int
	r     *rand.Rand
}

func newChurn(root string, names int, seed, stream uint64) *churn {
	return &churn{root: root, names: names, r: rand.New(rand.NewPCG(seed, stream))}
}

func (c *churn) path() string {
	p := c.root
	for range 1 + c.r.IntN(4) {
		p += fmt.Sprintf("/%d", c.r.IntN(c.names))
	}
	return p
}

func (c *churn) run(times int) {
	for range times {
		switch p := c.path(); c.r.IntN(10) {
		case 0, 1, 2:
			_ = os.MkdirAll(p, 0o755)
		case 3, 4:
			_ = os.WriteFile(p, []byte("x"), 0o644)
		case 5, 6, 7:
			_ = os.Rename(p, c.path())
		case 8:
			_ = os.RemoveAll(p)
		case 9: // out of the tree, and in again
			away := fmt.Sprintf("%s-%d", c.root, c.r.Int())
			_ = os.Rename(p, away)
			_ = os.Rename(away, c.path())
			_ = os.RemoveAll(away)
		}
	}
}

func lookAt(root string) map[string]bool {
	entries := map[string]bool{}
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && path != root {
			entries[path] = d.IsDir()
		}
		return nil
	})
	return entries
}

func watch(t *testing.T, r *Watcher, path string, recursive bool) *Watch {
	t.Helper()
	w, err := r.Watch(path, recursive)
	require.NoError(t, err)
	t.Cleanup(func() { _ = w.Close() })
	return w
}

func next(t *testing.T, w *Watch) []nestbox.FileEvent {
	t.Helper()
	events, err := w.Next(patience(t))
	require.NoError(t, err)
	return events
}

func patience(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// until reads up to the creation of path, which is left out.
func until(t *testing.T, w *Watch, path string) []nestbox.FileEvent {
	t.Helper()
	var all []nestbox.FileEvent
	for {
		for _, e := range next(t, w) {
			if e.Type == nestbox.FileCreate && e.Path == path {
				return all
			}
			all = append(all, e)
		}
	}
}

func TestOverflowIsTold(t *testing.T) {
	dir := t.TempDir()
	w := watch(t, New(Limits{Events: 10}), dir, true)
	for i := range 50 {
		require.NoError(t, os.WriteFile(fmt.Sprintf("%s/%d", dir, i), nil, 0o644))
	}
	require.Eventually(t, func() bool { // nothing is dropped while the reader keeps up
		w.queue.mu.Lock()
		defer w.queue.mu.Unlock()
		return w.queue.overflowed()
	}, time.Minute, time.Millisecond)
	events := next(t, w)
	require.Len(t, events, 10)
	require.Equal(t, nestbox.FileEvent{Type: nestbox.FileOverflow, Path: dir}, events[9])
	// What comes after the reader knows is told again.
	c := guesttest.TreeCopy{Entries: lookAt(dir)}
	c.Follow(t, w, marker(t, dir), func() map[string]bool { return lookAt(dir) })
}

func marker(t *testing.T, dir string) func(name string) string {
	return func(name string) string {
		require.NoError(t, os.WriteFile(dir+"/"+name, nil, 0o644))
		return dir + "/" + name
	}
}

// TestLostEvents: when the kernel has dropped events, as many as it has room for
// having come while nobody read, directories that were made meanwhile are watched
// nevertheless, and the reader is told to look again.
func TestLostEvents(t *testing.T) {
	dir := t.TempDir()
	w, err := New(Limits{}).newWatch(dir, true)
	require.NoError(t, err)
	require.NoError(t, w.begin())
	require.NoError(t, os.MkdirAll(dir+"/missed/deep", 0o755))
	for range 1 + maxQueuedEvents(t)/2 { // two events of each; equal ones in a row are one
		require.NoError(t, os.Chmod(dir, 0o755))
		require.NoError(t, os.Chmod(dir+"/missed", 0o755))
	}
	go w.run()
	t.Cleanup(func() { _ = w.Close() })
	for lost := false; !lost; {
		for _, e := range next(t, w) {
			lost = lost || e.Type == nestbox.FileOverflow
		}
	}
	require.NoError(t, os.WriteFile(dir+"/missed/deep/new", nil, 0o644))
	until(t, w, dir+"/missed/deep/new")
}

// maxQueuedEvents is what the kernel has room for.
func maxQueuedEvents(t *testing.T) int {
	b, err := os.ReadFile("/proc/sys/fs/inotify/max_queued_events")
	require.NoError(t, err)
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	require.NoError(t, err)
	return n
}

func TestRewritesAreOneEvent(t *testing.T) {
	dir := t.TempDir()
	w := watch(t, New(Limits{}), dir, false)
	file, err := os.Create(dir + "/f")
	require.NoError(t, err)
	defer file.Close()
	for range 10_000 {
		_, err := file.WriteString("x")
		require.NoError(t, err)
	}
	require.NoError(t, os.WriteFile(dir+"/last", nil, 0o644))
	require.Eventually(t, func() bool {
		w.queue.mu.Lock()
		defer w.queue.mu.Unlock()
		return w.queue.last[dir+"/last"] != ""
	}, time.Minute, time.Millisecond)
	require.Equal(t, []nestbox.FileEvent{
		{Type: nestbox.FileCreate, Path: dir + "/f"},
		{Type: nestbox.FileWrite, Path: dir + "/f"},
	}, until(t, w, dir+"/last"))
}

func TestLimits(t *testing.T) {
	dir := t.TempDir()
	for i := range 10 {
		require.NoError(t, os.MkdirAll(fmt.Sprintf("%s/%d", dir, i), 0o755))
	}
	r := New(Limits{Watches: 2, Directories: 12})
	one := watch(t, r, dir, true)
	_, err := r.Watch(dir, true)
	requireCode(t, nestbox.CodeExhausted, err)
	other := watch(t, r, dir, false) // the failed one holds nothing
	_, err = r.Watch(dir, false)
	requireCode(t, nestbox.CodeExhausted, err)
	require.NoError(t, other.Close())

	// A watch that can no longer be complete ends, and says why.
	for i := range 10 {
		require.NoError(t, os.Mkdir(fmt.Sprintf("%s/more%d", dir, i), 0o755))
	}
	for {
		if _, err = one.Next(t.Context()); err != nil {
			break
		}
	}
	requireCode(t, nestbox.CodeExhausted, err)
	require.NoError(t, one.Close())
	require.Zero(t, r.directories)
	require.Empty(t, r.watches)
}

func TestClose(t *testing.T) {
	r := New(Limits{})
	w := watch(t, r, t.TempDir(), true)
	failed := make(chan error)
	go func() {
		_, err := w.Next(context.Background())
		failed <- err
	}()
	r.Close()
	requireCode(t, nestbox.CodeUnavailable, <-failed)
	require.NoError(t, w.Close())
	_, err := r.Watch("/", false)
	requireCode(t, nestbox.CodeUnavailable, err)
}

// TestCloseWhileBusy closes watches in the midst of what they do.
func TestCloseWhileBusy(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	require.NoError(t, os.Mkdir(root, 0o755))
	stop := make(chan struct{})
	var churner sync.WaitGroup
	churner.Go(func() {
		c := newChurn(root, 3, 1, 1)
		for {
			select {
			case <-stop:
				return
			default:
				c.run(10)
			}
		}
	})
	r := New(Limits{})
	for range 100 {
		w, err := r.Watch(root, true)
		require.NoError(t, err)
		_, err = w.Next(t.Context())
		require.NoError(t, err)
		require.NoError(t, w.Close())
		_, err = w.Next(t.Context())
		for err == nil {
			_, err = w.Next(t.Context())
		}
		requireCode(t, nestbox.CodeCanceled, err)
	}
	close(stop)
	churner.Wait()
	require.Zero(t, r.directories)
}

func TestNextEndsWithItsContext(t *testing.T) {
	w := watch(t, New(Limits{}), t.TempDir(), false)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := w.Next(ctx)
	requireCode(t, nestbox.CodeCanceled, err)
}

func TestKernelsFilesAreRefused(t *testing.T) {
	for _, path := range []string{"/proc", "/proc/self/status", "/sys"} {
		_, err := New(Limits{}).Watch(path, false)
		requireCode(t, nestbox.CodeInvalid, err)
	}
}

func TestEndsWithRoot(t *testing.T) {
	for name, tc := range map[string]struct {
		end  func(dir string) error
		last nestbox.FileEventType
	}{
		"Removed": {os.Remove, nestbox.FileRemove},
		"Moved":   {func(dir string) error { return os.Rename(dir, dir+"2") }, nestbox.FileRename},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "d")
			require.NoError(t, os.Mkdir(dir, 0o755))
			w := watch(t, New(Limits{}), dir, true)
			require.NoError(t, tc.end(dir))
			events := next(t, w)
			require.Equal(t, nestbox.FileEvent{Type: tc.last, Path: dir, Directory: true}, events[len(events)-1])
			_, err := w.Next(t.Context())
			require.Equal(t, io.EOF, err)
		})
	}
}

func requireCode(t *testing.T, code nestbox.Code, err error) {
	t.Helper()
	var e *nestbox.Error
	require.True(t, errors.As(err, &e), "%v", err)
	require.Equal(t, code, e.Code, "%v", err)
}
