package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/image/rootfs"
)

// with returns a fill with one file in it.
func with(t *testing.T, text string) func(context.Context, *rootfs.Tree, string) error {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	require.NoError(t, w.WriteHeader(&tar.Header{Name: "etc/text", Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(text))}))
	_, err := io.WriteString(w, text)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return func(ctx context.Context, tree *rootfs.Tree, _ string) error {
		return tree.Add(ctx, rootfs.Layer{Name: "test", Archive: bytes.NewReader(b.Bytes()), Size: int64(b.Len())})
	}
}

func TestMake(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	store, err := NewStore(Config{Dir: dir})
	require.NoError(t, err)

	one, err := store.Make(t.Context(), with(t, "one"))
	require.NoError(t, err)
	require.Positive(t, one.Size)
	two, err := store.Make(t.Context(), with(t, "two"))
	require.NoError(t, err)
	require.NotEqual(t, one.Name, two.Name)
	again, err := store.Make(t.Context(), with(t, "one"))
	require.NoError(t, err)
	require.Equal(t, one, again, "the same files are the same image")

	root, err := store.Acquire(one.Name)
	require.NoError(t, err)
	require.FileExists(t, root.EROFS)
	require.Empty(t, root.Upper)

	// Three uses of the first: it stays until the last is over.
	store.Release(one.Name)
	store.Release(one.Name)
	require.FileExists(t, root.EROFS)
	store.Release(one.Name)
	require.NoFileExists(t, root.EROFS)
	_, err = store.Acquire(one.Name)
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))

	// A new process keeps what is used, once it knows.
	later, err := NewStore(Config{Dir: dir})
	require.NoError(t, err)
	later.Use(two.Name)
	later.Sweep()
	_, err = later.Acquire(two.Name)
	require.NoError(t, err)
}

func TestMakeAtOnce(t *testing.T) {
	t.Parallel()
	store, err := NewStore(Config{Dir: t.TempDir()})
	require.NoError(t, err)
	var group sync.WaitGroup
	names := make([]string, 8)
	for i := range names {
		group.Go(func() {
			info, err := store.Make(t.Context(), with(t, "same"))
			if err == nil {
				names[i] = info.Name
			}
		})
	}
	group.Wait()
	for _, name := range names {
		require.Equal(t, names[0], name)
		require.NotEmpty(t, name)
	}
}

func TestMakeFails(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	store, err := NewStore(Config{Dir: dir})
	require.NoError(t, err)
	before := entries(t, dir)
	mine := errors.New("mine")
	_, err = store.Make(t.Context(), func(context.Context, *rootfs.Tree, string) error { return mine })
	require.ErrorIs(t, err, mine)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = store.Make(ctx, with(t, "x"))
	require.Equal(t, nestbox.CodeCanceled, nestbox.CodeOf(err))
	require.Equal(t, before, entries(t, dir), "nothing is left")
	_, err = store.Acquire("sha256-..")
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
}

func TestMakeOnAFullDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8m"))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, 0)) })
	store, err := NewStore(Config{Dir: dir})
	require.NoError(t, err)
	before := entries(t, dir)
	_, err = store.Make(t.Context(), with(t, string(make([]byte, 16<<20))))
	require.ErrorIs(t, err, syscall.ENOSPC)
	require.Equal(t, nestbox.CodeExhausted, nestbox.CodeOf(err))
	require.Equal(t, before, entries(t, dir), "nothing is left")
}

func entries(t *testing.T, dir string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, "*"))
	require.NoError(t, err)
	_, err = os.Stat(dir)
	require.NoError(t, err)
	return found
}
