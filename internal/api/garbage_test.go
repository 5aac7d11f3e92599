package api

import (
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const execPath = "/v1/capsules/{id}/exec"

const webPath = "/v1/capsules/{id}/processes/web"

// badInputs are garbage of every kind, with what it should be answered.
var badInputs = []struct {
	method, path, body string
	status             int
	code, says         string
}{
	// JSON
	{"POST", "/v1/capsules", `{`, 400, "invalid_request", "body: invalid JSON at line 1, column 2: unexpected EOF"},
	{"POST", "/v1/capsules", "{\n \"vcpus\": 1,\n}", 400, "invalid_request", "line 2, column 12"},
	{"POST", "/v1/capsules", `{}{}`, 400, "invalid_request", "invalid JSON"},
	{"POST", "/v1/capsules", `[]`, 400, "invalid_request", "expected object"},
	{"POST", "/v1/capsules", `"x"`, 400, "invalid_request", "expected object"},
	{"POST", "/v1/capsules", "{\"template\":\"\xff\"}", 400, "invalid_request", "template: invalid UTF-8"},
	{"POST", "/v1/capsules", `{"vcpus":"2"}`, 400, "invalid_request", "body.vcpus: expected integer"},
	{"POST", "/v1/capsules", `{"vcpus":1.5}`, 400, "invalid_request", "body.vcpus: expected integer"},
	{"POST", "/v1/capsules", `{"vcpus":1e30}`, 400, "invalid_request", "vcpus"},
	{"POST", "/v1/capsules", `{"vcpu":1}`, 400, "invalid_request", "vcpu: unexpected property"},
	{"POST", "/v1/capsules", `{"metadata":{"a":1}}`, 400, "invalid_request", "body.metadata.a: expected string"},
	{"POST", "/v1/capsules", `{"template":"` + strings.Repeat("x", 9<<20) + `"}`, 413, "too_large", "larger than"},
	{"POST", "/v1/capsules", strings.Repeat("[", 20_000), 400, "invalid_request", "invalid JSON"},
	{"POST", "/v1/capsules", strings.Repeat("[", 100_000), 400, "invalid_request", "more than 65536 values"},
	{"POST", "/v1/capsules", "[" + strings.Repeat("0,", 100_000) + "0]", 400, "invalid_request", "more than 65536 values"},
	{"POST", "/v1/capsules", `{"VCPUs":1}`, 400, "invalid_request", "VCPUs: unexpected property"},
	{"POST", "/v1/capsules", `{"vcpus":1,"vcpus":2}`, 400, "invalid_request", `duplicate`},
	{"POST", "/v1/capsules", `{"metadata":{"a":"\ud800"}}`, 400, "invalid_request", "surrogate"},
	// Values
	{"GET", "/v1/capsules?status=running", "", 400, "invalid_request", `no query parameter "status"`},
	{"GET", "/v1/capsules?all=%zz", "", 400, "invalid_request", "query"},
	{"DELETE", webPath + "?sigal=TERM", "", 400, "invalid_request", `no query parameter "sigal"`},
	{"POST", "/v1/capsules", `{"vcpus":1000}`, 400, "invalid_request", "vcpus must be between"},
	{"POST", "/v1/capsules", `{"memory_mb":999999999}`, 400, "invalid_request", "memory_mb must be between"},
	{"POST", "/v1/capsules", `{"pids_max":1}`, 400, "invalid_request", "pids_max must be between"},
	{"POST", "/v1/capsules", `{"template":"../etc"}`, 400, "invalid_request", "template"},
	{"POST", "/v1/capsules", `{"timeout_sec":99999999999}`, 400, "invalid_request", "timeout_sec"},
	{"GET", "/v1/capsules?limit=x", "", 400, "invalid_request", "query.limit: invalid integer"},
	{"GET", "/v1/capsules?limit=-1", "", 400, "invalid_request", "query.limit"},
	{"GET", "/v1/capsules?limit=1001", "", 400, "invalid_request", "query.limit"},
	{"GET", "/v1/capsules?all=perhaps", "", 400, "invalid_request", "query.all: invalid boolean"},
	{"GET", "/v1/capsules?cursor=%00nonsense", "", 400, "invalid_request", "cursor"},
	// Ids
	{"GET", "/v1/capsules/Nope", "", 400, "invalid_request", "invalid capsule ID"},
	{"GET", "/v1/capsules/cl-" + strings.Repeat("a", 5000), "", 400, "invalid_request", "invalid capsule ID"},
	{"DELETE", "/v1/capsules/..%2f..%2fetc", "", 400, "invalid_request", "invalid capsule ID"},
	{"POST", "/v1/capsules/CL-0123456789ABCDEFGHIJKLMNO/ping", "", 400, "invalid_request", "invalid capsule ID"},
	{"GET", "/v1/capsules/cl-0123456789abcdefghijklmnO/processes", "", 400, "invalid_request", "invalid capsule ID"},
	// Commands
	{"POST", execPath, ``, 400, "invalid_request", "body is required"},
	{"POST", execPath, `null`, 400, "invalid_request", "expected object"},
	{"POST", execPath, `{}`, 400, "invalid_request", "cmd"},
	{"POST", execPath, `{"cmd":""}`, 400, "invalid_request", "cmd is required"},
	{"POST", execPath, `{"cmd":"a\u0000b"}`, 400, "invalid_request", "NUL"},
	{"POST", execPath, `{"cmd":"echo","args":"x"}`, 400, "invalid_request", "body.args: expected array"},
	{"POST", execPath, `{"cmd":"echo","args":[1]}`, 400, "invalid_request", "body.args[0]: expected string"},
	{"POST", execPath, `{"cmd":"echo","envs":{"A=B":"x"}}`, 400, "invalid_request", "environment variable"},
	{"POST", execPath, `{"cmd":"echo","cwd":"tmp"}`, 400, "invalid_request", "not an absolute path"},
	{"POST", execPath, `{"cmd":"echo","tag":"8080"}`, 400, "invalid_request", "not all digits"},
	{"POST", execPath, `{"cmd":"echo","tag":"a/b"}`, 400, "invalid_request", "tag"},
	{"POST", execPath, `{"cmd":"echo","timeout_sec":-1}`, 400, "invalid_request", "body.timeout_sec"},
	{"POST", execPath, `{"cmd":"echo","timeout_sec":1e300}`, 400, "invalid_request", "timeout_sec"},
	{"POST", execPath, `{"cmd":"missing"}`, 400, "invalid_request", "no such program"},
	{"POST", execPath, `{"cmd":"many","background":true}`, 429, "exhausted", "no more processes"},
	{"POST", execPath, `{"cmd":"quiet","background":true,"tag":"web"}`, 409, "conflict", "tag is taken"},
	// Processes
	{"GET", "/v1/capsules/{id}/processes?all=2", "", 400, "invalid_request", "query.all"},
	{"GET", "/v1/capsules/{id}/processes/0", "", 400, "invalid_request", "not a PID"},
	{"GET", "/v1/capsules/{id}/processes/99999999999", "", 400, "invalid_request", "not a PID"},
	{"GET", "/v1/capsules/{id}/processes/007", "", 400, "invalid_request", "not a PID"},
	{"GET", "/v1/capsules/{id}/processes/@", "", 400, "invalid_request", "not a process id"},
	{"GET", "/v1/capsules/{id}/processes/@07", "", 400, "invalid_request", "not a process id"},
	{"GET", "/v1/capsules/{id}/processes/@9007199254740992", "", 400, "invalid_request", "not a process id"},
	{"GET", "/v1/capsules/{id}/processes/@web", "", 400, "invalid_request", "not a process id"},
	{"GET", "/v1/capsules/{id}/processes/-1", "", 400, "invalid_request", "no process id, PID or tag"},
	{"GET", "/v1/capsules/{id}/processes/a%2fb", "", 400, "invalid_request", "no process id, PID or tag"},
	{"GET", "/v1/capsules/{id}/processes/none", "", 404, "not_found", "process not found"},
	{"GET", "/v1/capsules/{id}/processes/12345", "", 404, "not_found", "process not found"},
	{"GET", webPath + "?wait=soon", "", 400, "invalid_request", "wait must be a duration"},
	{"GET", webPath + "?wait=6m", "", 400, "invalid_request", "wait must be a duration"},
	{"GET", webPath + "?wait=-1s", "", 400, "invalid_request", "wait must be a duration"},
	{"DELETE", "/v1/capsules/{id}/processes/none", "", 404, "not_found", "process not found"},
	{"DELETE", webPath + "?signal=SIGNOPE", "", 400, "invalid_request", "SIGKILL"},
	{"DELETE", webPath + "?signal=99", "", 400, "invalid_request", "SIGKILL"},
	{"DELETE", webPath + "?grace=x", "", 400, "invalid_request", "grace must be a duration"},
	{"POST", webPath + "/signal", `{"signal":"nope"}`, 400, "invalid_request", "SIGKILL"},
	{"POST", webPath + "/signal", `{"signal":""}`, 400, "invalid_request", "unknown signal"},
	{"POST", webPath + "/signal", ``, 400, "invalid_request", "body is required"},
	{"POST", webPath + "/stdin", ``, 400, "invalid_request", "body is required"},
	{"POST", webPath + "/stdin", `{"data":1}`, 400, "invalid_request", "body.data: expected string"},
	{"POST", webPath + "/stdin", `{"data":"*","encoding":"base64"}`, 400, "invalid_request", "not valid base64"},
	{"POST", webPath + "/stdin", `{"data":"x","encoding":"latin1"}`, 400, "invalid_request", "body.encoding"},
	{"POST", webPath + "/stdin", `{"dat":"x"}`, 400, "invalid_request", "unexpected property"},
	{"POST", webPath + "/stdin?eof=no%20idea", `{}`, 400, "invalid_request", "query.eof"},
	{"POST", webPath + "/stdin", `{"data":"` + strings.Repeat("x", 5<<20) + `"}`, 413, "too_large", "larger than"},
	{"GET", webPath + "/logs?since=yesterday", "", 400, "invalid_request", "since must be"},
	{"GET", webPath + "/logs?since=-5", "", 400, "invalid_request", "since must be"},
	{"GET", webPath + "/logs?tail=-5", "", 400, "invalid_request", "query.tail"},
	{"GET", webPath + "/logs?since=0&tail=5", "", 400, "invalid_request", "since and tail"},
	{"GET", webPath + "/logs?stream=stdin", "", 400, "invalid_request", "query.stream"},
	{"GET", webPath + "/logs?follow=x", "", 400, "invalid_request", "query.follow"},
	{"GET", "/v1/capsules/{id}/processes/none/logs", "", 404, "not_found", "process not found"},
	// Streams, without an upgrade
	{"GET", webPath + "/stream", "", 426, "invalid_request", "WebSocket"},
	{"GET", "/v1/capsules/{id}/exec/stream", "", 426, "invalid_request", "WebSocket"},
	{"GET", "/v1/capsules/cl-nope/exec/stream", "", 400, "invalid_request", "invalid capsule ID"},
	// Files
	{"POST", "/v1/capsules/{id}/files/read", `{"path":"/none"}`, 404, "not_found", "no such file"},
	{"POST", "/v1/capsules/{id}/files/stream/read", `{"path":"/none"}`, 404, "not_found", "no such file"},
	{"POST", "/v1/capsules/{id}/files/read", `{"path":"relative"}`, 400, "invalid_request", "not absolute"},
	{"POST", "/v1/capsules/{id}/files/read", `{}`, 400, "invalid_request", "path"},
	{"POST", "/v1/capsules/{id}/files/stat", `{"path":"/none"}`, 404, "not_found", "no such file"},
	{"POST", "/v1/capsules/{id}/files/list", `{"path":"/","depth":-1}`, 400, "invalid_request", "body.depth"},
	{"POST", "/v1/capsules/{id}/files/list", `{"path":"/","depth":65}`, 400, "invalid_request", "body.depth"},
	{"POST", "/v1/capsules/{id}/files/remove", `{"path":""}`, 400, "invalid_request", "path is required"},
	{"POST", "/v1/capsules/{id}/files/mkdir", `{"path":"/` + strings.Repeat("a", 5000) + `"}`, 400, "invalid_request", "longer than"},
	{"GET", "/v1/capsules/{id}/files", "", 400, "invalid_request", "query.path"},
	{"GET", "/v1/capsules/{id}/files?path=/none", "", 404, "not_found", "no such file"},
	{"GET", "/v1/capsules/{id}/files?path=/a%00b", "", 400, "invalid_request", "NUL"},
	{"PUT", "/v1/capsules/{id}/files?path=x", "x", 400, "invalid_request", "not absolute"},
	{"PUT", "/v1/capsules/{id}/files?path=/x&mode=999", "x", 400, "invalid_request", "octal"},
	{"PUT", "/v1/capsules/{id}/files?path=/full", "x", 507, "exhausted", "no space left"},
	// Ports
	{"POST", "/v1/capsules/{id}/ports/0/url", `{}`, 400, "invalid_request", "not a port"},
	{"POST", "/v1/capsules/{id}/ports/65536/url", `{}`, 400, "invalid_request", "not a port"},
	{"POST", "/v1/capsules/{id}/ports/02280/url", `{}`, 400, "invalid_request", "not a port"},
	{"POST", "/v1/capsules/{id}/ports/+80/url", `{}`, 400, "invalid_request", "not a port"},
	{"POST", "/v1/capsules/{id}/ports/%2080/url", `{}`, 400, "invalid_request", "not a port"},
	{"POST", "/v1/capsules/{id}/ports/80/url", `{"expires_sec":-1}`, 400, "invalid_request", "expires_sec"},
	{"POST", "/v1/capsules/{id}/ports/80/url", `{"expires_sec":604801}`, 400, "invalid_request", "7 days"},
}

// TestBadInput sends garbage of every kind and looks for the right status, the
// right code and a message that says what is wrong.
func TestBadInput(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start("web")
	for _, c := range badInputs {
		name := c.method + " " + c.path[:min(len(c.path), 80)] + " " + c.body[:min(len(c.body), 60)]
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := *r // with this test's t
			got.t = t
			require.Contains(t, got.call(c.method, c.path, c.body).fails(c.status, c.code), c.says)
		})
	}
	t.Cleanup(func() { // the process that all this aimed at is as it was
		r.see("web", func(p *scripted) bool {
			return p.Running() && len(p.signals) == 0 && len(p.kills) == 0 && len(p.stdin) == 0
		})
	})
}

