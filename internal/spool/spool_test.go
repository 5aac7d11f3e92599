package spool

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// TestSpool: whatever is written in whatever pieces is read again, and whether it
// is text is known.
func TestSpool(t *testing.T) {
	t.Parallel()
	pool := NewPool(t.TempDir(), 1<<30, 1<<30)
	rapid.Check(t, func(t *rapid.T) {
		s := pool.New("a")
		defer s.Close()
		var want bytes.Buffer
		piece := rapid.OneOf(
			rapid.SliceOfN(rapid.Byte(), 0, 3),
			rapid.Map(rapid.StringN(0, 50, -1), func(s string) []byte { return []byte(s) }),
			rapid.Map(rapid.IntRange(0, inMemory), func(n int) []byte { return bytes.Repeat([]byte("€"), n/3) }),
		)
		for range rapid.IntRange(0, 10).Draw(t, "pieces") {
			b := piece.Draw(t, "piece")
			n, err := s.Write(b)
			require.NoError(t, err)
			require.Equal(t, len(b), n)
			want.Write(b)
		}
		require.EqualValues(t, want.Len(), s.Len())
		require.Equal(t, utf8.Valid(want.Bytes()), s.UTF8())
		for range 2 {
			got, err := io.ReadAll(s.Reader())
			require.NoError(t, err)
			require.True(t, bytes.Equal(want.Bytes(), got))
		}
	})
	require.Zero(t, pool.used)
}

func TestFull(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	pool := NewPool(dir, 3*inMemory, 2*inMemory)
	a, b := pool.New("a"), pool.New("b")
	_, err := a.Write(make([]byte, 2*inMemory))
	require.NoError(t, err)
	_, err = a.Write([]byte("x"))
	require.ErrorIs(t, err, ErrFull, "of its team")
	_, err = b.Write(make([]byte, inMemory))
	require.NoError(t, err, "in memory")
	_, err = b.Write([]byte("x"))
	require.ErrorIs(t, err, ErrFull)
	require.EqualValues(t, inMemory, b.Len())
	require.NoError(t, a.Close())
	require.NoError(t, a.Close())
	_, err = b.Write([]byte("x"))
	require.NoError(t, err)
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, entries, "files have no names")
	require.NoError(t, b.Close())
	require.Zero(t, pool.used)

	c := NewPool(filepath.Join(dir, "missing"), 1<<30, 1<<30).New("a")
	_, err = c.Write(make([]byte, 2*inMemory))
	require.ErrorIs(t, err, os.ErrNotExist)
}
