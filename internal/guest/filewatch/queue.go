package filewatch

import (
	"context"
	"sync"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// Bounds of a queue and of what is taken from it, in bytes of paths.
const (
	maxQueued = 1 << 20
	maxBatch  = 32 << 10
)

// queue is the events that a reader has not taken yet. When it is full, one that
// says so is put last, and what comes until that is taken is dropped: whoever
// reads of an overflow looks at the files again.
type queue struct {
	most  int
	ended chan struct{} // closed by end

	mu     sync.Mutex
	events []nestbox.FileEvent
	bytes  int                              // of their paths
	last   map[string]nestbox.FileEventType // the newest event of each path
	why    error                            // not nil once ended
	wake   chan struct{}                    // holds one if there may be something to take
}

func newQueue(most int) *queue {
	return &queue{most: most, ended: make(chan struct{}), last: map[string]nestbox.FileEventType{}, wake: make(chan struct{}, 1)}
}

// push adds an event, unless it says again what the last one of its path said
// that nobody has taken yet. root is the path of an overflow.
func (q *queue) push(e nestbox.FileEvent, root string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.why != nil || q.overflowed() {
		return
	}
	again := e.Type == nestbox.FileWrite || e.Type == nestbox.FileChmod
	if again && q.last[e.Path] == e.Type {
		return
	}
	if size := sizeOf(e); len(q.events) >= q.most-1 || q.bytes+size > maxQueued {
		e = nestbox.FileEvent{Type: nestbox.FileOverflow, Path: root}
	}
	q.add(e)
}

// overflow adds an event that says that others are missing.
func (q *queue) overflow(root string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.why == nil && !q.overflowed() {
		q.add(nestbox.FileEvent{Type: nestbox.FileOverflow, Path: root})
	}
}

func (q *queue) overflowed() bool {
	return len(q.events) > 0 && q.events[len(q.events)-1].Type == nestbox.FileOverflow
}

func (q *queue) add(e nestbox.FileEvent) {
	q.events = append(q.events, e)
	q.bytes += sizeOf(e)
	q.last[e.Path] = e.Type
	if e.To != "" {
		q.last[e.To] = e.Type
	}
	q.signal()
}

func sizeOf(e nestbox.FileEvent) int { return len(e.Path) + len(e.To) }

// end has next return why, once all events are taken. Only the first call counts.
func (q *queue) end(why error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.why == nil {
		q.why = why
		close(q.ended)
		q.signal()
	}
}

// reason returns why the queue has ended.
func (q *queue) reason() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.why
}

func (q *queue) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// next takes at least one event, at most most, waiting for it.
func (q *queue) next(ctx context.Context, most int) ([]nestbox.FileEvent, error) {
	for {
		events, err := q.take(most)
		if len(events) > 0 || err != nil {
			return events, err
		}
		select {
		case <-q.wake:
		case <-ctx.Done():
			return nil, guest.ContextError(ctx)
		}
	}
}

func (q *queue) take(most int) ([]nestbox.FileEvent, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.events) == 0 {
		return nil, q.why
	}
	n, bytes := 0, 0
	for n < min(len(q.events), max(most, 1)) && (n == 0 || bytes < maxBatch) {
		e := q.events[n]
		bytes += sizeOf(e)
		delete(q.last, e.Path)
		delete(q.last, e.To)
		n++
	}
	taken := q.events[:n:n]
	q.events = q.events[n:]
	q.bytes -= bytes
	if len(q.events) == 0 {
		q.events = nil // and what is taken is the reader's
	}
	return taken, nil
}
