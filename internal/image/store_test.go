package image_test

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/image"
)

func minimal(t *testing.T, dir string) image.Root {
	t.Helper()
	s, err := image.NewStore(image.Config{Dir: dir})
	require.NoError(t, err)
	require.Equal(t, []string{"minimal"}, s.Names())
	root, err := s.Acquire("minimal")
	require.NoError(t, err)
	return root
}

func TestUnknown(t *testing.T) {
	t.Parallel()
	s, err := image.NewStore(image.Config{Dir: t.TempDir()})
	require.NoError(t, err)
	for _, name := range []string{"", "nope", "minimal/..", "../minimal"} {
		_, err = s.Acquire(name)
		require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
		require.EqualError(t, err, "template not found")
	}
}

func TestBuiltOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "building-1", "root"), 0o700), "of a build that was killed")
	first := minimal(t, dir)
	info, err := os.Stat(first.Dir)
	require.NoError(t, err)
	require.Equal(t, first, minimal(t, dir))
	again, err := os.Stat(first.Dir)
	require.NoError(t, err)
	require.True(t, os.SameFile(info, again))
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 1)
}

// TestHalfWritten: a version that is not what its name says is built again.
func TestHalfWritten(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	first := minimal(t, dir)
	passwd := filepath.Join(first.Dir, "etc/passwd")
	want, err := os.ReadFile(passwd)
	require.NoError(t, err)
	require.NoError(t, os.Truncate(passwd, 0))
	for range 2 { // the second clears up
		require.Equal(t, first, minimal(t, dir))
		got, err := os.ReadFile(passwd)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 1)
}

func TestContent(t *testing.T) {
	t.Parallel()
	root := minimal(t, t.TempDir())
	stat := func(path string) (fs.FileMode, uint32) {
		info, err := os.Lstat(filepath.Join(root.Dir, path))
		require.NoError(t, err)
		return info.Mode(), info.Sys().(*syscall.Stat_t).Uid
	}
	for path, want := range map[string]struct {
		mode fs.FileMode
		uid  uint32
	}{
		"": {fs.ModeDir | 0o755, 0}, "root": {fs.ModeDir | 0o700, 0}, "tmp": {fs.ModeDir | fs.ModeSticky | 0o777, 0},
		"home/user": {fs.ModeDir | 0o755, 1000}, "home/user/.profile": {0o644, 1000}, "etc/passwd": {0o644, 0}, "etc/shadow": {0o600, 0},
		image.EnvdPath: {0o755, 0},
	} {
		mode, uid := stat(path)
		require.Equal(t, want.mode, mode, path)
		require.Equal(t, want.uid, uid, path)
	}
	passwd, err := os.ReadFile(filepath.Join(root.Dir, "etc/passwd"))
	require.NoError(t, err)
	require.Contains(t, string(passwd), "\nuser:x:1000:1000:user:/home/user:/bin/bash\n")
	require.Equal(t, image.Bind{Source: "/usr", Target: "/usr"}, root.Binds[0])
	for _, name := range []string{"bin/sh", "bin/bash", "lib"} {
		top, _, _ := strings.Cut(name, "/")
		_, err := os.Lstat(filepath.Join(root.Dir, top))
		require.NoError(t, err, name)
	}
	// What a site may have put below /usr is masked, by directories of ours.
	masks := map[string]string{}
	for _, b := range root.Binds[1:] {
		masks[b.Target] = b.Source
	}
	for _, target := range []string{"/usr/local", "/usr/src"} {
		require.NotEmpty(t, masks[target])
		require.NoError(t, filepath.WalkDir(masks[target], func(path string, e fs.DirEntry, err error) error {
			require.True(t, e.IsDir() || e.Name() == "python", path)
			return err
		}))
	}
}

// Nothing that only root may read on the host is in the template, and nothing
// that tells this host from another with the same packages.
func TestNothingPrivate(t *testing.T) {
	t.Parallel()
	root := minimal(t, t.TempDir())
	for _, path := range []string{"etc/machine-id", "etc/ssh", "etc/ssl/private", "etc/sudoers", "etc/gitconfig", "etc/environment", "etc/crontab", "var/log/x"} {
		require.NoFileExists(t, filepath.Join(root.Dir, path))
	}
	hostname, err := os.Hostname()
	require.NoError(t, err)
	ours := map[string]bool{"etc/shadow": true, "etc/gshadow": true}
	require.NoError(t, filepath.WalkDir(root.Dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(root.Dir, path)
		require.NoError(t, err)
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		require.False(t, bytes.Contains(text, []byte("PRIVATE KEY")), rel)
		if len(hostname) > 8 { // a short one may be a word
			require.False(t, bytes.Contains(text, []byte(hostname)), rel)
		}
		if host, err := os.Stat("/" + rel); err == nil && !ours[rel] {
			require.NotZero(t, host.Mode()&0o004, "/%s of the host is not for all to read", rel)
		}
		return nil
	}))
}

func owner(info fs.FileInfo) *syscall.Stat_t { return info.Sys().(*syscall.Stat_t) }
