package cli_test

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Capsules here have the files of this machine, so both sides of a copy can be
// looked at.

func writeFile(t *testing.T, path, content string, mode os.FileMode) {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, []byte(content), mode))
	require.NoError(t, os.Chmod(path, mode))
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(data)
}

func TestCopyFiles(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	here, there := t.TempDir(), t.TempDir()
	big := strings.Repeat("0123456789abcdef", 1<<17) // 2 MiB
	writeFile(t, here+"/tool", big, 0o750)
	at := time.Unix(1234567890, 500_000_000)
	require.NoError(t, os.Chtimes(here+"/tool", at, at))

	s.ok("cp", here+"/tool", id+":"+there+"/new/dir/tool")
	require.Equal(t, big, readFile(t, there+"/new/dir/tool"))
	info, err := os.Stat(there + "/new/dir/tool")
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o750), info.Mode().Perm())
	require.Equal(t, at, info.ModTime())

	s.ok("cp", here+"/tool", id+":"+there+"/od\xffd")
	require.Equal(t, big, readFile(t, there+"/od\xffd"))
	s.ok("cp", id+":"+there+"/od\xffd", here+"/o\xe9")
	require.Equal(t, big, readFile(t, here+"/o\xe9"))

	s.ok("cp", here+"/tool", id+":"+there)
	require.Equal(t, big, readFile(t, there+"/tool"), "into an existing directory")
	s.ok("cp", here+"/tool", id+":"+there+"/made/")
	require.Equal(t, big, readFile(t, there+"/made/tool"), "a slash means a directory")

	s.ok("cp", id+":"+there+"/tool", here+"/back")
	require.Equal(t, big, readFile(t, here+"/back"))
	info, err = os.Stat(here + "/back")
	require.NoError(t, err)
	require.Equal(t, at.Unix(), info.ModTime().Unix())
	require.Equal(t, fs.FileMode(0o750), info.Mode().Perm())
	writeFile(t, there+"/other", "other", 0o600)
	s.ok("cp", id+":"+there+"/other", here)
	require.Equal(t, "other", readFile(t, here+"/other"))

	s.start(io.MultiReader(strings.NewReader("from "), strings.NewReader("stdin")), "cp", "-", id+":"+there+"/in").wait(0)
	require.Equal(t, "from stdin", readFile(t, there+"/in"))
	require.Equal(t, "from stdin", s.ok("cp", id+":"+there+"/in", "-"))
}

func TestCopyFailures(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	here, there := t.TempDir(), t.TempDir()
	writeFile(t, here+"/file", "x", 0o644)
	require.Contains(t, s.fails(1, "cp", id+":"+there+"/none", here+"/x"), "no such file")
	require.NoFileExists(t, here+"/x")
	require.Contains(t, s.fails(1, "cp", here+"/none", id+":"+there), "no such file")
	require.Contains(t, s.fails(1, "cp", here, id+":"+there), "is a directory: use -r")
	require.Contains(t, s.fails(1, "cp", id+":"+there, here), "is a directory: use -r")
	require.Contains(t, s.fails(1, "cp", here+"/file", id+":relative"), "is not absolute")
	require.Contains(t, s.fails(1, "cp", here+"/file", here+"/file2"), "neither side is in a capsule")
	require.Contains(t, s.fails(1, "cp", id+":/a", id+":/b"), "between capsules")
	left, err := filepath.Glob(here + "/*")
	require.NoError(t, err)
	require.Equal(t, []string{here + "/file"}, left, "nothing half-done is left")
}

// TestCutUpload breaks off in the middle: the old file stays.
func TestCutUpload(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	there := t.TempDir()
	writeFile(t, there+"/file", "old", 0o644)
	r, w := io.Pipe()
	run := s.start(r, "cp", "-", id+":"+there+"/file")
	_, err := w.Write(bytes.Repeat([]byte("x"), 1<<20))
	require.NoError(t, err)
	require.NoError(t, w.CloseWithError(io.ErrUnexpectedEOF))
	run.wait(1)
	require.Equal(t, "old", readFile(t, there+"/file"))
}

