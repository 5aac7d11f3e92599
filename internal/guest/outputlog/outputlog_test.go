package outputlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"sort"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// logModel is what an Log must be like: all bytes that were ever written,
// with their streams, and for each reader where it is.
type logModel struct {
	log     *Log
	budget  *Budget
	bytes   []byte
	streams []nestbox.Stream
	exitAt  int // -1 before the exit
	closed  bool
	readers []*modelReader
	settled bool // the last write found no lossless reader
}

type modelReader struct {
	*Reader
	pos      int
	lossless bool
	kept     int // a lossless reader misses nothing from here on
	exited   bool
	ended    bool
}

func smallLimits(dir string) Limits {
	return Limits{Memory: 16 << 10, Disk: 24 << 10, TotalMemory: 24 << 10, TotalDisk: 20 << 10, Dir: dir}
}

// end ends the leader when all it wrote is read.
func end(l *Log, exit nestbox.Exit) {
	l.End(exit, func(func(int, func([]byte) (int, error)) (int, error)) {})
}

// write appends data as a pump does.
func write(l *Log, stream int, data []byte) error {
	for len(data) > 0 {
		n, err := l.Fill(stream, func(buf []byte) (int, error) { return copy(buf, data), nil })
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrShortBuffer
		}
		data = data[n:]
	}
	return nil
}

func (m *logModel) Write(t *rapid.T) {
	if m.closed {
		t.Skip("closed")
	}
	stream := rapid.IntRange(0, 1).Draw(t, "stream")
	size := rapid.OneOf(rapid.IntRange(1, 20), rapid.IntRange(1, 20_000)).Draw(t, "size")
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	require.NoError(t, write(m.log, stream, data))
	m.settle()
	m.bytes = append(m.bytes, data...)
	for range data {
		m.streams = append(m.streams, StreamNames[stream])
	}
}

func (m *logModel) settle() {
	m.settled = true
	for _, r := range m.readers {
		m.settled = m.settled && !r.lossless
	}
}

// Interleave writes many tiny pieces, whose index is larger than they are.
func (m *logModel) Interleave(t *rapid.T) {
	if m.closed {
		t.Skip("closed")
	}
	for i := range rapid.IntRange(1, 1000).Draw(t, "pieces") {
		require.NoError(t, write(m.log, i%2, []byte{byte(i)}))
		m.settle()
		m.bytes = append(m.bytes, byte(i))
		m.streams = append(m.streams, StreamNames[i%2])
	}
}

func (m *logModel) Attach(t *rapid.T) {
	since := nestbox.Since{}
	pos := 0
	switch rapid.IntRange(0, 3).Draw(t, "since") {
	case 1:
		since.Now, pos = true, len(m.bytes)
	case 2:
		pos = rapid.IntRange(0, len(m.bytes)).Draw(t, "offset")
		since.Offset = int64(pos)
	case 3:
		tail := rapid.IntRange(1, 50_000).Draw(t, "tail")
		since.Tail = int64(tail)
		pos = max(int(m.log.start), len(m.bytes)-tail)
	}
	lossless := rapid.Bool().Draw(t, "lossless")
	r, err := m.log.Attach(guest.Attach{Since: since, Lossless: lossless})
	require.NoError(t, err)
	m.readers = append(m.readers, &modelReader{Reader: r, pos: pos, lossless: lossless, kept: max(pos, int(m.log.start))})
}

func (m *logModel) Next(t *rapid.T) {
	if len(m.readers) == 0 {
		t.Skip("no reader")
	}
	r := rapid.SampledFrom(m.readers).Draw(t, "reader")
	if !m.mayStep(r) {
		t.Skip("it would wait")
	}
	m.step(t, r)
}

// mayStep reports whether Next returns without waiting.
func (m *logModel) mayStep(r *modelReader) bool {
	return r.ended || r.pos < len(m.bytes) || m.exitAt >= 0 && !r.exited || m.exitAt >= 0 && m.closed
}

func (m *logModel) step(t require.TestingT, r *modelReader) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	e, err := r.Next(ctx)
	if r.ended {
		require.ErrorIs(t, err, io.EOF)
		return
	}
	require.NoError(t, err)
	require.EqualValues(t, r.pos, e.Offset)
	end := int(e.End())
	switch e.Kind {
	case nestbox.EventData:
		require.NotEmpty(t, e.Data)
		require.True(t, bytes.Equal(m.bytes[r.pos:end], e.Data), "bytes at %d", r.pos)
		for _, s := range m.streams[r.pos:end] {
			require.Equal(t, s, e.Stream)
		}
		require.True(t, r.exited || m.exitAt < 0 || end <= m.exitAt, "data from after the exit before the exit")
	case nestbox.EventGap:
		require.EqualValues(t, m.log.start, e.To)
		require.True(t, !r.lossless || end <= r.kept, "a lossless reader misses bytes")
	case nestbox.EventExit:
		require.False(t, r.exited)
		require.GreaterOrEqual(t, r.pos, m.exitAt)
		r.exited = true
	case nestbox.EventClosed:
		require.True(t, r.exited && m.closed)
		require.Len(t, m.bytes, r.pos)
		r.ended = true
	}
	r.pos = end
}

