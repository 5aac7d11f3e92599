package edge

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"

	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// raw sends a request over a connection of its own.
func (r *rig) raw(t *testing.T, request string) *net.TCPConn {
	t.Helper()
	conn, err := r.client.Transport.(*http.Transport).DialContext(t.Context(), "tcp", "")
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	_, err = fmt.Fprintf(conn, request, r.host)
	require.NoError(t, err)
	return conn.(*net.TCPConn)
}

// TestHalfClosed: a client that has nothing more to send still gets its answer, as it
// does with nc or a socket of its own.
func TestHalfClosed(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, _ := io.ReadAll(req.Body)
		select {
		case <-release:
		case <-req.Context().Done():
			return
		}
		_, _ = fmt.Fprintf(w, "answer to %s", body)
	}))
	for _, request := range []string{
		"GET / HTTP/1.1\r\nHost: %s\r\nX-API-Key: wrn_00112233445566778899aabbccddeeff\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: %s\r\nX-API-Key: wrn_00112233445566778899aabbccddeeff\r\nContent-Length: 4\r\n\r\nbody",
		"GET / HTTP/1.0\r\nHost: %s\r\nX-API-Key: wrn_00112233445566778899aabbccddeeff\r\n\r\n",
	} {
		conn := r.raw(t, request)
		require.NoError(t, conn.CloseWrite())
		select { // the server has seen it, if it wants to
		case release <- struct{}{}:
		case <-time.After(time.Minute):
			t.Fatal("the request did not get through")
		}
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, res.StatusCode)
		body, err := io.ReadAll(res.Body)
		require.NoError(t, err)
		require.True(t, strings.HasPrefix(string(body), "answer to "))
		require.NoError(t, res.Body.Close())
	}
}

// TestNeverMadeUp: a request that dies on the way is no success.
func TestNeverMadeUp(t *testing.T) {
	t.Parallel()
	came := make(chan context.Context, 1)
	r := newRig(t, http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) {
		came <- req.Context()
		<-req.Context().Done()
	}))
	r.edge.linger = time.Millisecond
	conn := r.raw(t, "GET / HTTP/1.1\r\nHost: %s\r\nX-API-Key: wrn_00112233445566778899aabbccddeeff\r\n\r\n")
	<-came
	require.NoError(t, conn.CloseWrite())
	answer, err := io.ReadAll(conn)
	require.NoError(t, err)
	require.Empty(t, string(answer))
}

// TestIdleConnectionsAreDropped: a server that ends gracefully does not wait for us.
func TestIdleConnectionsAreDropped(t *testing.T) {
	t.Parallel()
	r := newRig(t, echo)
	for range 2 {
		res, _ := r.do(t, http.MethodGet, "/", nil, "X-API-Key", goodKey)
		require.Equal(t, http.StatusOK, res.StatusCode)
		require.Positive(t, r.idle())
		r.edge.LetGo()
		require.Eventually(t, func() bool { return r.idle() == 0 }, time.Minute, time.Millisecond)
	}
	res, _ := r.do(t, http.MethodGet, "/", nil, "X-API-Key", goodKey)
	require.Equal(t, http.StatusOK, res.StatusCode)
	require.Eventually(t, func() bool { return r.idle() == 0 }, time.Minute, time.Millisecond, "after a moment also by itself")
}

// TestBusyConnectionsAreLetGo: a connection that is in use when a program is told to end
// has no request more, however many there are.
func TestBusyConnectionsAreLetGo(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})

	r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {

		if req.URL.Path == "/slow" {
			_ = http.NewResponseController(w).Flush()
			<-release
		}
		_, _ = io.WriteString(w, req.RemoteAddr)
	}))
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, r.url+"/slow", nil)
	require.NoError(t, err)
	req.Header.Set("X-API-Key", goodKey)
	slow, err := r.client.Do(req)
	require.NoError(t, err)
	defer slow.Body.Close()
	done := r.edge.Ending(testCapsule)
	seen := map[string]bool{}
	for range 4 {
		_, body := r.do(t, http.MethodGet, "/", nil, "X-API-Key", goodKey)
		require.False(t, seen[body], "each is for one request")
		seen[body] = true
	}
	done()
	done() // which is no other's
	require.Eventually(t, func() bool {
		_, one := r.do(t, http.MethodGet, "/", nil, "X-API-Key", goodKey)
		_, other := r.do(t, http.MethodGet, "/", nil, "X-API-Key", goodKey)
		return one == other
	}, time.Minute, time.Millisecond, "and then they are kept again, for a moment")
	close(release)
	first, err := io.ReadAll(slow.Body)
	require.NoError(t, err, "what was on it comes whole")
	for range 4 {
		_, body := r.do(t, http.MethodGet, "/", nil, "X-API-Key", goodKey)
		require.NotEqual(t, string(first), body)
	}
}
