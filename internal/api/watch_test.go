package api

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

const watchPath = "/v1/capsules/{id}/files/watch?path=/d"

// scriptedWatch tells what a test says.
type scriptedWatch struct {
	events chan []nestbox.FileEvent
	broken chan error
	closed chan struct{} // by Close
}

// watchable makes /d, whose watch it returns.
func (r *rig) watchable() *scriptedWatch {
	w := &scriptedWatch{events: make(chan []nestbox.FileEvent), broken: make(chan error), closed: make(chan struct{})}
	r.guest.files.mu.Lock()
	defer r.guest.files.mu.Unlock()
	r.guest.files.content["/d"], r.guest.files.watch = "", w
	return w
}

func (w *scriptedWatch) Next(ctx context.Context) ([]nestbox.FileEvent, error) {
	select {
	case events := <-w.events:
		return events, nil
	case err := <-w.broken:
		return nil, err
	case <-ctx.Done():
		return nil, guest.ContextError(ctx)
	}
}

func (w *scriptedWatch) Close() error {
	close(w.closed)
	return nil
}

func (w *scriptedWatch) requireClosed(t *testing.T) {
	t.Helper()
	select {
	case <-w.closed:
	case <-time.After(time.Minute):
		require.Fail(t, "the watch goes on")
	}
}

var someEvents = []nestbox.FileEvent{
	{Type: nestbox.FileCreate, Path: "/d/a \"b\"", Directory: true},
	{Type: nestbox.FileRename, Path: "/d/a", To: "/d/c"},
	{Type: nestbox.FileOverflow, Path: "/d"},
}

// watchEvents opens a stream of Server-Sent Events.
func (r *rig) watchEvents() *bufio.Reader {
	res, err := r.server.Client().Do(r.newRequest(http.MethodGet, watchPath, nil)) // answers before there is an event
	require.NoError(r.t, err)
	r.t.Cleanup(func() { _ = res.Body.Close() })
	require.Equal(r.t, http.StatusOK, res.StatusCode)
	require.Equal(r.t, "text/event-stream", res.Header.Get("Content-Type"))
	return bufio.NewReader(res.Body)
}

func TestWatchEvents(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	w := r.watchable()
	in := r.watchEvents()
	w.events <- someEvents
	want := ": ping\n\n" +
		`data: {"type":"create","path":"/d/a \"b\"","directory":true}` + "\n\n" +
		`data: {"type":"rename","path":"/d/a","to":"/d/c"}` + "\n\n" +
		`data: {"type":"overflow","path":"/d"}` + "\n\n"
	got := make([]byte, len(want))
	_, err := io.ReadFull(in, got)
	require.NoError(t, err)
	require.Equal(t, want, string(got))
	w.broken <- io.EOF
	rest, err := io.ReadAll(in)
	require.NoError(t, err)
	require.Empty(t, rest)
	w.requireClosed(t)
}

// TestWatchBreaksOff: an answer that is cut is no end, and says why.
func TestWatchBreaksOff(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	w := r.watchable()
	in := r.watchEvents()
	w.broken <- nestbox.Errorf(nestbox.CodeExhausted, "too many directories")
	got, err := io.ReadAll(in)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	require.Contains(t, string(got), `data: {"type":"error","data":"too many directories","code":"exhausted"}`)
	w.requireClosed(t)
}

func TestWatchEndsWithClient(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	w := r.watchable()
	ctx, leave := context.WithCancel(t.Context())
	res, err := r.server.Client().Do(r.newRequest(http.MethodGet, watchPath, nil).WithContext(ctx))
	require.NoError(t, err)
	defer res.Body.Close()
	leave()
	w.requireClosed(t)
}

func TestWatchIsKeptAlive(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(c *Config) { c.EventInterval = 10 * time.Millisecond })
	r.watchable()
	in := r.watchEvents()
	for range 5 {
		line, err := in.ReadString('\n')
		require.NoError(t, err)
		require.Contains(t, []string{": ping\n", "\n"}, line)
	}
}

func TestWatchSocket(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	w := r.watchable()
	p := r.dial(watchPath + "&recursive=true")
	p.expect(map[string]any{"type": "watch", "path": "/d"})
	w.events <- someEvents
	p.expect(map[string]any{"type": "create", "path": "/d/a \"b\"", "directory": true})
	p.expect(map[string]any{"type": "rename", "path": "/d/a", "to": "/d/c"})
	p.expect(map[string]any{"type": "overflow", "path": "/d"})
	w.broken <- io.EOF
	p.closed(websocket.StatusNormalClosure)
	w.requireClosed(t)

	w = r.watchable()
	p = r.dial(watchPath)
	p.expect(map[string]any{"type": "watch", "path": "/d"})
	w.broken <- nestbox.Errorf(nestbox.CodeGuest, "lost")
	p.expect(map[string]any{"type": "error", "data": "lost", "code": "agent_error"})
	p.closed(websocket.StatusInternalError)
	w.requireClosed(t)
}

func TestWatchRefused(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.watchable()
	base, _, _ := strings.Cut(watchPath, "?")
	for query, status := range map[string]int{
		"":                     http.StatusBadRequest,
		"?path=":               http.StatusBadRequest,
		"?path=relative":       http.StatusBadRequest,
		"?path=/d&recursive=x": http.StatusBadRequest,
		"?path=/d&depth=3":     http.StatusBadRequest,
		"?path=/missing":       http.StatusNotFound,
		"?path=/d%00":          http.StatusBadRequest,
	} {
		r.call(http.MethodGet, base+query, "").expect(status)
	}
	r.call(http.MethodGet, watchPath, "", apiKeyHeader, "").expect(http.StatusUnauthorized)
	r.call(http.MethodGet, watchPath, "", apiKeyHeader, "wrn_"+strings.Repeat("0", 32)).expect(http.StatusUnauthorized)
	r.call(http.MethodGet, watchPath, "", apiKeyHeader, r.other).expect(http.StatusNotFound)

	p := r.dial(base + "?path=/missing")
	p.expect(map[string]any{"type": "error", "data": "no such file or directory: /missing", "code": "not_found"})
	p.closed(websocket.StatusPolicyViolation)
	p = r.dial(watchPath, apiKeyHeader, r.other)
	p.expect(map[string]any{"type": "error", "data": "capsule not found", "code": "not_found"})
	p.closed(websocket.StatusPolicyViolation)
}
