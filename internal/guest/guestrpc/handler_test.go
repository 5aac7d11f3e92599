package guestrpc

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/nestbox/nestbox"
	guestv1 "github.com/nestbox/nestbox/gen/nestbox/guest/v1"
	"github.com/nestbox/nestbox/internal/guest"
)

// do sends one request on a connection of its own.
func (s *server) do(t *testing.T, method, path, contentType, token string, body io.Reader) *http.Response {
	t.Helper()
	transport := &http.Transport{DisableKeepAlives: true}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+s.addr+path, body)
	require.NoError(t, err)
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	if token != "" {
		req.Header.Set(TokenHeader, token)
	}
	res, err := transport.RoundTrip(req)
	require.NoError(t, err)
	t.Cleanup(func() { _ = res.Body.Close() })
	return res
}

// everyPath returns the path of each procedure of the service, by its
// descriptor, and of a tunnel, with a content type for each.
func everyPath() map[string]string {
	paths := map[string]string{"/tunnel/80": ""}
	service := guestv1.File_nestbox_guest_v1_guest_proto.Services().ByName("GuestService")
	for i := range service.Methods().Len() {
		m := service.Methods().Get(i)
		kind := "application/proto"
		if m.IsStreamingClient() || m.IsStreamingServer() {
			kind = "application/connect+proto"
		}
		paths[fmt.Sprintf("/%s/%s", service.FullName(), m.Name())] = kind
	}
	return paths
}

func TestTokenIsRequired(t *testing.T) {
	t.Parallel()
	var lookups atomic.Int64
	handler := RequireToken(testToken, NewHandler(func(*http.Request) (guest.Guest, error) {
		lookups.Add(1)
		return nil, errors.New("looked up")
	}))
	open := RequireToken("", handler)
	paths := everyPath()
	require.Len(t, paths, 24)
	paths["/"] = ""
	for path, contentType := range paths {
		for _, token := range []string{"", "wrong", testToken + "x", testToken[1:]} {
			for _, h := range []http.Handler{handler, open} {
				res := record(t, h, path, contentType, token)
				require.Equal(t, http.StatusUnauthorized, res.StatusCode, path)
				body, err := io.ReadAll(res.Body)
				require.NoError(t, err)
				require.JSONEq(t, `{"code":"unauthenticated","message":"missing or wrong token"}`, string(body))
			}
		}
	}
	require.Zero(t, lookups.Load())
	require.NotEqual(t, http.StatusUnauthorized, record(t, handler, "/tunnel/80", "", testToken).StatusCode)
	require.EqualValues(t, 1, lookups.Load())
}

// record serves one request without a network.
func record(t *testing.T, h http.Handler, path, contentType, token string) *http.Response {
	t.Helper()
	client, conn := net.Pipe()
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = (&http.Server{Handler: h}).Serve(&oneConn{conn: conn})
	}()
	defer func() {
		_ = client.Close()
		<-served
	}()
	req, err := http.NewRequest(http.MethodPost, "http://guest"+path, http.NoBody)
	require.NoError(t, err)
	req.Header.Set("Content-Type", contentType)
	req.Header.Set(TokenHeader, token)
	require.NoError(t, req.Write(client))
	res, err := http.ReadResponse(bufio.NewReader(client), req)
	require.NoError(t, err)
	body, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	res.Body = io.NopCloser(bytes.NewReader(body))
	return res
}

// oneConn is a listener of one connection.
type oneConn struct{ conn net.Conn }

func (l *oneConn) Accept() (net.Conn, error) {
	if l.conn == nil {
		return nil, io.EOF
	}
	c := l.conn
	l.conn = nil
	return c, nil
}
func (*oneConn) Close() error   { return nil }
func (*oneConn) Addr() net.Addr { return &net.TCPAddr{} }

