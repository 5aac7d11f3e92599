package hostagent

import (
	"context"
	"errors"
	"net"
	"sync"
	"syscall"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// connections are the open connections into one sandbox. A sandbox that ends
// sends no FIN to its peers, so the host cuts them itself.
type connections struct {
	mu   sync.Mutex
	open map[*connection]struct{} // nil once cut
}

func newConnections() *connections {
	return &connections{open: map[*connection]struct{}{}}
}

type connection struct {
	net.Conn
	set *connections
}

// Close closes the connection and forgets it.
func (c *connection) Close() error {
	c.set.mu.Lock()
	delete(c.set.open, c)
	c.set.mu.Unlock()
	return c.Conn.Close()
}

// CloseWrite ends the sending side, where the connection below can.
func (c *connection) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Close()
}

func (cs *connections) add(conn net.Conn) (net.Conn, error) {
	c := &connection{Conn: conn, set: cs}
	cs.mu.Lock()
	cut := cs.open == nil
	if !cut {
		cs.open[c] = struct{}{}
	}
	cs.mu.Unlock()
	if cut {
		_ = conn.Close()
		return nil, nestbox.Errorf(nestbox.CodeInvalidState, "sandbox is not running")
	}
	return c, nil
}

// cut closes all connections and lets no new one come.
func (cs *connections) cut() {
	cs.mu.Lock()
	open := cs.open
	cs.open = nil
	cs.mu.Unlock()
	for c := range open {
		_ = c.Conn.Close()
	}
}

// lent is the guest of a running capsule as it is lent to others: its ports
// are dialled from the host where that works.
type lent struct {
	guest.Guest
	sandbox     sandbox.Sandbox
	connections *connections
}

// Dial tries the sandbox's own address first, which costs no hop inside, and
// then, for programs that listen on loopback only, goes through envd.
func (l lent) Dial(ctx context.Context, port uint16) (net.Conn, error) {
	if port == sandbox.EnvdPort {
		return nil, nestbox.Errorf(nestbox.CodeDenied, "port %d belongs to the capsule's daemon", port)
	}
	conn, err := l.sandbox.Dial(ctx, port)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return l.Guest.Dial(ctx, port) // its connection is tracked like every one to envd
	}
	if err != nil {
		return nil, err
	}
	return l.connections.add(conn)
}
