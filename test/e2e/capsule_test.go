package e2e

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// sentry returns the PID of the process that is a capsule's kernel.
func sentry(t *testing.T, id string) int {
	t.Helper()
	pid := 0
	eachFile(t, "/proc/[0-9]*/cmdline", func(path string, data []byte) {
		if strings.HasPrefix(string(data), "runsc-sandbox") && strings.Contains(string(data), id) {
			pid, _ = strconv.Atoi(filepath.Base(filepath.Dir(path)))
		}
	})
	require.NotZero(t, pid, "no sentry of %s", id)
	return pid
}

func TestCapsuleDies(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	dead, well := s.newCapsule(), s.newCapsule()
	require.NoError(t, syscall.Kill(sentry(t, dead), syscall.SIGKILL))
	var c capsuleJSON
	require.Eventually(t, func() bool {
		c = call[capsuleJSON](s, http.MethodGet, "/v1/capsules/"+dead, nil, 200)
		return c.Status == "error"
	}, patience, 10*time.Millisecond)
	require.NotEmpty(t, c.Reason)
	answer := call[errorJSON](s, http.MethodPost, "/v1/capsules/"+dead+"/exec", none{"cmd": "true"}, 409)
	require.Equal(t, "invalid_state", answer.Error.Code)
	require.Equal(t, "still here\n", s.sh(well, "echo still here").Stdout)
	require.Equal(t, []string{well}, s.capsuleIDs())
	call[none](s, http.MethodDelete, "/v1/capsules/"+dead, nil, 204)
	require.Equal(t, "stopped", call[capsuleJSON](s, http.MethodGet, "/v1/capsules/"+dead, nil, 200).Status)
}

type errorJSON struct {
	Error struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	} `json:"error"`
}

// TestForkBombs lets several users of a capsule fork without end. All of them
// together stay within the capsule's limit, root can still look into it, starts
// that cannot be are refused, and the trees can be killed.
func TestForkBombs(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	const limit, reserve = 96, 16
	id := call[capsuleJSON](s, http.MethodPost, "/v1/capsules", none{"pids_max": limit, "memory_mb": 2048}, 201).ID
	users := []string{"root", "nobody", "daemon"}
	for _, user := range users {
		call[startedJSON](s, http.MethodPost, "/v1/capsules/"+id+"/exec", none{
			"cmd": "python3", "background": true, "tag": user, "user": user,
			"args": []string{"-uc", `
import os
full = False
while True:
    try: os.fork()
    except BlockingIOError:  # EAGAIN
        if not full: os.write(1, b"full")
        full = True`},
		}, 202)
	}
	for _, user := range users {
		require.Eventually(t, func() bool { return strings.Contains(s.text(path(id, user)+"/logs"), "full") }, patience, 10*time.Millisecond)
	}
	count := call[execJSON](s, http.MethodPost, "/v1/capsules/"+id+"/exec", none{"cmd": "cat", "args": []string{"/sys/fs/cgroup/nestbox/pids.current"}, "timeout_sec": 60}, 200)
	n, err := strconv.Atoi(strings.TrimSpace(count.Stdout))
	require.NoError(t, err)
	require.GreaterOrEqual(t, n, limit)
	require.LessOrEqual(t, n, limit+1, "the bombs and cat")
	status, body := s.do(t.Context(), http.MethodPost, "/v1/capsules/"+id+"/exec", none{"cmd": "true", "user": "nobody"})
	require.Equal(t, http.StatusTooManyRequests, status, "%s", body)
	started := 0
	for status = http.StatusAccepted; status == http.StatusAccepted; started++ {
		status, body = s.do(t.Context(), http.MethodPost, "/v1/capsules/"+id+"/exec", none{"cmd": "sleep", "args": []string{"1000"}, "background": true})
	}
	require.Equal(t, http.StatusTooManyRequests, status, "%s", body)
	require.Equal(t, reserve, started-1)

	for _, user := range users {
		call[none](s, http.MethodDelete, path(id, user), nil, 204)
	}
	require.Equal(t, "well\n", s.sh(id, "echo well").Stdout)
	require.Equal(t, strconv.Itoa(reserve+2)+"\n", s.sh(id, "cat /sys/fs/cgroup/nestbox/pids.current").Stdout)
}

