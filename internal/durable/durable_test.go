package durable_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox/internal/durable"
)

func TestWriteFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "f")
	require.NoError(t, durable.WriteFile(path, []byte("old"), 0o600))
	require.NoError(t, durable.WriteFile(path, []byte("new"), 0o666))
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o666), info.Mode())
	require.Error(t, durable.WriteFile(filepath.Join(path, "x"), nil, 0o600))
	require.FileExists(t, path)
}

// TestConcurrentWriters: a reader sees one of the contents, whole.
func TestConcurrentWriters(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	var wg sync.WaitGroup
	for _, c := range "abcdefgh" {
		wg.Go(func() {
			for range 20 {
				if err := durable.WriteFile(path, []byte(strings.Repeat(string(c), 10_000)), 0o600); err != nil {
					t.Error(err)
				}
				text, err := os.ReadFile(path)
				if err != nil || len(text) != 10_000 || strings.Count(string(text), string(text[0])) != 10_000 {
					t.Errorf("half a file: %d bytes, %v", len(text), err)
				}
			}
		})
	}
	wg.Wait()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 1, "nothing is left")
}

func TestRemove(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "f")
	require.NoError(t, durable.Remove(path))
	require.NoError(t, durable.WriteFile(path, nil, 0o600))
	require.NoError(t, durable.Remove(path))
	require.NoFileExists(t, path)
}
