package client

import (
	"context"
	"io"

	"github.com/nestbox/nestbox"
)

// LogOptions say what part of an output log to read.
type LogOptions struct {
	Since  nestbox.Since
	Follow bool           // go on with what comes, until no more can; otherwise stop at the present end
	Stream nestbox.Stream // only this one; "" = both, in the order in which they were read
	// OnGap, if set, is called for bytes that are asked for and not kept any
	// more. If it is nil, reading fails with a *GapError. Since the zero Since
	// asks for what is kept, only OnGap hears of what was lost before.
	OnGap func(from, to int64)
}

// Logs reads the output of a process as plain bytes, across lost connections.
// The reader must be closed; reading ends with ctx.
//
// It reads the frames of the output stream rather than the plain form of the
// same log, which does not tell where in it a gap lies, and so cannot be
// resumed exactly.
func (p *Processes) Logs(ctx context.Context, sel string, opts LogOptions) (io.ReadCloser, error) {
	proc, err := p.Get(ctx, sel)
	if err != nil {
		return nil, err
	}
	if opts.Since == (nestbox.Since{}) && opts.OnGap != nil && proc.Output.Start > 0 {
		opts.OnGap(0, proc.Output.Start)
	}
	stream := p.attach(proc, Attach{Since: opts.Since, LinesOf: opts.Stream})
	return &logReader{ctx: ctx, opts: opts, end: proc.Output.End, stream: stream}, nil
}

type logReader struct {
	ctx    context.Context //nolint:containedctx // an io.Reader has no other place for it
	opts   LogOptions
	end    int64 // where to stop, without Follow
	stream *Stream
	rest   []byte // read, but not yet asked for
}

func (r *logReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(r.rest) == 0 {
		if err := r.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (r *logReader) fill() error {
	if at, err := r.stream.Begin(r.ctx); err != nil {
		return err
	} else if !r.opts.Follow && at >= r.end {
		return io.EOF
	}
	ev, err := r.stream.Next(r.ctx)
	if err != nil {
		return err
	}
	switch ev.Kind {
	case nestbox.EventData:
		if r.opts.Stream != "" && r.opts.Stream != ev.Stream {
			return nil
		}
		r.rest = ev.Data
		if !r.opts.Follow {
			r.rest = ev.Data[:min(int64(len(ev.Data)), max(0, r.end-ev.Offset))]
		}
	case nestbox.EventGap:
		if r.opts.OnGap == nil {
			return &GapError{From: ev.Offset, To: ev.To}
		}
		r.opts.OnGap(ev.Offset, ev.To)
	}
	return nil
}

func (r *logReader) Close() error { return r.stream.Close() }
