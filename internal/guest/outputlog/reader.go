package outputlog

import (
	"context"
	"io"
	"sort"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// Reader is a cursor over a Log. It keeps an offset and, while its caller has an
// event, a slab or a copy: of a part of one if there are many readers, all of
// which might stop where they are.
type Reader struct {
	log   *Log
	times bool // events are to have them

	// Guarded by the log's mu.
	pos      int64
	exitSent bool
	ended    bool
	closed   bool
	done     chan struct{} // closed by Close
	held     *slab         // whose buffer the last event is part of
	heldBuf  []byte

	loaded *slab  // a private copy of a slab on disk, or of a part of it
	copied []byte // a private copy of what is in memory
}

// Readers may hold shared bytes together, and more if they are few.
const (
	sharedBytes = 8 << 20
	fewReaders  = sharedBytes / maxSlab
)

// most returns how many bytes a reader may hold; 0 = a slab.
func (r *Reader) most() int {
	n := int(r.log.budget.readers.Load())
	if n <= fewReaders {
		return 0
	}
	return max(sharedBytes/n, minSlab)
}

var _ guest.OutputReader = (*Reader)(nil)

// Attach returns a new reader.
func (l *Log) Attach(how guest.Attach) (*Reader, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	since := how.Since
	r := &Reader{log: l, times: how.Times, pos: since.Offset, done: make(chan struct{})}
	switch {
	case since.Sought():
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "lines and times are to be located first")
	case since.Offset < 0 || since.Tail < 0:
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "an output offset is not negative")
	case since.Now:
		r.pos = l.end
	case since.Offset > l.end:
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "output offset %d is beyond the end of the log, which is %d", since.Offset, l.end)
	case since.Offset == 0 && since.Tail > 0:
		r.pos = max(l.start, l.end-since.Tail)
	}
	if how.Lossless {
		l.lossless[r] = struct{}{}
	}
	l.budget.readers.Add(1)
	return r, nil
}

// errStopped is what readers get when the daemon stops.
var errStopped = nestbox.Errorf(nestbox.CodeUnavailable, "the capsule's daemon is stopping")

// Next returns what comes next: as much of one stream as there is in one
// piece, and with times was read at one time, without a copy if it is in memory.
func (r *Reader) Next(ctx context.Context) (nestbox.OutputEvent, error) {
	for {
		if ctx.Err() != nil {
			return nestbox.OutputEvent{}, guest.ContextError(ctx)
		}
		event, onDisk, changed, err := r.step()
		switch {
		case err != nil || event.Kind != "":
			return event, err
		case onDisk != nil:
			if err := r.load(onDisk); err != nil {
				return nestbox.OutputEvent{}, err
			}
			continue
		}
		select {
		case <-changed:
		case <-r.done:
		case <-ctx.Done():
		}
	}
}

// step returns the next event, or a slab to load first, or what to wait for.
func (r *Reader) step() (event nestbox.OutputEvent, onDisk *slab, changed chan struct{}, err error) {
	l := r.log
	l.mu.Lock()
	defer l.mu.Unlock()
	r.release()
	switch {
	case r.closed:
		return event, nil, nil, nestbox.Errorf(nestbox.CodeInvalidState, "the reader is closed")
	case r.ended:
		return event, nil, nil, io.EOF
	case l.exit != nil && !r.exitSent && r.pos >= l.exitAt:
		exit := *l.exit
		event = nestbox.OutputEvent{Kind: nestbox.EventExit, Offset: r.pos, Exit: &exit}
		r.exitSent = true
	case r.loaded.covers(r.pos):
		return r.data(r.loaded, r.loaded.size), nil, nil, nil
	case r.pos < l.start:
		event = nestbox.OutputEvent{Kind: nestbox.EventGap, Offset: r.pos, To: l.start}
		r.pos = l.start
	case r.pos < l.end:
		s := l.slabs[sort.Search(len(l.slabs), func(i int) bool { return l.slabs[i].end() > r.pos })]
		if s.buf == nil {
			return event, s, nil, nil
		}
		r.loaded = nil
		if most := r.most(); most > 0 {
			event = r.data(s, most)
			r.copied = append(r.copied[:0], event.Data...)
			event.Data = r.copied
			break
		}
		r.copied = nil
		s.refs++
		r.held, r.heldBuf = s, s.buf
		event = r.data(s, s.size)
	case l.open == 0 && r.exitSent:
		event = nestbox.OutputEvent{Kind: nestbox.EventClosed, Offset: l.end}
		r.ended = true
	case l.aborted:
		err = errStopped
	default:
		if l.changed == nil {
			l.changed = make(chan struct{})
		}
		changed = l.changed
	}
	return event, nil, changed, err
}

// data returns the bytes of one stream at the cursor, at most so many, up to the
// leader's exit if that comes first, and moves on. Needs mu.
func (r *Reader) data(s *slab, most int) nestbox.OutputEvent {
	l := r.log
	from := int(r.pos - s.base)
	i := sort.Search(len(s.runs), func(i int) bool { return s.runs[i].end() > from })
	run := s.runs[i]
	if !r.times {
		for i+1 < len(s.runs) && s.runs[i+1].stream() == run.stream() {
			i++
		}
	}
	to := min(s.runs[i].end(), from+most)
	if l.exit != nil && !r.exitSent && l.exitAt > r.pos {
		to = min(to, int(l.exitAt-s.base))
	}
	event := nestbox.OutputEvent{
		Kind: nestbox.EventData, Stream: StreamNames[run.stream()],
		Offset: r.pos, Data: s.buf[from:to:to],
	}
	if r.times {
		event.At = l.timeOf(run.at)
	}
	r.pos = event.End()
	l.makeRoom()
	return event
}

// load copies a slab, or a part of it, from disk. If the slab was dropped meanwhile it does
// nothing.
func (r *Reader) load(s *slab) error {
	l := r.log
	l.mu.Lock()
	file, where, size := l.spill, s.disk, s.size
	gone := s.gone
	from, to := 0, size
	if most := r.most(); most > 0 {
		from = int(r.pos - s.base)
		to = min(from+most, size)
	}
	l.mu.Unlock()
	if gone {
		return nil
	}
	var buf []byte
	if r.loaded != nil && cap(r.loaded.buf) <= 2*(to-from) {
		buf = r.loaded.buf
	}
	buf, runs, err := file.load(where, size, from, to, buf)
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case s.gone:
		r.loaded = nil
	case err != nil:
		return &nestbox.Error{Code: nestbox.CodeGuest, Message: "output that was spilled to disk cannot be read", Err: err}
	default:
		r.loaded = &slab{base: s.base + int64(from), size: to - from, buf: buf, runs: runs}
		r.copied = nil
	}
	return nil
}

func (s *slab) covers(pos int64) bool { return s != nil && s.base <= pos && pos < s.end() }

// release gives up the buffer of the event before. Needs mu.
func (r *Reader) release() {
	s := r.held
	if s == nil {
		return
	}
	s.refs--
	if s.refs == 0 && (s.gone || s.buf == nil) {
		r.log.budget.recycle(r.heldBuf)
	}
	r.held, r.heldBuf = nil, nil
}

// Close detaches the reader: a lossless one stops holding the process back.
func (r *Reader) Close() error {
	l := r.log
	l.mu.Lock()
	if r.closed {
		l.mu.Unlock()
		return nil
	}
	r.closed = true
	l.budget.readers.Add(-1)
	close(r.done)
	r.release()
	delete(l.lossless, r)
	l.makeRoom()
	forgotten := l.forgotten
	l.mu.Unlock()
	if forgotten {
		l.Forget()
	}
	return nil
}