// TestFullDisk fills a capsule's disk: its limit holds, what runs goes on.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	id := call[capsuleJSON](s, http.MethodPost, "/v1/capsules", none{"disk_mb": 64}, 201).ID
	res := s.sh(id, "dd if=/dev/zero of=/root/big bs=1M count=200; df -m / | tail -1; echo alive")
	require.Contains(t, res.Stderr, "No space left on device")
	require.Contains(t, res.Stdout, "alive")
	require.Equal(t, "alive\n", s.sh(id, "rm /root/big; echo alive > /root/small; cat /root/small").Stdout)
}

// TestLimitsAreSeen looks at what a program inside takes for its machine.
func TestLimitsAreSeen(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	id := call[capsuleJSON](s, http.MethodPost, "/v1/capsules", none{"vcpus": 1, "memory_mb": 256}, 201).ID
	require.Equal(t, "1\n256\n", s.sh(id, "nproc; awk '/MemTotal/{print $2/1024}' /proc/meminfo").Stdout)
}

// TestNoWayOut tries to reach the machine, another capsule, and the address
// where clouds keep their metadata. A connection may be accepted, by the way out, but
// nothing ever comes back.
func TestNoWayOut(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	id, other := s.newCapsule(), s.newCapsule()
	s.background(other, "web", "exec python3 -m http.server 8000")
	_, port, err := net.SplitHostPort(s.addr)
	require.NoError(t, err)
	hosts := []string{"127.0.0.1", "169.254.0.21", "169.254.0.22", "169.254.169.254"}
	addrs, err := net.InterfaceAddrs()
	require.NoError(t, err)
	for _, a := range addrs {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.To4() != nil {
			hosts = append(hosts, ip.IP.String())
		}
	}
	script := `
import socket, sys
for host in sys.argv[1:]:
    for port in ` + port + `, 8000, 80, 22:
        try:
            with socket.create_connection((host, port), 5) as c:
                c.sendall(b"GET / HTTP/1.0\r\n\r\n")
                if c.recv(1):
                    print("reached", host, port)
        except OSError:
            pass
print("done")`
	res := call[execJSON](s, http.MethodPost, "/v1/capsules/"+id+"/exec",
		none{"cmd": "python3", "args": append([]string{"-c", script}, hosts...), "timeout_sec": 100}, 200)
	require.Equal(t, "done\n", res.Stdout, res.Stderr)
}

// TestPorts reaches a program that listens on its loopback only.
func TestPorts(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	id := s.newCapsule()
	s.sh(id, "mkdir -p /srv/w && echo hello > /srv/w/index.html")
	s.background(id, "web", "cd /srv/w && exec python3 -m http.server 3000 --bind 127.0.0.1")
	signed := call[struct {
		URL string `json:"url"`
	}](s, http.MethodPost, "/v1/capsules/"+id+"/ports/3000/url", none{}, 200).URL
	u, err := url.Parse(signed)
	require.NoError(t, err)
	get := func(host, query, key string) (status int, body string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+s.addr+"/?"+query, nil)
		require.NoError(t, err)
		req.Host = host
		if key != "" {
			req.Header.Set("X-API-Key", key)
		}
		return s.send(req)
	}
	require.Eventually(t, func() bool {
		status, body := get(u.Host, u.RawQuery, "")
		return status == 200 && body == "hello\n"
	}, patience, 20*time.Millisecond, "the program may need a moment")
	for name, c := range map[string]struct {
		host, query, key string
		want             int
	}{
		"no credential":     {u.Host, "", "", 401},
		"tampered token":    {u.Host, u.RawQuery[:len(u.RawQuery)-2] + "xx", "", 401},
		"token of 3000":     {strings.Replace(u.Host, "3000", "3001", 1), u.RawQuery, "", 401},
		"a key":             {u.Host, "", s.key(), 200},
		"nothing listens":   {strings.Replace(u.Host, "3000", "3001", 1), "", s.key(), 502},
		"the daemon's port": {strings.Replace(u.Host, "3000", "49983", 1), "", s.key(), 403},
		"leading zero":      {"0" + u.Host, "", s.key(), 400},
		"unknown capsule":   {"3000-cl-0000000000000000000000000.localhost", "", s.key(), 404},
	} {
		status, body := get(c.host, c.query, c.key)
		require.Equal(t, c.want, status, "%s: %s", name, body)
	}
}

