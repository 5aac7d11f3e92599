package guestrpc

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/rpcerr"
	"github.com/nestbox/nestbox/internal/splice"
)

// tunnelProtocol is the name in the Upgrade header of a tunnel. After the
// answer 101 the connection carries the bytes of the port and nothing else, in
// both directions until each has ended.
const tunnelProtocol = "nestbox-tunnel"

// serveTunnel answers POST /tunnel/{port}.
func serveTunnel(w http.ResponseWriter, r *http.Request) {
	port, err := strconv.ParseUint(r.PathValue("port"), 10, 16)
	if err != nil || port == 0 {
		rpcerr.WriteHTTP(w, r, nestbox.Errorf(nestbox.CodeInvalid, "port must be 1 to 65535"))
		return
	}
	if !strings.EqualFold(r.Header.Get("Upgrade"), tunnelProtocol) || r.ProtoMajor != 1 {
		rpcerr.WriteHTTP(w, r, nestbox.Errorf(nestbox.CodeInvalid, "a tunnel needs HTTP/1.1 and Upgrade: %s", tunnelProtocol))
		return
	}
	target, err := guestOf(r.Context()).Dial(r.Context(), uint16(port))
	if err != nil {
		rpcerr.WriteHTTP(w, r, err)
		return
	}
	defer target.Close()
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		rpcerr.WriteHTTP(w, r, err)
		return
	}
	defer conn.Close()
	_, err = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+tunnelProtocol+"\r\n\r\n")
	if err != nil {
		return
	}
	splice.Both(r.Context(), withBuffered(conn, buffered.Reader), target)
}

// bufferedConn is a connection of which a part was read ahead.
type bufferedConn struct {
	net.Conn
	ahead *bufio.Reader // nil once it is empty
}

// withBuffered returns conn with what r has read of it put back.
func withBuffered(conn net.Conn, r *bufio.Reader) net.Conn {
	if r.Buffered() == 0 {
		return conn
	}
	return &bufferedConn{Conn: conn, ahead: r}
}

// Read implements net.Conn.
func (c *bufferedConn) Read(p []byte) (int, error) {
	if c.ahead != nil {
		if n := c.ahead.Buffered(); n > 0 {
			return c.ahead.Read(p[:min(n, len(p))])
		}
		c.ahead = nil
	}
	return c.Conn.Read(p)
}

// CloseWrite ends the sending side.
func (c *bufferedConn) CloseWrite() error { return splice.CloseWrite(c.Conn) }

// openTunnel asks on conn for a tunnel to port. ctx bounds the asking only.
func openTunnel(ctx context.Context, conn net.Conn, port uint16, header http.Header) (net.Conn, error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, baseURL+"/tunnel/"+strconv.Itoa(int(port)), nil)
	if err != nil {
		return nil, err
	}
	req.Header = header.Clone()
	if req.Header == nil {
		req.Header = http.Header{}
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", tunnelProtocol)
	if err := req.Write(conn); err != nil {
		return nil, err
	}
	r := bufio.NewReader(io.LimitReader(conn, maxTunnelHeader))
	res, err := http.ReadResponse(r, req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusSwitchingProtocols {
		return nil, believe(rpcerr.ReadHTTP(res, nestbox.CodeGuest))
	}
	if !stop() {
		return nil, context.Cause(ctx)
	}
	return withBuffered(conn, r), nil
}

// maxTunnelHeader bounds the answer to a request for a tunnel.
const maxTunnelHeader = 16 << 10
