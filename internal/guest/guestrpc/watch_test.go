package guestrpc

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// told is a FileWatch that says what a test sends it.
type told struct {
	events chan []nestbox.FileEvent
	closed chan struct{} // by Close
}

func newTold() *told {
	return &told{events: make(chan []nestbox.FileEvent), closed: make(chan struct{})}
}

func (w *told) Next(ctx context.Context) ([]nestbox.FileEvent, error) {
	select {
	case events, ok := <-w.events:
		if !ok {
			return nil, io.EOF
		}
		return events, nil
	case <-ctx.Done():
		return nil, guest.ContextError(ctx)
	}
}

func (w *told) Close() error {
	close(w.closed)
	return nil
}

// watchOf is a guest all of whose watches are w.
func watchOf(w guest.FileWatch) *scripted {
	return &scripted{
		ping:  func(context.Context) (guest.Info, error) { return guest.Info{Features: guest.Features()}, nil },
		watch: func(context.Context, string, bool) (guest.FileWatch, error) { return w, nil },
	}
}

func watchAll(t *testing.T, c *Client) guest.FileWatch {
	t.Helper()
	w, err := c.Files().Watch(t.Context(), "/", true)
	require.NoError(t, err)
	t.Cleanup(func() { _ = w.Close() })
	return w
}

func TestWatchIsAliveWhileQuiet(t *testing.T) {
	t.Parallel()
	w := newTold()
	c := serveAlive(t, watchOf(w), 10*time.Millisecond).client(t)
	c.silentFor = 2 * time.Second
	watch := watchAll(t, c)
	go func() {
		quiet := time.NewTimer(3 * time.Second)
		defer quiet.Stop()
		<-quiet.C
		w.events <- []nestbox.FileEvent{{Type: nestbox.FileCreate, Path: "/f"}}
		close(w.events)
	}()
	events, err := watch.Next(t.Context())
	require.NoError(t, err)
	require.Equal(t, []nestbox.FileEvent{{Type: nestbox.FileCreate, Path: "/f"}}, events)
	_, err = watch.Next(t.Context())
	require.Equal(t, io.EOF, err)
	requireClosed(t, w.closed, "the server's watch goes on")
	requireFreed(t, c)
}

// TestWatchIsCut: what ends without having said so is no end.
func TestWatchIsCut(t *testing.T) {
	t.Parallel()
	for name, cut := range map[string]func(*server, *Client){
		"silence": func(*server, *Client) {},
		"server":  func(s *server, _ *Client) { _ = s.http.Close() },
		"client":  func(_ *server, c *Client) { c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newTold()
			s := serve(t, watchOf(w))
			c := s.client(t)
			c.silentFor = time.Second
			watch := watchAll(t, c)
			cut(s, c)
			_, err := watch.Next(t.Context())
			requireCode(t, err, nestbox.CodeGuest)
			requireClosed(t, w.closed, "the server's watch goes on")
			requireFreed(t, c)
		})
	}
}

// TestWatchIsNotBelieved: events that cannot be are an error of the daemon's.
func TestWatchIsNotBelieved(t *testing.T) {
	t.Parallel()
	ok := nestbox.FileEvent{Type: nestbox.FileCreate, Path: "/f"}
	many := make([]nestbox.FileEvent, guest.MaxWatchBatch+1)
	for i := range many {
		many[i] = ok
	}
	for name, events := range map[string][]nestbox.FileEvent{
		"type":     {ok, {Type: "explode", Path: "/f"}},
		"no type":  {{Path: "/f"}},
		"relative": {{Type: nestbox.FileCreate, Path: "f"}},
		"no path":  {{Type: nestbox.FileOverflow}},
		"long":     {{Type: nestbox.FileCreate, Path: "/" + strings.Repeat("x", maxWatchedPath)}},
		"to":       {{Type: nestbox.FileRename, Path: "/f", To: "g"}},
		"many":     many,
		"large":    {{Type: nestbox.FileCreate, Path: "/" + strings.Repeat("x", maxWatch)}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newTold()
			c := serve(t, watchOf(w)).client(t)
			watch := watchAll(t, c)
			w.events <- events
			_, err := watch.Next(t.Context())
			requireCode(t, err, nestbox.CodeGuest)
			requireClosed(t, w.closed, "the server's watch goes on")
			requireFreed(t, c)
		})
	}
}

// TestWatchNeedsFeature: an older daemon is not asked for what it does not know.
func TestWatchNeedsFeature(t *testing.T) {
	t.Parallel()
	c := serve(t, &scripted{ping: func(context.Context) (guest.Info, error) { return guest.Info{Version: "old"}, nil }}).client(t)
	_, err := c.Files().Watch(t.Context(), "/", true)
	requireCode(t, err, nestbox.CodeUnsupported)
}
