package guestrpc

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// byPieces is a connection that is read in pieces of given sizes.
type byPieces struct {
	net.Conn
	content io.Reader
	sizes   []int
	reads   int
}

func (c *byPieces) Read(p []byte) (int, error) {
	size := c.sizes[c.reads%len(c.sizes)]
	c.reads++
	return c.content.Read(p[:min(size, len(p))])
}

func TestReadAheadKeepsContent(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		content := make([]byte, rapid.IntRange(0, 300_000).Draw(t, "length"))
		_, _ = rand.NewChaCha8([32]byte{3}).Read(content)
		sizes := rapid.SliceOfN(rapid.SampledFrom([]int{50, 4096, 70_000, 1 << 20}), 1, 5)
		inner := &byPieces{content: bytes.NewReader(content), sizes: sizes.Draw(t, "read")}
		asked := sizes.Draw(t, "asked")
		conn := &readAheadConn{Conn: inner}
		var got []byte
		var err error
		for i := 0; err == nil; i++ {
			p := make([]byte, asked[i%len(asked)])
			var n int
			n, err = conn.Read(p)
			got = append(got, p[:n]...)
		}
		require.Equal(t, io.EOF, err)
		require.True(t, bytes.Equal(content, got), "%d bytes of %d, or others", len(got), len(content))
	})
}

// TestReadAheadReadsLarge reads bulk by 4 KiB, and then small requests.
func TestReadAheadReadsLarge(t *testing.T) {
	t.Parallel()
	const size = 8 << 20
	inner := &byPieces{content: bytes.NewReader(make([]byte, size)), sizes: []int{1 << 30}}
	conn := &readAheadConn{Conn: inner}
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{conn}, make([]byte, 4096))
	require.NoError(t, err)
	require.EqualValues(t, size, n)
	require.Less(t, inner.reads, size/readAhead+5)

	inner = &byPieces{content: bytes.NewReader(make([]byte, 100_000)), sizes: []int{100}}
	conn = &readAheadConn{Conn: inner}
	for range 500 {
		_, err := conn.Read(make([]byte, 4096))
		require.NoError(t, err)
		require.Nil(t, conn.buf, "small requests take no memory")
	}
}
