package guestrpc

import (
	"context"
	"io"
	"sync"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/nestbox/nestbox"
)

// errSilent cuts a stream of which even the signs of life stay away.
var errSilent = &nestbox.Error{Code: nestbox.CodeGuest, Message: "the connection to the capsule's daemon was lost"}

// inflow is a stream of messages from the daemon that has no end of its own time:
// signs of life come into its silence.
type inflow struct {
	stream connect.ClientStream
	frame  frame
	client *Client
	guard  *guard        // ends the stream; it waits only while its reader does, as a slow reader is no silent peer
	cause  func() error  // why the guard did
	limit  time.Duration // of silence
	give   func()        // the slot
	beat   func()
	quiet  int       // messages since quietSince that said nothing
	since  time.Time // of quiet
	err    error     // sticky: after io.EOF and after every error
}

// openInflow calls spec's procedure, whose first message is first. The stream goes
// on when ctx, which bounds the opening only, ends.
func (c *Client) openInflow(ctx context.Context, spec connect.Spec, req, first any) (*inflow, error) {
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
	return &inflow{
		stream: stream,
		client: c,
		guard:  life,
		cause:  func() error { return context.Cause(streamCtx) },
		limit:  c.silentFor,
		give:   give,
		beat:   c.pulse.beat,
	}, nil
}

// orContext returns why ctx has ended, if it has, instead of what came of it.
func orContext(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// spoke takes note of a message that said something.
func (f *inflow) spoke() {
	f.quiet = 0
	f.beat()
}

// maxQuiet is how many signs of life may come in a second.
const maxQuiet = 1000

// pass takes a message that says nothing.
func (f *inflow) pass() error {
	if f.quiet == 0 {
		f.since = time.Now()
	}
	f.quiet++
	f.beat()
	switch {
	case f.quiet < maxQuiet:
		return nil
	case time.Since(f.since) < time.Second:
		return protocolError("messages without end that say nothing")
	}
	f.quiet = 0
	return nil
}

// fail ends the stream with err, which came while its reader waited with ctx. It
// may be io.EOF.
func (f *inflow) fail(ctx context.Context, err error) error {
	guarded, _ := f.cause().(*nestbox.Error)
	switch {
	case err == io.EOF:
		f.err = io.EOF
	case ctx.Err() == nil && guarded != nil:
		f.err = f.client.explain(guarded)
	default:
		f.err = f.client.fromWire(orContext(ctx, err))
	}
	f.end()
	return f.err
}

func (f *inflow) end() {
	f.guard.release()
	_ = f.stream.Close()
	f.frame.release()
	f.give()
}
