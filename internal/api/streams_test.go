package api

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// peer is a test's end of a WebSocket.
type peer struct {
	t    testing.TB
	conn *websocket.Conn
}

// dial connects with the rig's key, or with the header that is given.
func (r *rig) dial(path string, header ...string) *peer {
	r.t.Helper()
	h := http.Header{apiKeyHeader: {r.key}}
	if len(header) > 0 {
		h = http.Header{}
		for i := 0; i < len(header); i += 2 {
			h.Set(header[i], header[i+1])
		}
	}
	return r.dialWith(path, &websocket.DialOptions{HTTPHeader: h})
}

func (r *rig) dialWith(path string, options *websocket.DialOptions) *peer {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), patience)
	defer cancel()
	conn, _, err := websocket.Dial(ctx, r.url+r.path(path), options)
	require.NoError(r.t, err)
	r.t.Cleanup(func() { _ = conn.CloseNow() })
	return &peer{r.t, conn}
}

// next returns the next message.
func (p *peer) next() map[string]any {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	defer cancel()
	_, b, err := p.conn.Read(ctx)
	require.NoError(p.t, err)
	var m map[string]any
	require.NoError(p.t, json.Unmarshal(b, &m))
	return m
}

// expect checks the fields of the next message.
func (p *peer) expect(want map[string]any) {
	p.t.Helper()
	got := p.next()
	for k, v := range want {
		require.EqualValues(p.t, v, got[k], "%v", got)
	}
}

func (p *peer) send(text string) {
	p.t.Helper()
	require.NoError(p.t, p.conn.Write(p.t.Context(), websocket.MessageText, []byte(text)))
}

// closed waits for the end of the stream and checks its code.
func (p *peer) closed(code websocket.StatusCode) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	defer cancel()
	_, b, err := p.conn.Read(ctx)
	require.Error(p.t, err, "%s", b)
	require.Equal(p.t, code, websocket.CloseStatus(err), "%v", err)
}

type fields = map[string]any

const webStream = "/v1/capsules/{id}/processes/web/stream"

func TestProcessStream(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start("web")
	p := r.dial(webStream)
	p.expect(fields{"type": "start", "id": "@11", "pid": 1, "tag": "web"})
	r.script("web", func(p *scripted) { p.write("stdout", "a€"); p.write("stderr", "err") })
	p.expect(fields{"type": "stdout", "data": "a€", "offset": 0, "end": 4})
	p.expect(fields{"type": "stderr", "data": "err", "offset": 4, "end": 7})
	r.script("web", func(p *scripted) { p.exit(nestbox.Exit{Reason: nestbox.ReasonExited}) })
	got := p.next()
	require.Contains(t, got, "exit_code") // also if it is 0
	require.Equal(t, fields{"type": "exit", "id": "@11", "exit_code": 0.0, "reason": "exited", "offset": 7.0}, got)
	r.script("web", func(p *scripted) { p.write("stdout", "grandchild"); p.closed() })
	p.expect(fields{"type": "stdout", "data": "grandchild"})
	p.expect(fields{"type": "output_closed", "offset": 17})
	p.closed(websocket.StatusNormalClosure)

	late := r.dial(webStream + "?since=4&encoding=base64&until=exit")
	late.expect(fields{"type": "start", "pid": 1})
	late.expect(fields{"type": "stderr", "data": "ZXJy", "offset": 4})
	late.expect(fields{"type": "exit"})
	late.closed(websocket.StatusNormalClosure)

	now := r.dial(webStream + "?since=now")
	now.expect(fields{"type": "start"})
	now.expect(fields{"type": "exit"})
	now.expect(fields{"type": "output_closed"})
	now.closed(websocket.StatusNormalClosure)
}

func TestStreamGapAndBreak(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start("web")
	r.script("web", func(p *scripted) { p.write("stdout", "0123456789"); p.drop(6) })
	p := r.dial(webStream + "?since=2")
	p.expect(fields{"type": "start"})
	p.expect(fields{"type": "gap", "from": 2, "to": 6, "offset": 2})
	p.expect(fields{"type": "stdout", "data": "6789", "offset": 6})
	r.script("web", func(p *scripted) { p.broken = nestbox.Errorf(nestbox.CodeGuest, "the daemon does not answer") })
	p.expect(fields{"type": "error", "code": "agent_error", "data": "the daemon does not answer"})
	p.closed(websocket.StatusInternalError)
	r.see("web", (*scripted).running)
}