// TestContentTypes: JSON is taken under the names it goes by; nothing else is.
func TestContentTypes(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for contentType, ok := range map[string]bool{
		"":                                  true,
		"application/json":                  true,
		"application/json; charset=utf-8":   true,
		"application/vnd.x+json":            true,
		"application/x-www-form-urlencoded": true, // what curl -d sends
		"text/html":                         false,
		"multipart/form-data; boundary=x":   false,
		"application/octet-stream":          false,
		";;;":                               false,
	} {
		got := r.request(http.MethodPost, "/v1/capsules/{id}/exec", strings.NewReader(`{"cmd":"echo"}`), "Content-Type", contentType)
		if ok {
			got.expect(http.StatusOK)
			continue
		}
		require.Contains(t, got.fails(http.StatusUnsupportedMediaType, "invalid_request"), "Content-Type must be application/json")
	}
	require.Contains(t, r.request(http.MethodPost, "/v1/capsules/{id}/files/write", strings.NewReader("x"), "Content-Type", "text/plain").
		fails(http.StatusUnsupportedMediaType, "invalid_request"), "multipart/form-data")
}

// TestNullIsAbsent: some clients send null for what they leave out.
func TestNullIsAbsent(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	var out execResult
	r.call(http.MethodPost, execPath, `{"cmd":"echo","args":null,"tag":null,"cwd":null,"envs":null,"timeout_sec":null,"background":null}`).
		expect(http.StatusOK).decode(&out)
	require.Equal(t, "\n", out.Stdout)
	r.call(http.MethodPost, "/v1/capsules", `{"template":null,"vcpus":null}`).expect(http.StatusCreated)
}
