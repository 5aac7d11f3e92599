package client_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/coder/websocket/wsjson"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nestbox/nestbox/client"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testKey     = "wrn_00000000000000000000000000000000"
	testCapsule = "cl-0123456789abcdefghijklmno"
	testTimeout = 60 * time.Second
)

// script is a server with one capsule and one process, whose connections break
// as the test wants them to.
type script struct {
	mu      sync.Mutex
	grown   *sync.Cond
	chunks  []chunk
	kept    int64 // offset of the oldest byte that is kept
	end     int64
	exit    map[string]any // nil while it runs
	id      string
	tag     string
	stdin   []byte
	stdinCh chan struct{} // closed at end of file
	starts  int
	killed  bool
	conns   map[*websocket.Conn]bool

	loseInput bool // break the connection of input
	skipGaps  bool // do not say what is no longer kept

	// cut decides, before a frame is sent, whether the connection breaks now.
	cut func() bool
	// refuse decides whether a request gets 503 instead of an answer.
	refuse func() bool
	// budget, if set, is how many bytes a connection carries to the client
	// before it breaks.
	budget func() int
	// beforeStart, if set, is called when a start message has come and the
	// process runs; true = the connection breaks before that is said.
	beforeStart func() bool
}

type chunk struct {
	stream string
	offset int64
	data   []byte
}

const (
	testPID = 42
	testID  = "@7" // of the first process
)

func newScript() *script {
	s := &script{
		id:      testID,
		stdinCh: make(chan struct{}),
		conns:   map[*websocket.Conn]bool{},
		cut:     func() bool { return false },
		refuse:  func() bool { return false },
	}
	s.grown = sync.NewCond(&s.mu)
	return s
}

func (s *script) write(stream string, data []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.chunks = append(s.chunks, chunk{stream, s.end, data})
	s.end += int64(len(data))
	s.grown.Broadcast()
}

// drop forgets the output before offset.
func (s *script) drop(offset int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept = offset
}

func (s *script) finish(code int, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exit == nil {
		s.exit = map[string]any{"code": code, "reason": reason}
	}
	s.grown.Broadcast()
}

// serve starts the server and returns a client of it.
func (s *script) serve(t *testing.T, change ...func(*client.Config)) (*client.Client, *httptest.Server) {
	t.Helper()
	mux := http.NewServeMux()
	base := "/v1/capsules/" + testCapsule
	mux.HandleFunc("GET "+base, func(w http.ResponseWriter, _ *http.Request) {
		reply(w, 200, map[string]any{"id": testCapsule, "status": "running"})
	})
	mux.HandleFunc("GET "+base+"/exec/stream", s.execStream)
	mux.HandleFunc("GET "+base+"/processes/{sel}", s.get)
	mux.HandleFunc("DELETE "+base+"/processes/{sel}", s.kill)
	mux.HandleFunc("GET "+base+"/processes/{sel}/stream", s.attach)
	mux.HandleFunc("POST "+base+"/processes/{sel}/stdin", s.writeStdin)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("X-API-Key") != testKey:
			fail(w, 401, "unauthorized", "invalid API key")
		case s.refuse():
			fail(w, 503, "host_unavailable", "capsule host is not reachable")
		default:
			mux.ServeHTTP(w, r)
		}
	}))
	if s.budget != nil {
		server.Listener = cutter{server.Listener, s.budget}
	}
	server.Start()
	cfg := client.Config{BaseURL: server.URL, APIKey: testKey}
	for _, f := range change {
		f(&cfg)
	}
	c, err := client.New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() {
		s.finish(137, "killed") // lets handlers end
		c.CloseIdle()
		server.Close()
	})
	return c, server
}

func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}

func fail(w http.ResponseWriter, status int, code, message string) {
	reply(w, status, map[string]any{"error": map[string]string{"code": code, "message": message}})
}

// accept upgrades a request to a connection that hangUp cuts.
func (s *script) accept(w http.ResponseWriter, r *http.Request) (*websocket.Conn, func()) {
	ws, err := websocket.Accept(w, r, nil)
	if err != nil {
		return nil, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns[ws] = true
	return ws, func() {
		_ = ws.CloseNow()
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.conns, ws)
	}
}

// state returns what the test may look at while the server runs.
func (s *script) state() (starts int, killed bool, stdin []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.starts, s.killed, s.stdin
}

// hangUp cuts all streams.
func (s *script) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ws := range s.conns {
		_ = ws.CloseNow()
	}
}

// known reports whether the process has been started and is called sel.
func (s *script) known(sel string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tag != "" && (sel == s.tag || sel == s.id)
}

