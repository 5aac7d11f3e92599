package api

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/envd"
)

// newRealRig is a rig whose capsule is this machine: its processes are real.
func newRealRig(t *testing.T, adjust ...func(*Config)) *rig {
	t.Helper()
	e, err := envd.New(envd.Config{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, e.Close()) })
	t.Cleanup(func() { // they would outlive the test
		ctx := context.WithoutCancel(t.Context())
		list, err := e.Processes().List(ctx, false)
		require.NoError(t, err)
		for _, p := range list {
			_, err := e.Processes().Kill(ctx, nestbox.Selector{ID: p.ID}, guest.Kill{Signal: syscall.SIGKILL})
			require.NoError(t, err)
		}
	})
	return newRigOver(t, func() guest.Guest { return e }, adjust...)
}

// shell starts a script in the background.
func (r *rig) shell(tag, script string) {
	r.t.Helper()
	r.call(http.MethodPost, execPath, fmt.Sprintf(`{"cmd":"/bin/sh","args":["-c",%q],"background":true,"tag":%q}`, script, tag)).expect(http.StatusAccepted)
}

func TestRealExec(t *testing.T) {
	t.Parallel()
	r := newRealRig(t)
	var out execResult
	r.call(http.MethodPost, execPath, `{"cmd":"/bin/sh","args":["-c","echo $X; pwd; echo err >&2; exit 3"],"envs":{"X":"wörld"},"cwd":"/tmp"}`).
		expect(http.StatusOK).decode(&out)
	require.Equal(t, []any{"wörld\n/tmp\n", "err\n", 3, "exited"}, []any{out.Stdout, out.Stderr, out.ExitCode, out.Reason})

	out = execResult{}
	r.call(http.MethodPost, execPath, `{"cmd":"/bin/sh","args":["-c","sleep 1000 & echo so far; wait"],"timeout_sec":1}`).
		expect(http.StatusOK).decode(&out)
	require.Equal(t, []any{"so far\n", 137, "SIGKILL", "timeout"}, []any{out.Stdout, out.ExitCode, out.Signal, out.Reason})

	require.NotEmpty(t, r.call(http.MethodPost, execPath, `{"cmd":"/no/such/program"}`).fails(http.StatusBadRequest, "invalid_request"))
}

// Readers that are cut and come back get every byte once.
func TestRealReattach(t *testing.T) {
	t.Parallel()
	r := newRealRig(t)
	const lines = 20000
	r.shell("count", fmt.Sprintf(`i=0; while [ $i -lt %d ]; do echo "line $i"; i=$((i+1)); done`, lines))
	var want strings.Builder
	for i := range lines {
		fmt.Fprintf(&want, "line %d\n", i)
	}
	var got strings.Builder
	at, done := int64(0), false
	for cut := 1; !done; cut++ {
		p := r.dial("/v1/capsules/{id}/processes/count/stream?encoding=base64&since=" + strconv.FormatInt(at, 10))
		p.expect(fields{"type": "start"})
		for range cut {
			m := p.next()
			if m["type"] == "output_closed" {
				done = true
				break
			}
			if m["type"] == "stdout" {
				b, err := base64.StdEncoding.DecodeString(m["data"].(string))
				require.NoError(t, err)
				require.EqualValues(t, at, m["offset"])
				got.Write(b)
				at = int64(m["end"].(float64))
			}
		}
		_ = p.conn.CloseNow()
	}
	require.Equal(t, want.String(), got.String())
	require.Equal(t, want.String(), string(r.call(http.MethodGet, "/v1/capsules/{id}/processes/count/logs", "").expect(http.StatusOK).body))
}

// The exit is told when the leader dies, though a descendant holds its output,
// and a kill later takes that one as well.
func TestRealExitAndKill(t *testing.T) {
	t.Parallel()
	r := newRealRig(t)
	p := r.dial("/v1/capsules/{id}/exec/stream")
	p.send(`{"type":"start","cmd":"/bin/sh","args":["-c","setsid sleep 1000 & echo $!; exit 3"],"tag":"left"}`)
	p.expect(fields{"type": "start"})
	pid, err := strconv.Atoi(strings.TrimSpace(p.next()["data"].(string)))
	require.NoError(t, err)
	p.expect(fields{"type": "exit", "exit_code": 3, "reason": "exited"})
	require.NoError(t, syscall.Kill(pid, 0))
	r.call(http.MethodDelete, "/v1/capsules/{id}/processes/left", "").expect(http.StatusNoContent)
	p.expect(fields{"type": "output_closed"})
	p.closed(websocket.StatusNormalClosure)
	require.Eventually(t, func() bool { return syscall.Kill(pid, 0) == syscall.ESRCH }, patience, time.Millisecond)
}

