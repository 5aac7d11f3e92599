package hostagent

import (
	"context"
	"errors"
	"net"
	"syscall"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest/guestrpc"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// lent is the guest of a running capsule as it is lent to others: its ports
// are dialled from the host where that works.
type lent struct {
	*guestrpc.Client
	sandbox sandbox.Sandbox
}

// Dial tries the sandbox's own address first, which costs no hop inside, and
// then, for programs that listen on loopback only, goes through envd.
func (l lent) Dial(ctx context.Context, port uint16) (net.Conn, error) {
	if port == sandbox.EnvdPort {
		return nil, nestbox.Errorf(nestbox.CodeDenied, "port %d belongs to the capsule's daemon", port)
	}
	conn, err := l.DialPast(ctx, func(ctx context.Context) (net.Conn, error) { return l.sandbox.Dial(ctx, port) })
	if errors.Is(err, syscall.ECONNREFUSED) {
		return l.Client.Dial(ctx, port)
	}
	return conn, err
}
