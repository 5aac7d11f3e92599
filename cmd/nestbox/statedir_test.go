package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestSecureStateDir(t *testing.T) {
	t.Parallel()
	mode := func(dir string) os.FileMode {
		info, err := os.Stat(dir)
		require.NoError(t, err)
		return info.Mode().Perm()
	}
	tmp := t.TempDir()
	made := filepath.Join(tmp, "a", "b")
	require.NoError(t, secureStateDir(made))
	require.Equal(t, os.FileMode(0o700), mode(made))
	require.NoError(t, os.WriteFile(filepath.Join(made, "x"), nil, 0o600))
	for _, was := range []os.FileMode{0o755, 0o711, 0o500} {
		require.NoError(t, os.Chmod(made, was))
		require.NoError(t, secureStateDir(made+"/"))
		require.Equal(t, os.FileMode(0o700), mode(made))
	}
	open := filepath.Join(tmp, "open")
	require.NoError(t, os.Mkdir(open, 0o700))
	require.NoError(t, os.Chmod(open, 0o777))
	require.NoError(t, secureStateDir(open), "it is empty")
	require.Equal(t, os.FileMode(0o700), mode(open))

	require.NoError(t, os.Chmod(made, 0o777))
	require.ErrorContains(t, secureStateDir(made), "written by others")
	link := filepath.Join(tmp, "link")
	require.NoError(t, os.Symlink(open, link))
	require.ErrorContains(t, secureStateDir(link), open)
	require.ErrorContains(t, secureStateDir(link+"/"), open)
	file := filepath.Join(tmp, "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	require.ErrorContains(t, secureStateDir(file), "no directory")
	if os.Geteuid() == 0 {
		require.NoError(t, os.Chown(open, 12345, -1))
		require.ErrorContains(t, secureStateDir(open), "12345")
	}
}
