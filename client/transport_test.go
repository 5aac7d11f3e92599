package client_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

func serve(t *testing.T, handler http.HandlerFunc, change ...func(*client.Config)) *client.Client {
	t.Helper()
	server := httptest.NewServer(handler)
	cfg := client.Config{BaseURL: server.URL, APIKey: testKey}
	for _, f := range change {
		f(&cfg)
	}
	c, err := client.New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { c.CloseIdle(); server.Close() })
	return c
}

// hangUp breaks the connection of a request that has been heard.
func hangUp(w http.ResponseWriter) {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err == nil {
		_ = conn.Close()
	}
}

// TestOnlyReadsAreRepeated loses the answer to the first tries of requests.
func TestOnlyReadsAreRepeated(t *testing.T) {
	t.Parallel()
	var requests atomic.Int64
	var listens atomic.Bool
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if requests.Add(1) <= 3 {
			if listens.Load() {
				_, _ = io.Copy(io.Discard, r.Body)
			}
			hangUp(w)
			return
		}
		if r.Method == http.MethodDelete {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		reply(w, 200, map[string]any{"id": testCapsule})
	})
	ctx := testContext(t)
	again := func(wantRequests int64, err error) error {
		t.Helper()
		require.Equal(t, wantRequests, requests.Swap(0))
		return err
	}
	_, err := c.Capsules.Get(ctx, testCapsule)
	require.NoError(t, again(4, err))
	require.NoError(t, again(4, c.Capsules.Destroy(ctx, testCapsule)), "destroying twice does no harm")

	procs := c.Capsule(testCapsule).Processes
	require.NoError(t, again(4, procs.WriteStdin(ctx, "web", []byte("x"), false)), "nobody asked for the input")
	listens.Store(true)
	_, err = c.Capsules.Create(ctx, nestbox.CapsuleSpec{})
	for _, err := range []error{
		again(1, err),
		again(1, procs.Signal(ctx, "web", "HUP")),
		again(1, procs.Kill(ctx, "web", client.Kill{})),
		again(1, procs.WriteStdin(ctx, "web", []byte("x"), false)),
		again(1, c.Capsule(testCapsule).Files.Write(ctx, "/x", strings.NewReader("x"), client.WriteOptions{})),
	} {
		require.Equal(t, nestbox.CodeUnavailable, nestbox.CodeOf(err))
		require.ErrorContains(t, err, "may or may not have been carried out")
	}
}

// TestRefusedConnections are tried again for every kind of request: nothing
// was sent.
func TestRefusedConnections(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(nil)
	addr := server.Listener.Addr().String()
	server.Close()
	c, err := client.New(client.Config{BaseURL: "http://" + addr, APIKey: testKey, RetryFor: testTimeout})
	require.NoError(t, err)
	t.Cleanup(c.CloseIdle)
	ctx := testContext(t)
	created := make(chan error, 1)
	go func() {
		_, err := c.Capsules.Create(ctx, nestbox.CapsuleSpec{})
		created <- err
	}()
	second := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		reply(w, 201, map[string]any{"id": testCapsule})
	}))
	_ = second.Listener.Close()
	second.Listener = listenAgain(t, addr)
	second.Start()
	t.Cleanup(second.Close)
	require.NoError(t, <-created)

	impatient, err := client.New(client.Config{BaseURL: "http://127.0.0.1:1", APIKey: testKey, RetryFor: -1})
	require.NoError(t, err)
	_, err = impatient.Health(ctx)
	require.Equal(t, nestbox.CodeUnavailable, nestbox.CodeOf(err))
	require.ErrorContains(t, err, "cannot reach http://127.0.0.1:1: dial tcp")
}

func TestErrorMapping(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		status  int
		body    string
		code    nestbox.Code
		message string
	}{
		{400, `{"error":{"code":"invalid_request","message":"no"}}`, nestbox.CodeInvalid, "no"},
		{404, `{"error":{"code":"not_found","message":"no"}}`, nestbox.CodeNotFound, "no"},
		{409, `{"error":{"code":"invalid_state","message":"no"}}`, nestbox.CodeInvalidState, "no"},
		{409, `{"error":{"code":"something_new","message":"no"}}`, nestbox.CodeConflict, "no"},
		{413, `{"error":{"code":"too_large","message":"no"}}`, nestbox.CodeTooLarge, "no"},
		{429, `{"error":{"code":"exhausted","message":"no"}}`, nestbox.CodeExhausted, "no"},
		{501, `{"error":{"code":"agent_error","message":"no"}}`, nestbox.CodeUnsupported, "no"},
		{502, `{"error":{"code":"agent_error","message":"no"}}`, nestbox.CodeGuest, "no"},
		{502, "<html>\nbad gateway", nestbox.CodeUnavailable, `server answered 502 Bad Gateway: "<html>"`},
		{507, `{"error":{"code":"exhausted","message":"no"}}`, nestbox.CodeExhausted, "no"},
		{418, ``, nestbox.CodeInternal, `server answered 418 I'm a teapot: ""`},
		{200, `<html>`, nestbox.CodeInternal, "is this the URL of a Nestbox server"},
	} {
		t.Run(fmt.Sprint(tc.status, tc.code), func(t *testing.T) {
			t.Parallel()
			c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(tc.status)
				_, _ = io.WriteString(w, tc.body)
			})
			_, err := c.Capsules.Get(testContext(t), testCapsule)
			var e *client.Error
			require.ErrorAs(t, err, &e)
			require.Equal(t, tc.status, e.Status)
			require.Equal(t, tc.code, nestbox.CodeOf(err))
			require.ErrorContains(t, err, tc.message)
		})
	}
}

// TestCutDownload fails rather than ends.
func TestCutDownload(t *testing.T) {
	t.Parallel()
	for _, header := range []string{"Content-Length: 10", "Transfer-Encoding: chunked"} {
		c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := w.(http.Hijacker).Hijack()
			if err == nil {
				_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\n"+header+"\r\n\r\n")
				_, _ = io.WriteString(conn, "5\r\nhello\r\n"[:8])
				_ = conn.Close()
			}
		})
		r, err := c.Capsule(testCapsule).Files.Read(testContext(t), "/x")
		require.NoError(t, err)
		_, err = io.ReadAll(r)
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		require.NoError(t, r.Close())
	}
}

// TestRefusedUpload does not send what the server does not want.
func TestRefusedUpload(t *testing.T) {
	t.Parallel()
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) { fail(w, 404, "not_found", "capsule not found") })
	r, w := io.Pipe()
	defer w.Close()
	err := c.Capsule(testCapsule).Files.Write(testContext(t), "/x", r, client.WriteOptions{})
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
}

// TestPagingEnds does not go round in circles with a server that does.
func TestPagingEnds(t *testing.T) {
	t.Parallel()
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Next-Cursor", "same")
		reply(w, 200, []map[string]any{{"id": testCapsule}})
	})
	n := 0
	for _, err := range c.Capsules.List(testContext(t), client.ListCapsules{}) {
		require.NoError(t, err)
		n++
	}
	require.Equal(t, 2, n)
}

// TestRecordThatFailsForGood ends Wait rather than asking for ever.
func TestRecordThatFailsForGood(t *testing.T) {
	t.Parallel()
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		fail(w, 503, "host_unavailable", "capsule host is not reachable")
	},
		func(cfg *client.Config) { cfg.ReconnectFor = 100 * time.Millisecond })
	_, err := c.Capsule(testCapsule).Processes.Wait(testContext(t), "web")
	require.EqualError(t, err, "capsule host is not reachable")
}