// TestWrongToken requires that a client with a wrong token can do nothing, and
// is told why.
func TestWrongToken(t *testing.T) {
	t.Parallel()
	s := serve(t, &scripted{})
	c := NewClient(ClientConfig{Dial: s.dial, Header: http.Header{TokenHeader: {"wrong"}}})
	t.Cleanup(c.Close)
	ctx, p, f := t.Context(), c.Processes(), c.Files()
	sel := nestbox.Selector{PID: 1}
	for name, call := range map[string]func() error{
		"Ping":        func() error { _, err := c.Ping(ctx); return err },
		"Dial":        func() error { _, err := c.Dial(ctx, 80); return err },
		"Start":       func() error { _, _, err := p.Start(ctx, nestbox.ProcessSpec{Cmd: "x"}, nil); return err },
		"StartAttach": func() error { _, _, err := p.Start(ctx, nestbox.ProcessSpec{Cmd: "x"}, &guest.Attach{}); return err },
		"List":        func() error { _, err := p.List(ctx, true); return err },
		"Get":         func() error { _, err := p.Get(ctx, sel); return err },
		"Wait":        func() error { _, err := p.Wait(ctx, sel); return err },
		"Attach":      func() error { _, err := p.Attach(ctx, sel, guest.Attach{}); return err },
		"WriteStdin":  func() error { return p.WriteStdin(ctx, sel, []byte("x"), true) },
		"Signal":      func() error { return p.Signal(ctx, sel, syscall.SIGTERM) },
		"Kill":        func() error { _, err := p.Kill(ctx, sel, guest.Kill{}); return err },
		"KillBiggest": func() error { _, err := p.KillBiggest(ctx, 0); return err },
		"Read":        func() error { _, _, err := f.Read(ctx, "/f", 0); return err },
		"Write": func() error {
			_, err := f.Write(ctx, "/f", bytes.NewReader(make([]byte, 8<<20)), guest.WriteOptions{})
			return err
		},
		"Stat":   func() error { _, err := f.Stat(ctx, "/f"); return err },
		"FList":  func() error { _, err := f.List(ctx, "/f", 1); return err },
		"Mkdir":  func() error { _, err := f.Mkdir(ctx, "/f"); return err },
		"Remove": func() error { return f.Remove(ctx, "/f") },
	} {
		t.Run(name, func(t *testing.T) { requireCode(t, call(), nestbox.CodeGuest) }) // never 401: the caller has a key
	}
}

// TestErrorsAreKept sends each code through a call, a stream, an upload and a
// tunnel.
func TestErrorsAreKept(t *testing.T) {
	t.Parallel()
	for _, code := range []nestbox.Code{
		nestbox.CodeInvalid, nestbox.CodeNotFound, nestbox.CodeConflict, nestbox.CodeInvalidState, nestbox.CodeTooLarge,
		nestbox.CodeExhausted, nestbox.CodeUnavailable, nestbox.CodeTimeout, nestbox.CodeUnsupported, nestbox.CodeGuest,
	} {
		requireError(t, nestbox.Errorf(code, "message of %s: %w", code, io.EOF), code, "message of "+string(code)+": EOF")
	}
	for _, code := range []nestbox.Code{nestbox.CodeUnauthenticated, nestbox.CodeDenied, nestbox.CodeCanceled, nestbox.CodeInternal} {
		requireError(t, nestbox.Errorf(code, "message"), nestbox.CodeGuest, "the capsule's daemon failed: message")
	}
	requireError(t, errors.New("secret"), nestbox.CodeGuest, "the capsule's daemon failed: internal error")
	requireError(t, nestbox.Errorf(nestbox.CodeNotFound, "\x1b[2J\x00"), nestbox.CodeNotFound, "\uFFFD[2J\uFFFD")
	requireError(t, nestbox.Errorf(nestbox.CodeNotFound, "%s", strings.Repeat("x", 5000)), nestbox.CodeNotFound, strings.Repeat("x", maxErrorText)+"…")
	requireError(t, fmt.Errorf("outer: %w", nestbox.Errorf(nestbox.CodeConflict, "inner")), nestbox.CodeConflict, "inner")
}

