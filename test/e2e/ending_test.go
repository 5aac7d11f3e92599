package e2e

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/stretchr/testify/require"
)

// doors are calls into a capsule that go on until it ends: each says that it is
// under way, and returns what its caller is told in the end.
func doors(s *server, id string) map[string]func(underWay func()) string {
	request := func(method, path, host string, body io.Reader) *http.Request {
		req, err := http.NewRequestWithContext(s.t.Context(), method, "http://"+s.addr+path, body)
		require.NoError(s.t, err)
		req.Header.Set("X-API-Key", s.key())
		req.Host = host
		return req
	}
	answer := func(req *http.Request) string {
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return err.Error()
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err != nil {
			return err.Error()
		}
		return res.Status + " " + string(text)
	}
	running := func(tag string) {
		require.Eventually(s.t, func() bool {
			status, _ := s.do(s.t.Context(), http.MethodGet, path(id, tag), nil)
			return status == 200
		}, patience, 10*time.Millisecond)
	}
	stream := func(path, first string, underWay func()) string {
		conn, _, err := websocket.Dial(s.t.Context(), "ws://"+s.addr+path, &websocket.DialOptions{HTTPHeader: http.Header{"X-API-Key": {s.key()}}})
		require.NoError(s.t, err)
		defer conn.CloseNow()
		if first != "" {
			require.NoError(s.t, conn.Write(s.t.Context(), websocket.MessageText, []byte(first)))
		}
		var all strings.Builder
		for {
			_, text, err := conn.Read(s.t.Context())
			if err != nil {
				return all.String()
			}
			all.Write(text)
			underWay()
		}
	}
	return map[string]func(func()) string{
		"exec": func(underWay func()) string {
			go func() { running("fg"); underWay() }()
			return answer(request(http.MethodPost, "/v1/capsules/"+id+"/exec", "", strings.NewReader(`{"cmd":"sleep","args":["1000"],"tag":"fg","timeout_sec":1000}`)))
		},
		"wait": func(underWay func()) string {
			underWay()
			return answer(request(http.MethodGet, path(id, "bg")+"?wait=5m", "", nil))
		},
		"stream": func(underWay func()) string { return stream(path(id, "bg")+"/stream", "", underWay) },
		"exec stream": func(underWay func()) string {
			return stream("/v1/capsules/"+id+"/exec/stream", `{"type":"start","cmd":"sleep","args":["1000"]}`, underWay)
		},
		"events": func(underWay func()) string {
			req := request(http.MethodGet, path(id, "bg")+"/logs?follow=true", "", nil)
			req.Header.Set("Accept", "text/event-stream")
			res, err := http.DefaultClient.Do(req)
			require.NoError(s.t, err)
			defer res.Body.Close()
			underWay()
			text, _ := io.ReadAll(res.Body) // it may be broken off
			return string(text)
		},
		"upload": func(underWay func()) string {
			body, sender := io.Pipe()
			go func() { _, _ = sender.Write(make([]byte, 100_000)); underWay() }()
			return answer(request(http.MethodPut, "/v1/capsules/"+id+"/files?path=/var/tmp/new", "", body))
		},
		"port": func(underWay func()) string {
			go func() {
				require.Eventually(s.t, func() bool { return strings.Contains(s.answer(path(id, "silent")+"/logs"), "asked") }, patience, 10*time.Millisecond)
				underWay()
			}()
			return answer(request(http.MethodGet, "/", "3000-"+id+".localhost", nil))
		},
		"CLI": func(underWay func()) string {
			cmd := exec.CommandContext(s.t.Context(), s.bin, "exec", id, "--", "sh", "-c", "echo here; sleep 1000")
			cmd.Env = append(os.Environ(), "NESTBOX_URL=http://"+s.addr, "NESTBOX_API_KEY="+s.key())
			out, err := cmd.StdoutPipe()
			require.NoError(s.t, err)
			var words strings.Builder
			cmd.Stderr = &words
			require.NoError(s.t, cmd.Start())
			_, err = bufio.NewReader(out).ReadString('\n')
			require.NoError(s.t, err, words.String())
			underWay()
			require.Error(s.t, cmd.Wait())
			return words.String()
		},
	}
}

