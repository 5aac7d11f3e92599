// Package meter bounds what callers make the server hold in memory, in bytes over
// all requests of a team and of all teams, rather than for each request.
//
// A request begins with Begin; whatever on its way holds much for it calls Take
// with the request's context, before it does. All that was taken is given back
// when the request ends. It is a leaf: it imports the root package only.
package meter

import (
	"context"
	"sync"
	"time"

	"github.com/nestbox/nestbox"
)

// Small is what need not be taken: every request may hold so many bytes.
const Small = 64 << 10

// waitFor is how long a request waits for others to give back.
const waitFor = 15 * time.Second

// Meter counts bytes. Use New; its methods are safe for concurrent use.
type Meter struct {
	total, perTeam int64

	mu    sync.Mutex
	used  int64
	teams map[string]int64
	given chan struct{} // closed and replaced when bytes are given back
}

// New returns a Meter of so many bytes in total, and for each team.
func New(total, perTeam int64) *Meter {
	return &Meter{total: total, perTeam: min(perTeam, total), teams: map[string]int64{}, given: make(chan struct{})}
}

// request is what one request has taken. It is guarded by Meter.mu.
type request struct {
	meter *Meter
	team  string
	taken int64
	ended bool
}

type requestKey struct{}

// Begin returns a context to Take with, and a function that gives back all that
// was taken.
func (m *Meter) Begin(ctx context.Context, team string) (context.Context, func()) {
	r := &request{meter: m, team: team}
	return context.WithValue(ctx, requestKey{}, r), func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		r.ended = true
		r.give(r.taken)
	}
}

// Give gives back bytes that were taken for the request of ctx and are not held
// any more.
func Give(ctx context.Context, bytes int64) {
	r, ok := ctx.Value(requestKey{}).(*request)
	if !ok || bytes <= 0 {
		return
	}
	r.meter.mu.Lock()
	defer r.meter.mu.Unlock()
	r.give(min(bytes, r.taken))
}

// give needs Meter.mu.
func (r *request) give(bytes int64) {
	m := r.meter
	if bytes == 0 {
		return
	}
	r.taken -= bytes
	m.used -= bytes
	if m.teams[r.team] -= bytes; m.teams[r.team] == 0 {
		delete(m.teams, r.team)
	}
	close(m.given)
	m.given = make(chan struct{})
}

// Take counts bytes that are about to be held for the request of ctx. If there is
// no room it waits for others, for a while. CodeExhausted: there was none.
// CodeTooLarge: there never can be. A context without a request takes what it
// likes.
func Take(ctx context.Context, bytes int64) error {
	r, ok := ctx.Value(requestKey{}).(*request)
	if !ok || bytes <= 0 {
		return nil
	}
	m := r.meter
	var timeout <-chan time.Time
	for {
		m.mu.Lock()
		if r.ended {
			m.mu.Unlock()
			return context.Canceled
		}
		if r.taken+bytes > m.perTeam {
			m.mu.Unlock()
			return nestbox.Errorf(nestbox.CodeTooLarge, "the request needs more than the %d MiB of memory that a team may use", m.perTeam>>20)
		}
		if m.used+bytes <= m.total && m.teams[r.team]+bytes <= m.perTeam {
			m.used += bytes
			m.teams[r.team] += bytes
			r.taken += bytes
			m.mu.Unlock()
			return nil
		}
		given := m.given
		m.mu.Unlock()
		if timeout == nil {
			timer := time.NewTimer(waitFor)
			defer timer.Stop()
			timeout = timer.C
		}
		select {
		case <-given:
		case <-timeout:
			return nestbox.Errorf(nestbox.CodeExhausted, "the requests in progress use all the memory that they may; try again")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
