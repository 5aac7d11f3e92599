package reserve

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestReserve(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r := New(dir)
	r.Give() // there is none yet
	held := func() int64 {
		var info unix.Stat_t
		require.NoError(t, unix.Stat(filepath.Join(dir, "reserve"), &info))
		return info.Blocks * 512
	}
	for range 2 {
		require.NoError(t, r.Keep())
		require.GreaterOrEqual(t, held(), int64(size))
	}
	r.GiveIfFull() // it is not
	require.GreaterOrEqual(t, held(), int64(size))
	for left := int64(size); left > 0; left -= piece {
		require.InDelta(t, left, held(), 64<<10)
		r.Give()
	}
	r.Give()
	require.Zero(t, held())
	require.NoError(t, r.Keep())
	require.GreaterOrEqual(t, held(), int64(size))
}

// TestReserveFollowsNoLink: what somebody put in its place is left alone.
func TestReserveFollowsNoLink(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	target := filepath.Join(dir, "target")
	require.NoError(t, os.WriteFile(target, []byte("precious"), 0o600))
	require.NoError(t, os.Symlink(target, filepath.Join(dir, "reserve")))
	r := New(dir)
	require.Error(t, r.Keep())
	r.Give()
	text, err := os.ReadFile(target)
	require.NoError(t, err)
	require.Equal(t, "precious", string(text))
}
