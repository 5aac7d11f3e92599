package guestrpc

import (
	"context"
	"errors"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"

	"github.com/nestbox/nestbox"
	guestv1 "github.com/nestbox/nestbox/gen/nestbox/guest/v1"
	"github.com/nestbox/nestbox/gen/nestbox/guest/v1/guestv1connect"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/rpcerr"
	"github.com/nestbox/nestbox/internal/splice"
)

// baseURL is where every guest is; ClientConfig.Dial decides which it is.
const baseURL = "http://guest"

const (
	// dialTimeout bounds the making of one connection, and dialPastTimeout that of
	// one past the daemon, which is then asked whether it lives.
	dialTimeout     = 8 * time.Second
	dialPastTimeout = 5 * time.Second

	// idleFor is how long an unused connection is kept. The server must keep
	// it longer.
	idleFor = time.Minute

	// maxIdle is how many unused connections are kept.
	maxIdle = 16

	// bufferSize is that of a connection's two buffers. Large messages are
	// read past them.
	bufferSize = 8 << 10

	// kernelBuffer bounds what the kernel holds of a connection's answers, while
	// a reader is slow; it would grow to tens of megabytes.
	kernelBuffer = 1 << 20
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
	life      context.Context //nolint:containedctx // until CloseBecause, whose cause it has
	endLife   context.CancelCauseFunc
	info      atomic.Pointer[guest.Info] // nil until the daemon was asked
	pulse     pulse
	hubs      hubs
	lingering group
	looks     looks
	inCalls   slots
	inStreams slots
	dialing   slots // to the daemon
	dialPast  slots // to ports, which must not keep the daemon from being asked
}

var _ guest.Guest = (*Client)(nil)

// NewClient returns a Client, which has no connection yet. Close it after use.
func NewClient(cfg ClientConfig) *Client {
	c := &Client{
		cfg: cfg, conns: newConnSet(), silentFor: silentFor,
		looks:   looks{after: lookAfter, in: lookIn},
		inCalls: newSlots(maxCalls), inStreams: newSlots(maxStreams), dialing: newSlots(maxDials), dialPast: newSlots(maxDials),
	}
	c.life, c.endLife = context.WithCancelCause(context.Background())
	c.transport = &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) },
		DisableCompression:     true,
		MaxIdleConns:           maxIdle,
		MaxIdleConnsPerHost:    maxIdle,
		IdleConnTimeout:        idleFor,
		ReadBufferSize:         bufferSize,
		WriteBufferSize:        bufferSize,
		MaxResponseHeaderBytes: 16 << 10,
	}
	httpClient := &http.Client{
		Transport:     boundedTransport{next: c.transport, large: newSlots(largeAnswers)},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	opts := append(options(), connecthttp.WithConditionalOptions(answerBounds))
	c.calls = connect.NewClient(connecthttp.NewTransport(httpClient, baseURL, opts...), sendHeader(cfg.Header))
	c.rpc = guestv1connect.NewGuestServiceClient(c.calls)
	return c
}

// answerBounds bounds each procedure's answers.
func answerBounds(spec connect.Spec) []connecthttp.Option {
	return []connecthttp.Option{connecthttp.WithReadMaxBytes(answerLimit(spec.Procedure))}
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

// Close is CloseBecause for no reason that is of interest to callers.
func (c *Client) Close() {
	c.CloseBecause(nestbox.Errorf(nestbox.CodeGuest, "the connection to the capsule is closed"))
}

// CloseBecause cuts every connection, so that calls, readers and dialled connections
// that are open fail, and lets no new one be made. Calls and readers then fail
// with cause, that of the first of several.
func (c *Client) CloseBecause(cause *nestbox.Error) {
	c.endLife(cause)
	c.conns.cut()
	c.transport.CloseIdleConnections()
	c.hubs.close()
	c.lingering.close()
}

// CloseIdleConnections closes the connections that are kept for later calls.
func (c *Client) CloseIdleConnections() { c.transport.CloseIdleConnections() }

func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := withCall(ctx)
	defer cancel()
	ctx, cancelTimeout := context.WithTimeoutCause(ctx, dialTimeout, errUnresponsive)
	defer cancelTimeout()
	if err := c.dialing.wait(ctx); err != nil {
		return nil, c.fromWire(err)
	}
	defer c.dialing.give()
	conn, err := c.cfg.Dial(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil, c.fromWire(context.Cause(ctx))
		}
		if code := nestbox.CodeOf(err); code == nestbox.CodeInternal || code == nestbox.CodeUnavailable {
			err = rpcerr.Lost(err, nestbox.CodeGuest)
		}
		return nil, c.explain(err)
	}
	if tcp, ok := conn.(interface{ SetReadBuffer(int) error }); ok {
		_ = tcp.SetReadBuffer(kernelBuffer) // best effort: it is a bound on what the kernel holds
	}
	return c.keep(conn)
}

