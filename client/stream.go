package client

import (
	"context"
	"io"
	"net/url"
	"strconv"
	"time"

	"github.com/nestbox/nestbox"
)

// Attach says how to read a process's output.
type Attach struct {
	// Since says where to begin. The zero value is the oldest byte kept.
	Since nestbox.Since
	// LinesOf says of which stream Since.Lines are; "" = of all.
	LinesOf nestbox.Stream
	// Times has events of data say when it was read. There are more of them then.
	Times bool
	// UntilExit ends the stream when the process has exited and what it had
	// written by then is read. Otherwise the stream ends when no more output
	// can come, which is later if the process left others behind that hold its
	// standard output.
	UntilExit bool
	// Lossless makes the process wait while this stream, connected, is slow.
	// Otherwise a stream that is slower than the process by more than what is
	// kept of its output has gaps.
	Lossless bool
}

// Stream reads the output of one process as it comes, across lost connections
// and restarts of the server: no byte is missing or comes twice, and what is
// not kept any more is an EventGap. It is used by one goroutine at a time.
type Stream struct {
	procs *Processes
	id    nestbox.ProcessID // 0 until known
	pid   int               // set with id
	tag   string            // set with id
	until string
	hold  bool           // the process waits for us
	times bool           // events are to have them
	lines nestbox.Stream // of which since counts lines
	since *nestbox.Since // where to begin, until the server has said where that is

	conn    *streamConn // nil while not connected
	lost    *pauses     // non-nil while trying to connect again
	next    int64       // offset of the next byte
	pending *frame      // read, but a gap before it was delivered first
	early   *int64      // next, when an exit came before the bytes that precede it
	exited  bool        // the exit was delivered
	closed  bool        // the end of the output was delivered
}

const (
	untilExit   = "exit"
	untilClosed = "closed"
)

// settled is how long a connection must have lasted to count as one that
// worked, although nothing came over it.
const settled = 10 * time.Second

// Attach begins to read the output of a process. The stream must be closed.
// CodeNotFound if nothing is known by sel.
func (p *Processes) Attach(ctx context.Context, sel string, how Attach) (*Stream, error) {
	proc, err := p.Get(ctx, sel)
	if err != nil {
		return nil, err
	}
	return p.attach(proc, how), nil
}

func (p *Processes) attach(proc nestbox.Process, how Attach) *Stream {
	until := untilClosed
	if how.UntilExit {
		until = untilExit
	}
	s := p.streamOf(proc, how.Since.Begins(proc.Output), until)
	s.hold, s.times = how.Lossless, how.Times
	if how.Since.Sought() {
		s.since, s.lines = &how.Since, how.LinesOf
	}
	return s
}

// streamOf returns a stream that is not connected yet.
func (p *Processes) streamOf(proc nestbox.Process, from int64, until string) *Stream {
	return &Stream{procs: p, id: proc.ID, pid: proc.PID, tag: proc.Tag, until: until, next: from}
}

// ID returns the process's id.
func (s *Stream) ID() nestbox.ProcessID { return s.id }

// PID returns the process's PID.
func (s *Stream) PID() int { return s.pid }

// Offset returns the offset of the next byte, which a later Attach can begin
// from.
func (s *Stream) Offset() int64 { return s.next }

// Next returns the next event (an exit without its time), waiting for it if need be. io.EOF follows the
// last one: EventExit with UntilExit, else EventClosed. The event's Data is
// valid until the following Next. An error other than io.EOF means that the
// output cannot be had any more, or that ctx ended; after the latter, Next may
// be called again.
func (s *Stream) Next(ctx context.Context) (nestbox.OutputEvent, error) {
	for {
		if s.finished() {
			s.hangUp()
			return nestbox.OutputEvent{}, io.EOF
		}
		if _, err := s.Begin(ctx); err != nil {
			return nestbox.OutputEvent{}, err
		}
		if s.conn == nil {
			if err := s.connect(ctx); err != nil {
				return nestbox.OutputEvent{}, err
			}
		}
		f, err := s.read(ctx)
		if err != nil {
			if time.Since(s.conn.born) > settled {
				s.lost = nil // it did work; this is another failure
			}
			s.hangUp()
			if err := s.pause(ctx, err); err != nil {
				return nestbox.OutputEvent{}, err
			}
			continue
		}
		ev, ok, err := s.accept(f)
		if err != nil || ok {
			return ev, err
		}
	}
}

// read returns the next frame that is no error.
func (s *Stream) read(ctx context.Context) (frame, error) {
	if f := s.pending; f != nil {
		s.pending = nil
		return *f, nil
	}
	f, err := s.conn.read(ctx)
	if err == nil && f.Type == frameError {
		err = newError(0, f.Code, f.text()).detailed(f.Detail)
	}
	return f, err
}

func (s *Stream) finished() bool { return s.closed || (s.exited && s.until == untilExit) }

// Close ends the reading. The process goes on.
func (s *Stream) Close() error {
	s.hangUp()
	return nil
}

func (s *Stream) hangUp() {
	s.pending = nil
	if s.conn != nil {
		s.conn.close()
		s.conn = nil
	}
}