func (s *script) get(w http.ResponseWriter, r *http.Request) {
	if !s.known(r.PathValue("sel")) {
		fail(w, 404, "not_found", "process not found")
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.URL.Query().Get("wait") != "" {
		for s.exit == nil && r.Context().Err() == nil {
			s.grown.Wait()
		}
	}
	reply(w, 200, map[string]any{
		"id": s.id, "pid": testPID, "tag": s.tag, "exit": s.exit, "stdin": true,
		"output": map[string]any{"start": s.kept, "end": s.end},
	})
}

func (s *script) kill(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	s.killed = true
	s.mu.Unlock()
	s.finish(137, "killed")
	w.WriteHeader(http.StatusNoContent)
}

func (s *script) writeStdin(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exit != nil {
		fail(w, 409, "invalid_state", "standard input is not open")
		return
	}
	buf := make([]byte, 8<<20)
	for {
		n, err := r.Body.Read(buf)
		s.stdin = append(s.stdin, buf[:n]...)
		if err != nil {
			break
		}
	}
	if s.loseInput && len(s.stdin) > 0 {
		s.stdin = nil
		hangUp(w)
		return
	}
	if r.URL.Query().Get("eof") == "true" {
		close(s.stdinCh)
	}
	w.WriteHeader(http.StatusNoContent)
}

func (s *script) execStream(w http.ResponseWriter, r *http.Request) {
	ws, done := s.accept(w, r)
	if ws == nil {
		return
	}
	defer done()
	var start struct {
		Type, Cmd, Tag string
		Detach         bool
	}
	if wsjson.Read(r.Context(), ws, &start) != nil || start.Type != "start" || !start.Detach {
		return
	}
	if start.Cmd == "missing" {
		_ = wsjson.Write(r.Context(), ws, map[string]any{"type": "error", "code": "invalid_request", "data": "missing: no such program"})
		return
	}
	s.mu.Lock()
	s.tag = start.Tag
	s.starts++
	s.mu.Unlock()
	if s.beforeStart != nil && s.beforeStart() {
		return
	}
	s.stream(r.Context(), ws, 0, r.URL.Query().Get("until"))
}

func (s *script) attach(w http.ResponseWriter, r *http.Request) {
	if !s.known(r.PathValue("sel")) {
		fail(w, 404, "not_found", "process not found")
		return
	}
	ws, done := s.accept(w, r)
	if ws == nil {
		return
	}
	defer done()
	since, err := strconv.ParseInt(r.URL.Query().Get("since"), 10, 64)
	if err != nil || r.URL.Query().Get("encoding") != "base64" {
		return
	}
	s.stream(r.Context(), ws, since, r.URL.Query().Get("until"))
}

// stream sends the log from an offset, in frames of random size, until it is
// cut.
func (s *script) stream(ctx context.Context, ws *websocket.Conn, at int64, until string) {
	send := func(frame map[string]any) bool {
		return !s.cut() && wsjson.Write(ctx, ws, frame) == nil
	}
	s.mu.Lock()
	tag := s.tag
	s.mu.Unlock()
	if !send(map[string]any{"type": "start", "id": s.id, "pid": testPID, "tag": tag}) {
		return
	}
	for {
		frame, exit := s.next(&at)
		if exit != nil {
			if send(map[string]any{"type": "exit", "exit_code": exit["code"], "reason": exit["reason"], "offset": at}) &&
				(until == "exit" || send(map[string]any{"type": "output_closed", "offset": at})) {
				_ = ws.Close(websocket.StatusNormalClosure, "")
			}
			return
		}
		if !send(frame) {
			return
		}
	}
}

// next returns the next frame from an offset, or how the process ended.
func (s *script) next(at *int64) (frame, exit map[string]any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for *at >= s.end && s.exit == nil {
		s.grown.Wait()
	}
	if *at < s.kept {
		frame = map[string]any{"type": "gap", "from": *at, "to": s.kept}
		*at = s.kept
		if !s.skipGaps {
			return frame, nil
		}
	}
	for _, c := range s.chunks {
		if *at >= c.offset && *at < c.offset+int64(len(c.data)) {
			rest := c.data[*at-c.offset:]
			rest = rest[:1+rand.IntN(len(rest))]
			frame = map[string]any{
				"type": c.stream, "data": base64.StdEncoding.EncodeToString(rest),
				"offset": *at, "end": *at + int64(len(rest)),
			}
			*at += int64(len(rest))
			return frame, nil
		}
	}
	return nil, s.exit
}