// A client that leaves a stream of its own kills what it started, all of it.
func TestRealDisconnect(t *testing.T) {
	t.Parallel()
	r := newRealRig(t)
	p := r.dial("/v1/capsules/{id}/exec/stream")
	p.send(`{"type":"start","cmd":"/bin/sh","args":["-c","setsid sleep 1000 & echo $!; wait"],"tag":"tree"}`)
	p.expect(fields{"type": "start"})
	pid, err := strconv.Atoi(strings.TrimSpace(p.next()["data"].(string)))
	require.NoError(t, err)
	_ = p.conn.CloseNow()
	var rec process
	r.call(http.MethodGet, "/v1/capsules/{id}/processes/tree?wait=1m", "").expect(http.StatusOK).decode(&rec)
	require.Equal(t, "killed", rec.Exit.Reason)
	require.Eventually(t, func() bool { return syscall.Kill(pid, 0) == syscall.ESRCH }, patience, time.Millisecond)
}

func TestRealStdinAndFiles(t *testing.T) {
	t.Parallel()
	r := newRealRig(t)
	p := r.dial("/v1/capsules/{id}/exec/stream?encoding=base64")
	p.send(`{"type":"start","cmd":"cat","stdin":true}`)
	p.expect(fields{"type": "start"})
	p.send(`{"type":"stdin","data":"AP8=","eof":true}`)
	p.expect(fields{"type": "stdout", "data": "AP8="})
	p.expect(fields{"type": "exit", "exit_code": 0})

	p = r.dial("/v1/capsules/{id}/exec/stream")
	p.send(`{"type":"start","cmd":"cat","stdin":true}`)
	p.expect(fields{"type": "start"})
	p.send(`{"type":"stdin","data":"not base64"}`)
	p.expect(fields{"type": "error", "code": "invalid_request"})
	p.send(`{"type":"stdin","data":"hé\n","encoding":"utf-8","eof":true}`)
	p.expect(fields{"type": "stdout", "data": "hé\n"})
	p.expect(fields{"type": "exit", "exit_code": 0})
	p = r.dial("/v1/capsules/{id}/exec/stream")
	p.send(`{"type":"start","cmd":"cat","stdin":"text"}`)
	p.expect(fields{"type": "error", "code": "invalid_request"})

	for stdin, want := range map[string]string{
		`"hé\n"`: "hé\n", `""`: "", `{"data":"AP8=","encoding":"base64"}`: "AP8=", `{"data":"x","encoding":"utf-8"}`: "x", `{"data":"x"}`: "x", `false`: "",
	} {
		var out execResult
		r.call(http.MethodPost, execPath, `{"cmd":"cat","stdin":`+stdin+`}`).expect(http.StatusOK).decode(&out)
		require.Equal(t, want, out.Stdout, stdin)
	}
	r.call(http.MethodPost, execPath, `{"cmd":"true","stdin":"`+strings.Repeat("not read", 1<<15)+`"}`).expect(http.StatusOK)
	for _, stdin := range []string{`1`, `{}`, `{"data":1}`, `{"data":"x","encoding":"utf-16"}`, `{"data":"x","more":1}`, `{"data":"?","encoding":"base64"}`} {
		r.call(http.MethodPost, execPath, `{"cmd":"cat","stdin":`+stdin+`}`).fails(http.StatusBadRequest, "invalid_request")
	}
	require.Contains(t, r.call(http.MethodPost, execPath, `{"cmd":"cat","stdin":"x","background":true}`).fails(http.StatusBadRequest, "invalid_request"), "stdin")
	merged := r.call(http.MethodPost, execPath, `{"cmd":"sh","args":["-c","echo 1; echo 2 >&2; echo 3"],"merge":true,"idle_timeout_sec":100}`).expect(http.StatusOK)
	require.Contains(t, string(merged.body), `"stdout":"1\n2\n3\n"`)

	path := t.TempDir() + "/new/f"
	content := strings.Repeat("\x00\xff", 1<<20)
	r.request(http.MethodPost, "/v1/capsules/{id}/files/write", strings.NewReader(form(file(content), field("path", path))), "Content-Type", formType).
		expect(http.StatusNoContent)
	require.Equal(t, content, string(r.request(http.MethodGet, "/v1/capsules/{id}/files?path="+path, nil).expect(http.StatusOK).body))
	r.call(http.MethodPost, "/v1/capsules/{id}/files/read", `{"path":"`+path+`x"}`).fails(http.StatusNotFound, "not_found")
}

