package guestrpc

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

func TestUnreachable(t *testing.T) {
	t.Parallel()
	notRunning := nestbox.Errorf(nestbox.CodeInvalidState, "capsule is not running")
	for want, dialErr := range map[nestbox.Code]error{
		nestbox.CodeGuest:        &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED},
		nestbox.CodeInvalidState: notRunning,
	} {
		c := newTestClient(t, func(context.Context) (net.Conn, error) { return nil, dialErr })
		_, err := c.Ping(t.Context())
		requireCode(t, err, want)
		_, err = c.Dial(t.Context(), 80)
		requireCode(t, err, want)
		_, err = c.Processes().Attach(t.Context(), nestbox.Selector{PID: 1}, guest.Attach{})
		requireCode(t, err, want)
		_, err = c.Files().Write(t.Context(), "/f", endless{}, guest.WriteOptions{})
		requireCode(t, err, want)
	}
	hung := newTestClient(t, func(ctx context.Context) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := hung.Dial(ctx, 80)
	requireCode(t, err, nestbox.CodeCanceled)
	_, err = hung.Ping(ctx)
	requireCode(t, err, nestbox.CodeCanceled)
}

// TestPeerIsNotOurs talks to servers that are no guests.
func TestPeerIsNotOurs(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]string{
		"closes":    "",
		"garbage":   "\x00\x01\x02garbage\r\n\r\n",
		"not found": "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
		"gateway":   "HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>",
		"redirect":  "HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n",
		"short":     "HTTP/1.1 200 OK\r\nContent-Type: application/connect+proto\r\nContent-Length: 100\r\n\r\n\x00\x00",
		"wrong":     "HTTP/1.1 200 OK\r\nContent-Type: application/connect+proto\r\nContent-Length: 7\r\n\r\n\x00\x00\x00\x00\x02\xff\xff",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newTestClient(t, func(context.Context) (net.Conn, error) { return answering(t, answer), nil })
			codes := []nestbox.Code{nestbox.CodeGuest, nestbox.CodeUnsupported}
			_, pingErr := c.Ping(t.Context())
			_, dialErr := c.Dial(t.Context(), 80)
			_, attachErr := c.Processes().Attach(t.Context(), nestbox.Selector{PID: 1}, guest.Attach{})
			_, _, startErr := c.Processes().Start(t.Context(), nestbox.ProcessSpec{Cmd: "x"}, nil)
			_, _, readErr := c.Files().Read(t.Context(), "/f", 0)
			_, listErr := c.Files().List(t.Context(), "/f", 1)
			for _, err := range []error{pingErr, dialErr, attachErr, startErr, readErr, listErr} {
				var e *nestbox.Error
				require.ErrorAs(t, err, &e)
				require.Contains(t, codes, e.Code, "%v", err)
			}
		})
	}
}

// answering returns a connection to a server that reads one request and sends
// answer.
func answering(t *testing.T, answer string) net.Conn {
	client, server := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer server.Close()
		if _, err := http.ReadRequest(bufio.NewReader(server)); err == nil {
			_, _ = io.WriteString(server, answer)
		}
	}()
	t.Cleanup(func() {
		_ = client.Close()
		<-done
	})
	return client
}

