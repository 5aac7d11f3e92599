package guesttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// RunFiles tests the Files of what newGuest returns. All it sees is the
// interface, so that it also tests a guest whose files are not this machine's.
func RunFiles(t *testing.T, newGuest func(t *testing.T) guest.Guest) {
	for name, test := range map[string]func(*testing.T, guest.Files, string){
		"WriteAndRead":        testWriteAndRead,
		"LargeFile":           testLargeFile,
		"ReplaceKeepsMode":    testReplaceKeepsMode,
		"WriteMakesParents":   testWriteMakesParents,
		"WriteThroughSymlink": testWriteThroughSymlink,
		"WriteOverOther":      testWriteOverOther,
		"WriteFails":          testWriteFails,
		"WriteCanceled":       testWriteCanceled,
		"WriteOwner":          testWriteOwner,
		"WriteConditions":     testWriteConditions,
		"WriteRace":           testWriteRace,
		"Append":              testAppend,
		"ReadFrom":            testReadFrom,
		"ReadOther":           testReadOther,
		"ReadWhileReplaced":   testReadWhileReplaced,
		"ReadPseudo":          testReadPseudo,
		"Stat":                testStat,
		"List":                testList,
		"ListMany":            testListMany,
		"Mkdir":               testMkdir,
		"Remove":              testRemove,
		"Names":               testNames,
		"BadPaths":            testBadPaths,
		"Concurrent":          testConcurrent,
		"Archive":             testArchive,
		"ArchiveContents":     testArchiveContents,
		"ArchiveFails":        testArchiveFails,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			files := newGuest(t).Files()
			test(t, files, newDir(t, files))
		})
	}
}

// newDir returns a new directory of the guest, which goes with the test.
func newDir(t *testing.T, files guest.Files) string {
	t.Helper()
	dir := "/tmp/nestbox-guesttest-" + nestbox.RandomHex(8)
	_, err := files.Mkdir(t.Context(), dir)
	require.NoError(t, err)
	t.Cleanup(func() { _ = files.Remove(context.WithoutCancel(t.Context()), dir) })
	return dir
}

// requireCode requires a *nestbox.Error with one of codes.
func requireCode(t *testing.T, err error, codes ...nestbox.Code) {
	t.Helper()
	require.Error(t, err)
	var e *nestbox.Error
	require.ErrorAs(t, err, &e)
	require.Contains(t, codes, e.Code, "error: %v", err)
	require.NotEmpty(t, e.Message)
}

func put(t *testing.T, files guest.Files, path, content string) {
	t.Helper()
	_, err := files.Write(t.Context(), path, strings.NewReader(content), guest.WriteOptions{})
	require.NoError(t, err)
}

func get(t *testing.T, files guest.Files, path string) string {
	t.Helper()
	r, _, err := files.Read(t.Context(), path, 0)
	require.NoError(t, err)
	content, err := io.ReadAll(r)
	require.NoError(t, err)
	require.NoError(t, r.Close())
	return string(content)
}

// paths returns what a listing of everything below dir shows, without dir.
func paths(t *testing.T, files guest.Files, dir string) []string {
	t.Helper()
	entries, err := files.List(t.Context(), dir, nestbox.MaxListDepth)
	require.NoError(t, err)
	out := []string{}
	for _, e := range entries {
		out = append(out, strings.TrimPrefix(e.Path, dir+"/"))
	}
	return out
}

func testWriteAndRead(t *testing.T, files guest.Files, dir string) {
	for i, content := range []string{"", "x", "line\n", "\x00\xff\xfe binary \r\n", strings.Repeat("nine by t", 40_000)} {
		path := fmt.Sprintf("%s/f%d", dir, i)
		info, err := files.Write(t.Context(), path, strings.NewReader(content), guest.WriteOptions{})
		require.NoError(t, err)
		require.Equal(t, path, info.Path)
		require.Equal(t, nestbox.FileTypeFile, info.Type)
		require.EqualValues(t, len(content), info.Size)
		require.EqualValues(t, 0o644, info.Mode)

		r, read, err := files.Read(t.Context(), path, 0)
		require.NoError(t, err)
		require.EqualValues(t, len(content), read.Size)
		got, err := io.ReadAll(iotest.OneByteReader(io.LimitReader(r, 3)))
		require.NoError(t, err)
		rest, err := io.ReadAll(r)
		require.NoError(t, err)
		require.NoError(t, r.Close())
		require.Equal(t, content, string(got)+string(rest))
	}
	require.Equal(t, []string{"f0", "f1", "f2", "f3", "f4"}, paths(t, files, dir), "nothing else is left behind")
}

