package control

import (
	"context"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/hostagent"
	"github.com/nestbox/nestbox/internal/hostagent/hosttest"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// fakeHost is a scripted hostagent.Host. Its capsules are entries of a map.
type fakeHost struct {
	now func() time.Time

	mu       sync.Mutex
	info     hostagent.Info
	capsules map[string]hostagent.Status
	died     chan struct{} // closed and replaced at each death
	down     bool          // every call is CodeUnavailable
	fail     map[string]error
	watches  int
	step     func(step) // called before and after each effect, not under mu
	guest    guest.Guest
	networks hosttest.Networks
}

// step is a point at which a process can die.
type step struct{ method, when, id string }

func newFakeHost(now func() time.Time) *fakeHost {
	return &fakeHost{
		now: now,
		info: hostagent.Info{
			HostInfo:  nestbox.HostInfo{ID: nestbox.NewID(nestbox.PrefixHost), Driver: "scripted", Templates: []string{"minimal"}},
			StartedAt: now(), Capabilities: []sandbox.Capability{sandbox.Egress},
		},
		capsules: map[string]hostagent.Status{},
		died:     make(chan struct{}),
		fail:     map[string]error{},
		step:     func(step) {},
		guest:    &fakeGuest{},
	}
}

// call runs the effect of a method under the lock, with steps around it.
func (h *fakeHost) call(ctx context.Context, method, id string, effect func() error) error {
	h.step(step{method, "before", id})
	h.mu.Lock()
	err := ctx.Err()
	switch {
	case err != nil:
	case h.down:
		err = nestbox.Errorf(nestbox.CodeUnavailable, "connection refused")
	case h.fail[method] != nil:
		err = h.fail[method]
	default:
		err = effect()
	}
	h.mu.Unlock()
	h.step(step{method, "after", id})
	return err
}

func (h *fakeHost) Info(ctx context.Context) (info hostagent.Info, err error) {
	err = h.call(ctx, "Info", "", func() error { info = h.info; return nil })
	return info, err
}

func (h *fakeHost) Create(ctx context.Context, id string, _ nestbox.CapsuleSpec) (s hostagent.Status, err error) {
	err = h.call(ctx, "Create", id, func() error {
		if _, taken := h.capsules[id]; taken {
			return nestbox.Errorf(nestbox.CodeConflict, "taken")
		}
		s = hostagent.Status{ID: id, State: hostagent.StateRunning, CreatedAt: h.now()}
		h.capsules[id] = s
		return nil
	})
	return s, err
}

func (h *fakeHost) Destroy(ctx context.Context, id string) error {
	return h.call(ctx, "Destroy", id, func() error { delete(h.capsules, id); return nil })
}

func (h *fakeHost) Get(ctx context.Context, id string) (s hostagent.Status, err error) {
	err = h.call(ctx, "Get", id, func() (err error) { s, err = h.find(id); return err })
	return s, err
}

func (h *fakeHost) find(id string) (hostagent.Status, error) {
	s, ok := h.capsules[id]
	if !ok {
		return s, nestbox.Errorf(nestbox.CodeNotFound, "this host has no capsule %s", id)
	}
	return s, nil
}

func (h *fakeHost) List(ctx context.Context) (list []hostagent.Status, err error) {
	err = h.call(ctx, "List", "", func() error { list = h.list(); return nil })
	return list, err
}

func (h *fakeHost) list() (list []hostagent.Status) {
	for _, s := range h.capsules {
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b hostagent.Status) int { return strings.Compare(a.ID, b.ID) })
	return list
}

func (h *fakeHost) Guest(ctx context.Context, id string) (g guest.Guest, err error) {
	err = h.call(ctx, "Guest", id, func() error {
		s, err := h.find(id)
		if err == nil && s.State != hostagent.StateRunning {
			err = nestbox.Errorf(nestbox.CodeInvalidState, "dead")
		}
		g = h.guest
		return err
	})
	return g, err
}

func (h *fakeHost) SetNetwork(ctx context.Context, id string, policy nestbox.NetworkPolicy) error {
	return h.call(ctx, "SetNetwork", id, func() error {
		if _, err := h.find(id); err != nil {
			return err
		}
		return h.networks.SetNetwork(ctx, id, policy)
	})
}

func (h *fakeHost) Network(ctx context.Context, id string) (r nestbox.NetworkReport, err error) {
	err = h.call(ctx, "Network", id, func() (err error) {
		if _, err := h.find(id); err != nil {
			return err
		}
		r, err = h.networks.Network(ctx, id)
		return err
	})
	return r, err
}

