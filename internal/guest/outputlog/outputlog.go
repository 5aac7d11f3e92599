// Package outputlog is the ordered, byte-numbered record of what one process
// wrote: kept within limits in memory and on disk, and read by any number of
// cursors, exactly, from any offset.
//
// It knows nothing of processes but that they have two streams and an exit. It
// may import the root package and the guest contract.
package outputlog

import (
	"errors"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nestbox/nestbox"
)

// The streams of a log, as they are numbered inside it.
const (
	Stdout = 0
	Stderr = 1
	Pty    = 2
)

// StreamNames are the names of the streams, by their numbers.
var StreamNames = [...]nestbox.Stream{Stdout: nestbox.Stdout, Stderr: nestbox.Stderr, Pty: nestbox.Pty}

// Log is the ordered, byte-numbered record of what one process wrote.
//
// It is a row of slabs, oldest first. Only the last one, the tail, grows; the
// others are sealed. The newest are in memory, older ones in a spill file, and
// when both are full the oldest slab is dropped. Bytes once written do not
// change, so a reader takes slices of a slab and copies nothing.
//
// A goroutine that appends, spills or drops holds writing, which is taken before mu and
// may be held during disk I/O (never while waiting for the process). mu guards
// the memory that readers look at.
type Log struct {
	budget    *Budget
	begun     time.Time
	maxMemory int64
	maxDisk   int64 // bytes of output
	maxSlab   int   // bytes of a slab together with its runs in memory

	writing  sync.Mutex
	nextSize int // of the next slab
	spill    *spillFile
	noSpill  bool  // the spill file could not be made
	spilled  int64 // bytes of output in it

	memory atomic.Int64 // capacity of the slabs in memory

	mu        sync.Mutex
	slabs     []*slab
	start     int64 // offset of the oldest byte kept
	end       int64 // offset after the newest byte
	written   [len(StreamNames)]int64
	open      int // streams that are not at their end
	exit      *nestbox.Exit
	exitAt    int64
	aborted   bool // the daemon stops
	forgotten bool // nobody can attach any more
	lossless  map[*Reader]struct{}
	changed   chan struct{} // closed at the next change, if somebody waits for one
	room      chan struct{} // closed when a lossless reader moves on, if a pump waits for that
}

// slab is a piece of a log. Its fields are guarded by the log's mu.
type slab struct {
	base int64
	last tick   // of its newest bytes
	size int    // bytes that are written
	buf  []byte // in memory; nil when on disk
	runs []run  // in memory
	disk extent // on disk; of size 0 if not
	refs int    // readers that look at buf
	gone bool   // no longer in the log
}

// run says that bytes of a slab, from the end of the run before up to end,
// come from one stream and were read within one tick.
type run struct {
	pos uint32 // end<<streamBits | stream
	at  tick
}

const (
	streamBits = 2
	streamMask = 1<<streamBits - 1
	runBytes   = 8 // of a run in memory
)

// tick is a time: so many nestbox.LogTick after the log was begun. It ends after a year
// and four months.
type tick uint32

func newRun(end, stream int, at tick) run { return run{uint32(end<<streamBits | stream), at} }
func (r run) end() int                    { return int(r.pos >> streamBits) }
func (r run) stream() int                 { return int(r.pos & streamMask) }

// now returns the current tick.
func (l *Log) now() tick { return l.tickAt(time.Now()) }

// tickAt returns the tick of a time.
func (l *Log) tickAt(t time.Time) tick {
	return tick(min(max(0, t.Sub(l.begun)/nestbox.LogTick), math.MaxUint32))
}

func (l *Log) timeOf(t tick) time.Time { return l.begun.Add(time.Duration(t) * nestbox.LogTick) }

func (s *slab) end() int64 { return s.base + int64(s.size) }