func (m *logModel) CloseReader(t *rapid.T) {
	if len(m.readers) == 0 {
		t.Skip("no reader")
	}
	i := rapid.IntRange(0, len(m.readers)-1).Draw(t, "reader")
	require.NoError(t, m.readers[i].Close())
	m.readers = append(m.readers[:i], m.readers[i+1:]...)
}

func (m *logModel) Shrink(*rapid.T) { m.log.Shrink() }

func (m *logModel) Exit(t *rapid.T) {
	if m.exitAt >= 0 {
		t.Skip("exited")
	}
	m.exitAt = len(m.bytes)
	end(m.log, nestbox.Exit{Code: 1})
}

func (m *logModel) CloseStreams(t *rapid.T) {
	if m.closed || rapid.IntRange(0, 3).Draw(t, "rarely") > 0 {
		t.Skip("not now")
	}
	m.closed = true
	require.False(t, m.log.CloseStream())
	require.True(t, m.log.CloseStream())
}

// Check compares what can be seen at any time.
func (m *logModel) Check(t *rapid.T) {
	state, _ := m.log.State()
	require.EqualValues(t, len(m.bytes), state.End)
	require.Equal(t, state.End, state.Stdout+state.Stderr)
	require.Equal(t, m.closed, state.Closed)
	require.LessOrEqual(t, state.Start, state.End)
	if m.settled { // what was kept for a lossless reader goes with the next write
		require.LessOrEqual(t, m.log.memory.Load(), m.log.maxMemory)
		require.LessOrEqual(t, state.End-state.Start, int64(16+24)<<10)
	}
	require.LessOrEqual(t, m.budget.disk.Load(), m.budget.limits.TotalDisk)
}

// finish reads everything to the end, and then nothing may be left.
func (m *logModel) finish(t require.TestingT) {
	if m.exitAt < 0 {
		m.exitAt = len(m.bytes)
		end(m.log, nestbox.Exit{})
	}
	if !m.closed {
		m.closed = true
		m.log.CloseStream()
		m.log.CloseStream()
	}
	m.log.Forget()
	for _, r := range m.readers {
		for !r.ended {
			m.step(t, r)
		}
		require.NoError(t, r.Close())
	}
	require.Zero(t, m.budget.memory.Load())
	require.Zero(t, m.budget.disk.Load())
	require.Zero(t, m.log.memory.Load())
}

func TestOutputLogModel(t *testing.T) {
	t.Parallel()
	for name, dir := range map[string]string{"with disk": t.TempDir(), "without disk": filepath.Join(t.TempDir(), "missing")} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rapid.Check(t, func(rt *rapid.T) {
				limits := smallLimits(dir)
				m := &logModel{budget: NewBudget(limits, nil), exitAt: -1}
				m.log = New(m.budget, 2)
				rt.Repeat(rapid.StateMachineActions(modelActions{m}))
				m.finish(rt)
			})
		})
	}
}

// modelActions hides the methods that are no actions.
type modelActions struct{ m *logModel }

func (a modelActions) Write(t *rapid.T)        { a.m.Write(t) }
func (a modelActions) Interleave(t *rapid.T)   { a.m.Interleave(t) }
func (a modelActions) Attach(t *rapid.T)       { a.m.Attach(t) }
func (a modelActions) Next(t *rapid.T)         { a.m.Next(t) }
func (a modelActions) CloseReader(t *rapid.T)  { a.m.CloseReader(t) }
func (a modelActions) Shrink(t *rapid.T)       { a.m.Shrink(t) }
func (a modelActions) Exit(t *rapid.T)         { a.m.Exit(t) }
func (a modelActions) CloseStreams(t *rapid.T) { a.m.CloseStreams(t) }
func (a modelActions) Check(t *rapid.T)        { a.m.Check(t) }

