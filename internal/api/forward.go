package api

import (
	"context"
	"net"
	"net/http"

	"github.com/coder/websocket"

	"github.com/nestbox/nestbox/internal/forward"
	"github.com/nestbox/nestbox/internal/meter"
)

func (s *server) registerForward() {
	op := registerRaw(s, s.raw, operation{
		id: "forwardPort", method: http.MethodGet, path: "/v1/capsules/{id}/ports/{port}/forward", tag: "Ports",
		summary: "Forward TCP connections to a port, over one WebSocket",
		about: "Its binary messages carry a yamux session (version 0), of which the client opens the streams: each is a TCP connection to the port, up to 64 at a time. " +
			"In the answering direction a stream begins with one byte: 0, the connection is made and its bytes follow; 1, it is not, and the reason follows as text. " +
			"Closing a stream for writing closes the sending side of the connection. The key must be in the handshake. `nestbox port-forward` and `Ports.Tunnel` speak it.",
		status: http.StatusSwitchingProtocols, errors: append([]int{http.StatusUpgradeRequired}, capsuleErrors...),
		sample: `nestbox port-forward "$CAPSULE" 5432`,
	}, s.forwardPort)
	op.Responses["101"].Content = nil
}

func (s *server) forwardPort(w http.ResponseWriter, r *http.Request, in *PortPath) error {
	port, err := parsePort(in.Port)
	if err != nil {
		return err
	}
	if err := checkUpgrade(r); err != nil {
		return err
	}
	ctx := r.Context()
	id, err := s.idOf(ctx, callerOf(ctx), in.ID)
	if err == nil {
		err = s.control.Capsules.Ping(ctx, callerOf(ctx), id)
	}
	if err != nil {
		return err
	}
	ws, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
	if err != nil {
		return nil // Accept has answered
	}
	defer func() { _ = ws.CloseNow() }()
	conn := websocket.NetConn(ctx, ws, websocket.MessageBinary)
	ws.SetReadLimit(forward.MaxMessage)
	// It ends when the client leaves, however it does.
	_ = forward.Serve(ctx, conn, requestMemory{ctx}, func(ctx context.Context) (net.Conn, error) {
		return s.control.Ports.Dial(ctx, id, port)
	})
	return nil
}

// requestMemory is what a request may hold.
type requestMemory struct {
	ctx context.Context //nolint:containedctx // of the request
}

// Take implements forward.Memory.
func (m requestMemory) Take(bytes int) error { return meter.Take(m.ctx, int64(bytes)) }

// Give implements forward.Memory.
func (m requestMemory) Give(bytes int) { meter.Give(m.ctx, int64(bytes)) }