// TestTeamsAreApart gives a second team a key: the first team's capsule does
// not exist for it.
func TestTeamsAreApart(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	id := s.newCapsule()
	s.background(id, "web", "exec sleep 1000")
	team := strings.TrimSpace(s.nestbox("key", "team", "others"))
	key := strings.TrimSpace(s.nestbox("key", "create", "--team", team))
	for _, key := range []string{key, "e2b_" + strings.TrimPrefix(key, "wrn_")} {
		for method, paths := range map[string][]string{
			http.MethodGet:    {"", "/processes", "/processes/web", "/processes/web/logs", "/files?path=/etc/passwd"},
			http.MethodDelete: {"", "/processes/web"},
			http.MethodPost:   {"/ping", "/ports/80/url"},
		} {
			for _, p := range paths {
				req, err := http.NewRequestWithContext(t.Context(), method, "http://"+s.addr+"/v1/capsules/"+id+p, nil)
				require.NoError(t, err)
				req.Header.Set("X-API-Key", key)
				status, body := s.send(req)
				require.Equal(t, 404, status, "%s %s: %s", method, p, body)
				require.Contains(t, body, `"not_found"`)
			}
		}
	}
	require.Len(t, s.processes(id), 1)
}

func (s *server) send(req *http.Request) (int, string) {
	s.t.Helper()
	res, err := http.DefaultClient.Do(req)
	require.NoError(s.t, err)
	defer res.Body.Close()
	var body strings.Builder
	_, err = io.Copy(&body, res.Body)
	require.NoError(s.t, err)
	return res.StatusCode, body.String()
}

// nestbox runs a command on the server's state directory.
func (s *server) nestbox(args ...string) string {
	s.t.Helper()
	cmd := exec.Command(s.bin, append(args, "--dir", s.dir)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	require.NoError(s.t, err, "%v", args)
	return string(out)
}

// TestUpAndDown starts a server in the background, stops it, and starts it
// again: its capsule has gone on.
func TestUpAndDown(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	id := s.newCapsule()
	s.background(id, "web", "exec sleep 1000")
	before := s.processes(id)

	second := exec.Command(s.bin, "up", "--dir", s.dir, "--listen", freeAddr(t))
	out, err := second.CombinedOutput()
	require.NoError(t, err, "what is wanted is there")
	require.Contains(t, string(out), "nestbox is already up at http://"+s.addr)
	require.Contains(t, string(out), "capsule create")
	out, err = exec.Command(s.bin, "down", "--dir", s.dir+"/none").CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "no server was ever started in")

	require.Contains(t, s.nestbox("down"), "stopped")
	s.signal(syscall.SIGTERM) // it is gone; this waits for it
	require.Contains(t, s.nestbox("up", "--detach", "--listen", s.addr), s.key())
	require.Equal(t, before, s.processes(id))
	require.Contains(t, s.nestbox("down"), "stopped")
	require.Contains(t, s.nestbox("down"), "no server was running")
	s.start()
	require.Equal(t, before, s.processes(id))
}

// TestCreateIsKilled kills the server while it creates capsules: what is then
// on the machine is what the list says, and no more.
func TestCreateIsKilled(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	for range 2 {
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			s.do(context.WithoutCancel(t.Context()), http.MethodPost, "/v1/capsules", none{})
		}()
		require.Eventually(t, func() bool {
			entries, err := os.ReadDir(filepath.Join(s.dir, "host", "capsules"))
			return err == nil && len(entries) > 0
		}, patience, time.Millisecond, "the create has begun")
		s.kill9()
		<-ended
		s.start()
		for _, id := range s.capsuleIDs() {
			call[none](s, http.MethodDelete, "/v1/capsules/"+id, nil, 204)
		}
	}
}

// TestStoppedDaemon has root inside a capsule stop its daemon: calls say so within
// seconds, the capsule is shown as unresponsive, others do not notice, and it can
// be destroyed.
func TestStoppedDaemon(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	id, other := s.newCapsule(), s.newCapsule()
	s.background(id, "stop", "sleep 0.3; kill -STOP 1")
	require.Eventually(t, func() bool {
		status, body := s.do(t.Context(), http.MethodGet, "/v1/capsules/"+id+"/processes", nil)
		return status == http.StatusGatewayTimeout && strings.Contains(string(body), `"timeout"`)
	}, patience, 100*time.Millisecond)
	require.Equal(t, 0, s.sh(other, "true").ExitCode)
	status, body := s.do(t.Context(), http.MethodGet, "/v1/capsules/"+id, nil)
	require.Equal(t, http.StatusOK, status)
	require.Contains(t, string(body), `"unresponsive":{"since":`)
	status, body = s.do(t.Context(), http.MethodDelete, "/v1/capsules/"+id, nil)
	require.Equal(t, http.StatusNoContent, status, string(body))
}