// TestOutputLogConcurrently has two writers, and readers of every kind that
// come, stall and go while slabs move to disk and away.
func TestOutputLogConcurrently(t *testing.T) {
	t.Parallel()
	limits := Limits{Memory: 64 << 10, Disk: 256 << 10, Dir: t.TempDir()}
	b := NewBudget(limits, nil)
	l := New(b, 2)
	const total = 4 << 20 // of each stream
	var writers, readers sync.WaitGroup
	for stream := range 2 {
		writers.Go(func() {
			defer l.CloseStream()
			for at := 0; at < total; {
				if !l.WaitRoom() {
					t.Error("aborted")
					return
				}
				data := countFrom(at, 1+rand.IntN(30_000))
				data = data[:min(len(data), total-at)]
				n, _ := l.Fill(stream, func(buf []byte) (int, error) { return copy(buf, data), nil })
				at += n
			}
		})
	}
	for i := range 8 {
		readers.Go(func() {
			if err := readCounting(l, i%2 == 0, i, total); err != nil {
				t.Errorf("reader %d: %v", i, err)
			}
		})
	}
	writers.Wait()
	end(l, nestbox.Exit{})
	readers.Wait()
	l.Forget()
	require.Zero(t, b.memory.Load())
	require.Zero(t, b.disk.Load())
}

// countFrom returns n bytes of a stream that can be checked from any offset.
func countFrom(at, n int) []byte {
	data := make([]byte, n)
	for i := range data {
		data[i] = byte((at + i) * 7 / 5)
	}
	return data
}

func readCounting(l *Log, lossless bool, i, total int) error {
	r, err := l.Attach(guest.Attach{Lossless: lossless})
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	at := map[nestbox.Stream]int{}
	gap := false
	for {
		e, err := r.Next(ctx)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if e.Kind == nestbox.EventGap {
			gap = true
			if lossless && e.Offset != 0 {
				return fmt.Errorf("lossless, but %d to %d are gone", e.Offset, e.To)
			}
		}
		if e.Kind == nestbox.EventData {
			if !gap && !bytes.Equal(e.Data, countFrom(at[e.Stream], len(e.Data))) {
				return fmt.Errorf("wrong bytes in %s after %d", e.Stream, at[e.Stream])
			}
			at[e.Stream] += len(e.Data)
		}
		if i > 2 && rand.IntN(20) == 0 { // a slow reader
			_ = r.log.Shrink()
		}
	}
	if !gap && (at[nestbox.Stdout] != total || at[nestbox.Stderr] != total) {
		return fmt.Errorf("read %v of %d", at, total)
	}
	return nil
}

// TestOutputDiskFull spills to a disk that gets full.
func TestOutputDiskFull(t *testing.T) {
	t.Parallel()
	limits := Limits{Memory: 64 << 10, Disk: 1 << 20, Dir: t.TempDir()}
	b := NewBudget(limits, nil)
	l := New(b, 2)
	data := countFrom(0, 100_000)
	require.NoError(t, write(l, Stdout, data))
	require.NotNil(t, l.spill)
	readOnly, err := unix.Open("/dev/full", unix.O_RDWR|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	require.NoError(t, unix.Dup3(readOnly, int(l.spill.file.Fd()), unix.O_CLOEXEC)) // every write says ENOSPC
	require.NoError(t, unix.Close(readOnly))
	for i := range 20 {
		require.NoError(t, write(l, Stdout, countFrom(100_000*(i+1), 100_000)))
	}
	state, _ := l.State()
	require.EqualValues(t, 21*100_000, state.End)
	require.LessOrEqual(t, l.memory.Load(), limits.Memory)
	r, err := l.Attach(guest.Attach{})
	require.NoError(t, err)
	defer func() { require.NoError(t, r.Close()) }()
	e, err := r.Next(t.Context())
	require.NoError(t, err)
	require.Equal(t, nestbox.EventGap, e.Kind)
	for r.pos < state.End {
		at := int(r.pos)
		e, err := r.Next(t.Context())
		require.NoError(t, err)
		require.True(t, bytes.Equal(countFrom(at, len(e.Data)), e.Data))
	}
}

// TestOutputLogSmall: a log that holds little costs little.
func TestOutputLogSmall(t *testing.T) {
	t.Parallel()
	limits := Limits{Dir: t.TempDir()}.withDefaults()
	b := NewBudget(limits, nil)
	l := New(b, 2)
	require.NoError(t, write(l, Stdout, []byte("hello\n")))
	require.EqualValues(t, minSlab, l.memory.Load())
	l.CloseStream()
	l.CloseStream()
	require.EqualValues(t, len("hello\n"), l.memory.Load())
	require.Nil(t, l.spill)

	l = New(b, 2)
	require.NoError(t, write(l, Stdout, make([]byte, 8<<20)))
	require.LessOrEqual(t, l.memory.Load(), limits.Memory)
	state, _ := l.State()
	require.Zero(t, state.Start, "nothing is lost")
}

// TestSpilledInSmallPieces: only the number of bytes decides what is kept, also
// when each few of them are spilled alone and the streams alternate.
func TestSpilledInSmallPieces(t *testing.T) {
	t.Parallel()
	for name, piece := range map[string]int{"a byte": 1, "a line": 70, "some lines": 3000} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			limits := Limits{Memory: 64 << 10, Disk: 200 << 10, TotalDisk: 1 << 20, Dir: t.TempDir()}
			b := NewBudget(limits, nil)
			l := New(b, 2)
			r, err := l.Attach(guest.Attach{})
			require.NoError(t, err)
			total := int(limits.Disk) + 100<<10
			for at := 0; at < total; at += piece {
				require.NoError(t, write(l, at/piece%2, countFrom(at, piece)))
				l.Shrink()
				kept := l.end - l.start
				require.True(t, l.start == 0 || kept+int64(l.maxSlab) >= limits.Disk, "%d bytes are kept", kept)
				require.LessOrEqual(t, kept, limits.Disk)
				require.LessOrEqual(t, b.Disk(), 2*limits.Disk+2*int64(l.maxSlab))
				require.LessOrEqual(t, len(l.slabs), int(limits.Disk)/l.maxSlab*18+20, "and few slabs")
			}
			for r.pos < l.end {
				at := int(r.pos)
				e, err := r.Next(t.Context())
				require.NoError(t, err)
				if e.Kind == nestbox.EventData {
					require.True(t, bytes.Equal(countFrom(at, len(e.Data)), e.Data), "at %d", at)
					require.Equal(t, StreamNames[at/piece%2], e.Stream)
				}
			}
			require.NoError(t, r.Close())
			l.TryDropAll()
			require.Zero(t, b.Disk())
			require.Zero(t, l.spilled)
		})
	}
}

