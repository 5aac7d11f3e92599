package hostile

import (
	"context"
	"fmt"
	"net/http"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	debug.SetMemoryLimit(memoryLimit) // as the server sets its own
	goleak.VerifyTestMain(m)
}

const memoryLimit = 512 << 20

// operations are all that a caller can ask of what is inside a capsule.
var operations = []struct{ method, path, body string }{
	{"POST", "/exec", `{"cmd":"sleep","tag":"web","timeout_sec":1}`},
	{"POST", "/exec", `{"cmd":"sleep","tag":"web","background":true}`},
	{"GET", "/processes?all=true", ""},
	{"GET", "/processes/web", ""},
	{"GET", "/processes/@1", ""},
	{"GET", "/processes/7", ""},
	{"GET", "/processes/web?wait=2s", ""},
	{"DELETE", "/processes/web", ""},
	{"POST", "/processes/web/signal", `{"signal":"HUP"}`},
	{"POST", "/processes/web/stdin", `{"data":"x"}`},
	{"GET", "/processes/web/logs", ""},
	{"GET", "/processes/web/logs?follow=true", ""},
	{"GET", "/processes/@1/logs?since=now&follow=true", ""},
	{"WS", "/processes/web/stream", ""},
	{"WS", "/exec/stream", `{"type":"start","cmd":"sleep","tag":"web"}`},
	{"GET", "/files?path=/f", ""},
	{"PUT", "/files?path=/f", "content"},
	{"POST", "/files/list", `{"path":"/f","depth":3}`},
	{"POST", "/files/stat", `{"path":"/f"}`},
	{"POST", "/files/mkdir", `{"path":"/f"}`},
	{"POST", "/files/remove", `{"path":"/f"}`},
}

// leaveAfter is when a caller has seen enough of a stream that does not end.
const leaveAfter = 12 * time.Second

// Limits of what all of it together, at the same time, may cost the server: the
// scripts live in this process too.
const (
	maxHeapMiB    = 768
	maxThreads    = 64
	spareThreads  = 24
	spareRoutines = 10
	spareFiles    = 10
)

// TestHostileGuests has every script answer every operation, all at the same
// time, while another team works.
func TestHostileGuests(t *testing.T) {
	r := newRig(t)
	other := r.newKey()
	well, _ := r.capsule(other)
	boxes := map[string]string{}
	for name, script := range scripts() {
		id, b := r.capsule(r.key)
		b.serve(script)
		boxes[name] = id
	}
	require.Equal(t, http.StatusOK, r.call(t.Context(), other, "POST", "/v1/capsules/"+well+"/exec", `{"cmd":"true"}`).status)
	r.http.CloseIdleConnections()
	before := measure(t)

	var threads int
	peak := peakHeap(func() {
		var all sync.WaitGroup
		for name, id := range boxes {
			for _, op := range operations {
				all.Go(func() { r.try(name, id, op.method, op.path, op.body) })
			}
		}
		attacked := make(chan struct{})
		go func() { all.Wait(); close(attacked) }()
		for working := true; working; {
			select {
			case <-attacked:
				working = false
			default:
			}
			got := r.call(t.Context(), other, "POST", "/v1/capsules/"+well+"/exec", `{"cmd":"echo","args":["well"]}`)
			require.NoError(t, got.err)
			require.Contains(t, got.body, "well\\n", "%d", got.status)
			threads = max(threads, measure(t).threads)
		}
	})
	t.Logf("peak: heap %d MiB, %d threads; before: %+v", peak, threads, before)
	require.Less(t, peak, maxHeapMiB)
	require.Less(t, threads, maxThreads+before.threads)

	for name, id := range boxes { // a daemon is not asked when its capsule is destroyed
		got := r.call(t.Context(), r.key, "DELETE", "/v1/capsules/"+id, "")
		require.Equal(t, http.StatusNoContent, got.status, "%s: %s", name, got.body)
	}
	r.settles(before)
}

// settles requires that nothing is left of what was caused.
func (r *rig) settles(before usage) {
	r.t.Helper()
	var now usage
	deadline := time.Now().Add(patience)
	for {
		r.http.CloseIdleConnections()
		now = measure(r.t)
		if now.goroutines <= before.goroutines+spareRoutines && now.descriptors <= before.descriptors+spareFiles &&
			now.threads <= before.threads+spareThreads && now.heapMiB <= before.heapMiB+64 {
			return
		}
		if time.Now().After(deadline) {
			break
		}
		<-time.After(50 * time.Millisecond)
	}
	r.t.Fatalf("left over: %+v, before %+v", now, before)
}

// try makes one request and judges the answer.
func (r *rig) try(name, id, method, path, body string) {
	what := fmt.Sprintf("%s: %s %s", name, method, path)
	endless := method == "WS" || path == "/exec" || strings.Contains(path, "follow") || strings.Contains(path, "wait") || strings.HasPrefix(path, "/files?")
	stay := patience
	if endless {
		stay = leaveAfter
	}
	ctx, leave := context.WithTimeout(r.t.Context(), stay)
	defer leave()
	if method == "WS" {
		r.trySocket(ctx, what, id, path, body)
		return
	}
	got := r.call(ctx, r.key, method, "/v1/capsules/"+id+path, body)
	switch got.status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusInternalServerError:
		r.t.Errorf("%s: a guest caused %d: %s", what, got.status, got.body)
	case 499:
		r.t.Errorf("%s: a guest says that the caller left: %s", what, got.body)
	case 0:
		if ctx.Err() == nil || !endless {
			r.t.Errorf("%s: no answer after %v: %v", what, got.took, got.err)
		}
	case http.StatusOK:
		if path == "/exec" {
			r.t.Errorf("%s: a command that never ran looks as if it had: %s", what, got.body)
		}
	}
	if len(got.body) > 64<<10 && got.status >= 400 {
		r.t.Errorf("%s: an error of %d bytes", what, len(got.body))
	}
	if strings.ContainsAny(got.body, "\x1b\x00") && got.status >= 400 {
		r.t.Errorf("%s: %q", what, got.body)
	}
}

// trySocket follows a WebSocket to its end.
func (r *rig) trySocket(ctx context.Context, what, id, path, first string) {
	ws, _, err := websocket.Dial(ctx, strings.Replace(r.url, "http", "ws", 1)+"/v1/capsules/"+id+path, &websocket.DialOptions{
		HTTPClient: r.http, HTTPHeader: http.Header{"X-API-Key": {r.key}},
	})
	if err != nil {
		if ctx.Err() == nil {
			r.t.Errorf("%s: %v", what, err)
		}
		return
	}
	defer ws.CloseNow()
	ws.SetReadLimit(1 << 20)
	if first != "" {
		_ = ws.Write(ctx, websocket.MessageText, []byte(first))
	}
	for {
		_, frame, err := ws.Read(ctx)
		if err != nil {
			return
		}
		text := string(frame)
		if strings.Contains(text, `"type":"exit"`) {
			r.t.Errorf("%s: an exit that never was: %s", what, text)
		}
		for _, code := range []string{"unauthorized", "forbidden", "internal_error", "canceled"} {
			if strings.Contains(text, `"code":"`+code+`"`) {
				r.t.Errorf("%s: a guest caused %s", what, text)
			}
		}
	}
}