// answer returns an answer's text.
func (s *server) answer(path string) string {
	_, body := s.do(s.t.Context(), http.MethodGet, path, nil)
	return string(body)
}

// later are calls that come when the capsule has ended.
func later(s *server, id string) map[string][2]string {
	c := "/v1/capsules/" + id
	return map[string][2]string{
		"exec": {http.MethodPost, c + "/exec"}, "list": {http.MethodGet, c + "/processes"}, "get": {http.MethodGet, c + "/processes/bg"},
		"logs": {http.MethodGet, c + "/processes/bg/logs"}, "kill": {http.MethodDelete, c + "/processes/bg"}, "ping": {http.MethodPost, c + "/ping"},
		"read": {http.MethodGet, c + "/files?path=/etc/passwd"}, "write": {http.MethodPut, c + "/files?path=/tmp/x"},
		"files": {http.MethodPost, c + "/files/list"}, "port": {http.MethodGet, ""},
	}
}

// TestEndsAreTold: whoever is inside a capsule, by whatever door, when it is
// destroyed, dies or freezes is told so, and so is who comes later.
func TestEndsAreTold(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	for name, c := range map[string]struct {
		end    func(s *server, id string)
		want   string
		status int
		never  []string // doors that wait for a program or a client, or try again
	}{
		"destroyed": {func(s *server, id string) { call[none](s, http.MethodDelete, "/v1/capsules/"+id, nil, 204) }, "capsule is stopped", 409, nil},
		"dead": {
			func(s *server, id string) { require.NoError(s.t, syscall.Kill(sentry(s.t, id), syscall.SIGKILL)) },
			"capsule died: the sandbox process was killed by signal 9", 409, nil,
		},
		"frozen": {
			func(s *server, id string) { require.NoError(s.t, syscall.Kill(sentry(s.t, id), syscall.SIGSTOP)) },
			"capsule is unresponsive", 504, []string{"upload", "port", "CLI"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := s.in(t)
			id := s.newCapsule()
			s.background(id, "bg", "exec sleep 1000")
			s.background(id, "silent", `exec python3 -uc "
import socket
s = socket.create_server(('', 3000))
print('listens')
c, _ = s.accept(); c.recv(1); print('asked'); s.accept()"`)
			require.Eventually(t, func() bool { return strings.Contains(s.answer(path(id, "silent")+"/logs"), "listens") }, patience, 10*time.Millisecond)
			var calls, underWay sync.WaitGroup
			for door, call := range doors(s, id) {
				for _, n := range c.never {
					if n == door {
						call = nil
					}
				}
				if call == nil {
					continue
				}
				underWay.Add(1)
				calls.Go(func() {
					told := call(sync.OnceFunc(underWay.Done))
					if !strings.Contains(told, c.want) {
						t.Errorf("%s: %.300s", door, told)
					}
				})
			}
			underWay.Wait()
			c.end(s, id)
			calls.Wait()
			for what, l := range later(s, id) {
				body := strings.NewReader(map[string]string{"exec": `{"cmd":"true"}`, "files": `{"path":"/"}`}[what])
				req, err := http.NewRequestWithContext(context.WithoutCancel(t.Context()), l[0], "http://"+s.addr+l[1], body)
				require.NoError(t, err)
				req.Header.Set("X-API-Key", s.key())
				if what == "port" {
					req.Host = "3000-" + id + ".localhost"
				}
				if name == "frozen" && (what == "ping" || what == "write") {
					continue // ping asks nobody inside
				}
				status, text := s.send(req)
				if status != c.status || !strings.Contains(text, c.want) {
					t.Errorf("%s, later: %d %.300s", what, status, text)
				}
			}
			call[none](s, http.MethodDelete, "/v1/capsules/"+id, nil, 204)
		})
	}
}
