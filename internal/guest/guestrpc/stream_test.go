package guestrpc

import (
	"bytes"
	"context"
	"errors"
	"io"
	"reflect"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// feed is an OutputReader that reads what a test sends it.
type feed struct {
	events chan nestbox.OutputEvent
	closed chan struct{} // by Close
}

func newFeed() *feed {
	return &feed{events: make(chan nestbox.OutputEvent), closed: make(chan struct{})}
}

func (f *feed) Next(ctx context.Context) (nestbox.OutputEvent, error) {
	select {
	case event, ok := <-f.events:
		if !ok {
			return nestbox.OutputEvent{}, io.EOF
		}
		return event, nil
	case <-ctx.Done():
		return nestbox.OutputEvent{}, nestbox.Errorf(nestbox.CodeCanceled, "canceled: %w", ctx.Err())
	}
}

func (f *feed) Close() error {
	close(f.closed)
	return nil
}

// attachTo is a guest whose processes all have reader for their output.
func attachTo(reader guest.OutputReader) *scripted {
	return &scripted{attach: func(context.Context, nestbox.Selector, guest.Attach) (guest.OutputReader, error) {
		return reader, nil
	}}
}

func attach(t *testing.T, c *Client) *reader {
	t.Helper()
	r, err := c.Processes().Attach(t.Context(), nestbox.Selector{PID: 7}, guest.Attach{})
	require.NoError(t, err)
	t.Cleanup(func() { _ = r.Close() })
	return r.(*reader)
}

func requireClosed(t *testing.T, closed <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-closed:
	case <-time.After(patience):
		require.Fail(t, what)
	}
}

func requireCode(t *testing.T, err error, code nestbox.Code) {
	t.Helper()
	var e *nestbox.Error
	require.ErrorAs(t, err, &e)
	require.Equal(t, code, e.Code, "%v", err)
	require.NotEmpty(t, e.Message)
}

func data(offset int64, text string) nestbox.OutputEvent {
	return nestbox.OutputEvent{Kind: nestbox.EventData, Stream: nestbox.Stdout, Offset: offset, Data: []byte(text)}
}

func TestEventsAreKept(t *testing.T) {
	t.Parallel()
	at := time.Now().UTC()
	large := bytes.Repeat([]byte{0, 0xff, '\n'}, maxData) // three messages
	events := []nestbox.OutputEvent{
		data(0, "hello"),
		{Kind: nestbox.EventData, Stream: nestbox.Stderr, Offset: 5, Data: []byte{0, 0xff, 0xfe, '\n'}},
		{Kind: nestbox.EventGap, Offset: 9, To: 1 << 50},
		{Kind: nestbox.EventExit, Offset: 1 << 50, Exit: &nestbox.Exit{Code: 137, Signal: "SIGKILL", Reason: nestbox.ReasonKilled, At: at}},
		data(1<<50, "after"),
		{Kind: nestbox.EventData, Stream: nestbox.Stderr, Offset: 1<<50 + 5, Data: large},
		{Kind: nestbox.EventClosed, Offset: 1<<50 + 5 + int64(len(large))},
	}
	f := newFeed()
	r := attach(t, serve(t, attachTo(f)).client(t))
	go func() {
		defer close(f.events)
		for _, e := range events {
			f.events <- e
		}
	}()
	for _, want := range events {
		got, err := r.Next(t.Context())
		require.NoError(t, err)
		for got.Kind == nestbox.EventData && len(got.Data) < len(want.Data) {
			got.Data = bytes.Clone(got.Data)
			more, err := r.Next(t.Context())
			require.NoError(t, err)
			require.Equal(t, got.End(), more.Offset)
			require.Equal(t, got.Stream, more.Stream)
			got.Data = append(got.Data, more.Data...)
		}
		if len(want.Data) == 0 {
			want.Data, got.Data = nil, nil
		}
		require.Equal(t, want, got)
	}
	for range 2 {
		_, err := r.Next(t.Context())
		require.Equal(t, io.EOF, err)
	}
}

