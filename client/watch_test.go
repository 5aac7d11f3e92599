package client_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

func TestWatch(t *testing.T) {
	t.Parallel()
	ctx := testContext(t)
	capsule, _ := newCapsule(t)
	dir := filepath.Join(t.TempDir(), "d")
	_, err := capsule.Files.Watch(ctx, dir, client.WatchOptions{})
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
	require.NoError(t, os.Mkdir(dir, 0o755))
	w, err := capsule.Files.Watch(ctx, dir, client.WatchOptions{Recursive: true})
	require.NoError(t, err)
	defer w.Close()
	expect := func(want ...nestbox.FileEvent) {
		t.Helper()
		for _, want := range want {
			got, err := w.Next(ctx)
			require.NoError(t, err)
			require.Equal(t, want, got)
		}
	}
	require.NoError(t, capsule.Files.Write(ctx, dir+"/a/f", strings.NewReader("abc"), client.WriteOptions{}))
	expect(
		nestbox.FileEvent{Type: nestbox.FileCreate, Path: dir + "/a", Directory: true},
		nestbox.FileEvent{Type: nestbox.FileCreate, Path: dir + "/a/f"},
		nestbox.FileEvent{Type: nestbox.FileWrite, Path: dir + "/a/f"})
	require.NoError(t, os.Rename(dir+"/a", dir+"/b"))
	require.NoError(t, os.RemoveAll(dir))
	expect(
		nestbox.FileEvent{Type: nestbox.FileRename, Path: dir + "/a", To: dir + "/b", Directory: true},
		nestbox.FileEvent{Type: nestbox.FileRemove, Path: dir + "/b/f"},
		nestbox.FileEvent{Type: nestbox.FileRemove, Path: dir + "/b", Directory: true},
		nestbox.FileEvent{Type: nestbox.FileRemove, Path: dir, Directory: true})
	_, err = w.Next(ctx)
	require.Equal(t, io.EOF, err)
}

// TestWatchSurvives: a watch goes on when its connection was lost and when the
// server was restarted, and says that something may have been missed.
func TestWatchSurvives(t *testing.T) {
	t.Parallel()
	ctx := testContext(t)
	capsule, server := newCapsule(t)
	dir := t.TempDir()
	w, err := capsule.Files.Watch(ctx, dir, client.WatchOptions{})
	require.NoError(t, err)
	defer w.Close()
	for i, lose := range []func(){server.Cut, server.Restart} {
		lose()
		got, err := w.Next(ctx)
		require.NoError(t, err)
		require.Equal(t, nestbox.FileEvent{Type: nestbox.FileOverflow, Path: dir}, got)
		path := fmt.Sprintf("%s/%d", dir, i)
		require.NoError(t, os.WriteFile(path, nil, 0o644))
		got, err = w.Next(ctx)
		require.NoError(t, err)
		require.Equal(t, nestbox.FileEvent{Type: nestbox.FileCreate, Path: path}, got)
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	_, err = w.Next(ended)
	require.Equal(t, nestbox.CodeCanceled, nestbox.CodeOf(err))
	require.NoError(t, capsule.Destroy(ctx))
	_, err = w.Next(ctx)
	require.Equal(t, nestbox.CodeInvalidState, nestbox.CodeOf(err))
}
