package client

import (
	"context"
	"net"
	"sync"

	"github.com/coder/websocket"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/forward"
)

// Tunnel makes TCP connections to one port inside a capsule, over one WebSocket,
// which is made again when it is lost. It is safe for concurrent use.
type Tunnel struct {
	ports *Ports
	port  uint16

	turn    chan struct{} // holds a token while the session is made
	mu      sync.Mutex
	session *forward.Session // nil = none yet
	closed  bool
}

// Tunnel returns a tunnel to a port, which has no connection yet. Close it after use.
func (p *Ports) Tunnel(port uint16) *Tunnel {
	return &Tunnel{ports: p, port: port, turn: make(chan struct{}, 1)}
}

// Dial makes a connection, which can be closed in one direction (CloseWrite). It waits
// for a server that is away, as long as the Config allows. CodeUnavailable: nothing
// listens on the port, or the server cannot be reached.
func (t *Tunnel) Dial(ctx context.Context) (net.Conn, error) {
	session, err := t.connected(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := session.Dial(ctx)
	if err != nil && session.Closed() && ctx.Err() == nil { // it was lost just now
		if session, err = t.connected(ctx); err == nil {
			conn, err = session.Dial(ctx)
		}
	}
	return conn, err
}

// Close cuts all connections.
func (t *Tunnel) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	if t.session != nil {
		return t.session.Close()
	}
	return nil
}

// connected returns a session that is not over, as far as is known.
func (t *Tunnel) connected(ctx context.Context) (*forward.Session, error) {
	select {
	case t.turn <- struct{}{}:
		defer func() { <-t.turn }()
	case <-ctx.Done():
		return nil, contextError(ctx)
	}
	if session, err := t.current(); session != nil || err != nil {
		return session, err
	}
	var lost *pauses
	for {
		session, err := t.connect(ctx)
		if err == nil {
			return session, t.keep(session)
		}
		c := t.ports.c
		if !c.mayComeBack(ctx, t.ports.capsule, err) {
			return nil, firstError(ctx, err)
		}
		if lost == nil {
			lost = newPauses(c.patience(err))
		}
		if !lost.next(ctx) {
			return nil, firstError(ctx, err)
		}
	}
}

func (t *Tunnel) current() (*forward.Session, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.closed:
		return nil, nestbox.Errorf(nestbox.CodeCanceled, "the tunnel is closed")
	case t.session != nil && !t.session.Closed():
		return t.session, nil
	}
	return nil, nil
}

func (t *Tunnel) keep(session *forward.Session) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		_ = session.Close()
		return nestbox.Errorf(nestbox.CodeCanceled, "the tunnel is closed")
	}
	t.session = session
	return nil
}

// connect makes a session.
func (t *Tunnel) connect(ctx context.Context) (*forward.Session, error) {
	path := t.ports.path(t.port) + "/forward"
	ws, err := t.ports.c.socket(ctx, path, nil)
	if err != nil {
		return nil, err
	}
	conn := websocket.NetConn(context.Background(), ws, websocket.MessageBinary)
	ws.SetReadLimit(forward.MaxMessage)
	return forward.NewSession(conn)
}