func (h *fakeHost) WatchDeaths(ctx context.Context, died func(hostagent.Status)) error {
	told := map[string]bool{}
	h.mu.Lock()
	h.watches++
	h.mu.Unlock()
	for {
		var dead []hostagent.Status
		var next chan struct{}
		err := h.call(ctx, "WatchDeaths", "", func() error {
			next = h.died
			for _, s := range h.list() {
				if s.State == hostagent.StateDead && !told[s.ID] {
					told[s.ID] = true
					dead = append(dead, s)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, s := range dead {
			died(s)
		}
		select {
		case <-next:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// change runs f under the lock and wakes the watchers.
func (h *fakeHost) change(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
	close(h.died)
	h.died = make(chan struct{})
}

// crash ends a capsule's sandbox.
func (h *fakeHost) crash(id string) {
	h.change(func() {
		if s, ok := h.capsules[id]; ok {
			s.State, s.Reason = hostagent.StateDead, "segfault"
			h.capsules[id] = s
		}
	})
}

// lose makes the host forget a capsule.
func (h *fakeHost) lose(id string) { h.change(func() { delete(h.capsules, id) }) }

func (h *fakeHost) setDown(down bool) { h.change(func() { h.down = down }) }

func (h *fakeHost) failing(method string, err error) { h.change(func() { h.fail[method] = err }) }

// restart is what a new host agent of the same directory finds.
func (h *fakeHost) restart() {
	h.change(func() {
		h.info.StartedAt = h.now()
		for id, s := range h.capsules {
			if s.State == hostagent.StateStarting {
				delete(h.capsules, id)
			}
		}
	})
}

// has returns the ids that are on the host.
func (h *fakeHost) has() (ids []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.list() {
		ids = append(ids, s.ID)
	}
	return ids
}

// put makes an entry of its own.
func (h *fakeHost) put(s hostagent.Status) { h.change(func() { h.capsules[s.ID] = s }) }

// fakeGuest runs scripted processes and has one open port.
type fakeGuest struct {
	guest.Guest // not called
	processes   fakeProcesses
}

const openPort = 3000

func (g *fakeGuest) Processes() guest.Processes { return &g.processes }

func (g *fakeGuest) Dial(_ context.Context, port uint16) (net.Conn, error) {
	if port != openPort {
		return nil, nestbox.Errorf(nestbox.CodeUnavailable, "nothing listens")
	}
	here, there := net.Pipe()
	return here, there.Close()
}

// fakeProcesses has one process, whose output log is script. A nil entry of
// the script cuts the reader; at its end a reader waits for ever.
type fakeProcesses struct {
	guest.Processes // not called

	mu       sync.Mutex
	script   []*nestbox.OutputEvent
	started  nestbox.ProcessSpec
	attached []guest.Attach
	open     int // readers
	record   *nestbox.Exit
	waiting  chan struct{}
}

func (p *fakeProcesses) Start(_ context.Context, spec nestbox.ProcessSpec, attach *guest.Attach) (nestbox.Process, guest.OutputReader, error) {
	p.mu.Lock()
	p.started = spec
	p.mu.Unlock()
	return nestbox.Process{ID: 3, PID: 7, Tag: "proc-1", Cmd: spec.Cmd}, p.reader(*attach), nil
}

func (p *fakeProcesses) Locate(context.Context, nestbox.Selector, nestbox.Since, nestbox.Stream) (int64, error) {
	return 0, nestbox.Errorf(nestbox.CodeUnsupported, "not scripted")
}

func (p *fakeProcesses) Tree(context.Context) ([]nestbox.SystemProcess, error) {
	return nil, nestbox.Errorf(nestbox.CodeUnsupported, "not scripted")
}

func (p *fakeProcesses) Attach(_ context.Context, sel nestbox.Selector, attach guest.Attach) (guest.OutputReader, error) {
	if sel.ID != 3 {
		return nil, nestbox.Errorf(nestbox.CodeNotFound, "no process %s", sel)
	}
	return p.reader(attach), nil
}

// Get answers the record that the process ended with, if it has.
func (p *fakeProcesses) Get(_ context.Context, sel nestbox.Selector) (nestbox.Process, error) {
	if sel.ID != 3 {
		return nestbox.Process{}, nestbox.Errorf(nestbox.CodeNotFound, "no process %s", sel)
	}
	return nestbox.Process{ID: 3, PID: 7, Exit: p.record}, nil
}

func (p *fakeProcesses) reader(attach guest.Attach) guest.OutputReader {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.attached = append(p.attached, attach)
	p.open++
	return &fakeReader{processes: p}
}

// fakeReader reads on where the reader before it was cut.
type fakeReader struct{ processes *fakeProcesses }

func (r *fakeReader) Next(ctx context.Context) (nestbox.OutputEvent, error) {
	p := r.processes
	p.mu.Lock()
	if len(p.script) == 0 {
		p.mu.Unlock()
		if p.waiting != nil {
			close(p.waiting)
		}
		<-ctx.Done()
		return nestbox.OutputEvent{}, ctx.Err()
	}
	defer p.mu.Unlock()
	event := p.script[0]
	p.script = p.script[1:]
	if event == nil {
		return nestbox.OutputEvent{}, nestbox.Errorf(nestbox.CodeGuest, "cut")
	}
	if event.Kind == nestbox.EventClosed && event.Exit == nil && len(p.script) == 0 {
		return nestbox.OutputEvent{}, io.EOF
	}
	return *event, nil
}

func (r *fakeReader) Close() error {
	r.processes.mu.Lock()
	defer r.processes.mu.Unlock()
	r.processes.open--
	return nil
}

func requireCode(t *testing.T, code nestbox.Code, err error) {
	t.Helper()
	require.Error(t, err)
	require.Equal(t, code, nestbox.CodeOf(err), "%v", err)
}