// call makes one call that is answered with one message, within a time that the
// daemon may take while it lives.
func call[Req, Res any](ctx context.Context, c *Client, most time.Duration, do func(context.Context, *Req) (*Res, error), req *Req) (*Res, error) {
	if err := c.inCalls.waitShort(ctx, c.looks.after+c.looks.in, "calls"); err != nil {
		return nil, err
	}
	defer c.inCalls.give()
	return guarded(ctx, c, most, do, req)
}

// longCall is call for what may rightly wait as long as ctx allows, while the
// daemon lives. It counts as a stream, so that others can still call.
func longCall[Req, Res any](ctx context.Context, c *Client, do func(context.Context, *Req) (*Res, error), req *Req) (*Res, error) {
	if err := c.inStreams.take("streams"); err != nil {
		return nil, err
	}
	defer c.inStreams.give()
	return guarded(ctx, c, 0, do, req)
}

func guarded[Req, Res any](ctx context.Context, c *Client, most time.Duration, do func(context.Context, *Req) (*Res, error), req *Req) (*Res, error) {
	ctx, g := c.guard(ctx)
	defer g.release()
	g.wait(most)
	res, err := do(ctx, req)
	if err != nil {
		return nil, c.fromWire(orContext(ctx, err))
	}
	c.pulse.beat()
	return res, nil
}

// Ping implements guest.Guest.
func (c *Client) Ping(ctx context.Context) (guest.Info, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, lookAfter+lookIn, errUnresponsive)
	defer cancel()
	return c.ping(asCall(ctx))
}

// ping has no slot and no guard: it is what tells whether others wait in vain.
func (c *Client) ping(ctx context.Context) (guest.Info, error) {
	res, err := c.rpc.Ping(ctx, &guestv1.PingRequest{})
	if err != nil {
		return guest.Info{}, c.fromWire(orContext(ctx, err))
	}
	if err := checkInfo(res); err != nil {
		return guest.Info{}, err
	}
	c.pulse.beat()
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
	return c.hold(func() (net.Conn, error) {
		guarded, g := c.guard(ctx)
		defer g.release()
		g.wait(callIn)
		conn, err := c.dial(guarded)
		if err != nil {
			return nil, err
		}
		tunnel, err := openTunnel(guarded, conn, port, c.cfg.Header)
		if err != nil {
			_ = conn.Close()
			return nil, c.fromWire(orContext(guarded, err))
		}
		return tunnel, nil
	})
}

// DialPast makes a connection to a port by dial, past the daemon. It is cut with
// the others and counts among the client's streams, and dial has a time limit.
// CodeExhausted: there are too many.
func (c *Client) DialPast(ctx context.Context, dial func(context.Context) (net.Conn, error)) (net.Conn, error) {
	return c.hold(func() (net.Conn, error) {
		ctx, cancel := context.WithTimeoutCause(ctx, dialPastTimeout, errNotAccepted)
		defer cancel()
		ctx, g := c.guard(ctx)
		defer g.release()
		g.wait(0)
		if err := c.dialPast.wait(ctx); err != nil {
			return nil, c.explain(err)
		}
		defer c.dialPast.give()
		conn, err := dial(ctx)
		switch {
		case err == nil:
			return c.keep(conn)
		case ctx.Err() == nil:
			if !errors.Is(err, syscall.ECONNREFUSED) {
				c.settle()
			}
			return nil, orContext(c.life, err)
		}
		if err = context.Cause(ctx); err == errNotAccepted { // the program's fault, or everybody's
			if c.pulse.look(context.WithoutCancel(ctx), c, c.looks.in) != nil {
				err = c.unresponsive()
			}
		}
		return nil, c.explain(err)
	})
}

var errNotAccepted = nestbox.Errorf(nestbox.CodeTimeout, "the port does not accept connections")

// keep has a connection be cut with the client, unless that was meanwhile.
func (c *Client) keep(conn net.Conn) (net.Conn, error) {
	kept, err := c.conns.add(conn)
	if err != nil {
		return nil, c.explain(err)
	}
	return kept, nil
}

// hold makes a connection that counts as a stream until it is closed.
func (c *Client) hold(open func() (net.Conn, error)) (net.Conn, error) {
	if err := c.inStreams.take("streams"); err != nil {
		return nil, err
	}
	conn, err := open()
	if err != nil {
		c.inStreams.give()
		return nil, err
	}
	return &heldConn{Conn: conn, give: sync.OnceFunc(c.inStreams.give)}, nil
}

type heldConn struct {
	net.Conn
	give func()
}

// Close implements net.Conn.
func (h *heldConn) Close() error {
	h.give()
	return h.Conn.Close()
}

// CloseWrite ends the sending side.
func (h *heldConn) CloseWrite() error { return splice.CloseWrite(h.Conn) }

// group is goroutines that are waited for.
type group struct {
	mu      sync.Mutex
	closed  bool
	running sync.WaitGroup
}

// run runs f, unless the group is closed.
func (g *group) run(f func()) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.closed {
		g.running.Go(f)
	}
	return !g.closed
}

func (g *group) close() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.running.Wait()
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
		return nil, rpcerr.Lost(net.ErrClosed, nestbox.CodeGuest)
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
func (c *trackedConn) CloseWrite() error { return splice.CloseWrite(c.Conn) }