// A name that is no text goes through every door, and is never taken for the one
// that it looks like.
func TestRealNamesThatAreNoText(t *testing.T) {
	t.Parallel()
	r := newRealRig(t)
	dir := t.TempDir()
	require.NoError(t, os.Mkdir(dir+"/d\xe9", 0o755))
	require.NoError(t, os.WriteFile(dir+"/d\xe9/f\xff", []byte("odd"), 0o600))
	require.NoError(t, os.WriteFile(dir+"/d\xe9/f\uFFFD", []byte("other"), 0o600))
	const api = "/v1/capsules/{id}/"
	escaped := dir + `/d\udbff\udee9/f\udbff\udeff` // as other JSON encoders write it
	var list struct{ Entries []fileEntry }
	r.call(http.MethodPost, api+"files/list", `{"path":"`+dir+`","depth":2}`).expect(http.StatusOK).decode(&list)
	require.Len(t, list.Entries, 3)
	shown := list.Entries[2].Path
	require.Equal(t, dir+"/d\U0010FEE9/f\U0010FEFF", shown)
	for _, path := range []string{shown, escaped} {
		require.Equal(t, "odd", string(r.call(http.MethodPost, api+"files/read", `{"path":"`+path+`"}`).expect(http.StatusOK).body))
	}
	for _, path := range []string{dir + "/d%E9/f%FF", url.QueryEscape(shown)} {
		require.Equal(t, "odd", string(r.request(http.MethodGet, api+"files?path="+path, nil).expect(http.StatusOK).body))
		r.request(http.MethodPut, api+"files?append=true&path="+path, strings.NewReader("+")).expect(http.StatusNoContent)
		r.request(http.MethodGet, api+"archive?path="+path, nil).expect(http.StatusOK)
		_ = os.WriteFile(dir+"/d\xe9/f\xff", []byte("odd"), 0o600)
	}
	r.request(http.MethodPost, api+"files/write", strings.NewReader(form(file("formed"), field("path", shown))), "Content-Type", formType).expect(http.StatusNoContent)
	written, err := os.ReadFile(dir + "/d\xe9/f\xff")
	require.NoError(t, err)
	require.Equal(t, "formed", string(written))
	out := r.call(http.MethodPost, api+"exec", `{"cmd":"sh","args":["-c","cat f?"],"cwd":"`+dir+`/d\udbff\udee9"}`).expect(http.StatusOK)
	require.Contains(t, string(out.body), "formed")
	r.call(http.MethodPost, api+"files/remove", `{"path":"`+shown+`"}`).expect(http.StatusNoContent)
	left, err := os.ReadDir(dir + "/d\xe9")
	require.NoError(t, err)
	require.Len(t, left, 1)
	require.Equal(t, "f\uFFFD", left[0].Name())
}