func TestConnectionsAreUsedAgain(t *testing.T) {
	t.Parallel()
	g := &scripted{
		ping: func(context.Context) (guest.Info, error) { return guest.Info{}, nil },
		start: func(context.Context, nestbox.ProcessSpec, *guest.Attach) (nestbox.Process, guest.OutputReader, error) {
			return aProcess(), nil, nil
		},
		attach: func(context.Context, nestbox.Selector, guest.Attach) (guest.OutputReader, error) {
			return &flood{left: 1}, nil
		},
		read: func(context.Context, string) (io.ReadCloser, nestbox.FileInfo, error) {
			return io.NopCloser(io.LimitReader(endless{}, 3<<20)), aFile(), nil
		},
		list: func(context.Context, string, int) ([]nestbox.FileInfo, error) {
			return slices.Repeat([]nestbox.FileInfo{aFile()}, 5), nil
		},
	}
	s := serve(t, g)
	var dials atomic.Int64
	c := newTestClient(t, func(ctx context.Context) (net.Conn, error) {
		dials.Add(1)
		return s.dial(ctx)
	})
	for range 20 {
		_, err := c.Ping(t.Context())
		require.NoError(t, err)
		_, _, err = c.Processes().Start(t.Context(), nestbox.ProcessSpec{Cmd: "x"}, nil)
		require.NoError(t, err)
		r := attach(t, c)
		for err == nil {
			_, err = r.Next(t.Context())
		}
		require.Equal(t, io.EOF, err)
		file, _, err := c.Files().Read(t.Context(), "/f", 0)
		require.NoError(t, err)
		_, err = io.Copy(io.Discard, file)
		require.NoError(t, err)
		require.NoError(t, file.Close())
		_, err = c.Files().List(t.Context(), "/f", 1)
		require.NoError(t, err)
	}
	require.EqualValues(t, 1, dials.Load())
	c.CloseIdleConnections()
	_, err := c.Ping(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 2, dials.Load())
}

// TestCloseCutsAll closes a client with a call, a reader and a tunnel open.
func TestCloseCutsAll(t *testing.T) {
	t.Parallel()
	f := newFeed()
	g := attachTo(f)
	waiting := make(chan struct{})
	g.wait = func(ctx context.Context, _ nestbox.Selector) (nestbox.Process, error) {
		close(waiting)
		<-ctx.Done()
		return nestbox.Process{}, ctx.Err()
	}
	here, there := net.Pipe()
	defer here.Close()
	g.dialTo = func(context.Context, uint16) (net.Conn, error) { return there, nil }
	c := serve(t, g).client(t)
	waited := make(chan error, 1)
	go func() {
		_, err := c.Processes().Wait(t.Context(), nestbox.Selector{PID: 1})
		waited <- err
	}()
	<-waiting
	r := attach(t, c)
	tunnel, err := c.Dial(t.Context(), 80)
	require.NoError(t, err)
	c.Close()
	requireCode(t, <-waited, nestbox.CodeGuest)
	_, err = r.Next(t.Context())
	requireCode(t, err, nestbox.CodeGuest)
	requireClosed(t, f.closed, "the server's reader goes on")
	_, err = tunnel.Read(make([]byte, 1))
	require.ErrorIs(t, err, net.ErrClosed)
	_, err = io.ReadAll(here)
	require.NoError(t, err, "the far end of the tunnel is closed too")
	_, err = c.Ping(t.Context())
	requireCode(t, err, nestbox.CodeGuest)
	_, err = c.Dial(t.Context(), 80)
	requireCode(t, err, nestbox.CodeGuest)
	c.Close()
}

// TestTunnelEndsWithServer ends a server's base context with a tunnel open.
func TestTunnelEndsWithServer(t *testing.T) {
	t.Parallel()
	here, there := net.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	s := serve(t, &scripted{dialTo: func(context.Context, uint16) (net.Conn, error) { return there, nil }})
	inner := s.http.Handler
	s.http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		inner.ServeHTTP(w, r.WithContext(ctx))
	})
	tunnel, err := s.client(t).Dial(t.Context(), 80)
	require.NoError(t, err)
	defer tunnel.Close()
	go func() { _, _ = tunnel.Write([]byte("hello")) }()
	buf := make([]byte, 5)
	_, err = io.ReadFull(here, buf)
	require.NoError(t, err)
	require.Equal(t, "hello", string(buf))
	cancel()
	_, err = tunnel.Read(buf)
	require.Error(t, err)
	_, err = here.Read(buf)
	require.ErrorIs(t, err, io.EOF)
	require.False(t, errors.Is(err, context.Canceled))
}