// A reader that stalls while the log moves on gets one gap, and what is kept;
// another reader has had everything meanwhile.
func TestStalledReaderGetsGap(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start("web")
	stalled, other := r.dial(webStream), r.dial(webStream)
	stalled.expect(fields{"type": "start"})
	other.expect(fields{"type": "start"})
	const piece, pieces = maxFrameData, 3072 // far more than fits into the buffers of a connection
	r.script("web", func(p *scripted) {
		for range pieces {
			p.write("stdout", strings.Repeat("x", piece))
		}
		p.closed()
	})
	for i := range pieces {
		other.expect(fields{"type": "stdout", "offset": i * piece})
	}
	other.expect(fields{"type": "output_closed"})
	r.script("web", func(p *scripted) { p.drop((pieces - 1) * piece) })
	at, gaps := 0.0, 0
	for {
		m := stalled.next()
		if m["type"] == "output_closed" {
			break
		}
		require.EqualValues(t, at, m["offset"])
		if m["type"] == "gap" {
			gaps++
			at = m["to"].(float64)
			continue
		}
		at = m["end"].(float64)
	}
	require.Equal(t, 1, gaps)
	require.EqualValues(t, pieces*piece, at)
	stalled.closed(websocket.StatusNormalClosure)
}

func (p *scripted) running() bool { return p.Running() && len(p.kills) == 0 }

func TestStreamErrors(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start("web")
	const exec = "/v1/capsules/{id}/exec/stream"
	for name, c := range map[string]struct {
		path, send, code string
	}{
		"unknown capsule":       {"/v1/capsules/cl-0000000000000000000000000/processes/web/stream", "", "not_found"},
		"unknown capsule, exec": {"/v1/capsules/cl-0000000000000000000000000/exec/stream", "", "not_found"},
		"unknown process":       {"/v1/capsules/{id}/processes/nope/stream", "", "not_found"},
		"no start":              {exec, `{"type":"stop"}`, "invalid_request"},
		"no JSON":               {exec, `x`, "invalid_request"},
		"no command":            {exec, `{"type":"start"}`, "invalid_request"},
		"bad tag":               {exec, `{"type":"start","cmd":"quiet","tag":"1"}`, "invalid_request"},
		"unknown field":         {exec, `{"type":"start","cmd":"quiet","x":1}`, "invalid_request"},
		"no such program":       {exec, `{"type":"start","cmd":"missing"}`, "invalid_request"},
		"tag is taken":          {exec, `{"type":"start","cmd":"quiet","tag":"web"}`, "conflict"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := *r
			got.t = t
			p := got.dial(c.path)
			if c.send != "" {
				p.send(c.send)
			}
			p.expect(fields{"type": "error", "code": c.code})
			p.closed(websocket.StatusPolicyViolation)
		})
	}
}

func TestStreamRefusedBeforeUpgrade(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for _, path := range []string{
		"/v1/capsules/cl-nope/exec/stream",
		"/v1/capsules/cl-nope/processes/web/stream",
		"/v1/capsules/{id}/processes/0/stream",
		webStream + "?since=x",
		webStream + "?encoding=latin1",
		webStream + "?until=never",
	} {
		got := r.request(http.MethodGet, path, nil, "Connection", "Upgrade", "Upgrade", "websocket",
			"Sec-WebSocket-Version", "13", "Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA==")
		got.fails(http.StatusBadRequest, "invalid_request")
	}
	r.request(http.MethodGet, webStream, nil, "Connection", "Upgrade", "Upgrade", "websocket", "Sec-WebSocket-Version", "12").
		fails(http.StatusBadRequest, "invalid_request")
}