// TestSpillFileRoom takes and gives pieces of all sizes in any order.
func TestSpillFileRoom(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		f := &spillFile{budget: NewBudget(Limits{TotalDisk: 1000}, nil)}
		var taken []extent
		t.Repeat(map[string]func(*rapid.T){
			"take": func(t *rapid.T) {
				e, err := f.take(rapid.Int64Range(1, 200).Draw(t, "size"))
				if err == nil {
					taken = append(taken, e)
				}
			},
			"put": func(t *rapid.T) {
				if len(taken) > 0 {
					i := rapid.IntRange(0, len(taken)-1).Draw(t, "which")
					f.put(taken[i])
					taken = append(taken[:i], taken[i+1:]...)
				}
			},
			"": func(t *rapid.T) {
				all := append(append([]extent{}, taken...), f.free...)
				sort.Slice(all, func(i, j int) bool { return all[i].at < all[j].at })
				at := int64(0)
				for _, e := range all { // no gap, no overlap
					require.Equal(t, at, e.at)
					at = e.end()
				}
				require.Equal(t, f.size, at)
				require.Equal(t, f.size, f.budget.Disk())
				for i := 1; i < len(f.free); i++ {
					require.Less(t, f.free[i-1].end(), f.free[i].at, "joined and in order")
				}
			},
		})
	})
}

// TestStalledReaders: a thousand readers that each stop with an event in hand
// hold little, and get everything when they go on.
func TestStalledReaders(t *testing.T) {
	t.Parallel()
	b := NewBudget(Limits{Dir: t.TempDir()}, nil)
	l := New(b, 2)
	const n, each = 1000, 40_000
	readers := make([]*Reader, n)
	events := make([]nestbox.OutputEvent, n)
	for i := range readers {
		r, err := l.Attach(guest.Attach{})
		require.NoError(t, err)
		readers[i] = r
		require.NoError(t, write(l, i%2, countFrom(i*each, each)))
		if i%3 == 0 { // it stops far behind the others
			l.Shrink()
		}
		events[i], err = r.Next(t.Context())
		require.NoError(t, err)
	}
	held := 0
	for _, r := range readers {
		held += cap(r.copied) + cap(r.heldBuf)
		if r.loaded != nil {
			held += cap(r.loaded.buf)
		}
	}
	require.Less(t, held, 5*sharedBytes)
	for i, r := range readers {
		require.True(t, bytes.Equal(countFrom(0, len(events[i].Data)), events[i].Data))
		if i%100 > 0 {
			require.NoError(t, r.Close())
		}
	}
	for _, r := range readers[:1] {
		for r.pos < l.end {
			at := int(r.pos)
			e, err := r.Next(t.Context())
			require.NoError(t, err)
			require.Equal(t, nestbox.EventData, e.Kind)
			require.True(t, bytes.Equal(countFrom(at, len(e.Data)), e.Data))
		}
	}
	for i := 0; i < n; i += 100 {
		require.NoError(t, readers[i].Close())
	}
	require.Zero(t, b.readers.Load())
}
