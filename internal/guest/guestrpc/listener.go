package guestrpc

import (
	"net"

	"github.com/nestbox/nestbox/internal/splice"
)

// The sizes of reads. net/http reads a request by 4 KiB, and an upload by what
// its client has put into one chunk, where in a sandbox each read is expensive.
const (
	largeRead = 64 << 10  // is passed on as it is
	readAhead = 256 << 10 // is read instead of smaller ones, while they are full
)

// ReadAhead returns a listener on inner's connections whose bulk is read in
// large pieces, whatever the size of the reads. It is for servers inside
// sandboxes. A connection that carries little takes no memory for it.
func ReadAhead(inner net.Listener) net.Listener { return readAheadListener{inner} }

type readAheadListener struct{ net.Listener }

// Accept implements net.Listener.
func (l readAheadListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &readAheadConn{Conn: conn}, nil
}

// readAheadConn is a connection that is read by one goroutine at a time.
type readAheadConn struct {
	net.Conn
	buf  []byte // nil = pass reads on
	rest []byte // of buf
}

// Read implements net.Conn.
func (c *readAheadConn) Read(p []byte) (int, error) {
	if len(c.rest) == 0 {
		if c.buf == nil || len(p) >= largeRead {
			return c.pass(p)
		}
		n, err := c.Conn.Read(c.buf)
		c.rest = c.buf[:n]
		if n < len(p) {
			c.buf = nil // the bulk is over; rest keeps its bytes
		}
		if n == 0 || err != nil {
			return copy(p, c.take(len(p))), err
		}
	}
	return copy(p, c.take(len(p))), nil
}

func (c *readAheadConn) pass(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n == len(p) && n > 1 && n < largeRead { // net/http looks for hang-ups with reads of 1 byte
		c.buf = make([]byte, readAhead)
	}
	return n, err
}

func (c *readAheadConn) take(n int) []byte {
	taken := c.rest[:min(n, len(c.rest))]
	c.rest = c.rest[len(taken):]
	return taken
}

// CloseWrite ends the sending side.
func (c *readAheadConn) CloseWrite() error { return splice.CloseWrite(c.Conn) }