// New makes the log of a process with so many open streams.
func New(b *Budget, streams int) *Log {
	return &Log{
		budget:    b,
		begun:     time.Now(),
		maxMemory: b.limits.Memory,
		maxDisk:   max(0, b.limits.Disk),
		maxSlab:   int(min(maxSlab, b.limits.Memory/4)),
		nextSize:  minSlab,
		open:      streams,
		lossless:  map[*Reader]struct{}{},
	}
}

// Fill reads once from a stream into the log.
func (l *Log) Fill(stream int, read func([]byte) (int, error)) (int, error) {
	l.writing.Lock()
	defer l.writing.Unlock()
	return l.fillLocked(stream, read)
}

func (l *Log) fillLocked(stream int, read func([]byte) (int, error)) (int, error) {
	tail, fresh := l.tail()
	free := min(cap(tail.buf), l.maxSlab-runBytes*(len(tail.runs)+1))
	n, err := read(tail.buf[len(tail.buf):free])
	if n <= 0 {
		if fresh {
			l.budget.recycle(tail.buf)
		}
		return n, err
	}
	if fresh && n == cap(tail.buf) {
		l.nextSize = min(4*cap(tail.buf), l.maxSlab) // there is more where this came from
	} else if fresh {
		l.nextSize = min(2*cap(tail.buf), l.maxSlab)
	}
	l.publish(tail, fresh, stream, n)
	for l.memory.Load() > l.maxMemory && l.relieve() {
	}
	return n, err
}

// tail returns the slab to write to, and whether it is a new one that is not
// in the log yet. A nearly full slab is left, because a short read costs as
// much as a long one.
func (l *Log) tail() (s *slab, fresh bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := len(l.slabs); n > 0 {
		last := l.slabs[n-1]
		free := min(cap(last.buf), l.maxSlab-runBytes*(len(last.runs)+1)) - len(last.buf)
		if last.buf != nil && free > 0 && free >= cap(last.buf)/16 {
			return last, false
		}
	}
	return &slab{base: l.end, buf: l.budget.buffer(l.nextSize)}, true
}

// publish makes n bytes that were read into the tail part of the log.
func (l *Log) publish(tail *slab, fresh bool, stream, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if fresh {
		l.slabs = append(l.slabs, tail)
		l.account(cap(tail.buf))
	}
	tail.buf = tail.buf[:tail.size+n]
	tail.size += n
	tail.addRun(tail.size, stream, l.now())
	l.end += int64(n)
	l.written[stream] += int64(n)
	l.broadcast()
}

func (l *Log) account(n int) {
	l.memory.Add(int64(n))
	l.budget.memory.Add(int64(n))
}

// relieve takes the oldest slab out of memory: to disk if possible, else by
// dropping it. It reports whether it did. Needs writing.
func (l *Log) relieve() bool {
	l.mu.Lock()
	i := slices.IndexFunc(l.slabs, func(s *slab) bool { return s.buf != nil })
	if i < 0 {
		l.mu.Unlock()
		return false
	}
	first := l.first(i)
	old, s := slices.Clone(l.slabs[first:i]), l.slabs[i]
	l.mu.Unlock()
	whole, err := l.join(old, s)
	if err != nil { // readers will be told
		old = nil
		whole, _ = l.join(nil, s)
	}
	if l.store(whole, s.base-whole.base) {
		l.replace(old, s, whole)
		return true
	}
	return l.dropThrough(s)
}

// first returns the first of the slabs on disk that are joined with the i-th
// when that goes there too: those that are no larger than what comes after them.
// So what is spilled in small pieces does not stay in small pieces, and none is
// written more often than the logarithm of their number. Needs mu.
func (l *Log) first(i int) int {
	size, runs := l.slabs[i].size, len(l.slabs[i].runs)
	for i > 0 {
		s := l.slabs[i-1]
		runs += int(s.disk.size) - s.size // at least a byte each
		if s.disk.size == 0 || s.size > size || size+s.size+runBytes*runs > l.maxSlab {
			break
		}
		size += s.size
		i--
	}
	return i
}

