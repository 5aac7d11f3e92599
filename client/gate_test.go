package client_test

import (
	"bytes"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

// gate is a buffer that tells when it holds some number of bytes.
type gate struct {
	reached chan struct{}

	mu   sync.Mutex
	buf  bytes.Buffer
	want int
}

func newGate(want int) *gate { return &gate{reached: make(chan struct{}), want: want} }

func (g *gate) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	before := g.buf.Len()
	g.buf.Write(p)
	if before < g.want && g.buf.Len() >= g.want {
		close(g.reached)
	}
	return len(p), nil
}

func (g *gate) String() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.buf.String()
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

// awaitRefusal returns when nothing listens any more.
func awaitRefusal(t *testing.T, c *client.Client) {
	t.Helper()
	require.Eventually(t, func() bool {
		_, err := c.Health(testContext(t))
		return nestbox.CodeOf(err) == nestbox.CodeUnavailable
	}, testTimeout, 10*time.Millisecond)
}

// listenAgain takes an address that was in use a moment ago.
func listenAgain(t *testing.T, addr string) net.Listener {
	t.Helper()
	var l net.Listener
	require.Eventually(t, func() (ok bool) {
		var err error
		l, err = net.Listen("tcp", addr)
		return err == nil
	}, testTimeout, 10*time.Millisecond)
	return l
}

// cutter is a listener whose connections break after so many bytes, in the
// middle of whatever that is.
type cutter struct {
	net.Listener
	budget func() int
}

func (c cutter) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &cutConn{Conn: conn, left: c.budget()}, nil
}

type cutConn struct {
	net.Conn
	left int
}

func (c *cutConn) Write(p []byte) (int, error) {
	if len(p) <= c.left {
		c.left -= len(p)
		return c.Conn.Write(p)
	}
	n, _ := c.Conn.Write(p[:c.left])
	c.left = 0
	_ = c.Conn.Close()
	return n, net.ErrClosed
}