func TestRealLogLines(t *testing.T) {
	t.Parallel()
	r := newRealRig(t)
	r.call(http.MethodPost, execPath, `{"cmd":"sh","args":["-c","seq 1 5; sleep 0.2; echo err >&2; sleep 0.2; printf 6"],"tag":"seq","background":true}`).expect(http.StatusAccepted)
	r.call(http.MethodGet, "/v1/capsules/{id}/processes/seq?wait=1m", "").expect(http.StatusOK)
	const logs = "/v1/capsules/{id}/processes/seq/logs"
	for query, want := range map[string]string{
		"?tail_lines=1":                      "6",
		"?tail_lines=3":                      "5\nerr\n6",
		"?tail_lines=3&stream=stdout":        "4\n5\n6",
		"?tail_lines=1&stream=stderr":        "err\n",
		"?tail_lines=99":                     "1\n2\n3\n4\n5\nerr\n6",
		"?since=1h&tail_lines=2":             "err\n6",
		"?since=0s":                          "",
		"?since=2020-01-02T03:04:05Z":        "1\n2\n3\n4\n5\nerr\n6",
		"?since=2120-01-02T03:04:05%2B01:00": "",
	} {
		require.Equal(t, want, string(r.request(http.MethodGet, logs+query, nil).expect(http.StatusOK).body), query)
	}
	stamped := string(r.request(http.MethodGet, logs+"?timestamps=true", nil).expect(http.StatusOK).body)
	require.Regexp(t, `^(20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [1-5]\n){5}\S+Z err\n\S+Z 6$`, stamped)
	events := string(r.request(http.MethodGet, logs+"?timestamps=true&tail_lines=1", nil, "Accept", "text/event-stream").expect(http.StatusOK).body)
	require.Regexp(t, `"type":"stdout".*"data":"6".*"at":"20`, events)
	p := r.dial("/v1/capsules/{id}/processes/seq/stream?tail_lines=1&tail_stream=stdout&timestamps=true&encoding=base64")
	require.EqualValues(t, 10, p.next()["offset"])
	require.Contains(t, p.next(), "at")
	for _, query := range []string{"?tail_lines=-1", "?tail_lines=1&tail=1", "?tail_lines=1&since=4", "?since=-5m", "?since=yesterday", "?tail_lines=1&since=now"} {
		r.request(http.MethodGet, logs+query, nil).fails(http.StatusBadRequest, "invalid_request")
	}
}

func TestRealDescendants(t *testing.T) {
	t.Parallel()
	r := newRealRig(t)
	r.call(http.MethodPost, execPath, `{"cmd":"sh","args":["-c","sleep 4321 & wait"],"tag":"p","background":true}`).expect(http.StatusAccepted)
	require.Eventually(t, func() bool {
		var list processList
		r.call(http.MethodGet, "/v1/capsules/{id}/processes?descendants=true", "").expect(http.StatusOK).decode(&list)
		for _, p := range list.Descendants {
			if p.Cmd == "sleep 4321" && p.Process == list.Processes[0].ID {
				return true
			}
		}
		return false
	}, patience, 10*time.Millisecond)
}

// TestStartAgain: asking again, with a key or for a tag that is taken, starts nothing more
// than was asked for.
func TestStartAgain(t *testing.T) {
	t.Parallel()
	r := newRealRig(t)
	start := func(body string, headers ...string) (out execStarted) {
		t.Helper()
		headers = append([]string{apiKeyHeader, r.key, "Content-Type", "application/json"}, headers...)
		r.request(http.MethodPost, execPath, strings.NewReader(body), headers...).expect(http.StatusAccepted).decode(&out)
		return out
	}
	const sleep = `{"cmd":"sleep","args":["1000"],"background":true,"tag":"web"`
	first := start(sleep+`}`, "Idempotency-Key", "one")
	require.Equal(t, first, start(sleep+`}`, "Idempotency-Key", "one"))
	require.Equal(t, first, start(`{"cmd":"true","background":true,"tag":"web","on_conflict":"return"}`), "it says what runs")
	r.call(http.MethodPost, execPath, sleep+`}`).fails(http.StatusConflict, "conflict")
	second := start(sleep + `,"on_conflict":"replace"}`)
	require.NotEqual(t, first.ID, second.ID)
	require.Equal(t, "web", second.Tag)
	for _, c := range []struct {
		body, key string
		status    int
		code      string
	}{
		{`{"cmd":"true","background":true}`, "one", 409, "conflict"},
		{`{"cmd":"true"}`, "two", 400, "invalid_request"},
		{`{"cmd":"true","background":true}`, strings.Repeat("x", 256), 400, "invalid_request"},
		{`{"cmd":"true","background":true,"on_conflict":"return"}`, "", 400, "invalid_request"},
		{`{"cmd":"true","background":true,"tag":"web","on_conflict":"restart"}`, "", 400, "invalid_request"},
	} {
		r.request(http.MethodPost, execPath, strings.NewReader(c.body), apiKeyHeader, r.key, "Content-Type", "application/json", "Idempotency-Key", c.key).fails(c.status, c.code)
	}
}
