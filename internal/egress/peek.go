package egress

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/nestbox/nestbox"
)

// maxPeek bounds what is read of a connection to find out its name: a TLS greeting
// with keys of post-quantum ciphers is larger than it used to be, and so may be the
// head of a request.
const maxPeek = 64 << 10

// peek reads the beginning of a connection, which is to be sent on, and returns the
// name that it shows; "" if it shows none, or none that can be.
func (g *Gateway) peek(conn net.Conn, port uint16) (name string, ahead []byte) {
	_ = conn.SetReadDeadline(time.Now().Add(g.cfg.Limits.Peek))
	defer func() { _ = conn.SetReadDeadline(time.Time{}) }()
	tee := &teeReader{r: io.LimitReader(conn, maxPeek)}
	name = shownName(tee, port)
	return name, tee.seen.Bytes()
}

// shownName returns the name at the beginning of a connection to a port.
func shownName(r io.Reader, port uint16) (name string) {
	if port == httpsPort {
		name = serverName(r)
	} else {
		name = hostOf(r)
	}
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if !nestbox.ValidHostName(name) { // an address, for example
		return ""
	}
	return name
}

// teeReader remembers what was read.
type teeReader struct {
	r    io.Reader
	seen bytes.Buffer
}

func (t *teeReader) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	t.seen.Write(p[:n])
	return n, err
}

// serverName returns the name in a TLS greeting (RFC 6066 section 3). With an encrypted
// greeting (ECH) that is the outer name, which is what the connection is then judged by.
func serverName(r io.Reader) (name string) {
	errSeen := errors.New("seen")
	server := tls.Server(readOnly{r}, &tls.Config{
		MinVersion: tls.VersionTLS10, //nolint:gosec // nothing is negotiated
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			name = hello.ServerName
			return nil, errSeen
		},
	})
	_ = server.HandshakeContext(context.Background()) // it always fails
	return name
}

// readOnly is a connection to which nothing can be written.
type readOnly struct{ io.Reader }

func (readOnly) Write([]byte) (int, error)        { return 0, io.ErrClosedPipe }
func (readOnly) Close() error                     { return nil }
func (readOnly) LocalAddr() net.Addr              { return nil }
func (readOnly) RemoteAddr() net.Addr             { return nil }
func (readOnly) SetDeadline(time.Time) error      { return nil }
func (readOnly) SetReadDeadline(time.Time) error  { return nil }
func (readOnly) SetWriteDeadline(time.Time) error { return nil }

// hostOf returns the host that the first HTTP request of a connection names.
func hostOf(r io.Reader) string {
	req, err := http.ReadRequest(bufio.NewReaderSize(r, 4<<10))
	if err != nil {
		return ""
	}
	host := req.Host
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	return host
}
