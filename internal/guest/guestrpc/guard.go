package guestrpc

import (
	"context"
	"sync"
	"time"

	"github.com/nestbox/nestbox"
)

// How long a daemon may take. Root inside a capsule can stop it, or put
// something else in its place, so nothing is waited for without a bound.
const (
	// lookAfter is how long a call waits before the daemon is asked whether it
	// lives, and then between two such looks.
	lookAfter = 5 * time.Second

	// lookIn is how long it may take to say so. A call to a frozen daemon so
	// ends within lookAfter + lookIn.
	lookIn = 4 * time.Second

	// callIn bounds a call that only looks something up or changes one thing,
	// by a daemon that says that it lives.
	callIn = time.Minute

	// killIn is what a kill may take beyond its grace, and workIn what may
	// take its time: removing a large tree, the end of a large upload.
	killIn = 2 * time.Minute
	workIn = 10 * time.Minute

	// frozenLook is how soon a daemon that did not answer lately is asked again, and
	// how long it then may take: who calls it gets to know within a second.
	frozenLook = 400 * time.Millisecond
)

// guard ends a context when the daemon shows no life while it is waited for, or
// when it is waited for too long. It is used by one goroutine at a time.
type guard struct {
	client *Client
	cancel context.CancelCauseFunc
	apart  func() bool   // from the client's life
	every  time.Duration // between looks at the daemon
	late   error         // after the longest time; nil = one that says how long that was

	mu    sync.Mutex
	timer *time.Timer
	since time.Time     // the waiting began; zero = nothing is waited for
	most  time.Duration // it may take; 0 = no limit but signs of life
}

// guard returns a context that ends with ctx, with the client or because of the
// guard, and the guard, which must be released.
func (c *Client) guard(ctx context.Context) (context.Context, *guard) {
	ctx, cancel := context.WithCancelCause(ctx)
	apart := context.AfterFunc(c.life, func() { cancel(context.Cause(c.life)) })
	return asCall(ctx), &guard{client: c, cancel: cancel, apart: apart, every: c.looks.after}
}

// wait says that the daemon is waited for from now on, for at most that long.
func (g *guard) wait(most time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.since, g.most = time.Now(), most
	first := g.every
	if !g.client.pulse.frozenSince().IsZero() {
		first = min(first, frozenLook)
	}
	if g.timer == nil {
		g.timer = time.AfterFunc(first, g.look)
		return
	}
	g.timer.Reset(first)
}

// rest says that nothing is waited for.
func (g *guard) rest() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.since = time.Time{}
	if g.timer != nil {
		g.timer.Stop()
	}
}

// release frees the guard and ends its context.
func (g *guard) release() {
	g.rest()
	g.apart()
	g.cancel(nil)
}

// look ends the waiting if it is in vain.
func (g *guard) look() {
	g.mu.Lock()
	since, most := g.since, g.most
	g.mu.Unlock()
	if since.IsZero() {
		return
	}
	in := g.client.looks.in
	if !g.client.pulse.frozenSince().IsZero() {
		in = min(in, frozenLook)
	}
	err := g.client.pulse.look(context.Background(), g.client, in)
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case !g.since.Equal(since): // it waits for something else by now
	case err != nil:
		g.cancel(g.client.unresponsive())
	case most > 0 && time.Since(since) >= most && g.late != nil:
		g.cancel(g.late)
	case most > 0 && time.Since(since) >= most:
		g.cancel(nestbox.Errorf(nestbox.CodeTimeout, "the capsule's daemon lives, but did not answer within %v", most))
	default:
		g.timer.Reset(g.every)
	}
}

// looks are lookAfter and lookIn, or less in tests.
type looks struct{ after, in time.Duration }

// pulse is what is known of a daemon's life. Many calls that wait share one
// look at it.
type pulse struct {
	mu      sync.Mutex
	last    time.Time     // sign of life
	frozen  time.Time     // since when there has been none; zero = it lives
	looking chan struct{} // closed when the look under way is over
	err     error         // of the last look
}

// beat notes a sign of life.
func (p *pulse) beat() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last, p.frozen = time.Now(), time.Time{}
}

// frozenSince returns since when the daemon has shown no life; zero = it lives,
// or nobody has looked.
func (p *pulse) frozenSince() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.frozen
}

// look returns nil if the daemon has shown life lately, or does within in when it
// is asked.
func (p *pulse) look(ctx context.Context, c *Client, in time.Duration) error {
	p.mu.Lock()
	if time.Since(p.last) < c.looks.after {
		p.mu.Unlock()
		return nil
	}
	if looking := p.looking; looking != nil {
		p.mu.Unlock()
		select {
		case <-looking:
		case <-time.After(in):
			return errUnresponsive
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.err
	}
	p.looking = make(chan struct{})
	p.mu.Unlock()

	began := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, in, errUnresponsive)
	_, err := c.ping(asCall(ctx))
	cancel()

	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err = err; err != nil && p.frozen.IsZero() {
		p.frozen = began
	}
	close(p.looking)
	p.looking = nil
	return err
}

// Look asks the daemon whether it lives, unless it has shown that lately, and
// returns since when it has not; zero = it lives. It takes at most lookIn.
func (c *Client) Look(ctx context.Context) (frozenSince time.Time) {
	_ = c.pulse.look(ctx, c, c.looks.in) // the pulse has it
	return c.pulse.frozenSince()
}

// FrozenSince returns what the last Look, or a call, found out.
func (c *Client) FrozenSince() time.Time { return c.pulse.frozenSince() }

// asCall makes ctx known to dial, which http.Transport otherwise lets go on
// when the request that asked for the connection has ended.
func asCall(ctx context.Context) context.Context {
	return context.WithValue(ctx, callKey{}, ctx)
}

type callKey struct{}

// withCall returns ctx, ended also when the call ends that it is for.
func withCall(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	call, ok := ctx.Value(callKey{}).(context.Context)
	if !ok {
		return ctx, func() { cancel(nil) }
	}
	stop := context.AfterFunc(call, func() { cancel(context.Cause(call)) })
	return ctx, func() { stop(); cancel(nil) }
}
