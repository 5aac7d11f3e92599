package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox/internal/testbin"
)

// patience bounds every wait. It is long because the machine may be busy; no
// test waits for it to pass.
const patience = 2 * time.Minute

// server is a `nestbox up` on a directory of its own, that can be killed and
// started again.
type server struct {
	t    *testing.T
	bin  string
	dir  string
	addr string
	args []string    // beside those
	tls  *tls.Config // of its clients; nil = it speaks plain HTTP

	mu  sync.Mutex
	cmd *exec.Cmd
	log *os.File
}

// newServer starts a server, with further arguments. At the end of the test all its capsules are
// destroyed, the server is stopped, and nothing of it may be left.
func newServer(t *testing.T, args ...string) *server {
	t.Helper()
	s := &server{t: t, bin: testbin.Nestbox(t), dir: stateDir(t), addr: freeAddr(t), args: args}
	s.start()
	t.Cleanup(s.finish)
	return s
}

// stateDir is not t.TempDir: sandboxes run as other users, who must be able to
// reach it, and a failed test's log is worth keeping.
func stateDir(t *testing.T) string {
	dir, err := os.MkdirTemp("", "nestbox-e2e-*")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o711))
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("state and log kept in %s", dir)
			return
		}
		require.NoError(t, os.RemoveAll(dir))
	})
	return dir
}

// freeAddr finds a port that stays the same over restarts of one server.
func freeAddr(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}

// in is the server for a subtest, which leaves it as it is.
func (s *server) in(t *testing.T) *server {
	return &server{t: t, bin: s.bin, dir: s.dir, addr: s.addr, tls: s.tls}
}

// url is the address of the API.
func (s *server) url() string {
	if s.tls != nil {
		return "https://" + s.addr
	}
	return "http://" + s.addr
}

// client returns an HTTP client that finds every host name at the server.
func (s *server) client() *http.Client {
	if s.tls == nil {
		return http.DefaultClient
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", s.addr)
	}
	return &http.Client{Transport: &http.Transport{DialContext: dial, TLSClientConfig: s.tls.Clone(), ForceAttemptHTTP2: true, DisableKeepAlives: true}}
}

// pid is that of the server process.
func (s *server) pid() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cmd.Process.Pid
}

// text gets what is no JSON.
func (s *server) text(path string) string {
	status, body := s.do(context.Background(), http.MethodGet, path, nil)
	require.Equal(s.t, http.StatusOK, status, "%s", body)
	return string(body)
}

func (s *server) start() {
	s.t.Helper()
	log, err := os.OpenFile(filepath.Join(s.dir, "server.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(s.t, err)
	cmd := exec.Command(s.bin, append([]string{"up", "--dir", s.dir, "--listen", s.addr}, s.args...)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	require.NoError(s.t, cmd.Start())
	s.mu.Lock()
	s.cmd, s.log = cmd, log
	s.mu.Unlock()
	s.waitHealthy()
}

func (s *server) waitHealthy() {
	s.t.Helper()
	require.Eventually(s.t, func() bool {
		res, err := s.client().Get(s.url() + "/health")
		if err != nil {
			return false
		}
		res.Body.Close()
		return res.StatusCode == http.StatusOK
	}, patience, 20*time.Millisecond, "the server does not answer; see %s", filepath.Join(s.dir, "server.log"))
}

// signal ends the server process and waits until it is gone.
func (s *server) signal(sig syscall.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.cmd.Process.Signal(sig)
	_ = s.cmd.Wait()
	_ = s.log.Close()
}

func (s *server) kill9() { s.signal(syscall.SIGKILL) }

func (s *server) finish() {
	ids := s.capsuleIDs()
	var wg sync.WaitGroup
	for _, id := range ids {
		wg.Add(1)
		go func() {
			defer wg.Done()
			status, body := s.do(context.Background(), http.MethodDelete, "/v1/capsules/"+id, nil)
			if status != http.StatusNoContent {
				s.t.Errorf("destroy %s: %d %s", id, status, body)
			}
		}()
	}
	wg.Wait()
	s.signal(syscall.SIGTERM)
	requireNoTrace(s.t, s.dir)
}

func (s *server) key() string {
	data, err := os.ReadFile(filepath.Join(s.dir, "api-key"))
	require.NoError(s.t, err)
	return strings.TrimSpace(string(data))
}

// do sends one request and returns status and body; status 0 = no answer.
func (s *server) do(ctx context.Context, method, path string, body any) (int, []byte) {
	var r io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		require.NoError(s.t, err)
		r = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, s.url()+path, r)
	require.NoError(s.t, err)
	req.Header.Set("X-API-Key", s.key())
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := s.client().Do(req)
	if err != nil {
		return 0, []byte(err.Error())
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		return 0, []byte(err.Error())
	}
	return res.StatusCode, data
}

// call is do for a request that must succeed.
func call[T any](s *server, method, path string, body any, want int) T {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.t.Context()), patience) // also used when the test has ended
	defer cancel()
	status, data := s.do(ctx, method, path, body)
	require.Equal(s.t, want, status, "%s %s: %s", method, path, data)
	var out T
	if len(data) > 0 {
		require.NoError(s.t, json.Unmarshal(data, &out), "%s", data)
	}
	return out
}

type none = map[string]any

type capsuleJSON struct {
	ID     string `json:"id"`
	Status string `json:"status"`
	Reason string `json:"reason"`
}

type startedJSON struct {
	SandboxID string `json:"sandbox_id"`
	Cmd       string `json:"cmd"`
	PID       int    `json:"pid"`
	Tag       string `json:"tag"`
}

type execJSON struct {
	Stdout   string `json:"stdout"`
	Stderr   string `json:"stderr"`
	ExitCode int    `json:"exit_code"`
	Reason   string `json:"reason"`
}

type processJSON struct {
	PID   int    `json:"pid"`
	Tag   string `json:"tag"`
	State string `json:"state"`
	Exit  *struct {
		Code   int    `json:"code"`
		Signal string `json:"signal"`
		Reason string `json:"reason"`
	} `json:"exit"`
}

type processesJSON struct {
	Processes []processJSON `json:"processes"`
}

func (s *server) capsuleIDs() []string {
	var ids []string
	for _, c := range call[[]capsuleJSON](s, http.MethodGet, "/v1/capsules", nil, 200) {
		ids = append(ids, c.ID)
	}
	return ids
}

func (s *server) newCapsule() string {
	s.t.Helper()
	c := call[capsuleJSON](s, http.MethodPost, "/v1/capsules", none{}, 201)
	require.Equal(s.t, "running", c.Status)
	return c.ID
}

// sh runs a script in the foreground.
func (s *server) sh(id, script string) execJSON {
	s.t.Helper()
	return call[execJSON](s, http.MethodPost, "/v1/capsules/"+id+"/exec", none{"cmd": "/bin/sh", "args": []string{"-c", script}}, 200)
}

// background starts a script in the background.
func (s *server) background(id, tag, script string) startedJSON {
	s.t.Helper()
	return call[startedJSON](s, http.MethodPost, "/v1/capsules/"+id+"/exec",
		none{"cmd": "/bin/sh", "args": []string{"-c", script}, "background": true, "tag": tag}, 202)
}

func (s *server) processes(id string) []processJSON {
	s.t.Helper()
	return call[processesJSON](s, http.MethodGet, "/v1/capsules/"+id+"/processes?all=true", nil, 200).Processes
}

// path is the URL path of a process.
func path(id, selector string) string {
	return fmt.Sprintf("/v1/capsules/%s/processes/%s", id, selector)
}
