package guesttest

import (
	"context"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// RunWatch tests the Files.Watch of what newGuest returns, which must have
// /bin/sh and coreutils.
func RunWatch(t *testing.T, newGuest func(t *testing.T) guest.Guest) {
	for name, test := range map[string]func(*testing.T, *watched){
		"Directory":        testWatchDirectory,
		"NotBelow":         testWatchNotBelow,
		"NewDirectories":   testWatchNewDirectories,
		"MovedDirectories": testWatchMovedDirectories,
		"ThroughAPI":       testWatchThroughAPI,
		"File":             testWatchFile,
		"Symlink":          testWatchSymlink,
		"RootGone":         testWatchRootGone,
		"Refused":          testWatchRefused,
		"Ends":             testWatchEnds,
		"Several":          testWatchSeveral,
		"CopyOfTree":       testWatchCopyOfTree,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGuest(t)
			test(t, &watched{t: t, g: g, dir: newDir(t, g.Files())})
		})
	}
}

// watched is a directory of a guest in which things happen.
type watched struct {
	t   *testing.T
	g   guest.Guest
	dir string
}

// sh runs a script in the directory.
func (w *watched) sh(script string) {
	w.t.Helper()
	output(w.t, w.g.Processes(), "cd "+w.dir+" && "+script)
}

func (w *watched) watch(path string, recursive bool) guest.FileWatch {
	w.t.Helper()
	watch, err := w.g.Files().Watch(w.t.Context(), path, recursive)
	require.NoError(w.t, err)
	w.t.Cleanup(func() { _ = watch.Close() })
	return watch
}

func (w *watched) next(watch guest.FileWatch) []nestbox.FileEvent {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	events, err := watch.Next(ctx)
	require.NoError(w.t, err)
	require.NotEmpty(w.t, events)
	return slices.Clone(events)
}

// expect reads events as long as it takes until all that are wanted have come, and
// requires that there were no others, and that they came in that order.
func (w *watched) expect(watch guest.FileWatch, want ...nestbox.FileEvent) {
	w.t.Helper()
	var got []nestbox.FileEvent
	for len(got) < len(want) {
		for _, e := range w.next(watch) {
			if e.Type == nestbox.FileWrite && len(got) > 0 && got[len(got)-1] == e {
				continue // a second write of the same may be told, or not
			}
			got = append(got, e)
		}
		require.Equal(w.t, want[:min(len(got), len(want))], got)
	}
}

func (w *watched) event(kind nestbox.FileEventType, name string) nestbox.FileEvent {
	return nestbox.FileEvent{Type: kind, Path: w.dir + "/" + name}
}

func (w *watched) ofDir(kind nestbox.FileEventType, name string) nestbox.FileEvent {
	return nestbox.FileEvent{Type: kind, Path: w.dir + "/" + name, Directory: true}
}

func (w *watched) renamed(name, to string, directory bool) nestbox.FileEvent {
	return nestbox.FileEvent{Type: nestbox.FileRename, Path: w.dir + "/" + name, To: w.dir + "/" + to, Directory: directory}
}

func testWatchDirectory(t *testing.T, w *watched) {
	w.sh("echo old > old")
	watch := w.watch(w.dir, false)
	w.sh("echo new > f")
	w.expect(watch, w.event(nestbox.FileCreate, "f"), w.event(nestbox.FileWrite, "f"))
	w.sh("echo more >> old")
	w.expect(watch, w.event(nestbox.FileWrite, "old"))
	w.sh("chmod 600 f")
	w.expect(watch, w.event(nestbox.FileChmod, "f"))
	w.sh("mv f g")
	w.expect(watch, w.renamed("f", "g", false))
	w.sh("mv g old")
	w.expect(watch, w.renamed("g", "old", false))
	w.sh("rm old")
	w.expect(watch, w.event(nestbox.FileRemove, "old"))
	w.sh("ln -s nowhere link && rm link")
	w.expect(watch, w.event(nestbox.FileCreate, "link"), w.event(nestbox.FileRemove, "link"))
	w.sh("chmod 700 .")
	w.expect(watch, nestbox.FileEvent{Type: nestbox.FileChmod, Path: w.dir, Directory: true})
	w.sh("mkdir d && mv d e && rmdir e")
	w.expect(watch, w.ofDir(nestbox.FileCreate, "d"), w.renamed("d", "e", true), w.ofDir(nestbox.FileRemove, "e"))
}

func testWatchNotBelow(t *testing.T, w *watched) {
	w.sh("mkdir d")
	watch := w.watch(w.dir, false)
	w.sh("echo x > d/f; mkdir new; echo x > new/f; echo > last")
	w.expect(watch, w.ofDir(nestbox.FileCreate, "new"), w.event(nestbox.FileCreate, "last"), w.event(nestbox.FileWrite, "last"))
}