func testLargeFile(t *testing.T, files guest.Files, dir string) {
	const size = 20<<20 + 12345
	sum := func(r io.Reader) []byte {
		h := newHash()
		n, err := io.Copy(h, r)
		require.NoError(t, err)
		require.EqualValues(t, size, n)
		return h.Sum(nil)
	}
	content := func() io.Reader { return io.LimitReader(rand.NewChaCha8([32]byte{1}), size) }
	_, err := files.Write(t.Context(), dir+"/large", content(), guest.WriteOptions{})
	require.NoError(t, err)
	r, info, err := files.Read(t.Context(), dir+"/large", 0)
	require.NoError(t, err)
	defer r.Close()
	require.EqualValues(t, size, info.Size)
	require.Equal(t, sum(content()), sum(r))
}

func testReplaceKeepsMode(t *testing.T, files guest.Files, dir string) {
	info, err := files.Write(t.Context(), dir+"/f", strings.NewReader("old and longer"), guest.WriteOptions{Mode: 0o4751})
	require.NoError(t, err)
	require.EqualValues(t, 0o4751, info.Mode)
	info, err = files.Write(t.Context(), dir+"/f", strings.NewReader("new"), guest.WriteOptions{})
	require.NoError(t, err)
	require.EqualValues(t, 0o4751, info.Mode, "an existing file keeps its mode")
	require.EqualValues(t, 3, info.Size)
	require.Equal(t, "new", get(t, files, dir+"/f"))
	at := time.Unix(1234567890, 987654000).UTC()
	info, err = files.Write(t.Context(), dir+"/f", strings.NewReader("new"), guest.WriteOptions{Mode: 0o600, ModifiedAt: at})
	require.NoError(t, err)
	require.EqualValues(t, 0o600, info.Mode)
	require.Equal(t, at, info.ModifiedAt)
}

func testWriteMakesParents(t *testing.T, files guest.Files, dir string) {
	put(t, files, dir+"/a/b/c/f", "deep")
	require.Equal(t, []string{"a", "a/b", "a/b/c", "a/b/c/f"}, paths(t, files, dir))
	info, err := files.Stat(t.Context(), dir+"/a/b")
	require.NoError(t, err)
	require.EqualValues(t, 0o755, info.Mode)
}

func testWriteOverOther(t *testing.T, files guest.Files, dir string) {
	_, err := files.Mkdir(t.Context(), dir+"/d")
	require.NoError(t, err)
	put(t, files, dir+"/f", "x")
	for _, path := range []string{dir, dir + "/d", "/dev/null", dir + "/f/below", dir + "/f/far/below"} {
		_, err := files.Write(t.Context(), path, strings.NewReader("y"), guest.WriteOptions{})
		requireCode(t, err, nestbox.CodeConflict)
	}
	require.Equal(t, []string{"d", "f"}, paths(t, files, dir))
	require.Equal(t, "x", get(t, files, dir+"/f"))
}

func testWriteFails(t *testing.T, files guest.Files, dir string) {
	put(t, files, dir+"/f", "old")
	broken := func(err error) io.Reader {
		return io.MultiReader(strings.NewReader(strings.Repeat("new", 1<<20)), iotest.ErrReader(err))
	}
	_, err := files.Write(t.Context(), dir+"/f", broken(errors.New("cut")), guest.WriteOptions{})
	requireCode(t, err, nestbox.CodeCanceled)
	_, err = files.Write(t.Context(), dir+"/f", broken(io.ErrUnexpectedEOF), guest.WriteOptions{})
	requireCode(t, err, nestbox.CodeCanceled)
	_, err = files.Write(t.Context(), dir+"/x/y/f", broken(nestbox.Errorf(nestbox.CodeTooLarge, "too large")), guest.WriteOptions{})
	requireCode(t, err, nestbox.CodeTooLarge)
	require.Equal(t, "old", get(t, files, dir+"/f"))
	requireOnly(t, files, dir, "f")
}

