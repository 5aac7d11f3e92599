// Package forward carries any number of TCP connections to one port of a capsule over
// one connection, a WebSocket's: with flow control for each, half-closing, and why one
// could not be made. It is what both ends of port-forward speak: yamux, version 0, whose
// streams begin with a status in the answering direction.
//
// It may import the root package, internal/splice and yamux only.
package forward

import (
	"context"
	"io"
	"net"
	"sync"
	"time"

	"github.com/libp2p/go-yamux/v5"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/splice"
)

const (
	// MaxConnections is how many connections a session carries at a time.
	MaxConnections = 64
	// MaxMessage bounds a message of the WebSocket, in bytes.
	MaxMessage = 128 << 10

	maxWindow = 1 << 20 // what is on its way to a slow reader, of each connection
	aliveIn   = 20 * time.Second
	writeIn   = time.Minute // until a peer that takes nothing is gone

	statusOK     = 0
	statusFailed = 1 // what is wrong follows
	maxReason    = 1 << 10
)

// Memory is what a session may hold; nil = no matter how much. Take fails if there is
// not so much left.
type Memory interface {
	Take(bytes int) error
	Give(bytes int)
}

type memoryManager struct{ Memory }

func (m memoryManager) ReserveMemory(size int, _ uint8) error { return m.Take(size) }
func (m memoryManager) ReleaseMemory(size int)                { m.Give(size) }
func (memoryManager) Done()                                   {}

func config() *yamux.Config {
	c := yamux.DefaultConfig()
	c.AcceptBacklog = MaxConnections
	c.MaxIncomingStreams = MaxConnections
	c.KeepAliveInterval, c.ConnectionWriteTimeout = aliveIn, writeIn
	c.MaxStreamWindowSize = maxWindow
	c.LogOutput = io.Discard
	return c
}

// Serve answers the connections that the peer makes over conn by those that dial makes,
// until conn or ctx ends, and closes all of them.
func Serve(ctx context.Context, conn net.Conn, memory Memory, dial func(context.Context) (net.Conn, error)) error {
	var manager func() (yamux.MemoryManager, error)
	if memory != nil {
		manager = func() (yamux.MemoryManager, error) { return memoryManager{memory}, nil }
	}
	session, err := yamux.Server(conn, config(), manager)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer context.AfterFunc(ctx, func() { _ = session.Close() })()
	var open sync.WaitGroup
	defer open.Wait()
	defer cancel()
	for {
		stream, err := session.AcceptStream()
		if err != nil {
			return err
		}
		open.Go(func() { answer(ctx, &connection{stream}, dial) })
	}
}

// answer makes the other side of a connection.
func answer(ctx context.Context, c net.Conn, dial func(context.Context) (net.Conn, error)) {
	target, err := dial(ctx)
	if err != nil {
		text := nestbox.MessageOf(err)
		_, _ = c.Write(append([]byte{statusFailed}, text[:min(len(text), maxReason)]...)) // it may be gone
		_ = splice.CloseWrite(c)
		_, _ = io.Copy(io.Discard, c) // until the peer has seen it
		_ = c.Close()
		return
	}
	if _, err := c.Write([]byte{statusOK}); err != nil {
		_ = c.Close()
		_ = target.Close()
		return
	}
	splice.Both(ctx, c, target)
}

// connection is a stream as a connection: closing it while it is in use is a reset.
type connection struct{ *yamux.Stream }

// Close implements net.Conn.
func (c *connection) Close() error { return c.Reset() }

// Session is the side that makes connections. It is safe for concurrent use.
type Session struct{ session *yamux.Session }

// NewSession begins a session over conn, which it closes in the end.
func NewSession(conn net.Conn) (*Session, error) {
	session, err := yamux.Client(conn, config(), nil)
	if err != nil {
		return nil, err
	}
	return &Session{session}, nil
}

// Closed reports whether the session is over.
func (s *Session) Closed() bool { return s.session.IsClosed() }

// Close ends the session and all of its connections.
func (s *Session) Close() error { return s.session.Close() }

// Dial makes a connection. CodeUnavailable: it cannot be made, and what is wrong; or
// the session is over.
func (s *Session) Dial(ctx context.Context) (net.Conn, error) {
	stream, err := s.session.OpenStream(ctx)
	if err != nil {
		return nil, lost(ctx, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = stream.Reset() })
	var status [1]byte
	_, err = stream.Write(nil) // so that the peer hears of it
	if err == nil {
		_, err = io.ReadFull(stream, status[:])
	}
	if err == nil && status[0] != statusOK {
		reason, _ := io.ReadAll(io.LimitReader(stream, maxReason))
		err = nestbox.Errorf(nestbox.CodeUnavailable, "%s", reason)
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		_ = stream.Reset()
		return nil, lost(ctx, err)
	}
	return &connection{stream}, nil
}

func lost(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nestbox.Errorf(nestbox.CodeCanceled, "canceled: %w", context.Cause(ctx))
	}
	if nestbox.CodeOf(err) == nestbox.CodeUnavailable {
		return err
	}
	return nestbox.Errorf(nestbox.CodeUnavailable, "the connection to the server was lost: %w", err)
}