func TestStreamAuthentication(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(c *Config) { c.AuthTimeout = patience })
	r.start("web")
	auth := `{"type":"auth","token":"` + r.key + `"}`
	for name, c := range map[string]struct {
		header []string
		send   string
		ok     bool
	}{
		"bearer":                  {[]string{"Authorization", "Bearer " + r.key}, "", true},
		"first message":           {[]string{"X-None", "1"}, auth, true},
		"after a bad header":      {[]string{apiKeyHeader, "x"}, auth, true},
		"no key":                  {[]string{"X-None", "1"}, `{"type":"start","cmd":"quiet"}`, false},
		"bad key":                 {[]string{"X-None", "1"}, `{"type":"auth","token":"x"}`, false},
		"garbage":                 {[]string{"X-None", "1"}, `{`, false},
		"bad header, no message":  {[]string{apiKeyHeader, "x"}, `{"type":"start"}`, false},
		"a token of a wrong type": {[]string{"X-None", "1"}, `{"type":"auth","token":1}`, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := *r
			got.t = t
			p := got.dial(webStream, c.header...)
			if c.send != "" {
				p.send(c.send)
			}
			if c.ok {
				p.expect(fields{"type": "start", "tag": "web"})
				return
			}
			p.expect(fields{"type": "error", "code": "unauthorized"})
			p.closed(closeUnauthorized)
		})
	}
}

func TestStreamAuthenticationTimeout(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(c *Config) { c.AuthTimeout = time.Millisecond })
	p := r.dial(webStream, "X-None", "1")
	p.expect(fields{"type": "error", "code": "unauthorized", "data": "X-API-Key or Authorization: Bearer <token> required"})
	p.closed(closeUnauthorized)
}

func TestExecStream(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p := r.dial("/v1/capsules/{id}/exec/stream")
	p.send(`{"type":"start","cmd":"echo","args":["hello"],"tag":"e"}`)
	p.expect(fields{"type": "start", "pid": 1, "tag": "e"})
	p.expect(fields{"type": "stdout", "data": "hello\n"})
	p.expect(fields{"type": "exit", "exit_code": 0})
	p.expect(fields{"type": "output_closed"})
	p.closed(websocket.StatusNormalClosure)
	r.see("e", func(p *scripted) bool { return p.attached == guest.Attach{Lossless: true} && len(p.kills) == 0 })
}

func execStream(r *rig, start string) *peer {
	p := r.dial("/v1/capsules/{id}/exec/stream")
	p.send(`{"type":"start","cmd":"quiet","tag":"web","stdin":true` + start + `}`)
	p.expect(fields{"type": "start"})
	return p
}

func TestExecStreamStop(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p := execStream(r, "")
	p.send(`{"type":"stop"}`)
	p.expect(fields{"type": "exit", "exit_code": 137, "signal": "SIGKILL", "reason": "killed"})
	p.expect(fields{"type": "output_closed"})
	p.closed(websocket.StatusNormalClosure)
}

func TestExecStreamStdin(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p := execStream(r, "")
	p.send(`{"type":"alive"}`)
	p.send(`{"type":"stdin","data":"AP8="}`)
	p.send(`{"type":"stdin","data":"eA==","eof":true}`)
	r.see("web", func(p *scripted) bool { return string(p.stdin) == "\x00\xffx" && !p.Stdin })
	p.send(`{"type":"stdin","data":"eA=="}`)
	p.expect(fields{"type": "error", "code": "invalid_state"})
	for _, bad := range []string{`{"type":"stdin","data":"*"}`, `{"type":"resize"}`, `[]`, `{`} {
		p.send(bad) // does no harm to the process
		p.expect(fields{"type": "error", "code": "invalid_request"})
	}
	r.script("web", func(p *scripted) { p.write("stdout", "alive") })
	p.expect(fields{"type": "stdout", "data": "alive"})
}

// A process that does not read its input can still be stopped.
func TestExecStreamStopBehindStdin(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.guest.procs.stall = make(chan struct{}) // never
	p := execStream(r, "")
	for range stdinBacklog {
		p.send(`{"type":"stdin","data":"eA=="}`)
	}
	p.send(`{"type":"stop"}`)
	p.expect(fields{"type": "exit", "reason": "killed"})
}

// A client that leaves is noticed, also while its input waits for the process.
func TestExecStreamDisconnectBehindStdin(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(c *Config) { c.PingInterval = time.Millisecond })
	r.guest.procs.stall = make(chan struct{}) // never
	p := execStream(r, "")
	for range 2 * stdinBacklog {
		p.send(`{"type":"stdin","data":"eA=="}`)
	}
	_ = p.conn.CloseNow()
	r.see("web", func(p *scripted) bool { return len(p.kills) == 1 })
}

