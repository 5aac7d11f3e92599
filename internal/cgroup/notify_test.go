package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestNotifier: more files than a user may have inotify instances are watched,
// each is told of its own changes, and nothing is left when the last goes.
func TestNotifier(t *testing.T) {
	t.Parallel()
	const files = 1000
	dir := t.TempDir()
	m := &Mount{unified: true, dirs: map[string]string{"": dir}}
	var watches []*MemoryWatch
	events := func(i int) string { return filepath.Join(dir, fmt.Sprint(i), "memory.events") }
	for i := range files {
		require.NoError(t, os.Mkdir(filepath.Join(dir, fmt.Sprint(i)), 0o700))
		require.NoError(t, os.WriteFile(events(i), nil, 0o600))
		w, err := m.Group(fmt.Sprint(i)).WatchMemory(1)
		require.NoError(t, err)
		watches = append(watches, w)
	}
	_, err := m.Group("0").WatchMemory(1)
	require.ErrorContains(t, err, "watched already")
	_, err = m.Group("none").WatchMemory(1)
	require.ErrorIs(t, err, os.ErrNotExist)

	for _, i := range []int{0, 500, files - 1} {
		require.NoError(t, os.WriteFile(events(i), []byte("x"), 0o600))
		require.NoError(t, watches[i].Wait(0))
	}
	require.NoError(t, watches[1].Wait(time.Nanosecond), "its time is up")

	waited := make(chan error, 1)
	go func() { waited <- watches[2].Wait(0) }()
	require.NoError(t, os.RemoveAll(filepath.Join(dir, "3"))) // a group that is removed first
	for _, w := range watches {
		require.NoError(t, w.Close())
		require.NoError(t, w.Close())
	}
	require.ErrorIs(t, <-waited, os.ErrClosed)
	require.Nil(t, m.events.file)

	w, err := m.Group("4").WatchMemory(1)
	require.NoError(t, err, "and again")
	require.NoError(t, os.WriteFile(events(4), []byte("y"), 0o600))
	require.NoError(t, w.Wait(0))
	require.NoError(t, w.Close())
}
