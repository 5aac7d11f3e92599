package guestrpc

import (
	"bytes"
	"context"
	"io"
	"net"
	"sort"
	"sync"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/rpcerr"
)

// A thousand readers of one process need not cost its daemon a thousand streams:
// all but the first share one, which a hub reads for them. A reader that is
// behind what the hub keeps reads for itself, so that slow readers lose nothing
// and hold up no other.

const (
	// hubKeeps is how many bytes of output a hub keeps.
	hubKeeps = 1 << 20

	// hubAhead is how far a hub reads ahead of the fastest of its readers.
	hubAhead = hubKeeps / 2
)

// hubs are the readers of a client, by process.
type hubs struct {
	mu      sync.Mutex
	of      map[output]*audience
	closed  bool
	running sync.WaitGroup // hubs
}

// output is what an audience reads. Lossless readers are apart: the process waits
// for the slowest of them.
type output struct {
	process  nestbox.ProcessID
	lossless bool
}

// close ends all hubs.
func (h *hubs) close() {
	h.mu.Lock()
	h.closed = true
	for _, a := range h.of {
		if a.hub != nil {
			a.hub.stop()
		}
	}
	h.mu.Unlock()
	h.running.Wait()
}

// audience is how many read one process, and the hub for those that share.
type audience struct {
	readers int
	hub     *hub // nil until there is a second one
}

// attach attaches a reader that may share. from is its offset.
func (h *hubs) attach(ctx context.Context, c *Client, of output, from int64) (guest.OutputReader, error) {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return nil, c.explain(rpcerr.Lost(net.ErrClosed, nestbox.CodeGuest))
	}
	if h.of == nil {
		h.of = map[output]*audience{}
	}
	a := h.of[of]
	if a == nil {
		a = &audience{}
		h.of[of] = a
	}
	a.readers++
	var shared *hub
	var first bool
	if a.readers > 1 {
		if first = a.hub == nil || a.hub.over(); first {
			a.hub = newHub(from, of.lossless)
			h.running.Add(1)
		}
		shared = a.hub
	}
	h.mu.Unlock()
	leave := sync.OnceFunc(func() { h.leave(of, a) })
	open := func(ctx context.Context, at int64) (*reader, error) {
		return c.attach(ctx, nestbox.Selector{ID: of.process}, guest.Attach{Since: nestbox.Since{Offset: at}, Lossless: of.lossless})
	}
	if first {
		up, err := open(ctx, from)
		if err == nil {
			up.give() // it is the client's own, and each of its readers has a slot
		}
		go func() {
			defer h.running.Done()
			shared.run(c, up, err)
		}()
	}
	m := &member{client: c, hub: shared, pos: from, open: open, leave: leave}
	if err := m.join(ctx, c); err != nil {
		leave()
		return nil, err
	}
	return m, nil
}

// leave ends a hub with its last reader.
func (h *hubs) leave(of output, a *audience) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if a.readers--; a.readers == 0 {
		delete(h.of, of)
		if a.hub != nil {
			a.hub.stop()
		}
	}
}

// hub reads the output of one process for many.
type hub struct {
	ctx   context.Context //nolint:containedctx // of its stream
	stop  context.CancelFunc
	slow  bool          // it goes as fast as its slowest reader, rather than its fastest
	ready chan struct{} // closed when the stream is open, or could not be opened

	mu      sync.Mutex
	chunks  []nestbox.OutputEvent // data and gaps, one after the other
	start   int64                 // where the first of them begins
	end     int64
	exit    *nestbox.OutputEvent
	closed  bool
	err     error // why it ended; io.EOF after the end of the output
	members map[*member]struct{}
	changed chan struct{} // closed and replaced when there is more
	wanted  chan struct{} // closed when a reader has moved on, if the hub waits for that
}

func newHub(from int64, slow bool) *hub {
	h := &hub{slow: slow, ready: make(chan struct{}), start: from, end: from, members: map[*member]struct{}{}, changed: make(chan struct{})}
	h.ctx, h.stop = context.WithCancel(context.Background())
	return h
}

// over reports whether the hub reads no more.
func (h *hub) over() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.err != nil
}

// run reads until the output or the last reader ends. err is why there is no
// stream.
func (h *hub) run(c *Client, up *reader, err error) {
	defer h.stop()
	if err != nil {
		h.finish(err)
		close(h.ready)
		return
	}
	close(h.ready)
	defer func() { _ = up.Close() }()
	for h.await() {
		event, err := up.Next(h.ctx)
		if err != nil {
			h.finish(orContext(c.life, err))
			return
		}
		h.add(event)
	}
	h.finish(orContext(c.life, errClosedReader()))
}

// await waits until a reader, or each, is near the end of what is kept.
func (h *hub) await() bool {
	for {
		h.mu.Lock()
		near := h.slow && len(h.members) > 0
		for m := range h.members {
			if isNear := h.end-m.pos <= hubAhead; h.slow {
				near = near && isNear
			} else {
				near = near || isNear
			}
		}
		if near {
			h.mu.Unlock()
			return true
		}
		if h.wanted == nil {
			h.wanted = make(chan struct{})
		}
		wanted := h.wanted
		h.mu.Unlock()
		select {
		case <-wanted:
		case <-h.ctx.Done():
			return false
		}
	}
}