// requireOnly waits until dir holds only the given paths: the far side of a
// cut upload learns of it a little later.
func requireOnly(t *testing.T, files guest.Files, dir string, want ...string) {
	t.Helper()
	var got []string
	require.Eventually(t, func() bool {
		got = paths(t, files, dir)
		return strings.Join(got, " ") == strings.Join(want, " ")
	}, 30*time.Second, 20*time.Millisecond, "%s holds other things than %q: %q", dir, want, &got)
}

func testWriteCanceled(t *testing.T, files guest.Files, dir string) {
	put(t, files, dir+"/f", "old")
	ctx, cancel := context.WithCancel(t.Context())
	content, feed := io.Pipe()
	defer feed.Close()
	done := make(chan error, 1)
	go func() {
		_, err := files.Write(ctx, dir+"/f", content, guest.WriteOptions{})
		done <- err
	}()
	_, err := feed.Write(bytes.Repeat([]byte("new"), 1<<20))
	require.NoError(t, err)
	cancel()
	// The next read of the content is the first chance to see it.
	go func() { _, _ = io.Copy(feed, zeros{}) }()
	requireCode(t, <-done, nestbox.CodeCanceled)
	_ = content.Close()
	require.Equal(t, "old", get(t, files, dir+"/f"))
	requireOnly(t, files, dir, "f")

	_, err = files.Write(ctx, dir+"/g", strings.NewReader("x"), guest.WriteOptions{})
	requireCode(t, err, nestbox.CodeCanceled)
	_, err = files.Stat(ctx, dir+"/f")
	requireCode(t, err, nestbox.CodeCanceled)
	requireOnly(t, files, dir, "f")
}

// zeros never ends.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func testWriteOwner(t *testing.T, files guest.Files, dir string) {
	for _, user := range []string{"no-such-user-here", "1234567890"} {
		_, err := files.Write(t.Context(), dir+"/a/f", strings.NewReader("x"), guest.WriteOptions{User: user})
		requireCode(t, err, nestbox.CodeInvalid)
	}
	requireOnly(t, files, dir)

	me, err := files.Stat(t.Context(), dir)
	require.NoError(t, err)
	info, err := files.Write(t.Context(), dir+"/a/f", strings.NewReader("x"), guest.WriteOptions{User: me.Owner})
	require.NoError(t, err)
	require.Equal(t, me.Owner, info.Owner)
	if me.Owner != "root" {
		return // only root may give files away
	}
	const other = "nobody" // whom every system has
	info, err = files.Write(t.Context(), dir+"/b/c/f", strings.NewReader("x"), guest.WriteOptions{User: other})
	require.NoError(t, err)
	require.Equal(t, other, info.Owner)
	parent, err := files.Stat(t.Context(), dir+"/b")
	require.NoError(t, err)
	require.Equal(t, other, parent.Owner, "parents that are made have the owner too")
	info, err = files.Write(t.Context(), dir+"/b/c/f", strings.NewReader("new"), guest.WriteOptions{})
	require.NoError(t, err)
	require.Equal(t, other, info.Owner, "an existing file keeps its owner")
	info, err = files.Write(t.Context(), dir+"/b/c/f", strings.NewReader("new"), guest.WriteOptions{User: "root"})
	require.NoError(t, err)
	require.Equal(t, "root", info.Owner)
}

func testReadOther(t *testing.T, files guest.Files, dir string) {
	for path, code := range map[string]nestbox.Code{
		dir:               nestbox.CodeInvalid,
		"/dev/null":       nestbox.CodeInvalid,
		"/dev/zero":       nestbox.CodeInvalid,
		"/":               nestbox.CodeInvalid,
		dir + "/none":     nestbox.CodeNotFound,
		dir + "/none/not": nestbox.CodeNotFound,
	} {
		_, _, err := files.Read(t.Context(), path, 0)
		requireCode(t, err, code)
	}
	put(t, files, dir+"/f", "x")
	_, _, err := files.Read(t.Context(), dir+"/f/below", 0)
	requireCode(t, err, nestbox.CodeNotFound)
}

