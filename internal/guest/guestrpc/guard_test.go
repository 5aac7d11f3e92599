package guestrpc

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// freezer is a server that answers nothing while it is frozen.
type freezer struct {
	frozen atomic.Bool
	open   atomic.Int64 // requests
	thaw   chan struct{}
}

// freeze puts a freezer before s.
func freeze(s *server) *freezer {
	f := &freezer{thaw: make(chan struct{})}
	next := s.http.Handler
	s.http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !f.frozen.Load() {
			next.ServeHTTP(w, r)
			return
		}
		f.open.Add(1)
		defer f.open.Add(-1)
		go func() { _, _ = io.Copy(io.Discard, r.Body) }() // so that the end of the connection is seen
		select {
		case <-f.thaw:
		case <-r.Context().Done():
		}
	})
	return f
}

// everything is every call to a daemon.
func everything(c *Client) map[string]func(context.Context) error {
	p, f := c.Processes(), c.Files()
	sel := nestbox.Selector{PID: 7}
	return map[string]func(context.Context) error{
		"Ping": func(ctx context.Context) error { _, err := c.Ping(ctx); return err },
		"Dial": func(ctx context.Context) error { _, err := c.Dial(ctx, 80); return err },
		"Start": func(ctx context.Context) error {
			_, _, err := p.Start(ctx, nestbox.ProcessSpec{Cmd: "x"}, nil)
			return err
		},
		"StartAttach": func(ctx context.Context) error {
			_, _, err := p.Start(ctx, nestbox.ProcessSpec{Cmd: "x"}, &guest.Attach{})
			return err
		},
		"List":        func(ctx context.Context) error { _, err := p.List(ctx, true); return err },
		"Get":         func(ctx context.Context) error { _, err := p.Get(ctx, sel); return err },
		"by id":       func(ctx context.Context) error { _, err := p.Get(ctx, nestbox.Selector{ID: 1}); return err },
		"Wait":        func(ctx context.Context) error { _, err := p.Wait(ctx, sel); return err },
		"Attach":      func(ctx context.Context) error { _, err := p.Attach(ctx, sel, guest.Attach{}); return err },
		"WriteStdin":  func(ctx context.Context) error { return p.WriteStdin(ctx, sel, []byte("x"), true) },
		"Signal":      func(ctx context.Context) error { return p.Signal(ctx, sel, syscall.SIGTERM) },
		"Kill":        func(ctx context.Context) error { _, err := p.Kill(ctx, sel, guest.Kill{Grace: time.Hour}); return err },
		"KillBiggest": func(ctx context.Context) error { _, err := p.KillBiggest(ctx, 0); return err },
		"Read":        func(ctx context.Context) error { _, _, err := f.Read(ctx, "/f", 0); return err },
		"Write": func(ctx context.Context) error {
			_, err := f.Write(ctx, "/f", bytes.NewReader(make([]byte, 64<<20)), guest.WriteOptions{})
			return err
		},
		"Put": func(ctx context.Context) error {
			_, err := f.Write(ctx, "/f", strings.NewReader("x"), guest.WriteOptions{})
			return err
		},
		"Stat":   func(ctx context.Context) error { _, err := f.Stat(ctx, "/f"); return err },
		"FList":  func(ctx context.Context) error { _, err := f.List(ctx, "/f", 1); return err },
		"Mkdir":  func(ctx context.Context) error { _, err := f.Mkdir(ctx, "/f"); return err },
		"Remove": func(ctx context.Context) error { return f.Remove(ctx, "/f") },
		"Pack": func(ctx context.Context) error {
			_, err := f.Pack(ctx, "/f", guest.PackOptions{}, io.Discard, nil)
			return err
		},
		"Unpack": func(ctx context.Context) error {
			_, err := f.Unpack(ctx, "/f", bytes.NewReader(make([]byte, 64<<20)), guest.UnpackOptions{})
			return err
		},
		"Watch": func(ctx context.Context) error { _, err := f.Watch(ctx, "/f", true); return err },
	}
}

// requireFreed requires that calls that have returned gave their slots back. Those
// of dials come a moment later: net/http dials in a goroutine of its own, which
// sees the end of the call when the call has already returned.
func requireFreed(t *testing.T, c *Client) {
	t.Helper()
	require.Zero(t, len(c.inCalls)+len(c.inStreams))
	require.Eventually(t, func() bool { return len(c.dialing) == 0 }, patience, time.Millisecond)
}