func requireError(t *testing.T, err error, code nestbox.Code, message string) {
	t.Helper()
	g := &scripted{
		ping:   func(context.Context) (guest.Info, error) { return guest.Info{}, err },
		dialTo: func(context.Context, uint16) (net.Conn, error) { return nil, err },
		attach: func(context.Context, nestbox.Selector, guest.Attach) (guest.OutputReader, error) { return nil, err },
		write: func(context.Context, string, io.Reader, guest.WriteOptions) (nestbox.FileInfo, error) {
			return nestbox.FileInfo{}, err
		},
	}
	c := serve(t, g).client(t)
	_, pingErr := c.Ping(t.Context())
	_, dialErr := c.Dial(t.Context(), 80)
	_, attachErr := c.Processes().Attach(t.Context(), nestbox.Selector{PID: 1}, guest.Attach{})
	_, writeErr := c.Files().Write(t.Context(), "/f", strings.NewReader("x"), guest.WriteOptions{})
	for _, got := range []error{pingErr, dialErr, attachErr, writeErr} {
		requireCode(t, got, code)
		require.EqualError(t, got, message)
	}
}

func TestLookupFails(t *testing.T) {
	t.Parallel()
	handler := NewHandler(func(*http.Request) (guest.Guest, error) {
		return nil, nestbox.Errorf(nestbox.CodeInvalidState, "capsule is not running")
	})
	s := serve(t, nil)
	s.http.Handler = handler
	c := s.client(t)
	_, err := c.Ping(t.Context())
	requireCode(t, err, nestbox.CodeInvalidState)
	_, err = c.Processes().Attach(t.Context(), nestbox.Selector{PID: 1}, guest.Attach{})
	requireCode(t, err, nestbox.CodeInvalidState)
	_, err = c.Files().Write(t.Context(), "/f", bytes.NewReader(make([]byte, 8<<20)), guest.WriteOptions{})
	requireCode(t, err, nestbox.CodeInvalidState)
	_, err = c.Dial(t.Context(), 80)
	requireCode(t, err, nestbox.CodeInvalidState)
}

// TestGarbage sends what no client of ours sends. The server answers with an
// error, or hangs up, and goes on.
func TestGarbage(t *testing.T) {
	t.Parallel()
	pinged := func(context.Context) (guest.Info, error) { return guest.Info{Version: "v"}, nil }
	uploaded := func(_ context.Context, _ string, r io.Reader, _ guest.WriteOptions) (nestbox.FileInfo, error) {
		_, err := io.Copy(io.Discard, r)
		return nestbox.FileInfo{}, err
	}
	s := serve(t, &scripted{ping: pinged, write: uploaded})
	paths := everyPath()
	huge := make([]byte, 5)
	binary.BigEndian.PutUint32(huge[1:], 1<<31)
	for path, kind := range paths {
		for _, contentType := range []string{kind, "application/json", "application/connect+json", "application/grpc", "text/plain", ""} {
			for _, body := range []string{"", "\xff\xff\xff\xff\xff", string(huge), "\x00\x00\x00\x00\x02\xff\xff", "\x02\x00\x00\x00\x00", "\x01\x00\x00\x00\x01x", "{}"} {
				if strings.HasSuffix(path, "/Ping") || body != "" || contentType != kind {
					res := s.do(t, http.MethodPost, path, contentType, testToken, strings.NewReader(body))
					require.NotEqual(t, http.StatusSwitchingProtocols, res.StatusCode)
				}
			}
		}
		require.GreaterOrEqual(t, s.do(t, http.MethodGet, path, "", testToken, nil).StatusCode, 400)
	}
	for _, path := range []string{"/", "/tunnel", "/tunnel/", "/tunnel/0", "/tunnel/65536", "/tunnel/-1", "/tunnel/x", "/tunnel/80/x", "/nestbox.guest.v1.GuestService/", "/nestbox.guest.v1.GuestService/Nope"} {
		require.GreaterOrEqual(t, s.do(t, http.MethodPost, path, "application/proto", testToken, nil).StatusCode, 400, path)
	}
	for _, raw := range []string{"\x00\x01\x02", "GET\r\n\r\n", "POST / HTTP/9.9\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"} {
		conn, err := s.dial(t.Context())
		require.NoError(t, err)
		_, err = conn.Write([]byte(raw))
		require.NoError(t, err)
		require.NoError(t, conn.(*net.TCPConn).CloseWrite())
		_, _ = io.Copy(io.Discard, conn)
		require.NoError(t, conn.Close())
	}
	info, err := s.client(t).Ping(t.Context())
	require.NoError(t, err)
	require.Equal(t, "v", info.Version)
}

