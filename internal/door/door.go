// Package door bounds what those who come in may make the server hold: how many
// connections there are, at all, for each peer address and for each team, and how
// slowly a request may come.
//
// Until a request has shown who calls, its connection may be closed at any time
// in favour of a newcomer. What a caller does that is known is never cut off; it
// is refused when its team, or everybody together, does too much at a time, with a
// reserve for what is needed to see and to end things.
//
// It is a leaf: it imports the root package and the standard library.
package door

import (
	"container/list"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
)

// Config bounds a Door. Zero fields mean the defaults, which follow from how
// many descriptors the process may have.
type Config struct {
	MaxConns      int // connections at a time; default 2/5 of the descriptors
	MaxPerAddress int // of one peer address; default 3/4 of MaxConns
	MaxPerTeam    int // requests and streams of one team at a time; default 1/3 of MaxConns
	Reserve       int // of MaxConns, for essential requests only; default 1/16
}

func (c Config) withDefaults() Config {
	if c.MaxConns <= 0 {
		c.MaxConns = max(64, descriptors()*2/5)
	}
	if c.MaxPerAddress <= 0 {
		c.MaxPerAddress = max(1, c.MaxConns*3/4)
	}
	if c.MaxPerTeam <= 0 {
		c.MaxPerTeam = max(1, c.MaxConns/3)
	}
	if c.Reserve <= 0 {
		c.Reserve = max(1, c.MaxConns/16)
	}
	return c
}

func descriptors() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 1024
	}
	return int(min(limit.Cur, 1<<18))
}

// Door counts connections and requests. Use New; its methods are safe for
// concurrent use.
type Door struct {
	cfg Config

	mu      sync.Mutex
	conns   int
	busy    int        // connections with a request of a known caller
	waiting *list.List // of *conn whose caller is not known, the one that waits longest first
	peers   map[netip.Addr]*peer
	teams   map[string]int // requests in progress
}

// peer is what there is of one address.
type peer struct {
	conns   int
	waiting *list.List // of *conn, as in Door
}

// New returns a Door.
func New(cfg Config) *Door {
	return &Door{cfg: cfg.withDefaults(), waiting: list.New(), peers: map[netip.Addr]*peer{}, teams: map[string]int{}}
}

// Limits returns what the Door goes by.
func (d *Door) Limits() Config { return d.cfg }

// Listen returns a listener whose connections the Door bounds.
func (d *Door) Listen(l net.Listener) net.Listener { return &listener{Listener: l, door: d} }

type listener struct {
	net.Listener
	door *Door
}

// Accept implements net.Listener. A connection for which there is no room is
// closed at once.
func (l *listener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if c := l.door.enter(raw); c != nil {
			return c, nil
		}
		_ = raw.Close()
	}
}

// conn is one connection. Its fields but Conn are guarded by Door.mu.
type conn struct {
	net.Conn
	door   *Door
	addr   netip.Addr
	inAll  *list.Element // in Door.waiting; nil while it is busy
	inPeer *list.Element // in peer.waiting
	busy   int           // requests of known callers
	gone   bool
}

