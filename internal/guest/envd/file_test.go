package envd

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/guesttest"
)

// fileGuest is a guest of which only the files are used.
type fileGuest struct {
	guest.Guest
	files guest.Files
}

func (g fileGuest) Files() guest.Files { return g.files }

func TestFiles(t *testing.T) {
	t.Parallel()
	guesttest.RunFiles(t, func(*testing.T) guest.Guest { return fileGuest{files: newFiles()} })
}

func writeFile(t *testing.T, path, content string) error {
	t.Helper()
	_, err := newFiles().Write(t.Context(), path, strings.NewReader(content), guest.WriteOptions{})
	return err
}

func requireContent(t *testing.T, path, want string) {
	t.Helper()
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, want, string(got))
}

func TestWriteFollowsSymlinks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	require.NoError(t, os.MkdirAll(at("x/y"), 0o755))
	require.NoError(t, os.WriteFile(at("target"), []byte("old"), 0o640))
	for name, target := range map[string]string{
		"relative": "target",
		"absolute": at("target"),
		"chain":    "relative",
		"dangling": "new/deep/file",
		"loop":     "loop",
		"todir":    "x",
		"l":        "x/y",
		"x/y/up":   "../up-target", // of /l/up it is x/up-target, not up-target
	} {
		require.NoError(t, os.Symlink(target, at(name)))
	}
	for _, name := range []string{"relative", "absolute", "chain"} {
		require.NoError(t, writeFile(t, at(name), name))
		requireContent(t, at("target"), name)
	}
	st, err := os.Stat(at("target"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o640), st.Mode().Perm())
	require.NoError(t, writeFile(t, at("dangling"), "made"))
	requireContent(t, at("new/deep/file"), "made")
	require.NoError(t, writeFile(t, at("l/up"), "up"))
	requireContent(t, at("x/up-target"), "up")
	require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(writeFile(t, at("loop"), "")))
	require.Equal(t, nestbox.CodeConflict, nestbox.CodeOf(writeFile(t, at("todir"), "")))
	for _, name := range []string{"relative", "absolute", "chain", "dangling", "loop", "todir"} {
		st, err := os.Lstat(at(name))
		require.NoError(t, err)
		require.Equal(t, os.ModeSymlink, st.Mode().Type(), "%s is still a symlink", name)
	}
}

func TestListDoesNotFollowSymlinks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(dir+"/d/sub", 0o755))
	require.NoError(t, os.Symlink("d", dir+"/link"))
	require.NoError(t, os.Symlink("..", dir+"/d/parent"))
	require.NoError(t, os.Symlink("nowhere", dir+"/broken"))
	entries, err := newFiles().List(t.Context(), dir, 10)
	require.NoError(t, err)
	got := map[string]string{}
	for _, e := range entries {
		got[strings.TrimPrefix(e.Path, dir+"/")] = string(e.Type) + e.SymlinkTarget
	}
	require.Equal(t, map[string]string{
		"d": "directory", "d/sub": "directory", "d/parent": "symlink..", "link": "symlinkd", "broken": "symlinknowhere",
	}, got)
	entries, err = newFiles().List(t.Context(), dir+"/link", 1)
	require.NoError(t, err)
	require.Equal(t, dir+"/link/parent", entries[0].Path)
}

// TestNothingBlocks would hang on a FIFO without a writer.
func TestNothingBlocks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, syscall.Mkfifo(dir+"/fifo", 0o600))
	socket, err := net.Listen("unix", dir+"/socket")
	require.NoError(t, err)
	defer socket.Close()
	for _, name := range []string{"fifo", "socket"} {
		_, _, err := newFiles().Read(t.Context(), dir+"/"+name, 0)
		require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err), "%v", err)
		require.Equal(t, nestbox.CodeConflict, nestbox.CodeOf(writeFile(t, dir+"/"+name, "x")))
		info, err := newFiles().Stat(t.Context(), dir+"/"+name)
		require.NoError(t, err)
		require.Equal(t, nestbox.FileTypeOther, info.Type)
		require.NoError(t, newFiles().Remove(t.Context(), dir+"/"+name))
	}
}

