package envd

import (
	"context"
	"net"
	"strconv"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// dialLoopback connects to a TCP port on the loopback of the machine: IPv4
// first, then IPv6. CodeUnavailable if nothing listens there.
func dialLoopback(ctx context.Context, port uint16) (net.Conn, error) {
	if port == 0 {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "port must be 1 to 65535")
	}
	var d net.Dialer
	for _, host := range [...]string{"127.0.0.1", "::1"} {
		conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(port))))
		if err == nil {
			return conn, nil
		}
		if ctx.Err() != nil {
			return nil, guest.ContextError(ctx)
		}
	}
	return nil, nestbox.Errorf(nestbox.CodeUnavailable, "nothing listens on port %d in the capsule", port)
}