// connect attaches at the offset that was reached, and keeps trying for as
// long as the Config allows.
func (s *Stream) connect(ctx context.Context) error {
	path, err := s.procs.path(selector(s.id), "/stream")
	if err != nil {
		return err
	}
	q := url.Values{"since": {strconv.FormatInt(s.next, 10)}, "encoding": {"base64"}, "until": {s.until}}
	if s.hold {
		q.Set("lossless", "true")
	}
	if s.times {
		q.Set("timestamps", "true")
	}
	if s.since != nil {
		s.seek(q)
	}
	for {
		conn, err := s.procs.c.dial(ctx, path, q)
		if err == nil {
			s.conn = conn
			return nil
		}
		if err := s.pause(ctx, err); err != nil {
			return err
		}
	}
}

// Begin returns the offset at which the stream begins, which for lines and times the
// server has to say.
func (s *Stream) Begin(ctx context.Context) (int64, error) {
	for s.since != nil {
		if err := s.connect(ctx); err != nil {
			return 0, err
		}
		f, err := s.read(ctx)
		if err == nil {
			_, _, err = s.accept(f)
		}
		if err == nil && s.since != nil {
			err = nestbox.Errorf(nestbox.CodeInternal, "the server sent %.40q where start was expected", f.Type)
		}
		if err != nil {
			s.hangUp()
			if err := s.pause(ctx, err); err != nil {
				return 0, err
			}
		}
	}
	return s.next, nil
}

// seek has the server say where to begin.
func (s *Stream) seek(q url.Values) {
	q.Del("since")
	if !s.since.After.IsZero() {
		q.Set("since", s.since.After.UTC().Format(time.RFC3339Nano))
	}
	if s.since.Lines > 0 {
		q.Set("tail_lines", strconv.FormatInt(s.since.Lines, 10))
		if s.lines != "" {
			q.Set("tail_stream", string(s.lines))
		}
	}
}

// pause waits before the next attempt to connect. It returns the error to give
// up with: err itself if it is for good, or if the time for attempts is over.
func (s *Stream) pause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return contextError(ctx)
	}
	if !s.procs.c.mayComeBack(ctx, s.procs.capsule, err) {
		return firstError(ctx, err)
	}
	if s.lost == nil {
		s.lost = newPauses(s.procs.c.patience(err))
	}
	if !s.lost.next(ctx) {
		return firstError(ctx, err)
	}
	return nil
}

// accept turns a frame into an event, if it is one. It is what makes the
// stream exact: what came already is cut off, and what was left out becomes a
// gap, whether the server says so or not.
func (s *Stream) accept(f frame) (ev nestbox.OutputEvent, ok bool, err error) {
	switch f.Type {
	case frameStart:
		if s.since != nil {
			s.next, s.since = f.Offset, nil
		}
	case frameStdout, frameStderr, framePty:
		return s.acceptData(f)
	case frameGap:
		if f.To > s.next {
			return s.gap(f.To), true, nil
		}
	case frameExit:
		return s.acceptExit(f)
	case frameClosed:
		if f.Offset > s.next {
			s.pending = &f
			return s.gap(f.Offset), true, nil
		}
		s.closed = true
		return nestbox.OutputEvent{Kind: nestbox.EventClosed, Offset: f.Offset}, true, nil
	}
	return ev, false, nil // a frame of a later version
}

// gap goes on at offset to.
func (s *Stream) gap(to int64) nestbox.OutputEvent {
	ev := nestbox.OutputEvent{Kind: nestbox.EventGap, Offset: s.next, To: to}
	s.next, s.lost = to, nil
	return ev
}

func (s *Stream) acceptData(f frame) (ev nestbox.OutputEvent, ok bool, err error) {
	data, offset := f.Data, f.Offset
	if offset > s.next {
		s.pending = &f
		return s.gap(offset), true, nil
	}
	data = data[min(s.next-offset, int64(len(data))):]
	if len(data) == 0 {
		return ev, false, nil
	}
	ev = nestbox.OutputEvent{Kind: nestbox.EventData, Stream: nestbox.Stream(f.Type), Offset: s.next, Data: data, At: f.At}
	s.next, s.lost = ev.End(), nil
	return ev, true, nil
}

// acceptExit delivers the exit once. If the stream is to end with it, all that
// was written before must have come. What did not may only be late, and is
// asked for once more before it counts as lost.
func (s *Stream) acceptExit(f frame) (ev nestbox.OutputEvent, ok bool, err error) {
	if s.exited {
		return ev, false, nil
	}
	if s.until == untilExit && f.Offset > s.next {
		if s.early == nil || *s.early != s.next {
			at := s.next
			s.early = &at
			s.hangUp()
			return ev, false, nil
		}
		s.pending = &f
		return s.gap(f.Offset), true, nil
	}
	s.exited, s.lost = true, nil
	exit := &nestbox.Exit{Code: f.ExitCode, Signal: f.Signal, Reason: nestbox.ExitReason(f.Reason)}
	return nestbox.OutputEvent{Kind: nestbox.EventExit, Offset: f.Offset, Exit: exit}, true, nil
}