func TestNamesThatAreNotUTF8(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(dir+"/a\xffb", nil, 0o600))
	require.NoError(t, os.Symlink("\xfe", dir+"/link"))
	entries, err := newFiles().List(t.Context(), dir, 1)
	require.NoError(t, err)
	require.Len(t, entries, 2)
	require.Equal(t, "a\U0010FEFFb", entries[0].Name)
	require.Equal(t, dir+"/a\U0010FEFFb", entries[0].Path)
	require.Equal(t, "\U0010FEFE", entries[1].SymlinkTarget)
	require.NoError(t, newFiles().Remove(t.Context(), entries[0].Path))
	require.NoFileExists(t, dir+"/a\xffb")
}

func TestRemoveLeavesSymlinkTarget(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(dir+"/keep/f", 0o755))
	require.NoError(t, os.Symlink("keep", dir+"/link"))
	require.NoError(t, newFiles().Remove(t.Context(), dir+"/link"))
	_, err := os.Lstat(dir + "/keep/f")
	require.NoError(t, err)
}

func TestRemoveSparesTheKernelsFiles(t *testing.T) {
	t.Parallel()
	link := t.TempDir() + "/link"
	require.NoError(t, os.Symlink("/proc/self", link))
	for _, path := range []string{"/proc/self/fdinfo", "/proc/self/status", "/proc/self/fd/", link + "/fdinfo"} {
		err := newFiles().Remove(t.Context(), path)
		require.Equal(t, nestbox.CodeDenied, nestbox.CodeOf(err), path)
		require.ErrorContains(t, err, "belongs to the kernel", path)
	}
	require.NoError(t, newFiles().Remove(t.Context(), "/proc/none/such"))
	require.NoError(t, newFiles().Remove(t.Context(), link), "the link itself is nobody else's")
}

func TestDiskFull(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(dir+"/f", []byte("old"), 0o600))
	full := os.NewSyscallError("write", syscall.ENOSPC)
	require.Equal(t, nestbox.CodeExhausted, nestbox.CodeOf(writeError("/f", full)))
	require.Equal(t, nestbox.CodeExhausted, nestbox.CodeOf(fileError("/f", &os.PathError{Op: "write", Path: "/f", Err: syscall.EDQUOT})))

	// The content's error stands in for the disk's.
	_, err := newFiles().Write(t.Context(), dir+"/a/b/f", iotest.ErrReader(fileError("/f", full)), guest.WriteOptions{})
	require.Equal(t, nestbox.CodeExhausted, nestbox.CodeOf(err))
	_, err = newFiles().Write(t.Context(), dir+"/f", iotest.ErrReader(fileError("/f", full)), guest.WriteOptions{})
	require.Equal(t, nestbox.CodeExhausted, nestbox.CodeOf(err))
	requireContent(t, dir+"/f", "old")
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, left, 1)
}

// TestOverwrite is what is left where a file cannot be replaced.
func TestOverwrite(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(dir+"/f", []byte("old and longer"), 0o600))
	temp, err := os.Create(dir + "/temp")
	require.NoError(t, err)
	defer temp.Close()
	_, err = temp.WriteString("new")
	require.NoError(t, err)
	require.NoError(t, overwrite(dir+"/f", temp))
	requireContent(t, dir+"/f", "new")
}

func TestDialLoopback(t *testing.T) {
	t.Parallel()
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			require.Contains(t, address, "::1", "a machine may be without IPv6 only: %v", err)
			continue
		}
		port := uint16(listener.Addr().(*net.TCPAddr).Port)
		conn, err := dialLoopback(t.Context(), port)
		require.NoError(t, err)
		require.NoError(t, conn.Close())
		require.NoError(t, listener.Close())
	}
	// A port that is bound, so that nobody else gets it, and not listened on.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	require.NoError(t, unix.Bind(fd, &unix.SockaddrInet4{}))
	bound, err := unix.Getsockname(fd)
	require.NoError(t, err)
	_, err = dialLoopback(t.Context(), uint16(bound.(*unix.SockaddrInet4).Port))
	require.Equal(t, nestbox.CodeUnavailable, nestbox.CodeOf(err))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = dialLoopback(ctx, 9)
	require.Equal(t, nestbox.CodeCanceled, nestbox.CodeOf(err))
}
