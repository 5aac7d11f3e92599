package guestrpc

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// errSilent cuts a stream of which even the signs of life stay away.
var errSilent = &nestbox.Error{Code: nestbox.CodeGuest, Message: "the connection to the capsule's daemon was lost"}

// reader is an OutputReader over a stream of events.
type reader struct {
	stream connect.ClientStream
	frame  frame
	field  protowire.Number // of a message, that holds the event
	client *Client
	guard  *guard        // ends the stream; it waits only while Next does, as a slow reader is no silent peer
	cause  func() error  // why the guard did
	limit  time.Duration // of silence
	give   func()        // the slot
	beat   func()
	linger func(func()) bool // runs it beside, unless the client is closed
	at     int64             // the offset that was reached; negative = not known yet
	quiet  int               // messages since quietSince that held no event
	since  time.Time         // of quiet
	exited bool              // EventExit has come
	closed bool              // EventClosed has come
	err    error             // sticky: after io.EOF and after every error
}

var _ guest.OutputReader = (*reader)(nil)

// openReader calls spec's procedure, which streams messages that hold an event
// in the given field after a first message, first. The stream goes
// on when ctx, which bounds the opening only, ends.
func (c *Client) openReader(ctx context.Context, spec connect.Spec, req any, field protowire.Number, first any) (*reader, error) {
	if err := c.inStreams.take("streams"); err != nil {
		return nil, err
	}
	give := sync.OnceFunc(c.inStreams.give)
	opening, g := c.guard(ctx)
	defer g.release()
	g.wait(callIn)
	streamCtx, life := c.guard(context.WithoutCancel(ctx))
	life.every, life.late = c.silentFor/2, errSilent
	stop := context.AfterFunc(opening, func() { life.cancel(context.Cause(opening)) })
	stream, err := c.calls.CallServerStream(streamCtx, spec, req)
	if err == nil {
		err = stream.Receive(first)
	}
	if !stop() && err == nil {
		err = context.Cause(opening)
	}
	if err != nil {
		err = orContext(opening, unexpectedEOF(err))
		life.release()
		if stream != nil {
			_ = stream.Close()
		}
		give()
		return nil, c.fromWire(err)
	}
	c.pulse.beat()
	return &reader{
		stream: stream,
		field:  field,
		client: c,
		guard:  life,
		cause:  func() error { return context.Cause(streamCtx) },
		limit:  c.silentFor,
		give:   give,
		beat:   c.pulse.beat,
		linger: c.lingering.run,
		at:     -1,
	}, nil
}

// orContext returns why ctx has ended, if it has, instead of what came of it.
func orContext(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// Next implements guest.OutputReader.
func (r *reader) Next(ctx context.Context) (nestbox.OutputEvent, error) {
	if r.err != nil {
		return nestbox.OutputEvent{}, r.err
	}
	defer context.AfterFunc(ctx, func() { r.guard.cancel(ctx.Err()) })()
	defer r.guard.rest()
	for {
		r.guard.wait(r.limit)
		event, ok, err := r.receive()
		if err != nil {
			return nestbox.OutputEvent{}, r.fail(ctx, err)
		}
		if ok {
			err = r.follow(event)
		} else {
			err = r.pass()
		}
		if err != nil {
			return nestbox.OutputEvent{}, r.fail(ctx, err)
		}
		if ok {
			return event, nil
		}
	}
}

// receive returns the next event, or false if it is none for a reader.
func (r *reader) receive() (nestbox.OutputEvent, bool, error) {
	if err := r.frame.receive(r.stream); err != nil {
		return nestbox.OutputEvent{}, false, err
	}
	message, ok, err := r.frame.bytes(r.field)
	if err != nil || !ok {
		return nestbox.OutputEvent{}, false, err
	}
	return decodeEvent(message)
}

// follow takes over where an event leads, if it can come here.
func (r *reader) follow(event nestbox.OutputEvent) error {
	if err := checkEvent(event, r.at); err != nil {
		return err
	}
	isExit, isEnd := event.Kind == nestbox.EventExit, event.Kind == nestbox.EventClosed
	switch {
	case r.closed:
		return protocolError("output after its end")
	case isExit && r.exited:
		return protocolError("a second exit")
	case isEnd && !r.exited:
		return protocolError("the end of output without an exit")
	}
	r.exited, r.closed = r.exited || isExit, isEnd
	r.at = event.End()
	r.quiet = 0
	r.beat()
	return nil
}

// maxQuiet is how many signs of life may come in a second.
const maxQuiet = 1000

// pass takes a message that holds no event.
func (r *reader) pass() error {
	if r.quiet == 0 {
		r.since = time.Now()
	}
	r.quiet++
	r.beat()
	switch {
	case r.quiet < maxQuiet:
		return nil
	case time.Since(r.since) < time.Second:
		return protocolError("messages without end that say nothing")
	}
	r.quiet = 0
	return nil
}

func (r *reader) fail(ctx context.Context, err error) error {
	guarded, _ := r.cause().(*nestbox.Error)
	switch {
	case errors.Is(err, io.EOF) && r.closed:
		r.err = io.EOF
	case ctx.Err() == nil && guarded != nil:
		r.err = r.client.explain(guarded)
	default:
		r.err = r.client.fromWire(orContext(ctx, unexpectedEOF(err)))
	}
	r.end()
	return r.err
}

// finish reads the end of a stream that holds no more events, so that its
// connection can be used again.
func (r *reader) finish() {
	r.guard.wait(r.limit)
	_, _, _ = r.receive()
	r.end()
}

// lastWords is how long the end of a stream is waited for whose process has ended.
const lastWords = 100 * time.Millisecond

// Close implements io.Closer. The server's reader ends with it, if the process
// has ended in a moment, so that the connection can be used again.
func (r *reader) Close() error {
	if r.err != nil {
		r.end()
		return nil
	}
	r.err = errClosedReader()
	if !r.exited || r.closed || !r.linger(r.lastWords) {
		r.end()
	}
	return nil
}

// lastWords reads to the end of the stream, if that comes soon.
func (r *reader) lastWords() {
	defer time.AfterFunc(lastWords, func() { r.guard.cancel(errSilent) }).Stop()
	for range 4 { // the end of the output, and of the stream
		if _, _, err := r.receive(); err != nil {
			break
		}
	}
	r.end()
}

func (r *reader) end() {
	r.guard.release()
	_ = r.stream.Close()
	r.frame.release()
	r.give()
}