func TestForeignStreams(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start("web")
	for _, path := range []string{webStream, "/v1/capsules/{id}/exec/stream"} {
		p := r.dial(path, apiKeyHeader, r.other)
		p.expect(fields{"type": "error", "code": "not_found", "data": "capsule not found"})
		p.closed(websocket.StatusPolicyViolation)
	}
}

func TestExecStreamDisconnect(t *testing.T) {
	t.Parallel()
	for name, leave := range map[string]func(*peer){
		"close":      func(p *peer) { require.NoError(p.t, p.conn.Close(websocket.StatusNormalClosure, "")) },
		"connection": func(p *peer) { _ = p.conn.CloseNow() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			leave(execStream(r, ""))
			r.see("web", func(p *scripted) bool { return len(p.kills) == 1 && p.kills[0] == guest.Kill{} })
		})
	}
}

// A detached process, one that has ended already, and one whose stream broke on
// our side are not killed when the client leaves.
func TestExecStreamLeavesAlone(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		start string
		do    func(*scripted)
		last  string
	}{
		"detached": {`,"detach":true`, func(p *scripted) { p.write("stdout", "x") }, "stdout"},
		"ended":    {``, func(p *scripted) { p.exit(nestbox.Exit{Reason: nestbox.ReasonExited}) }, "exit"},
		"broken":   {``, func(p *scripted) { p.broken = nestbox.Errorf(nestbox.CodeUnavailable, "host went away") }, "error"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			p := execStream(r, c.start)
			r.script("web", c.do)
			p.expect(fields{"type": c.last})
			_ = p.conn.Close(websocket.StatusNormalClosure, "") // "broken" has closed first
			r.idle()
			r.see("web", func(p *scripted) bool { return len(p.kills) == 0 })
		})
	}
}

// idle waits until the server has nothing to do, so that nothing can happen any
// more.
func (r *rig) idle() {
	r.t.Helper()
	require.Eventually(r.t, func() bool {
		return strings.Count(r.log.String(), "path="+r.path("/v1/capsules/{id}/exec/stream")) == 1
	},
		patience, time.Millisecond)
}

// A server that stops is not a client that leaves.
func TestServerStopKillsNothing(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	ctx, stop := context.WithCancel(t.Context())
	server := httptest.NewUnstartedServer(New(Config{Control: r.control}))
	server.Config.BaseContext = func(net.Listener) context.Context { return ctx }
	server.Start()
	r.url = server.URL
	p := execStream(r, "")
	stop()
	_, _, err := p.conn.Read(t.Context())
	require.Error(t, err)
	server.Close() // waits for the handlers
	r.see("web", (*scripted).running)
}

// A peer that answers no ping is found out, and treated as one that left.
func TestVanishedPeer(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(c *Config) { c.PingInterval, c.PongTimeout = 5*time.Millisecond, 20*time.Millisecond })
	execStream(r, "") // reads nothing more, and so sends no pong
	r.see("web", func(p *scripted) bool { return len(p.kills) == 1 })
}

// One that answers pings stays for as long as it likes.
func TestQuietStreamLives(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(c *Config) { c.PingInterval = 50 * time.Millisecond })
	r.start("web")
	pings := make(chan struct{}, 1)
	p := r.dialWith(webStream, &websocket.DialOptions{
		HTTPHeader: http.Header{apiKeyHeader: {r.key}},
		OnPingReceived: func(context.Context, []byte) bool {
			select {
			case pings <- struct{}{}:
			default: // one may come before the start frame, when nobody waits for it
			}
			return true
		},
	})
	p.expect(fields{"type": "start"})
	got := make(chan map[string]any)
	go func() { got <- p.next() }()
	for range 5 {
		select {
		case <-pings:
		case m := <-got:
			require.Fail(t, "something came", "%v", m)
		case <-time.After(patience):
			require.Fail(t, "no ping came")
		}
	}
	r.script("web", func(p *scripted) { p.write("stdout", "still here") })
	for {
		select {
		case <-pings:
		case m := <-got:
			require.Equal(t, "still here", m["data"])
			return
		case <-time.After(patience):
			require.Fail(t, "the output did not come")
		}
	}
}

func TestTooLargeMessage(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p := r.dial("/v1/capsules/{id}/exec/stream")
	p.send(`{"type":"start","cmd":"` + strings.Repeat("x", maxMessage) + `"}`)
	p.closed(websocket.StatusMessageTooBig)
}
