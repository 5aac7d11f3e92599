package api

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
	"github.com/nestbox/nestbox/internal/meter"
)

// maxMessage bounds one message from a client, maxFirstMessage one from a client
// that is not known yet.
const (
	maxMessage      = 2 << 20
	maxFirstMessage = 4 << 10
)

// closeUnauthorized is the close code of a WebSocket whose client sent no
// valid key.
const closeUnauthorized websocket.StatusCode = 4401

// errPeerGone is why a socket's context ended when its client left.
var errPeerGone = errors.New("the WebSocket's client went away")

// socket is one WebSocket with a live client. A slow client makes send wait,
// and so slows nobody but its own stream.
type socket struct {
	s      *server
	conn   *websocket.Conn
	ctx    context.Context // ends when the client leaves or the server stops
	cancel context.CancelCauseFunc
	in     chan []byte                     // messages from the client, closed when it leaves
	wg     sync.WaitGroup                  // of everything that close waits for
	life   atomic.Int64                    // when the client last showed life, in Unix nanoseconds
	busy   atomic.Bool                     // a message waits to be taken, so that no pong can be seen
	leave  func()                          // nil until the caller is known
	memory atomic.Pointer[context.Context] // to take it from; nil until the caller is known

	errorOf func(d errorDetail, fatal bool) any // the frame of an error; nil = errorFrame
}

// checkUpgrade refuses, with a JSON error, what is no WebSocket handshake.
func checkUpgrade(r *http.Request) error {
	if r.ProtoMajor != 1 || !hasToken(r.Header, "Connection", "upgrade") || !hasToken(r.Header, "Upgrade", "websocket") {
		return &errorBody{
			status: http.StatusUpgradeRequired,
			Detail: errorDetail{Code: "invalid_request", Message: "this is a WebSocket: connect with an HTTP/1.1 upgrade"},
		}
	}
	if r.Header.Get("Sec-WebSocket-Version") != "13" || len(r.Header.Get("Sec-WebSocket-Key")) != 24 {
		return nestbox.Errorf(nestbox.CodeInvalid, "bad WebSocket handshake: Sec-WebSocket-Version must be 13 and Sec-WebSocket-Key 16 bytes in base64")
	}
	return nil
}

func hasToken(h http.Header, name, token string) bool {
	for _, v := range h.Values(name) {
		for t := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(t), token) {
				return true
			}
		}
	}
	return false
}

// accept upgrades a checked request and finds out who calls. If it returns nil,
// the request is answered. Any Origin may connect: what lets a caller in is an
// API key, which no browser sends by itself.
func (s *server) accept(w http.ResponseWriter, r *http.Request) (*socket, control.Caller) {
	conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
	if err != nil {
		return nil, control.Caller{} // Accept has answered
	}
	conn.SetReadLimit(maxFirstMessage)
	ctx, cancel := context.WithCancelCause(r.Context())
	k := &socket{s: s, conn: conn, ctx: ctx, cancel: cancel, in: make(chan []byte)}
	k.alive()
	k.wg.Go(k.receive)
	k.wg.Go(k.ping)
	caller, err := k.authenticate(r.Header)
	if err == nil {
		err = k.admit(caller)
	}
	if err != nil {
		k.fail(err)
		return nil, control.Caller{}
	}
	conn.SetReadLimit(maxMessage)
	return k, caller
}

// admit lets a known caller in until the socket is closed.
func (k *socket) admit(caller control.Caller) error {
	ctx, leave, err := k.s.admit(k.ctx, caller, false)
	if err != nil {
		return err
	}
	k.leave = leave
	k.memory.Store(&ctx)
	context.AfterFunc(ctx, func() { k.cancel(context.Cause(ctx)) })
	return nil
}

func (k *socket) alive() { k.life.Store(time.Now().UnixNano()) }

// receive hands on the client's messages until it leaves.
func (k *socket) receive() {
	defer close(k.in)
	for {
		msg, err := k.read()
		if err != nil {
			k.cancel(errPeerGone)
			return
		}
		k.alive()
		k.busy.Store(true)
		select {
		case k.in <- msg:
		case <-k.ctx.Done():
			return
		}
		k.busy.Store(false)
	}
}

// read reads one message, within what the caller's requests may hold.
func (k *socket) read() ([]byte, error) {
	_, r, err := k.conn.Reader(k.ctx)
	if err != nil {
		return nil, err
	}
	held := k.ctx
	if ctx := k.memory.Load(); ctx != nil {
		held = *ctx
	}
	return readAll(held, r, maxMessage+1) // the reader has the limit, and says so
}