// testWatchNewDirectories makes directories, and at once what is in them.
func testWatchNewDirectories(t *testing.T, w *watched) {
	w.sh("mkdir -p there/before")
	watch := w.watch(w.dir, true)
	w.sh("echo x > there/before/f")
	w.expect(watch, w.event(nestbox.FileCreate, "there/before/f"), w.event(nestbox.FileWrite, "there/before/f"))
	const trees = 50
	w.sh("for i in $(seq 50); do mkdir -p $i/a/b && echo x > $i/a/b/f; done")
	created, written := map[string]bool{}, map[string]bool{}
	for len(written) < trees {
		for _, e := range w.next(watch) {
			switch e.Type {
			case nestbox.FileCreate:
				require.False(t, created[e.Path], "%s is created twice", e.Path)
				created[e.Path] = true
			case nestbox.FileWrite:
				require.True(t, created[e.Path], "%s is written before it is created", e.Path)
				written[e.Path] = true
			default:
				require.Fail(t, "unexpected", "%+v", e)
			}
		}
	}
	require.Len(t, created, 4*trees)
	w.sh("echo y > 50/a/b/f")
	for e := range written { // what of the last is still to come
		delete(written, e)
	}
	for !written[w.dir+"/50/a/b/f"] {
		for _, e := range w.next(watch) {
			written[e.Path] = e.Type == nestbox.FileWrite
		}
	}
}

func testWatchMovedDirectories(t *testing.T, w *watched) {
	w.sh("mkdir -p in/a/b out/c/d && echo x > out/c/d/f")
	in := w.dir + "/in"
	watch := w.watch(in, true)
	w.sh("mv in/a in/z")
	w.expect(watch, w.renamed("in/a", "in/z", true))
	w.sh(": > in/z/b/f")
	w.expect(watch, w.event(nestbox.FileCreate, "in/z/b/f"))
	w.sh("mv in/z out && : > out/z/b/g && mkdir in/z") // no event of what is out
	w.expect(watch, w.ofDir(nestbox.FileRename, "in/z"), w.ofDir(nestbox.FileCreate, "in/z"))
	w.sh("mv out/c in/z")
	w.expect(watch, w.ofDir(nestbox.FileCreate, "in/z/c"), w.ofDir(nestbox.FileCreate, "in/z/c/d"),
		w.event(nestbox.FileCreate, "in/z/c/d/f"), w.event(nestbox.FileWrite, "in/z/c/d/f"))
	w.sh("rm in/z/c/d/f && rm -r in/z/c")
	w.expect(watch, w.event(nestbox.FileRemove, "in/z/c/d/f"), w.ofDir(nestbox.FileRemove, "in/z/c/d"), w.ofDir(nestbox.FileRemove, "in/z/c"))
}

// testWatchThroughAPI: a file is told by its own name, however it is written.
func testWatchThroughAPI(t *testing.T, w *watched) {
	watch := w.watch(w.dir, true)
	f := w.dir + "/f"
	put(t, w.g.Files(), f, "x")
	w.expect(watch, w.event(nestbox.FileCreate, "f"), w.event(nestbox.FileWrite, "f"))
	put(t, w.g.Files(), f, "y")
	w.expect(watch, w.event(nestbox.FileWrite, "f"))
	_, err := w.g.Files().Mkdir(t.Context(), w.dir+"/d")
	require.NoError(t, err)
	w.expect(watch, w.ofDir(nestbox.FileCreate, "d"))
	put(t, w.g.Files(), w.dir+"/d/f", "x")
	w.expect(watch, w.event(nestbox.FileCreate, "d/f"), w.event(nestbox.FileWrite, "d/f"))
	put(t, w.g.Files(), w.dir+"/e/f", "x")
	w.expect(watch, w.ofDir(nestbox.FileCreate, "e"), w.event(nestbox.FileCreate, "e/f"), w.event(nestbox.FileWrite, "e/f"))
	require.NoError(t, w.g.Files().Remove(t.Context(), f))
	w.expect(watch, w.event(nestbox.FileRemove, "f"))
}

func testWatchFile(t *testing.T, w *watched) {
	w.sh("echo x > f")
	watch := w.watch(w.dir+"/f", true)
	w.sh("echo x > other; echo y >> f")
	w.expect(watch, w.event(nestbox.FileWrite, "f"))
	put(t, w.g.Files(), w.dir+"/f", "z")
	w.expect(watch, w.event(nestbox.FileWrite, "f"))
	w.sh("mv other f") // as an editor does
	w.expect(watch, w.event(nestbox.FileCreate, "f"))
	w.sh("chmod 600 f; mv f g; echo x > g")
	w.expect(watch, w.event(nestbox.FileChmod, "f"), w.event(nestbox.FileRename, "f"))
	w.sh("echo x > f; rm f")
	w.expect(watch, w.event(nestbox.FileCreate, "f"), w.event(nestbox.FileWrite, "f"), w.event(nestbox.FileRemove, "f"))
	w.sh("rm -r ../${PWD##*/}")
	_, err := watch.Next(t.Context())
	require.Equal(t, io.EOF, err)
}