// join returns old slabs on disk and the one in memory that follows them as one.
func (l *Log) join(old []*slab, s *slab) (whole *slab, err error) {
	if len(old) == 0 {
		return &slab{base: s.base, last: s.last, size: s.size, buf: s.buf, runs: s.runs}, nil
	}
	whole = &slab{base: old[0].base, buf: make([]byte, 0, s.end()-old[0].base)}
	for _, part := range append(old, s) {
		buf, runs := part.buf, part.runs
		if part != s {
			if buf, runs, err = l.spill.load(part.disk, part.size, 0, part.size, nil); err != nil {
				return nil, err
			}
		}
		for _, r := range runs {
			whole.addRun(whole.size+r.end(), r.stream(), r.at)
		}
		whole.buf = append(whole.buf, buf...)
		whole.size += part.size
	}
	return whole, nil
}

// addRun says of which stream the bytes up to end are, and when they were read.
func (s *slab) addRun(end, stream int, at tick) {
	s.last = at
	if k := len(s.runs); k > 0 && s.runs[k-1].stream() == stream && s.runs[k-1].at == at {
		s.runs[k-1] = newRun(end, stream, at)
		return
	}
	s.runs = append(s.runs, newRun(end, stream, at))
}

// replace puts a slab that was stored in the place of those that it was made of,
// as far as those were not dropped for it.
func (l *Log) replace(old []*slab, s, whole *slab) {
	l.mu.Lock()
	defer l.mu.Unlock()
	whole.buf, whole.runs = nil, nil
	i := slices.Index(l.slabs, s)
	first := i
	for first > 0 && slices.Contains(old, l.slabs[first-1]) {
		first--
	}
	for _, part := range l.slabs[first : i+1] {
		l.remove(part)
	}
	l.slabs = slices.Replace(l.slabs, first, i+1, whole)
}

// store writes a slab to disk, in place of the oldest ones there if need be. As
// many of its bytes as again says are there already, and will be replaced.
func (l *Log) store(s *slab, again int64) bool {
	if l.spill == nil && !l.noSpill && l.maxDisk > 0 {
		file, err := newSpillFile(l.budget)
		l.noSpill = err != nil
		l.mu.Lock()
		l.spill = file
		l.mu.Unlock()
	}
	if l.spill == nil || int64(s.size) > l.maxDisk {
		return false
	}
	for {
		if l.spilled-again+int64(s.size) > l.maxDisk {
			if !l.dropSpilled() {
				return false
			}
			continue
		}
		where, err := l.spill.store(s)
		if err == nil {
			s.disk = where
			l.spilled += int64(s.size)
			return true
		}
		if errors.Is(err, errNoRoom) && !l.dropSpilled() {
			return false
		}
	}
}

// dropSpilled drops the oldest slab if it is on disk.
func (l *Log) dropSpilled() bool {
	l.mu.Lock()
	oldest := l.slabs[0]
	l.mu.Unlock()
	return oldest.disk.size > 0 && l.dropThrough(oldest)
}

// dropThrough drops all slabs up to and including s, if no lossless reader
// waits for one of them. Needs writing.
func (l *Log) dropThrough(s *slab) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.unreadFrom() < s.end() {
		return false
	}
	for {
		oldest := l.slabs[0]
		l.slabs[0] = nil
		l.slabs = l.slabs[1:]
		l.remove(oldest)
		if oldest == s {
			break
		}
	}
	l.start = s.end()
	l.broadcast()
	return true
}

// remove frees what a slab uses. Needs writing and mu.
func (l *Log) remove(s *slab) {
	s.gone = true
	if s.disk.size > 0 {
		l.spill.put(s.disk)
		l.spilled -= int64(s.size)
		return
	}
	l.account(-cap(s.buf))
	if s.refs == 0 {
		l.budget.recycle(s.buf)
		s.buf = nil
	}
}

// unreadFrom returns the first offset that must be kept for a lossless
// reader. Needs mu.
func (l *Log) unreadFrom() int64 {
	from := l.end
	for r := range l.lossless {
		from = min(from, r.pos)
	}
	return from
}