// TestFrozenDaemon: every call to a daemon that does not answer ends, says why,
// and the client knows since when. A daemon that goes on is well again.
func TestFrozenDaemon(t *testing.T) {
	t.Parallel()
	s := serve(t, &scripted{ping: func(context.Context) (guest.Info, error) { return guest.Info{}, nil }})
	f := freeze(s)
	c := s.client(t)
	c.looks = looks{after: 100 * time.Millisecond, in: 100 * time.Millisecond}
	f.frozen.Store(true)
	began := time.Now()
	var calls sync.WaitGroup
	for name, call := range everything(c) {
		calls.Go(func() {
			err := call(context.Background())
			if nestbox.CodeOf(err) != nestbox.CodeTimeout {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	calls.Wait()
	require.False(t, c.FrozenSince().Before(began))
	require.False(t, c.FrozenSince().IsZero())
	requireFreed(t, c)

	f.frozen.Store(false)
	close(f.thaw)
	require.Eventually(t, func() bool { return c.Look(t.Context()).IsZero() }, patience, time.Millisecond)
}

// TestSlowDaemonIsNotFrozen: a call that takes many times as long as a look is
// waited for while the daemon says that it lives.
func TestSlowDaemonIsNotFrozen(t *testing.T) {
	t.Parallel()
	var pings atomic.Int64
	enough := make(chan struct{})
	c := serve(t, &scripted{
		ping: func(context.Context) (guest.Info, error) {
			if pings.Add(1) == 5 {
				close(enough)
			}
			return guest.Info{}, nil
		},
		wait: func(ctx context.Context, _ nestbox.Selector) (nestbox.Process, error) {
			<-enough
			p := aProcess()
			p.Exit = anExit()
			return p, nil
		},
	}).client(t)
	c.looks = looks{after: 5 * time.Millisecond, in: patience}
	_, err := c.Processes().Wait(t.Context(), nestbox.Selector{PID: 7})
	require.NoError(t, err)
	require.True(t, c.FrozenSince().IsZero())
}

// TestLeavingFreesAtOnce: callers that leave a frozen daemon leave nothing
// behind, although nobody would look at the daemon for an hour.
func TestLeavingFreesAtOnce(t *testing.T) {
	t.Parallel()
	for name, hang := range map[string]bool{"no answer": false, "no connection": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := serve(t, &scripted{})
			f := freeze(s)
			f.frozen.Store(true)
			defer close(f.thaw)
			var dialling atomic.Int64
			c := newTestClient(t, func(ctx context.Context) (net.Conn, error) {
				if hang {
					dialling.Add(1)
					defer dialling.Add(-1)
					<-ctx.Done()
					return nil, ctx.Err()
				}
				return s.dial(ctx)
			})
			c.looks = looks{after: time.Hour, in: time.Hour}
			ctx, leave := context.WithCancel(t.Context())
			var calls sync.WaitGroup
			for _, call := range everything(c) {
				for range 3 {
					calls.Go(func() { _ = call(ctx) })
				}
			}
			require.Eventually(t, func() bool { return f.open.Load()+dialling.Load() >= 40 }, patience, time.Millisecond)
			leave()
			calls.Wait()
			requireFreed(t, c)
			require.Eventually(t, func() bool { return f.open.Load()+dialling.Load() == 0 }, patience, time.Millisecond)
		})
	}
}

// TestBudget: what goes on with one daemon at a time is bounded: beyond that streams
// are refused, and calls after a short wait.
func TestBudget(t *testing.T) {
	t.Parallel()
	c := serve(t, &scripted{ping: func(context.Context) (guest.Info, error) { return guest.Info{}, nil }, attach: func(context.Context, nestbox.Selector, guest.Attach) (guest.OutputReader, error) {
		return newFeed(), nil
	}}).client(t)
	c.looks = looks{after: time.Second, in: time.Second}
	c.inStreams, c.inCalls = newSlots(2), newSlots(0)
	first := attach(t, c)
	attach(t, c)
	_, err := c.Processes().Attach(t.Context(), nestbox.Selector{PID: 7}, guest.Attach{})
	requireCode(t, err, nestbox.CodeExhausted)
	_, err = c.Processes().Get(t.Context(), nestbox.Selector{PID: 7})
	requireCode(t, err, nestbox.CodeExhausted)
	_, _, err = c.Files().Read(t.Context(), "/f", 0)
	requireCode(t, err, nestbox.CodeExhausted)
	_, err = c.Dial(t.Context(), 80)
	requireCode(t, err, nestbox.CodeExhausted)
	require.NoError(t, first.Close())
	attach(t, c)
}
