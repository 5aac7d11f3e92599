// Package edge is where requests come in: those whose host name is
// <port>-<capsule>.<domain> go to that port inside the capsule, as do those that name
// a port in their path or in headers, and all others to the API.
//
// Ports are private unless their owner has made them public. A request shows either an
// API key of the capsule's team or a signed token that expires, and neither is ever passed
// on into the capsule. Of the project the package imports internal/control,
// internal/door and the root package only.
package edge

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"strings"
	"sync"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
	"github.com/nestbox/nestbox/internal/door"
)

// Ports is what the edge asks of the control plane: *control.Ports.
type Ports interface {
	Authorize(ctx context.Context, capsule string, port uint16, cred control.PortCredential) (control.Entry, error)
	Hold(ctx context.Context, by control.Entry) (_ context.Context, release func())
	Dial(ctx context.Context, capsule string, port uint16) (net.Conn, error)
	Check(ctx context.Context, capsule string) error
}

// Config is what an Edge is made of.
type Config struct {
	Outside Outside
	Ports   Ports
	API     http.Handler // everything else
	Origins []string     // whose pages may use the API; those of ports are their owners'
	Log     *slog.Logger
	// Life ends all requests when the server is to end; nil = nothing does.
	Life context.Context //nolint:containedctx // of the server
}

// Edge is an http.Handler.
type Edge struct {
	cfg    Config
	inside *inside
	proxy  *httputil.ReverseProxy
	linger time.Duration
}

// New returns an Edge, whose connections into capsules LetGo closes in the end.
func New(cfg Config) *Edge {
	e := &Edge{cfg: cfg, linger: lingerFor}
	if len(cfg.Origins) > 0 {
		e.cfg.API = corsFor(cfg.Origins, apiHeaders, false).Handler(cfg.API)
	}
	e.inside = newInside(cfg.Ports)
	e.proxy = &httputil.ReverseProxy{
		Rewrite:        rewrite,
		ModifyResponse: confine,
		BufferPool:     newBuffers(),
		Transport:      e.inside,
		FlushInterval:  -1, // a stream is passed on as it comes
		ErrorHandler:   e.failed,
		ErrorLog:       slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug),
	}
	return e
}

// LetGo closes connections into capsules, as soon as nothing is on them.
func (e *Edge) LetGo() { e.inside.renew() }

// Ending lets those into one capsule go, and has each that is made until done be for one
// request only, so that no program waits for them that is told to end. It may be told so
// while it still takes new ones.
func (e *Edge) Ending(capsule string) (done func()) { return e.inside.begin(capsule) }

// passage is a request on its way into a capsule.
type passage struct {
	route
	visit    visit
	settings nestbox.PortSettings
	answer   *answer
}

type passageKey struct{}

func passageOf(ctx context.Context) passage {
	p, _ := ctx.Value(passageKey{}).(passage)
	return p
}

// ServeHTTP implements http.Handler.
func (e *Edge) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	v, err := e.cfg.Outside.visit(r)
	if err != nil {
		e.refuse(w, r, err)
		return
	}
	way, ok, err := parseRoute(r, v.host, e.cfg.Outside.Domain)
	switch {
	case err != nil:
		e.refuse(w, r, err)
	case !ok:
		e.cfg.API.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), visitKey{}, v)))
	case way.short:
		toDirectory(w, r)
	default:
		e.enter(w, r, passage{route: way, visit: v})
	}
}

// enter passes a request on into its capsule, if it may go there.
func (e *Edge) enter(w http.ResponseWriter, r *http.Request, p passage) {
	cred, inQuery := credential(r, p)
	entry, err := e.cfg.Ports.Authorize(r.Context(), p.capsule, p.port, cred)
	if origins := entry.Settings.CORSOrigins; len(origins) > 0 {
		corsFor(origins, nil, true).HandlerFunc(w, r)
		if isPreflight(r) { // which has no credential, and is answered
			return
		}
	}
	if err != nil {
		e.refuse(w, r, err)
		return
	}
	p.settings = entry.Settings
	release, err := door.Admit(r.Context(), admittedAs(entry), false)
	if err != nil {
		e.refuse(w, r, err)
		return
	}
	defer release()
	if inQuery != "" && p.named() && isNavigation(r) {
		rememberToken(w, r, p.visit, inQuery)
		return
	}
	ctx, leave := e.outlive(r)
	defer leave()
	ctx, done := e.cfg.Ports.Hold(ctx, entry)
	defer done()
	// A program may answer while the request's body is still coming. Where this
	// cannot be (HTTP/2 always can) the proxy works without.
	_ = http.NewResponseController(w).EnableFullDuplex()
	p.answer = &answer{ResponseWriter: w}
	e.proxy.ServeHTTP(p.answer, r.WithContext(context.WithValue(ctx, passageKey{}, p)))
}

