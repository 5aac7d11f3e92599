package client

import (
	"context"
	"errors"
	"io"

	"github.com/nestbox/nestbox"
)

const feedBuffer = 256 << 10

// startFeeding starts the goroutine that writes standard input.
func (c *Cmd) startFeeding(ctx context.Context) {
	r := c.run
	r.fed = make(chan struct{})
	ctx, r.stopFeeding = context.WithCancel(ctx)
	if c.Stdin == nil {
		close(r.fed)
		return
	}
	go func() {
		defer close(r.fed)
		r.feedErr = c.feed(ctx)
		if c.stdinPipe != nil {
			_ = c.stdinPipe.CloseWithError(r.feedErr) // nobody reads any more: let no writer wait
		}
	}()
}

// feed writes standard input until it or the process ends. Like exec.Cmd, it
// closes the process's end also when it fails: a process that waits for more
// would never end.
func (c *Cmd) feed(ctx context.Context) error {
	buf := make([]byte, feedBuffer)
	for {
		c.run.inRead.Store(true)
		if ctx.Err() != nil {
			c.run.inRead.Store(false)
			return nil
		}
		n, readErr := c.Stdin.Read(buf)
		c.run.inRead.Store(false)
		if n > 0 || readErr != nil {
			if err := c.writeInput(ctx, buf[:n], readErr != nil && c.Terminal == nil); err != nil {
				return errors.Join(err, c.writeInput(ctx, nil, true))
			}
		}
		if errors.Is(readErr, io.EOF) || ctx.Err() != nil {
			return nil
		}
		if readErr != nil {
			return readErr
		}
	}
}

// writeInput writes once what surely has not been written: while the server is
// away, nothing is. What may have arrived before the connection broke cannot
// be sent again, and is an error. That the process takes no more input is
// none, as exec.Cmd ignores EPIPE.
func (c *Cmd) writeInput(ctx context.Context, data []byte, eof bool) error {
	wait := newPauses(c.procs.c.reconnectFor)
	for {
		err := c.procs.WriteStdin(ctx, selector(c.Process.ID), data, eof)
		var e *Error
		switch {
		case err == nil, ctx.Err() != nil:
			return nil
		case nestbox.CodeOf(err) == nestbox.CodeInvalidState, nestbox.CodeOf(err) == nestbox.CodeNotFound:
			return nil
		case !errors.As(err, &e) || !e.unsent || !wait.next(ctx):
			return err
		}
	}
}