// TestAliveKeepsQuietStream has a stream say nothing for many times as long as
// a client waits for a sign of life.
func TestAliveKeepsQuietStream(t *testing.T) {
	t.Parallel()
	f := newFeed()
	c := serveAlive(t, attachTo(f), 10*time.Millisecond).client(t)
	c.silentFor = 2 * time.Second
	r := attach(t, c)
	go func() {
		quiet := time.NewTimer(5 * time.Second)
		defer quiet.Stop()
		<-quiet.C
		f.events <- data(0, "still here")
	}()
	event, err := r.Next(t.Context())
	require.NoError(t, err)
	require.Equal(t, "still here", string(event.Data))
}

// TestSilenceCutsStream reads a stream whose server gives no sign of life.
func TestSilenceCutsStream(t *testing.T) {
	t.Parallel()
	f := newFeed()
	c := serve(t, attachTo(f)).client(t)
	c.silentFor = 200 * time.Millisecond
	r := attach(t, c)
	_, err := r.Next(t.Context())
	requireCode(t, err, nestbox.CodeGuest)
	requireClosed(t, f.closed, "the server's reader goes on")
	_, again := r.Next(t.Context())
	require.Equal(t, err, again)
}

// TestSlowReaderIsNotSilence has a client be slower than silentFor.
func TestSlowReaderIsNotSilence(t *testing.T) {
	t.Parallel()
	f := newFeed()
	c := serve(t, attachTo(f)).client(t)
	c.silentFor = time.Second
	r := attach(t, c)
	for i := range 3 {
		f.events <- data(int64(i), "x")
		quiet := time.NewTimer(2 * c.silentFor)
		<-quiet.C
		_, err := r.Next(t.Context())
		require.NoError(t, err)
	}
}

func TestEndOfNextEndsServersReader(t *testing.T) {
	t.Parallel()
	f := newFeed()
	r := attach(t, serve(t, attachTo(f)).client(t))
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel)
	_, err := r.Next(ctx)
	requireCode(t, err, nestbox.CodeCanceled)
	requireClosed(t, f.closed, "the server's reader goes on")

	f = newFeed()
	r = attach(t, serve(t, attachTo(f)).client(t))
	ctx, cancel = context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err = r.Next(ctx)
	requireCode(t, err, nestbox.CodeTimeout)
	requireClosed(t, f.closed, "the server's reader goes on")
}

func TestCloseEndsServersReader(t *testing.T) {
	t.Parallel()
	f := newFeed()
	r := attach(t, serve(t, attachTo(f)).client(t))
	require.NoError(t, r.Close())
	requireClosed(t, f.closed, "the server's reader goes on")
	_, err := r.Next(t.Context())
	requireCode(t, err, nestbox.CodeCanceled)
	require.NoError(t, r.Close())
}