func TestCopyTrees(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	here, there := t.TempDir(), t.TempDir()
	deep := strings.Repeat("/d", 70) // deeper than one listing goes
	writeFile(t, here+"/tree/a/one", "1", 0o644)
	writeFile(t, here+"/tree/b c/two", "2", 0o755)
	writeFile(t, here+"/tree"+deep+"/three", "3", 0o600)
	require.NoError(t, os.MkdirAll(here+"/tree/empty", 0o755))

	s.ok("cp", "-r", here+"/tree", id+":"+there)
	require.Equal(t, "1", readFile(t, there+"/tree/a/one"))
	require.Equal(t, "2", readFile(t, there+"/tree/b c/two"))
	require.Equal(t, "3", readFile(t, there+"/tree"+deep+"/three"))
	require.DirExists(t, there+"/tree/empty")

	require.NoError(t, os.Symlink("../a/one", there+"/tree/b c/link"))
	s.ok("cp", "-r", id+":"+there+"/tree", here+"/copy")
	require.Equal(t, "3", readFile(t, here+"/copy"+deep+"/three"))
	require.DirExists(t, here+"/copy/empty")
	target, err := os.Readlink(here + "/copy/b c/link")
	require.NoError(t, err)
	require.Equal(t, "../a/one", target)
	s.ok("cp", "-r", id+":"+there+"/tree", here+"/copy") // again, into it
	require.Equal(t, "1", readFile(t, here+"/copy/tree/a/one"))

	// What cannot be copied is named, and the rest is copied all the same.
	socket, err := net.Listen("unix", here+"/tree/socket")
	require.NoError(t, err)
	defer socket.Close()
	said := s.fails(1, "cp", "-r", here+"/tree", id+":"+there+"/second")
	require.Contains(t, said, "socket is a socket and was left out")
	require.Contains(t, said, "not everything was copied")
	require.Equal(t, "1", readFile(t, there+"/second/a/one"))
}

// TestCopyKeeps: a tree arrives as it was, in both directions.
func TestCopyKeeps(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	here, there := t.TempDir(), t.TempDir()
	writeFile(t, here+"/tree/private/file", "1", 0o400)
	require.NoError(t, os.Symlink("private/file", here+"/tree/link"))
	require.NoError(t, os.Symlink("/nowhere", here+"/tree/dangling"))
	require.NoError(t, os.Symlink("private", here+"/tree/dirlink"))
	require.NoError(t, os.Link(here+"/tree/private/file", here+"/tree/hard"))
	require.NoError(t, unix.Mkfifo(here+"/tree/fifo", 0o600))
	writeFile(t, here+"/tree/not\xffutf8", "2", 0o644)
	require.NoError(t, os.Chown(here+"/tree/private", 77, 88))
	at := time.Unix(1_500_000_000, 42)
	for _, name := range []string{"private/file", "private", "not\xffutf8", ""} {
		require.NoError(t, os.Chtimes(here+"/tree/"+name, at, at))
	}
	require.NoError(t, os.Chmod(here+"/tree/private", 0o700))
	require.NoError(t, os.Symlink("tree", here+"/to-tree"))
	list := func(dir, without string) string {
		out, err := exec.CommandContext(t.Context(), "sh", "-c", "cd "+dir+" && find . ! -type l -printf '%p %m %T@ %n %s "+without+"\\n' -o -printf '%p %l\\n' | sort").CombinedOutput()
		require.NoError(t, err, "%s", out)
		return string(out)
	}
	for i, how := range []struct{ flag, source, compare string }{
		{"-r", "tree", ""}, {"-a", "tree", "%U:%G"}, {"-r", "to-tree", ""},
	} {
		in, back := fmt.Sprintf("%s/in%d", there, i), fmt.Sprintf("%s/back%d", here, i)
		s.ok("cp", how.flag, here+"/"+how.source, id+":"+in)
		require.Equal(t, list(here+"/tree", how.compare), list(in, how.compare))
		s.ok("cp", how.flag, id+":"+in, back)
		require.Equal(t, list(here+"/tree", how.compare), list(back, how.compare))
		require.NoError(t, os.Symlink(in, in+"-link"))
		s.ok("cp", how.flag, id+":"+in+"-link", back+"-by-link")
		require.Equal(t, list(here+"/tree", how.compare), list(back+"-by-link", how.compare))
	}
	s.ok("cp", "-r", "--owner", "1", here+"/tree", id+":"+there+"/owned")
	st, err := os.Stat(there + "/owned/private/file")
	require.NoError(t, err)
	require.Equal(t, uint32(1), st.Sys().(*syscall.Stat_t).Uid)
	require.Contains(t, s.fails(1, "cp", "-a", "--owner", "1", here+"/tree", id+":"+there+"/x"), "different things")
	require.Contains(t, s.fails(1, "cp", "-r", "--owner", "1", id+":"+there, here+"/x"), "into a capsule")
}

// TestDownloadStaysInside has a symlink on this side where the capsule has a
// directory, as a hostile capsule could arrange by changing while it is copied.
func TestDownloadStaysInside(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	here, there, outside := t.TempDir(), t.TempDir(), t.TempDir()
	writeFile(t, there+"/tree/dir/file", "hostile", 0o644)
	require.NoError(t, os.MkdirAll(here+"/copy", 0o755))
	require.NoError(t, os.Symlink(outside, here+"/copy/dir"))
	require.Contains(t, s.fails(1, "cp", "-r", id+":"+there+"/tree/.", here+"/copy"), "something else is there")
	require.NoFileExists(t, outside+"/file")
}