func testWatchSymlink(t *testing.T, w *watched) {
	w.sh("mkdir real && ln -s real link && echo x > real/f && ln -s real/f flink")
	dir, file := w.watch(w.dir+"/link", true), w.watch(w.dir+"/flink", false)
	w.sh("echo y >> real/f")
	w.expect(dir, w.event(nestbox.FileWrite, "link/f"))
	w.expect(file, w.event(nestbox.FileWrite, "flink"))
	w.sh("ln -s .. real/up && mkdir real/d && : > real/d/f") // links below are not followed
	w.expect(dir, w.event(nestbox.FileCreate, "link/up"), w.ofDir(nestbox.FileCreate, "link/d"), w.event(nestbox.FileCreate, "link/d/f"))
}

func testWatchRootGone(t *testing.T, w *watched) {
	for script, last := range map[string]nestbox.FileEvent{
		"rmdir r1":        w.ofDir(nestbox.FileRemove, "r1"),
		"mv r2 elsewhere": w.ofDir(nestbox.FileRename, "r2"),
		"rm -r above3":    w.ofDir(nestbox.FileRemove, "above3/r3"),
	} {
		w.sh("mkdir -p r1 r2 above3/r3")
		watch := w.watch(last.Path, true)
		w.sh(script)
		w.expect(watch, last)
		for range 2 {
			_, err := watch.Next(t.Context())
			require.Equal(t, io.EOF, err)
		}
	}
}

func testWatchRefused(t *testing.T, w *watched) {
	w.sh("echo > f; ln -s loop loop; ln -s /proc proc")
	for path, code := range map[string]nestbox.Code{
		w.dir + "/missing":     nestbox.CodeNotFound,
		w.dir + "/f/below":     nestbox.CodeNotFound,
		"relative":             nestbox.CodeInvalid,
		"":                     nestbox.CodeInvalid,
		w.dir + "/loop":        nestbox.CodeInvalid,
		"/proc":                nestbox.CodeInvalid,
		"/proc/self/fdinfo":    nestbox.CodeInvalid,
		w.dir + "/proc":        nestbox.CodeInvalid,
		w.dir + "/nul\x00byte": nestbox.CodeInvalid,
	} {
		_, err := w.g.Files().Watch(t.Context(), path, true)
		requireCode(t, err, code)
	}
}

func testWatchEnds(t *testing.T, w *watched) {
	ctx, cancel := context.WithCancel(t.Context())
	watch, err := w.g.Files().Watch(ctx, w.dir, true)
	require.NoError(t, err)
	cancel() // of the call only
	w.sh(": > f")
	w.expect(watch, w.event(nestbox.FileCreate, "f"))
	ctx, cancel = context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err = watch.Next(ctx)
	requireCode(t, err, nestbox.CodeTimeout)
	require.NoError(t, watch.Close())
	require.NoError(t, watch.Close())
	_, err = watch.Next(t.Context())
	requireCode(t, err, nestbox.CodeCanceled, nestbox.CodeTimeout)
}

func testWatchSeveral(t *testing.T, w *watched) {
	var watches []guest.FileWatch
	for range 8 {
		watches = append(watches, w.watch(w.dir, true))
	}
	w.sh("mkdir d && : > d/f")
	for i, watch := range watches {
		w.expect(watch, w.ofDir(nestbox.FileCreate, "d"), w.event(nestbox.FileCreate, "d/f"))
		if i%2 == 0 {
			require.NoError(t, watch.Close())
		}
	}
	w.sh(": > d/g")
	w.expect(watches[1], w.event(nestbox.FileCreate, "d/g"))
}

// churnScript changes a tree of few names, by numbers that only look random.
const churnScript = `
n=%d
next() { n=$(( (n * 1103515245 + 12345) %% 2147483648 )); r=$(( n / 65536 %% $1 )); }
path() { next 4; p=$r; for _ in 1 2; do next 4; p=$p/$r; next 3; [ $r = 0 ] && break; done; }
for _ in $(seq 120); do
  path; a=$p; path; b=$p; next 6
  case $r in
  0|1) mkdir -p $a ;;
  2) echo x > $a ;;
  3) mv -T $a $b ;;
  4) cp -r $a $b ;;
  5) rm -rf $a ;;
  esac 2>/dev/null
done
:`

// testWatchCopyOfTree keeps a copy of a tree by what is told of it.
func testWatchCopyOfTree(t *testing.T, w *watched) {
	root := w.dir + "/root"
	w.sh("mkdir root")
	watch := w.watch(root, true)
	c := &TreeCopy{Entries: map[string]bool{}}
	for round := range 4 {
		w.sh("cd root && " + fmt.Sprintf(churnScript, 7*round+1))
		mark := func(name string) string {
			put(t, w.g.Files(), root+"/"+name, "")
			return root + "/" + name
		}
		c.Follow(t, watch, mark, func() map[string]bool { return w.tree(root) })
	}
}

func (w *watched) tree(root string) map[string]bool {
	w.t.Helper()
	entries, err := w.g.Files().List(w.t.Context(), root, nestbox.MaxListDepth)
	require.NoError(w.t, err)
	tree := map[string]bool{}
	for _, e := range entries {
		tree[e.Path] = e.Type == nestbox.FileTypeDirectory
	}
	return tree
}
