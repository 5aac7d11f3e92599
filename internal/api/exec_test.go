package api

import (
	"encoding/base64"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

func TestExecForeground(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	var out execResult
	r.call(http.MethodPost, execPath, `{"cmd":"echo","args":["hello","<wörld>"]}`).expect(http.StatusOK).decode(&out)
	require.GreaterOrEqual(t, out.DurationMS, int64(0))
	out.DurationMS = 0
	require.Equal(t, execResult{SandboxID: r.capsule, Cmd: "echo", ID: "@11", PID: 1, Stdout: "hello <wörld>\n", Encoding: "utf-8", Reason: "exited"}, out)

	r.call(http.MethodPost, execPath, `{"cmd":"timeout","timeout_sec":1}`).expect(http.StatusOK).decode(&out)
	require.Equal(t, []any{137, "SIGKILL", "timeout", "so far"}, []any{out.ExitCode, out.Signal, out.Reason, out.Stderr})

	out = execResult{}
	r.call(http.MethodPost, execPath, `{"cmd":"binary"}`).expect(http.StatusOK).decode(&out)
	require.Equal(t, "base64", out.Encoding)
	require.Equal(t, base64.StdEncoding.EncodeToString([]byte("\xff\x00")), out.Stdout)
	require.Equal(t, base64.StdEncoding.EncodeToString([]byte("text")), out.Stderr)
}

func TestExecBackground(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	var out execStarted
	r.call(http.MethodPost, execPath, `{"cmd":"quiet","background":true}`).expect(http.StatusAccepted).decode(&out)
	require.Regexp(t, `^proc-[0-9a-f]{8}$`, out.Tag)
	require.Equal(t, execStarted{SandboxID: r.capsule, Cmd: "quiet", ID: "@11", PID: 1, Tag: out.Tag}, out)
}

func TestProcesses(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start("web")
	r.call(http.MethodPost, execPath, `{"cmd":"echo","tag":"done"}`).expect(http.StatusOK)
	var list processList
	r.call(http.MethodGet, "/v1/capsules/{id}/processes", "").expect(http.StatusOK).decode(&list)
	require.Len(t, list.Processes, 1)
	require.Equal(t, "running", list.Processes[0].State)
	require.Nil(t, list.Processes[0].ExitCode)
	r.call(http.MethodGet, "/v1/capsules/{id}/processes?all=true", "").expect(http.StatusOK).decode(&list)
	require.Len(t, list.Processes, 2)
	done := list.Processes[1]
	require.Equal(t, "exited", done.State)
	require.Equal(t, &exit{Reason: "exited"}, done.Exit)
	require.Equal(t, 0, *done.ExitCode)
	require.NotNil(t, done.EndedAt)
	require.Equal(t, output{End: 1, Stdout: 1, Closed: true}, done.Output)
	var p process
	for _, selector := range []string{"done", "2"} {
		r.call(http.MethodGet, "/v1/capsules/{id}/processes/"+selector, "").expect(http.StatusOK).decode(&p)
		require.Equal(t, 2, p.PID)
	}
}

func TestWait(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start("web")
	const path = "/v1/capsules/{id}/processes/web"
	var p process
	r.call(http.MethodGet, path+"?wait=1ms", "").expect(http.StatusOK).decode(&p)
	require.Equal(t, "running", p.State)
	answered := make(chan *answer)
	go func() { answered <- r.call(http.MethodGet, path+"?wait=300", "") }()
	require.Eventually(t, func() bool {
		r.guest.procs.mu.Lock()
		defer r.guest.procs.mu.Unlock()
		return r.guest.procs.waits > 1
	}, patience, time.Millisecond)
	r.script("web", func(p *scripted) { p.exit(nestbox.Exit{Code: 3, Reason: nestbox.ReasonExited}) })
	(<-answered).expect(http.StatusOK).decode(&p)
	require.Equal(t, 3, *p.ExitCode)
	r.call(http.MethodGet, path+"?wait=5m", "").expect(http.StatusOK) // at once: it has ended
}

func TestKillAndSignal(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start("web")
	const path = "/v1/capsules/{id}/processes/web"
	r.call(http.MethodPost, path+"/signal", `{"signal":"hup"}`).expect(http.StatusNoContent)
	r.see("web", func(p *scripted) bool { return len(p.signals) == 1 && p.signals[0] == 1 })
	r.call(http.MethodDelete, path+"?signal=SIGTERM&grace=1500ms", "").expect(http.StatusNoContent)
	r.call(http.MethodDelete, path, "").expect(http.StatusNoContent)
	r.see("web", func(p *scripted) bool {
		return len(p.kills) == 2 && p.kills[0] == guest.Kill{Signal: 15, Grace: 1500 * time.Millisecond} && p.kills[1] == guest.Kill{}
	})
}

func TestStdin(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start("cat")
	const path = "/v1/capsules/{id}/processes/cat/stdin"
	r.call(http.MethodPost, path, `{"data":"ä\n"}`).expect(http.StatusNoContent)
	r.call(http.MethodPost, path, `{"data":"AP8=","encoding":"base64"}`).expect(http.StatusNoContent)
	r.request(http.MethodPost, path, strings.NewReader("raw\xfe"), "Content-Type", "application/octet-stream").expect(http.StatusNoContent)
	r.request(http.MethodPost, path+"?eof=true", strings.NewReader(""), "Content-Type", "application/octet-stream").expect(http.StatusNoContent)
	r.see("cat", func(p *scripted) bool { return string(p.stdin) == "ä\n\x00\xffraw\xfe" && !p.Stdin })
	require.Contains(t, r.call(http.MethodPost, path, `{"data":"x"}`).fails(http.StatusConflict, "invalid_state"), "not open")
	r.request(http.MethodPost, path, strings.NewReader(strings.Repeat("x", nestbox.MaxStdin+1)), "Content-Type", "application/octet-stream").
		fails(http.StatusRequestEntityTooLarge, "too_large")
}
