package api

import (
	"encoding/base64"
	"encoding/json"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const ptyPath = "/v1/capsules/{id}/pty"

func (p *peer) say(message any) {
	p.t.Helper()
	text, err := json.Marshal(message)
	require.NoError(p.t, err)
	p.send(string(text))
}

// typeIn sends input to a terminal.
func (p *peer) typeIn(text string) {
	p.t.Helper()
	p.say(map[string]any{"type": "input", "data": base64.StdEncoding.EncodeToString([]byte(text))})
}

// until reads output until text was shown, and returns all of it and the end of the last.
func (p *peer) until(text string) (shown string, end int64) {
	p.t.Helper()
	for !strings.Contains(shown, text) {
		m := p.next()
		require.Equal(p.t, "output", m["type"], "%q: %v", shown, m)
		data, err := base64.StdEncoding.DecodeString(m["data"].(string))
		require.NoError(p.t, err)
		shown += string(data)
		end = int64(m["end"].(float64))
	}
	return shown, end
}

func TestPty(t *testing.T) {
	t.Parallel()
	r := newRealRig(t)
	p := r.dial(ptyPath)
	p.say(map[string]any{
		"type": "start", "cmd": "bash", "args": []string{"--norc", "--noprofile"}, "rows": 30, "cols": 90, "envs": map[string]string{"PS1": "$ ", "HISTFILE": ""},
	})
	started := p.next()
	require.Equal(t, "started", started["type"])
	tag := started["tag"].(string)
	require.Regexp(t, `^pty-[0-9a-f]{8}$`, tag)
	p.until("$ ")
	p.typeIn("stty size\r")
	p.until("30 90")
	p.say(map[string]any{"type": "resize", "rows": 41, "cols": 101})
	p.say(map[string]any{"type": "resize", "rows": 0, "cols": 101})
	m := p.next()
	for m["type"] == "output" {
		m = p.next()
	}
	require.Equal(t, []any{"error", "invalid_request", false}, []any{m["type"], m["code"], m["fatal"]})
	p.typeIn("stty size; X=kept\r")
	p.until("41 101")
	require.NoError(t, p.conn.CloseNow())

	// The shell lives on, shows what it showed, and is listed like any process.
	var list processList
	r.call(http.MethodGet, "/v1/capsules/{id}/processes", "").expect(http.StatusOK).decode(&list)
	require.Equal(t, tag, list.Processes[0].Tag)
	require.Equal(t, &terminal{Rows: 41, Cols: 101, Term: "xterm-256color"}, list.Processes[0].Terminal)
	p = r.dial(ptyPath)
	p.say(map[string]any{"type": "connect", "tag": tag, "rows": 20, "cols": 80})
	require.Equal(t, started["pid"], p.next()["pid"])
	p.until("41 101")
	p.typeIn("echo $X again; stty size\r")
	p.until("20 80")
	p.typeIn("exit 5\r")
	for m = p.next(); m["type"] == "output"; {
		m = p.next()
	}
	require.Equal(t, []any{"exit", 5.0, "exited"}, []any{m["type"], m["exit_code"], m["reason"]})

	p = r.dial(ptyPath)
	p.say(map[string]any{"type": "start", "cmd": "sleep", "args": []string{"1000"}})
	p.next()
	p.say(map[string]any{"type": "kill"})
	m = p.next()
	require.Equal(t, []any{"exit", 137.0, "SIGKILL", "killed"}, []any{m["type"], m["exit_code"], m["signal"], m["reason"]})
}

func TestPtyRefuses(t *testing.T) {
	t.Parallel()
	r := newRealRig(t)
	r.shell("plain", "sleep 1000")
	for _, c := range []struct {
		send any
		code string
	}{
		{map[string]any{"type": "start", "cmd": "/no/such"}, "invalid_request"},
		{map[string]any{"type": "start", "rows": -1}, "invalid_request"},
		{map[string]any{"type": "start", "term": "a b"}, "invalid_request"},
		{map[string]any{"type": "begin"}, "invalid_request"},
		{map[string]any{"type": "connect", "tag": "nobody"}, "not_found"},
		{map[string]any{"type": "connect", "tag": ""}, "invalid_request"},
		{map[string]any{"type": "connect", "tag": "plain"}, "invalid_state"},
		{[]int{1}, "invalid_request"},
	} {
		p := r.dial(ptyPath)
		p.say(c.send)
		m := p.next()
		require.Equal(t, []any{"error", c.code, true}, []any{m["type"], m["code"], m["fatal"]}, "%v: %v", c.send, m)
	}
	r.call(http.MethodPost, "/v1/capsules/{id}/processes/plain/resize", `{"rows":1,"cols":1}`).fails(http.StatusConflict, "invalid_state")
	r.call(http.MethodPost, "/v1/capsules/{id}/processes/plain/resize", `{"rows":0,"cols":1}`).fails(http.StatusBadRequest, "invalid_request")
}

// TestPtyReconnects: a client that is cut and comes back at random sees every byte once.
func TestPtyReconnects(t *testing.T) {
	t.Parallel()
	r := newRealRig(t)
	p := r.dial(ptyPath)
	p.say(map[string]any{
		"type": "start", "cmd": "sh", "tag": "count",
		"args": []string{"-c", `stty -echo -opost; i=0; while [ $i -lt 20000 ]; do echo "line $i"; i=$((i+1)); done; echo over; read -r x`},
	})
	var shown strings.Builder
	at := int64(0)
	for cuts := 0; ; {
		m := p.next()
		if m["type"] == "started" {
			continue
		}
		require.Equal(t, "output", m["type"])
		require.EqualValues(t, at, m["offset"])
		data, err := base64.StdEncoding.DecodeString(m["data"].(string))
		require.NoError(t, err)
		shown.Write(data)
		at = int64(m["end"].(float64))
		if strings.HasSuffix(shown.String(), "over\n") {
			break
		}
		if cuts < 100 && rand.N(2) == 0 {
			cuts++
			require.NoError(t, p.conn.CloseNow())
			p = r.dial(ptyPath)
			p.say(map[string]any{"type": "connect", "tag": "count", "since": at})
		}
	}
	lines := strings.Split(shown.String(), "\n")
	require.Len(t, lines, 20002)
	for i, line := range lines[:20000] {
		if line != "line "+strconv.Itoa(i) {
			require.Equal(t, "line "+strconv.Itoa(i), line)
		}
	}
}