// testReadWhileReplaced requires that a reader keeps the file that it opened.
func testReadWhileReplaced(t *testing.T, files guest.Files, dir string) {
	old := strings.Repeat("old ", 3<<20)
	put(t, files, dir+"/f", old)
	r, _, err := files.Read(t.Context(), dir+"/f", 0)
	require.NoError(t, err)
	defer r.Close()
	first := make([]byte, 4)
	_, err = io.ReadFull(r, first)
	require.NoError(t, err)
	put(t, files, dir+"/f", "new")
	rest, err := io.ReadAll(r)
	require.NoError(t, err)
	require.True(t, string(first)+string(rest) == old, "got %d bytes of %d, or others", 4+len(rest), len(old))
	require.Equal(t, "new", get(t, files, dir+"/f"))

	// A reader that is closed early, or whose context ends, is no harm.
	put(t, files, dir+"/f", old)
	ctx, cancel := context.WithCancel(t.Context())
	r, _, err = files.Read(ctx, dir+"/f", 0)
	require.NoError(t, err)
	cancel()
	_, err = io.Copy(io.Discard, r)
	requireCode(t, err, nestbox.CodeCanceled)
	require.NoError(t, r.Close())
	_, err = r.Read(first)
	require.Error(t, err)
}

// testReadPseudo reads a file whose size is not what is in it.
func testReadPseudo(t *testing.T, files guest.Files, _ string) {
	require.Contains(t, get(t, files, "/proc/self/status"), "Pid:")
}

func testStat(t *testing.T, files guest.Files, dir string) {
	put(t, files, dir+"/f", "four")
	info, err := files.Stat(t.Context(), dir+"/f")
	require.NoError(t, err)
	require.Equal(t, "f", info.Name)
	require.Equal(t, dir+"/f", info.Path)
	require.Equal(t, nestbox.FileTypeFile, info.Type)
	require.EqualValues(t, 4, info.Size)
	require.NotEmpty(t, info.Owner)
	require.NotEmpty(t, info.Group)
	require.Empty(t, info.SymlinkTarget)
	require.False(t, info.ModifiedAt.IsZero())

	info, err = files.Stat(t.Context(), dir+"//./x/../")
	require.NoError(t, err)
	require.Equal(t, dir, info.Path)
	require.Equal(t, nestbox.FileTypeDirectory, info.Type)
	info, err = files.Stat(t.Context(), "/dev/null")
	require.NoError(t, err)
	require.Equal(t, nestbox.FileTypeOther, info.Type)
	info, err = files.Stat(t.Context(), "/")
	require.NoError(t, err)
	require.Equal(t, nestbox.FileTypeDirectory, info.Type)
	info, err = files.Stat(t.Context(), "/proc/self/exe")
	require.NoError(t, err)
	require.Equal(t, nestbox.FileTypeSymlink, info.Type, "what a symlink points to is not looked at")
	require.NotEmpty(t, info.SymlinkTarget)
	for _, path := range []string{dir + "/none", dir + "/f/below"} {
		_, err = files.Stat(t.Context(), path)
		requireCode(t, err, nestbox.CodeNotFound)
	}
}

func testMkdir(t *testing.T, files guest.Files, dir string) {
	info, err := files.Mkdir(t.Context(), dir+"/a/b/c")
	require.NoError(t, err)
	require.Equal(t, nestbox.FileTypeDirectory, info.Type)
	require.EqualValues(t, 0o755, info.Mode)
	require.Equal(t, "c", info.Name)
	put(t, files, dir+"/f", "x")
	for _, path := range []string{dir + "/a/b/c", dir + "/a", dir, "/", dir + "/f", dir + "/f/below"} {
		_, err = files.Mkdir(t.Context(), path)
		requireCode(t, err, nestbox.CodeConflict)
	}
	require.Equal(t, []string{"a", "a/b", "a/b/c", "f"}, paths(t, files, dir))
}

func testRemove(t *testing.T, files guest.Files, dir string) {
	put(t, files, dir+"/a/b/f", "x")
	put(t, files, dir+"/g", "x")
	for _, path := range []string{dir + "/a", dir + "/g", dir + "/g", dir + "/none/not", dir + "/a/b"} {
		require.NoError(t, files.Remove(t.Context(), path))
	}
	require.Empty(t, paths(t, files, dir))
	put(t, files, dir+"/f", "x")
	require.NoError(t, files.Remove(t.Context(), dir+"/f/below"), "below a file there is nothing")
	require.Equal(t, "x", get(t, files, dir+"/f"))
	for _, path := range []string{"/", "//", "/tmp/..", "/./"} {
		requireCode(t, files.Remove(t.Context(), path), nestbox.CodeInvalid)
	}
}