// TestContextOfAttach bounds the opening, not the reader.
func TestContextOfAttach(t *testing.T) {
	t.Parallel()
	f := newFeed()
	c := serve(t, attachTo(f)).client(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	r, err := c.Processes().Attach(ctx, nestbox.Selector{PID: 7}, guest.Attach{})
	require.NoError(t, err)
	defer r.Close()
	cancel()
	go func() { f.events <- data(0, "x") }()
	_, err = r.Next(t.Context())
	require.NoError(t, err)
	_, err = c.Processes().Attach(ctx, nestbox.Selector{PID: 7}, guest.Attach{})
	requireCode(t, err, nestbox.CodeCanceled)

	stuck := &scripted{attach: func(ctx context.Context, _ nestbox.Selector, _ guest.Attach) (guest.OutputReader, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}}
	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = serve(t, stuck).client(t).Processes().Attach(ctx, nestbox.Selector{PID: 7}, guest.Attach{})
	requireCode(t, err, nestbox.CodeTimeout)
}

// counted counts the events that are taken of a flood.
type counted struct {
	flood
	taken  atomic.Int64
	closed chan struct{}
}

func (c *counted) Next(ctx context.Context) (nestbox.OutputEvent, error) {
	c.taken.Add(1)
	return c.flood.Next(ctx)
}

func (c *counted) Close() error {
	close(c.closed)
	return nil
}

// TestBackPressure requires that a reader that is not read stops its source
// after a bounded number of bytes, is not cut for it, and still ends at once.
func TestBackPressure(t *testing.T) {
	t.Parallel()
	const size = maxData
	source := &counted{flood: flood{data: make([]byte, size), left: 1 << 30}, closed: make(chan struct{})}
	r := attach(t, serve(t, attachTo(source)).client(t))
	var last int64
	require.Eventually(t, func() bool { // until it stands still
		now := source.taken.Load()
		still := now > 0 && now == last
		last = now
		return still
	}, patience, 500*time.Millisecond)
	require.Less(t, last, int64(64<<20/size), "the kernel buffers a few MiB, and nobody else anything")
	for i := range int64(4 * 64) {
		event, err := r.Next(t.Context())
		require.NoError(t, err)
		require.Equal(t, i*size, event.Offset)
	}
	require.NoError(t, r.Close())
	requireClosed(t, source.closed, "the server's reader goes on, blocked by a client that is gone")
}

func TestServerLost(t *testing.T) {
	t.Parallel()
	f := newFeed()
	s := serve(t, attachTo(f))
	r := attach(t, s.client(t))
	f.events <- data(0, "x")
	_, err := r.Next(t.Context())
	require.NoError(t, err)
	require.NoError(t, s.http.Close())
	_, err = r.Next(t.Context())
	requireCode(t, err, nestbox.CodeGuest)
}

// TestEndWithoutClosed takes a stream that ends before its log does for cut.
func TestEndWithoutClosed(t *testing.T) {
	t.Parallel()
	f := newFeed()
	r := attach(t, serve(t, attachTo(f)).client(t))
	close(f.events)
	_, err := r.Next(t.Context())
	requireCode(t, err, nestbox.CodeGuest)
}

func TestErrorOfReader(t *testing.T) {
	t.Parallel()
	for want, err := range map[nestbox.Code]error{
		nestbox.CodeNotFound: nestbox.Errorf(nestbox.CodeNotFound, "forgotten"),
		nestbox.CodeGuest:    errors.New("secret"),
	} {
		r := attach(t, serve(t, attachTo(failing{err})).client(t))
		_, err := r.Next(t.Context())
		requireCode(t, err, want)
		require.NotContains(t, err.Error(), "secret")
	}
}

type failing struct{ err error }

func (f failing) Next(context.Context) (nestbox.OutputEvent, error) {
	return nestbox.OutputEvent{}, f.err
}
func (failing) Close() error { return nil }

func TestStart(t *testing.T) {
	t.Parallel()
	spec := nestbox.ProcessSpec{
		Cmd: "cmd", Args: []string{"", "a b", "ü"}, Env: map[string]string{"K": "v", "E": ""},
		Cwd: "/x", User: "u", Tag: "t", Stdin: true, Timeout: 90 * time.Second,
	}
	how := guest.Attach{Since: nestbox.Since{Offset: 5, Tail: 6, Now: true}, Lossless: true}
	want := nestbox.Process{
		PID: 7, Tag: "t", Cmd: "cmd", Args: []string{"a"}, Cwd: "/x", User: "u", Stdin: true,
		StartedAt: time.Now().UTC(), Output: nestbox.OutputState{Start: 1, End: 7, Stdout: 3, Stderr: 4, Closed: true},
	}
	f := newFeed()
	g := &scripted{start: func(_ context.Context, got nestbox.ProcessSpec, attach *guest.Attach) (nestbox.Process, guest.OutputReader, error) {
		if !equal(got, spec) {
			return nestbox.Process{}, nil, nestbox.Errorf(nestbox.CodeInvalid, "%+v", got)
		}
		if attach == nil {
			return want, nil, nil
		}
		if *attach != how {
			return nestbox.Process{}, nil, nestbox.Errorf(nestbox.CodeInvalid, "%+v", *attach)
		}
		return want, f, nil
	}}
	c := serve(t, g).client(t)
	p, reader, err := c.Processes().Start(t.Context(), spec, nil)
	require.NoError(t, err)
	require.Equal(t, want, p)
	require.True(t, reader == nil, "a nil interface")
	p, reader, err = c.Processes().Start(t.Context(), spec, &how)
	require.NoError(t, err)
	require.Equal(t, want, p)
	defer reader.Close()
	go func() { f.events <- data(0, "x") }()
	event, err := reader.Next(t.Context())
	require.NoError(t, err)
	require.Equal(t, "x", string(event.Data))
	spec.Args[0] = "\xff"
	_, _, err = c.Processes().Start(t.Context(), spec, nil)
	requireCode(t, err, nestbox.CodeInvalid)
}

func equal(a, b nestbox.ProcessSpec) bool { return reflect.DeepEqual(a, b) }