func TestWaitEndsWithItsCaller(t *testing.T) {
	t.Parallel()
	ended := make(chan struct{})
	c := serve(t, &scripted{wait: func(ctx context.Context, _ nestbox.Selector) (nestbox.Process, error) {
		<-ctx.Done()
		close(ended)
		return nestbox.Process{}, nestbox.Errorf(nestbox.CodeCanceled, "canceled: %w", ctx.Err())
	}}).client(t)
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() {
		_, err := c.Processes().Wait(ctx, nestbox.Selector{Tag: "t"})
		result <- err
	}()
	cancel()
	requireCode(t, <-result, nestbox.CodeCanceled)
	select {
	case <-ended:
	default: // canceled before it was sent, or it ends soon: the server waits for its handlers
	}
}

func TestStdin(t *testing.T) {
	t.Parallel()
	type call struct {
		sel  nestbox.Selector
		size int
		eof  bool
	}
	var got call
	c := serve(t, &scripted{
		stdin: func(_ context.Context, sel nestbox.Selector, data []byte, eof bool) error {
			got = call{sel, len(data), eof}
			return nil
		},
		signal: func(_ context.Context, sel nestbox.Selector, sig syscall.Signal) error {
			got = call{sel, int(sig), false}
			return nil
		},
	}).client(t)
	for _, want := range []call{
		{nestbox.Selector{PID: 7}, 0, true},
		{nestbox.Selector{Tag: "t"}, 1, false},
		{nestbox.Selector{Tag: "t"}, nestbox.MaxStdin, true},
	} {
		require.NoError(t, c.Processes().WriteStdin(t.Context(), want.sel, make([]byte, want.size), want.eof))
		require.Equal(t, want, got)
	}
	err := c.Processes().WriteStdin(t.Context(), nestbox.Selector{PID: 7}, make([]byte, nestbox.MaxStdin+1), false)
	requireCode(t, err, nestbox.CodeTooLarge)
	require.NoError(t, c.Processes().Signal(t.Context(), nestbox.Selector{PID: 9}, syscall.SIGUSR1))
	require.Equal(t, call{nestbox.Selector{PID: 9}, int(syscall.SIGUSR1), false}, got)
}

// TestListingsAreBounded: few are made at a time, and the others wait.
func TestListingsAreBounded(t *testing.T) {
	t.Parallel()
	var now, most atomic.Int64
	var once sync.Once
	full, release := make(chan struct{}), make(chan struct{})
	s := serve(t, &scripted{list: func(context.Context, string, int) ([]nestbox.FileInfo, error) {
		n := now.Add(1)
		defer now.Add(-1)
		for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
		}
		if n == maxListings {
			once.Do(func() { close(full) })
		}
		<-release
		return nil, nil
	}})
	var all errgroup.Group
	for range 5 * maxListings {
		c := s.client(t)
		all.Go(func() error { _, err := c.Files().List(t.Context(), "/", 1); return err })
	}
	<-full
	close(release)
	require.NoError(t, all.Wait())
	require.EqualValues(t, maxListings, most.Load())
}