// done gives back what a message held.
func (k *socket) done(msg []byte) {
	if ctx := k.memory.Load(); ctx != nil && cap(msg) > meter.Small {
		meter.Give(*ctx, int64(cap(msg)))
	}
}

// ping keeps quiet streams alive through proxies, and finds out when the client
// has vanished without a word. A client that takes data or answers pings is alive; a
// client that stalls is so for PongTimeout.
func (k *socket) ping() {
	ticker := time.NewTicker(k.s.cfg.PingInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-k.ctx.Done():
			return
		}
		ctx, cancel := context.WithTimeout(k.ctx, k.s.cfg.PingInterval)
		err := k.conn.Ping(ctx)
		cancel()
		silent := time.Since(time.Unix(0, k.life.Load()))
		switch {
		case err == nil:
			k.alive()
		case !errors.Is(err, context.DeadlineExceeded), // the connection is broken
			!k.busy.Load() && silent >= k.s.cfg.PongTimeout:
			k.cancel(errPeerGone)
			return
		}
	}
}

// authenticate takes the key of the handshake, or else waits for a first
// message that brings it. A wrong key in the handshake counts as none, as in
// Wrenn's API.
func (k *socket) authenticate(h http.Header) (control.Caller, error) {
	why := error(errNoCredential)
	if secret, ok := credential(h); ok {
		caller, err := k.s.control.Keys.Authenticate(k.ctx, secret)
		if err == nil {
			return caller, nil
		}
		why = err
	}
	timeout := time.NewTimer(k.s.cfg.AuthTimeout)
	defer timeout.Stop()
	select {
	case msg, ok := <-k.in:
		var auth struct {
			Type  string `json:"type"`
			Token string `json:"token"`
		}
		if !ok || unmarshalJSON(msg, &auth) != nil || auth.Type != "auth" {
			return control.Caller{}, why
		}
		return k.s.control.Keys.Authenticate(k.ctx, auth.Token)
	case <-timeout.C:
		return control.Caller{}, why
	case <-k.ctx.Done():
		return control.Caller{}, context.Cause(k.ctx)
	}
}

// send writes one frame. It waits while the client does not take it, and may
// be called by several goroutines.
func (k *socket) send(frame any) error {
	buf := k.s.buffers.Get().(*bytes.Buffer)
	defer k.s.buffers.Put(buf)
	buf.Reset()
	if err := encodeFrame(buf, frame); err != nil {
		return err
	}
	if err := k.conn.Write(k.ctx, websocket.MessageText, buf.Bytes()); err != nil {
		return err
	}
	k.alive()
	return nil
}

// sendError tells the client of err; the stream goes on.
func (k *socket) sendError(err error) {
	body := k.s.toBody(k.ctx, err)
	_ = k.send(k.errorFrame(body.Detail, false)) // the client may be gone
}

func (k *socket) errorFrame(d errorDetail, fatal bool) any {
	if k.errorOf != nil {
		return k.errorOf(d, fatal)
	}
	return errorFrame{"error", d.Message, d.Code, d.Detail}
}

// fail sends err as an error frame and closes.
func (k *socket) fail(err error) {
	if k.ctx.Err() != nil {
		k.close(websocket.StatusGoingAway)
		return
	}
	body := k.s.toBody(k.ctx, err)
	_ = k.send(k.errorFrame(body.Detail, true)) // the client may be gone
	switch {
	case body.status == http.StatusUnauthorized:
		k.close(closeUnauthorized)
	case body.status >= http.StatusInternalServerError:
		k.close(websocket.StatusInternalError)
	default:
		k.close(websocket.StatusPolicyViolation)
	}
}

// close says goodbye, frees the connection and waits for the goroutines.
func (k *socket) close(code websocket.StatusCode) {
	if k.ctx.Err() != nil {
		_ = k.conn.CloseNow() // nobody is there
	} else {
		k.wg.Go(k.discard) // so that the client's close frame is seen
		_ = k.conn.Close(code, "")
	}
	k.cancel(nil)
	k.wg.Wait()
	if k.leave != nil {
		k.leave()
	}
}

// discard takes the client's messages until it leaves.
func (k *socket) discard() {
	for msg := range k.in {
		k.done(msg)
	}
}

// gone reports whether the client, or the removal of its key, rather than the
// server ended the stream.
func (k *socket) gone() bool {
	cause := context.Cause(k.ctx)
	return errors.Is(cause, errPeerGone) || nestbox.CodeOf(cause) == nestbox.CodeUnauthenticated
}
