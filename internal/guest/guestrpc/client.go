package guestrpc

import (
	"context"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"

	"github.com/nestbox/nestbox"
	guestv1 "github.com/nestbox/nestbox/gen/nestbox/guest/v1"
	"github.com/nestbox/nestbox/gen/nestbox/guest/v1/guestv1connect"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/rpcerr"
)

// baseURL is where every guest is; ClientConfig.Dial decides which it is.
const baseURL = "http://guest"

const (
	// dialTimeout bounds the making of one connection, which may go on after
	// the call that asked for it has ended.
	dialTimeout = 10 * time.Second

	// idleFor is how long an unused connection is kept. The server must keep
	// it longer.
	idleFor = time.Minute

	// maxIdle is how many unused connections are kept.
	maxIdle = 16

	// bufferSize is that of a connection's two buffers. Large messages are
	// read past them.
	bufferSize = 64 << 10
)

// ClientConfig is what a Client needs.
type ClientConfig struct {
	// Dial makes one connection to the server.
	Dial func(ctx context.Context) (net.Conn, error)
	// Header is sent with every request. It must not be changed any more.
	Header http.Header
}

// Client is the guest.Guest behind a NewHandler. It is safe for concurrent use.
// Whatever goes wrong between the two is CodeGuest.
type Client struct {
	cfg       ClientConfig
	conns     *connSet
	transport *http.Transport
	calls     *connect.Client
	rpc       guestv1connect.GuestServiceClient
	silentFor time.Duration
	info      atomic.Pointer[guest.Info] // nil until the daemon was asked
}

var _ guest.Guest = (*Client)(nil)

// NewClient returns a Client, which has no connection yet. Close it after use.
func NewClient(cfg ClientConfig) *Client {
	c := &Client{cfg: cfg, conns: newConnSet(), silentFor: silentFor}
	c.transport = &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) },
		DisableCompression:     true,
		MaxIdleConns:           maxIdle,
		MaxIdleConnsPerHost:    maxIdle,
		IdleConnTimeout:        idleFor,
		ReadBufferSize:         bufferSize,
		WriteBufferSize:        bufferSize,
		MaxResponseHeaderBytes: 64 << 10,
	}
	httpClient := &http.Client{
		Transport:     c.transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	opts := append(options(), connecthttp.WithConditionalOptions(longLists))
	c.calls = connect.NewClient(connecthttp.NewTransport(httpClient, baseURL, opts...), sendHeader(cfg.Header))
	c.rpc = guestv1connect.NewGuestServiceClient(c.calls)
	return c
}

// longLists lets lists of processes be longer than other messages.
func longLists(spec connect.Spec) []connecthttp.Option {
	if spec.Procedure == guestv1connect.GuestServiceListProcedure {
		return []connecthttp.Option{connecthttp.WithReadMaxBytes(maxList)}
	}
	return nil
}

// sendHeader adds header to every call.
func sendHeader(header http.Header) connect.ClientInterceptor {
	return func(next connect.ClientFunc) connect.ClientFunc {
		return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
			if info, ok := connect.CallInfoForClientContext(ctx); ok {
				for key, values := range header {
					info.RequestHeader().SetValues(key, values)
				}
			}
			return next(ctx, spec)
		}
	}
}

// Close cuts every connection, so that calls, readers and dialled connections
// that are open fail, and lets no new one be made.
func (c *Client) Close() {
	c.conns.cut()
	c.transport.CloseIdleConnections()
}

// Adopt makes a connection that was dialled past the daemon one of the client's,
// so that it is cut with the others.
func (c *Client) Adopt(conn net.Conn) (net.Conn, error) { return c.conns.add(conn) }

// CloseIdleConnections closes the connections that are kept for later calls.
func (c *Client) CloseIdleConnections() { c.transport.CloseIdleConnections() }

func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, dialTimeout, nestbox.Errorf(nestbox.CodeGuest, "the capsule's daemon does not answer"))
	defer cancel()
	conn, err := c.cfg.Dial(ctx)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fromWire(err)
	}
	return c.conns.add(conn)
}

// fromWire returns what a call's error means to the caller.
func fromWire(err error) error { return rpcerr.FromConnect(err, nestbox.CodeGuest) }

// Ping implements guest.Guest.
func (c *Client) Ping(ctx context.Context) (guest.Info, error) {
	res, err := c.rpc.Ping(ctx, &guestv1.PingRequest{})
	if err != nil {
		return guest.Info{}, fromWire(err)
	}
	info := infoFromWire(res)
	c.info.Store(&info)
	return info, nil
}

// need returns CodeUnsupported if the daemon lacks a feature. A daemon never
// changes, so it is asked once.
func (c *Client) need(ctx context.Context, f guest.Feature) error {
	info := c.info.Load()
	if info == nil {
		asked, err := c.Ping(ctx)
		if err != nil {
			return err
		}
		info = &asked
	}
	if !slices.Contains(info.Features, f) {
		return nestbox.Errorf(nestbox.CodeUnsupported, "the capsule's daemon is of version %.40q and lacks %s: a capsule that is made now has it", info.Version, f)
	}
	return nil
}

// selector returns the wire form of sel, if the daemon understands it. A zero
// one comes of the record of a daemon that has no ids.
func (c *Client) selector(ctx context.Context, sel nestbox.Selector) (*guestv1.Selector, error) {
	if sel.ID != 0 || sel == (nestbox.Selector{}) {
		if err := c.need(ctx, guest.FeatureProcessID); err != nil {
			return nil, err
		}
	}
	return selectorToWire(sel), nil
}

// Processes implements guest.Guest.
func (c *Client) Processes() guest.Processes { return processes{c} }

// Files implements guest.Guest.
func (c *Client) Files() guest.Files { return files{c} }

// Dial implements guest.Guest. The connection has CloseWrite.
func (c *Client) Dial(ctx context.Context, port uint16) (net.Conn, error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	tunnel, err := openTunnel(ctx, conn, port, c.cfg.Header)
	if err != nil {
		_ = conn.Close()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fromWire(err)
	}
	return tunnel, nil
}

// connSet is the set of a client's open connections.
type connSet struct {
	mu   sync.Mutex
	open map[*trackedConn]struct{} // nil once cut
}

func newConnSet() *connSet { return &connSet{open: map[*trackedConn]struct{}{}} }

func (s *connSet) add(conn net.Conn) (net.Conn, error) {
	c := &trackedConn{Conn: conn, set: s}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open == nil {
		_ = conn.Close()
		return nil, nestbox.Errorf(nestbox.CodeGuest, "the connection to the capsule is closed")
	}
	s.open[c] = struct{}{}
	return c, nil
}

func (s *connSet) remove(c *trackedConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, c)
}

func (s *connSet) cut() {
	s.mu.Lock()
	open := s.open
	s.open = nil
	s.mu.Unlock()
	for c := range open {
		_ = c.Conn.Close()
	}
}

// trackedConn is a connection that its set forgets when it is closed.
type trackedConn struct {
	net.Conn
	set *connSet
}

// Close implements net.Conn.
func (c *trackedConn) Close() error {
	c.set.remove(c)
	return c.Conn.Close()
}

// CloseWrite ends the sending side.
func (c *trackedConn) CloseWrite() error { return closeWrite(c.Conn) }