// admittedAs is the name under which a request is counted: what strangers do on public
// ports does not keep their owner out.
func admittedAs(e control.Entry) string {
	if e.KeyID == "" {
		return "public ports of " + e.TeamID
	}
	return e.TeamID
}

// lingerFor is how long an answer may be awaited after its client has closed its
// sending side: whether it still reads shows only once there is something to write.
const lingerFor = 2 * time.Minute

// outlive returns a context for a request that goes on when its client has closed its
// sending side, for which net/http ends the request's own: of HTTP/1 that may well be
// the end of the request and no more.
func (e *Edge) outlive(r *http.Request) (_ context.Context, leave func()) {
	if r.ProtoMajor != 1 {
		return context.WithCancel(r.Context())
	}
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(r.Context()))
	timer := time.AfterFunc(1<<63-1, func() { cancel(errClientLeft) })
	stopLingering := context.AfterFunc(r.Context(), func() { timer.Reset(e.linger) })
	stopLife := func() bool { return true }
	if life := e.cfg.Life; life != nil {
		stopLife = context.AfterFunc(life, func() { cancel(context.Cause(life)) })
	}
	return ctx, func() {
		stopLingering()
		stopLife()
		timer.Stop()
		cancel(nil)
	}
}

var errClientLeft = errors.New("the client has left, or nothing came for it")

// buffers are those of bodies on their way.
type buffers struct{ pool sync.Pool }

func newBuffers() *buffers {
	return &buffers{sync.Pool{New: func() any { return make([]byte, 32<<10) }}}
}

// Get implements httputil.BufferPool.
func (b *buffers) Get() []byte { return b.pool.Get().([]byte) }

// Put implements httputil.BufferPool.
func (b *buffers) Put(buf []byte) { b.pool.Put(buf) } //nolint:staticcheck // a slice header each is little

// statusOf maps the codes that the control plane answers for ports.
var statusOf = map[nestbox.Code]int{
	nestbox.CodeInvalid:         http.StatusBadRequest,
	nestbox.CodeUnauthenticated: http.StatusUnauthorized,
	nestbox.CodeDenied:          http.StatusForbidden,
	nestbox.CodeNotFound:        http.StatusNotFound,
	nestbox.CodeInvalidState:    http.StatusConflict,
	nestbox.CodeExhausted:       http.StatusServiceUnavailable,
	nestbox.CodeUnavailable:     http.StatusServiceUnavailable,
	nestbox.CodeTimeout:         http.StatusGatewayTimeout,
	nestbox.CodeGuest:           http.StatusBadGateway,
}

const howToGetIn = "this port is private: send the header X-API-Key, or use a URL made by `nestbox url <capsule> <port>`"

// errorHeader tells an answer of the edge from one of the program, whatever its status.
const errorHeader = "Nestbox-Error"

// refuse answers an error as plain text.
func (e *Edge) refuse(w http.ResponseWriter, r *http.Request, err error) {
	code := nestbox.CodeOf(err)
	status, known := statusOf[code]
	text := nestbox.MessageOf(err)
	level := slog.LevelWarn
	switch {
	case !known:
		status, level = http.StatusInternalServerError, slog.LevelError
	case status == http.StatusUnauthorized:
		text += "; " + howToGetIn
	}
	if status >= http.StatusInternalServerError {
		id := nestbox.RandomHex(8)
		w.Header().Set("X-Request-Id", id)
		e.cfg.Log.Log(r.Context(), level, "a request for a capsule's port failed",
			"request_id", id, "host", r.Host, "status", status, "error", err, "cause", errors.Unwrap(err))
	}
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set(errorHeader, string(code))
	http.Error(w, text, status)
}

// failed answers for a capsule whose port did not.
func (e *Edge) failed(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil {
		panic(http.ErrAbortHandler) // the client has left: silence would be a 200
	}
	known := &nestbox.Error{}
	if !errors.As(err, &known) {
		if why := e.cfg.Ports.Check(r.Context(), passageOf(r.Context()).capsule); why != nil {
			e.refuse(w, r, why)
			return
		}
	}
	switch {
	case !errors.As(err, &known):
		known = &nestbox.Error{Code: nestbox.CodeGuest, Message: "the program on this port broke the connection", Err: err}
	case known.Code == nestbox.CodeUnavailable && strings.Contains(known.Message, "nothing listens"):
		// The host is well; it is the program that is not there (yet).
		known = &nestbox.Error{Code: nestbox.CodeGuest, Message: known.Message, Err: err}
	}
	e.refuse(w, r, known)
}