func (h *hub) add(event nestbox.OutputEvent) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch event.Kind {
	case nestbox.EventData:
		event.Data = bytes.Clone(event.Data)
		h.chunks = append(h.chunks, event)
	case nestbox.EventGap:
		h.chunks = append(h.chunks, event)
	case nestbox.EventExit:
		h.exit = &event
	case nestbox.EventClosed:
		h.closed = true
	}
	h.end = event.End()
	for len(h.chunks) > 1 && h.end-h.chunks[0].End() >= hubKeeps {
		h.chunks[0] = nestbox.OutputEvent{}
		h.chunks = h.chunks[1:]
		h.start = h.chunks[0].Offset
	}
	h.broadcast()
}

func (h *hub) finish(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.err = err
	h.broadcast()
}

// broadcast needs mu.
func (h *hub) broadcast() {
	close(h.changed)
	h.changed = make(chan struct{})
}

// want needs mu.
func (h *hub) want() {
	if h.wanted != nil {
		close(h.wanted)
		h.wanted = nil
	}
}

// member is one reader of a hub, or one that reads for itself.
type member struct {
	client *Client
	hub    *hub // nil once it reads for itself
	pos    int64
	open   func(ctx context.Context, at int64) (*reader, error)
	own    *reader // nil while it shares
	leave  func()
	give   func() // the slot, while it shares

	exitSent, ended bool
	done            bool
}

var _ guest.OutputReader = (*member)(nil)

// join makes the reader one of its hub, if the hub has what it needs.
func (m *member) join(ctx context.Context, c *Client) error {
	if m.hub == nil {
		return m.alone(ctx)
	}
	select {
	case <-m.hub.ready:
	case <-ctx.Done():
		return m.client.fromWire(context.Cause(ctx))
	}
	m.hub.mu.Lock()
	has := m.hub.err == nil && m.pos >= m.hub.start && m.pos <= m.hub.end
	if has {
		m.hub.members[m] = struct{}{}
		m.hub.want()
	}
	m.hub.mu.Unlock()
	if !has {
		m.hub = nil
		return m.alone(ctx)
	}
	if err := c.inStreams.take("streams"); err != nil {
		m.part()
		return err
	}
	m.give = sync.OnceFunc(c.inStreams.give)
	return nil
}

// alone makes the reader read for itself, from where it is.
func (m *member) alone(ctx context.Context) (err error) {
	m.own, err = m.open(ctx, m.pos)
	if err != nil {
		m.own = nil
	}
	return err
}

// part takes the reader out of its hub.
func (m *member) part() {
	if m.hub == nil {
		return
	}
	m.hub.mu.Lock()
	delete(m.hub.members, m)
	m.hub.want()
	m.hub.mu.Unlock()
	m.hub = nil
	if m.give != nil {
		m.give()
	}
}

// Next implements guest.OutputReader.
func (m *member) Next(ctx context.Context) (nestbox.OutputEvent, error) {
	for {
		switch {
		case m.done:
			return nestbox.OutputEvent{}, errClosedReader()
		case m.own != nil:
			event, err := m.own.Next(ctx)
			if event.Kind == nestbox.EventExit && m.exitSent {
				continue // the hub has told it
			}
			return event, err
		case m.ended:
			return nestbox.OutputEvent{}, io.EOF
		}
		event, changed, err := m.step()
		switch {
		case err == errBehind:
			m.part()
			if err := m.alone(ctx); err != nil {
				return nestbox.OutputEvent{}, err
			}
			continue
		case err != nil || event.Kind != "":
			return event, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nestbox.OutputEvent{}, m.client.fromWire(context.Cause(ctx))
		}
	}
}

// errBehind says that the hub does not keep what the reader needs.
var errBehind = io.ErrShortBuffer

// step returns the next event, or what to wait for.
func (m *member) step() (event nestbox.OutputEvent, changed chan struct{}, err error) {
	h := m.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.exit != nil && !m.exitSent && m.pos >= h.exit.Offset:
		m.exitSent = true
		event = *h.exit
		event.Offset = m.pos
		exit := *h.exit.Exit
		event.Exit = &exit
	case m.pos < h.start:
		return event, nil, errBehind
	case m.pos < h.end:
		event = h.chunks[sort.Search(len(h.chunks), func(i int) bool { return h.chunks[i].End() > m.pos })]
		if event.Kind == nestbox.EventData {
			event.Data = event.Data[m.pos-event.Offset:]
		}
		event.Offset = m.pos
		m.pos = event.End()
		h.want()
	case h.closed && m.exitSent:
		m.ended = true
		event = nestbox.OutputEvent{Kind: nestbox.EventClosed, Offset: h.end}
	case h.err != nil:
		return event, nil, h.err
	}
	return event, h.changed, nil
}

// Close implements io.Closer.
func (m *member) Close() error {
	if m.done {
		return nil
	}
	m.done = true
	m.part()
	m.leave()
	if m.own != nil {
		return m.own.Close()
	}
	return nil
}

func errClosedReader() error {
	return nestbox.Errorf(nestbox.CodeCanceled, "the reader is closed")
}