func testNames(t *testing.T, files guest.Files, dir string) {
	long := strings.Repeat("n", syscall.NAME_MAX)
	names := []string{" ", "a b", "-rf", "dollar$", "new\nline", "quote\"'", "tab\t", "ünïcödé ☃", "\\", long,
		"caf\uFFFD", nestbox.PathText("caf\xe9"), nestbox.PathText("\U0010FEE9"), nestbox.PathText(strings.Repeat("\xff", syscall.NAME_MAX))}
	for _, name := range names {
		put(t, files, dir+"/"+name, name)
	}
	require.ElementsMatch(t, names, paths(t, files, dir))
	for _, name := range names {
		require.Equal(t, name, get(t, files, dir+"/"+name))
		require.NoError(t, files.Remove(t.Context(), dir+"/"+name))
	}
	require.Empty(t, paths(t, files, dir))
	_, err := files.Write(t.Context(), dir+"/"+long+"n", strings.NewReader(""), guest.WriteOptions{})
	requireCode(t, err, nestbox.CodeInvalid)
}

func testBadPaths(t *testing.T, files guest.Files, dir string) {
	put(t, files, dir+"/f", "x")
	for _, path := range []string{dir + "/f/", dir + "/f/.", dir + "/new/", dir + "/new/..", "/"} {
		_, _, err := files.Read(t.Context(), path, 0)
		requireCode(t, err, nestbox.CodeInvalid)
		_, err = files.Write(t.Context(), path, strings.NewReader("y"), guest.WriteOptions{})
		requireCode(t, err, nestbox.CodeInvalid)
	}
	requireOnly(t, files, dir, "f")
	require.Equal(t, "x", get(t, files, dir+"/f"))
	for _, path := range []string{"", "relative", "./x", "../etc", "/nul\x00", "/" + strings.Repeat("x/", nestbox.MaxPathBytes)} {
		_, _, err := files.Read(t.Context(), path, 0)
		requireCode(t, err, nestbox.CodeInvalid)
		_, err = files.Write(t.Context(), path, strings.NewReader(""), guest.WriteOptions{})
		requireCode(t, err, nestbox.CodeInvalid)
		_, err = files.Stat(t.Context(), path)
		requireCode(t, err, nestbox.CodeInvalid)
		_, err = files.List(t.Context(), path, 1)
		requireCode(t, err, nestbox.CodeInvalid)
		_, err = files.Mkdir(t.Context(), path)
		requireCode(t, err, nestbox.CodeInvalid)
		requireCode(t, files.Remove(t.Context(), path), nestbox.CodeInvalid)
	}
}

// testConcurrent has writers replace one file while readers read it: a reader
// sees one whole content.
func testConcurrent(t *testing.T, files guest.Files, dir string) {
	const writers, rounds, size = 4, 10, 300_000
	content := func(w int) string { return strings.Repeat(string(rune('a'+w)), size) }
	put(t, files, dir+"/f", content(0))
	done := make(chan error, 2*writers)
	for w := range writers {
		go func() {
			var err error
			for i := 0; i < rounds && err == nil; i++ {
				_, err = files.Write(t.Context(), dir+"/f", strings.NewReader(content(w)), guest.WriteOptions{})
			}
			done <- err
		}()
		go func() {
			var err error
			for i := 0; i < rounds && err == nil; i++ {
				err = readWhole(t.Context(), files, dir+"/f", size)
			}
			done <- err
		}()
	}
	for range 2 * writers {
		require.NoError(t, <-done)
	}
	require.Equal(t, []string{"f"}, paths(t, files, dir))
}

func readWhole(ctx context.Context, files guest.Files, path string, size int) error {
	r, _, err := files.Read(ctx, path, 0)
	if err != nil {
		return err
	}
	defer r.Close()
	got, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if len(got) != size || bytes.Count(got, got[:1]) != size {
		return fmt.Errorf("read a mixture of %d bytes", len(got))
	}
	return nil
}