// Shrink takes everything out of memory, to disk as far as possible, and
// returns how many bytes that gave.
func (l *Log) Shrink() int64 {
	l.writing.Lock()
	defer l.writing.Unlock()
	before := l.memory.Load()
	for l.relieve() {
	}
	l.nextSize = minSlab
	return before - l.memory.Load()
}

// TryDropAll drops all bytes that no lossless reader waits for. It does
// nothing if the log is being written, so that it may be called while another
// log is.
func (l *Log) TryDropAll() {
	if l.writing.TryLock() {
		defer l.writing.Unlock()
		l.dropAll()
	}
}

// Forget is for a log that nobody can attach to any more: its bytes go as
// soon as no lossless reader waits for them.
func (l *Log) Forget() {
	l.writing.Lock()
	defer l.writing.Unlock()
	l.mu.Lock()
	l.forgotten = true
	l.mu.Unlock()
	l.dropAll()
}

// dropAll drops all bytes that no lossless reader waits for. Needs writing.
func (l *Log) dropAll() {
	l.mu.Lock()
	var last *slab
	for _, s := range l.slabs {
		if s.end() <= l.unreadFrom() {
			last = s
		}
	}
	l.mu.Unlock()
	if last != nil {
		l.dropThrough(last)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.slabs) == 0 && l.spill != nil {
		l.spill.close()
		l.spill = nil
	}
}

// OnDisk reports whether the log has a spill file.
func (l *Log) OnDisk() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.spill != nil
}

// End records the leader's end, once, after drain has moved into the log what
// the leader had written before; drain's fill is Fill under the lock that End
// holds, so that no other writer comes between.
func (l *Log) End(exit nestbox.Exit, drain func(fill func(stream int, read func([]byte) (int, error)) (int, error))) {
	l.writing.Lock()
	defer l.writing.Unlock()
	drain(l.fillLocked)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.exit, l.exitAt = &exit, l.end
	l.broadcast()
}

// Memory returns how many bytes the log has in memory.
func (l *Log) Memory() int64 { return l.memory.Load() }

// CloseStream notes that a stream is at its end, and reports whether it was
// the last one. The tail then gives back what it does not use.
func (l *Log) CloseStream() bool {
	l.writing.Lock()
	defer l.writing.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open--
	if l.open > 0 {
		return false
	}
	if n := len(l.slabs); n > 0 {
		if s := l.slabs[n-1]; s.buf != nil && s.size < cap(s.buf)/2 {
			l.account(s.size - cap(s.buf))
			s.buf = slices.Clip(slices.Clone(s.buf))
		}
	}
	l.broadcast()
	return true
}

// Abort ends all readers and pumps.
func (l *Log) Abort() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.aborted = true
	l.broadcast()
	l.makeRoom()
}

// State returns what the record shows.
func (l *Log) State() (nestbox.OutputState, *nestbox.Exit) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return nestbox.OutputState{
		Start: l.start, End: l.end,
		Stdout: l.written[Stdout], Stderr: l.written[Stderr], Pty: l.written[Pty],
		Closed: l.open == 0,
	}, l.exit
}

// broadcast wakes all who wait for a change. Needs mu.
func (l *Log) broadcast() {
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// makeRoom wakes the pumps that wait for a lossless reader. Needs mu.
func (l *Log) makeRoom() {
	if l.room != nil {
		close(l.room)
		l.room = nil
	}
}

// WaitRoom waits until the lossless readers are near enough to the end for
// more to be read. It reports false when the daemon stops.
func (l *Log) WaitRoom() bool {
	for {
		l.mu.Lock()
		if l.aborted {
			l.mu.Unlock()
			return false
		}
		window := l.maxMemory
		if l.budget.OverMemory() {
			window = int64(l.maxSlab) / 4
		}
		if l.end-l.unreadFrom() < window {
			l.mu.Unlock()
			return true
		}
		if l.room == nil {
			l.room = make(chan struct{})
		}
		room := l.room
		l.mu.Unlock()
		<-room
	}
}