func addrOf(c net.Conn) netip.Addr {
	if tcp, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// enter lets a connection in, if need be in place of one whose caller is not
// known. It returns nil if there is no room.
func (d *Door) enter(raw net.Conn) *conn {
	c := &conn{Conn: raw, door: d, addr: addrOf(raw)}
	var evicted *conn
	d.mu.Lock()
	p := d.peers[c.addr]
	if p == nil {
		p = &peer{waiting: list.New()}
		d.peers[c.addr] = p
	}
	room := true
	switch {
	case p.conns >= d.cfg.MaxPerAddress:
		evicted, room = d.evict(p.waiting)
	case d.conns >= d.cfg.MaxConns:
		evicted, room = d.evict(d.waiting)
	}
	if room {
		d.conns++
		d.peers[c.addr] = p // evicting its last one has removed it
		p.conns++
		d.wait(c, p)
	} else if p.conns == 0 {
		delete(d.peers, c.addr)
	}
	d.mu.Unlock()
	if evicted != nil {
		_ = evicted.Conn.Close()
	}
	if !room {
		return nil
	}
	return c
}

// evict takes out the connection that has waited longest. Needs mu.
func (d *Door) evict(from *list.List) (*conn, bool) {
	first := from.Front()
	if first == nil {
		return nil, false
	}
	c := first.Value.(*conn)
	d.leave(c)
	return c, true
}

// wait puts a connection among those whose caller is not known. Needs mu.
func (d *Door) wait(c *conn, p *peer) {
	c.inAll, c.inPeer = d.waiting.PushBack(c), p.waiting.PushBack(c)
}

// unwait takes it out again. Needs mu.
func (d *Door) unwait(c *conn) {
	if c.inAll != nil {
		d.waiting.Remove(c.inAll)
		d.peers[c.addr].waiting.Remove(c.inPeer)
		c.inAll, c.inPeer = nil, nil
	}
}

// leave forgets a connection. Needs mu.
func (d *Door) leave(c *conn) {
	if c.gone {
		return
	}
	c.gone = true
	d.unwait(c)
	if c.busy > 0 {
		d.busy--
	}
	d.conns--
	p := d.peers[c.addr]
	if p.conns--; p.conns == 0 {
		delete(d.peers, c.addr)
	}
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.door.mu.Lock()
	c.door.leave(c)
	c.door.mu.Unlock()
	return c.Conn.Close()
}

// CloseWrite ends the sending side.
func (c *conn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Close()
}

type connKey struct{}

// ConnContext is for http.Server.
func (d *Door) ConnContext(ctx context.Context, raw net.Conn) context.Context {
	if over, ok := raw.(interface{ NetConn() net.Conn }); ok { // *tls.Conn
		raw = over.NetConn()
	}
	if c, ok := raw.(*conn); ok {
		return context.WithValue(ctx, connKey{}, c)
	}
	return ctx
}

// Admit counts a request of a known caller until release is called, which may be
// done more than once. An essential one (to see and end what there is) is let in
// while others are not. CodeExhausted: the team, or everybody together, does too
// much at a time. A context that came through no Door is let in.
func Admit(ctx context.Context, team string, essential bool) (release func(), err error) {
	c, ok := ctx.Value(connKey{}).(*conn)
	if !ok {
		return func() {}, nil
	}
	d := c.door
	d.mu.Lock()
	defer d.mu.Unlock()
	most, all := d.cfg.MaxPerTeam, d.cfg.MaxConns-d.cfg.Reserve
	if essential {
		most, all = most+max(1, d.cfg.Reserve/2), d.cfg.MaxConns+1
	}
	switch {
	case d.teams[team] >= most:
		return nil, nestbox.Errorf(nestbox.CodeExhausted, "too many requests and streams of this team at a time: %d", most)
	case c.busy == 0 && d.busy >= all:
		return nil, nestbox.Errorf(nestbox.CodeExhausted, "the server has too many requests and streams at a time; try again")
	}
	if rc, ok := ctx.Value(answerKey{}).(*http.ResponseController); ok {
		_ = rc.SetWriteDeadline(time.Time{})
	}
	d.teams[team]++
	if c.busy++; c.busy == 1 && !c.gone {
		d.busy++
		d.unwait(c)
	}
	return sync.OnceFunc(func() { d.done(c, team) }), nil
}

func (d *Door) done(c *conn, team string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.teams[team]--; d.teams[team] == 0 {
		delete(d.teams, team)
	}
	if c.busy--; c.busy == 0 && !c.gone {
		d.busy--
		d.wait(c, d.peers[c.addr])
	}
}

// How slowly a body may come: what is not read within firstBody is the client's
// loss, and from graceBody on it must have come at minBodyRate on average.
const (
	firstBody   = 5 * time.Second
	graceBody   = 20 * time.Second
	minBodyRate = 1 << 10 // bytes a second

	// strangerAnswer is how long an answer to a caller that is not known may
	// take to be read.
	strangerAnswer = 10 * time.Second
)

type answerKey struct{}

// Handler bounds how slowly bodies come, and how slowly those whose caller is not
// known take their answers. A handler that does not read a body
// need not care for it.
func (d *Door) Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		_ = rc.SetWriteDeadline(time.Now().Add(strangerAnswer)) // until Admit
		r = r.WithContext(context.WithValue(r.Context(), answerKey{}, rc))
		if r.Body != nil && r.Body != http.NoBody {
			_ = rc.SetReadDeadline(time.Now().Add(firstBody)) // recorders have none
			body := &pacedBody{ReadCloser: r.Body, rc: rc}
			r = r.WithContext(context.WithValue(r.Context(), bodyKey{}, body))
			r.Body = body
		}
		next.ServeHTTP(w, r)
	})
}

// pacedBody is a body with a deadline that moves on as it comes.
type pacedBody struct {
	io.ReadCloser
	rc    *http.ResponseController
	begun time.Time
	read  int64

	mu  sync.Mutex // a deadline is set with it held
	cut bool
}

type bodyKey struct{}

var errCut = errors.New("the request was ended")

// CutBody ends the reading of a request's body, now and later, which the end of a
// context does not.
func CutBody(ctx context.Context) {
	if b, ok := ctx.Value(bodyKey{}).(*pacedBody); ok {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.cut = true
		_ = b.rc.SetReadDeadline(time.Now())
	}
}

// allow sets the deadline of the next read.
func (b *pacedBody) allow(until time.Time) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cut {
		return errCut
	}
	_ = b.rc.SetReadDeadline(until)
	return nil
}

// Read implements io.Reader.
func (b *pacedBody) Read(p []byte) (int, error) {
	if b.begun.IsZero() {
		b.begun = time.Now() // it may have waited for its turn
	}
	earned := time.Duration(b.read/minBodyRate) * time.Second
	if err := b.allow(b.begun.Add(graceBody + earned)); err != nil {
		return 0, err
	}
	n, err := b.ReadCloser.Read(p)
	b.read += int64(n)
	switch {
	case errors.Is(err, io.EOF):
		_ = b.allow(time.Time{}) // what follows is the handler's time
	case err != nil:
		_ = b.rc.SetReadDeadline(time.Now()) // the rest of it is not waited for
	}
	return n, err
}
