package guestrpc

import (
	"context"
	"errors"
	"io"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// reader is an OutputReader over a stream of events.
type reader struct {
	*inflow
	field  protowire.Number  // of a message, that holds the event
	linger func(func()) bool // runs it beside, unless the client is closed
	at     int64             // the offset that was reached; negative = not known yet
	exited bool              // EventExit has come
	closed bool              // EventClosed has come
}

var _ guest.OutputReader = (*reader)(nil)

// openReader calls spec's procedure, which streams messages that hold an event
// in the given field after a first message, first.
func (c *Client) openReader(ctx context.Context, spec connect.Spec, req any, field protowire.Number, first any) (*reader, error) {
	in, err := c.openInflow(ctx, spec, req, first)
	if err != nil {
		return nil, err
	}
	return &reader{inflow: in, field: field, linger: c.lingering.run, at: -1}, nil
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
	r.spoke()
	return nil
}

// fail ends the reader. The end of the stream is that of the output only if that was said.
func (r *reader) fail(ctx context.Context, err error) error {
	if errors.Is(err, io.EOF) && r.closed {
		return r.inflow.fail(ctx, io.EOF)
	}
	return r.inflow.fail(ctx, unexpectedEOF(err))
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
