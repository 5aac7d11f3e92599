package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/nestbox/nestbox"
)

// request is one HTTP request.
type request struct {
	method string
	path   string // below the base URL
	query  url.Values
	header http.Header
	json   any       // body, if not nil
	data   []byte    // body, if not nil and json is nil
	body   io.Reader // body, if neither is there; such a request is never repeated
	length int64     // of body; -1 = unknown
	// repeatable says that carrying the request out twice does no harm. GET
	// always is.
	repeatable bool
	// ask sends data only once the server asks for it. If the connection is lost
	// before that, nothing was done. It costs a round trip.
	ask bool
}

// askedBody is data that knows whether it was asked for. The connection may
// read it until it is closed, even after the request has failed.
type askedBody struct {
	data  *bytes.Reader
	asked atomic.Bool
}

// Read implements io.Reader.
func (b *askedBody) Read(p []byte) (int, error) {
	b.asked.Store(true)
	return b.data.Read(p)
}

// send makes a request and returns an answer that is a success, whose body the
// caller closes. It tries again for a while if the server cannot be reached,
// or loses the connection of a request that may be repeated.
func (c *Client) send(ctx context.Context, r request) (*http.Response, error) {
	if r.json != nil {
		var err error
		if r.data, err = json.Marshal(r.json); err != nil {
			return nil, nestbox.Errorf(nestbox.CodeInvalid, "encode the request: %w", err)
		}
		r.header = http.Header{"Content-Type": {"application/json"}}
	}
	wait := newPauses(c.retryFor)
	for {
		body := r.content()
		res, err := c.once(ctx, r, body)
		if err == nil && res.StatusCode < 300 {
			return res, nil
		}
		if err == nil {
			err = responseError(res)
			closeBody(res.Body)
			return nil, err
		}
		if ctx.Err() != nil {
			return nil, contextError(ctx)
		}
		asked, asks := body.(*askedBody)
		unsent := notSent(err) || asks && !asked.asked.Load()
		again := r.body == nil && (unsent || r.repeatable || r.method == http.MethodGet)
		if !again || !wait.next(ctx) {
			return nil, c.connectionError(err, !unsent)
		}
	}
}

// content returns the body for one attempt; nil if there is none.
func (r request) content() io.Reader {
	switch {
	case r.ask:
		return &askedBody{data: bytes.NewReader(r.data)}
	case r.data != nil:
		return bytes.NewReader(r.data)
	}
	return r.body
}

func (c *Client) once(ctx context.Context, r request, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, r.method, c.url(r.path, r.query), body)
	if err != nil {
		return nil, err
	}
	for k, v := range r.header {
		req.Header[k] = v
	}
	if r.body != nil && r.length != 0 {
		req.ContentLength = r.length
	}
	if r.ask {
		req.ContentLength = int64(len(r.data))
		req.Header.Set("Expect", "100-continue")
	}
	c.setIdentity(req.Header)
	return c.http.Do(req)
}

func (c *Client) setIdentity(h http.Header) {
	h.Set("X-API-Key", c.key)
	h.Set("User-Agent", "nestbox-go/"+nestbox.Version)
}

func (c *Client) url(path string, query url.Values) string {
	u := c.base.String() + path
	if len(query) > 0 {
		u += "?" + query.Encode()
	}
	return u
}

// call makes a request with a JSON body (nil = none) and reads a JSON answer
// into out (nil = there is none).
func (c *Client) call(ctx context.Context, method, path string, query url.Values, in, out any) error {
	res, err := c.send(ctx, request{method: method, path: path, query: query, json: in})
	if err != nil {
		return err
	}
	return decode(res, out)
}

// maxJSON bounds an answer: foreground output of 32 MiB, in JSON.
const maxJSON = 256 << 20

// decode reads a JSON answer and closes its body.
func decode(res *http.Response, out any) error {
	defer closeBody(res.Body)
	if out == nil {
		return nil
	}
	raw, err := io.ReadAll(io.LimitReader(res.Body, maxJSON+1))
	if err != nil {
		return &Error{Status: res.StatusCode, Err: nestbox.Errorf(nestbox.CodeUnavailable, "the answer was cut off: %w", err)}
	}
	if len(raw) > maxJSON {
		return &Error{Status: res.StatusCode, Err: nestbox.Errorf(nestbox.CodeTooLarge, "the answer is longer than %d bytes", maxJSON)}
	}
	if err := json.Unmarshal(raw, out); err != nil {
		return &Error{Status: res.StatusCode, Err: nestbox.Errorf(nestbox.CodeInternal, "cannot read the answer (is this the URL of a Nestbox server?): %w", err)}
	}
	return nil
}

// closeBody reads what little may be left, so that the connection can be used
// again, and closes.
func closeBody(body io.ReadCloser) {
	_, _ = io.CopyN(io.Discard, body, 64<<10)
	_ = body.Close()
}

// contextError is the error for a context that ended.
func contextError(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return nestbox.Errorf(nestbox.CodeTimeout, "gave up waiting: %w", ctx.Err())
	}
	return nestbox.Errorf(nestbox.CodeCanceled, "canceled: %w", ctx.Err())
}

// pauses spaces out attempts: from 25 ms to a second, each more or less at
// random, so that the clients of a server that comes back do not all come at
// the same moment.
type pauses struct {
	backoff  *backoff.ExponentialBackOff
	deadline time.Time
}

const (
	firstPause = 25 * time.Millisecond
	lastPause  = time.Second
)

// newPauses allows attempts for the given time from now.
func newPauses(total time.Duration) *pauses {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.MaxInterval, b.Multiplier = firstPause, lastPause, 2
	return &pauses{backoff: b, deadline: time.Now().Add(total)}
}

// next waits before the next attempt. It returns false if there is to be none,
// because the time is over or ctx ended.
func (p *pauses) next(ctx context.Context) bool {
	pause := p.backoff.NextBackOff()
	if time.Now().Add(pause).After(p.deadline) {
		return false
	}
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
