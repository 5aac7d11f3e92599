package e2e

import (
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox/internal/cgroup"
)

// hogs use more memory than their capsule has, each in a way of its own.
var hogs = map[string]string{
	"large pieces": `exec python3 -c "
b = []
while True: b.append(bytearray(16 << 20))"`,
	"small pieces": `exec python3 -c "
b = []
while True: b.append(str(len(b)) * 20)"`,
	"one piece": `exec python3 -c "bytearray(8 << 30)"`,
	"pages": `exec python3 -c "
import mmap
m = mmap.mmap(-1, 8 << 30)
for i in range(0, 8 << 30, 4096): m[i] = 1"`,
	"threads": `exec python3 -c "
import threading
b = []
def eat():
    while True: b.append(bytearray(1 << 20))
for i in range(30): threading.Thread(target=eat).start()"`,
	"a child": `python3 -c "
b = []
while True: b.append(bytearray(1 << 20))"; sleep 1000`,
	"many children": `for i in $(seq 60); do python3 -c "
import time
b = bytearray(20 << 20)
time.sleep(1000)" & done; wait`,
	"shared memory": `exec python3 -c "
b = []
try:
    with open('/dev/shm/hog', 'wb') as f:
        while True: f.write(b'x' * (1 << 20))
except OSError: pass
while True: b.append(bytearray(1 << 20))"`,
	"a file without a name": `exec python3 -c "
import os
f = os.memfd_create('hog')
while True: os.write(f, b'x' * (1 << 20))"`,
	"pipes": `exec python3 -c "
import os, fcntl
p = []
while True:
    r, w = os.pipe(); p.append((r, w)); fcntl.fcntl(w, 1031, 1 << 20); os.set_blocking(w, False)
    try:
        while True: os.write(w, b'x' * 65536)
    except BlockingIOError: pass"`,
	"sockets": `exec python3 -c "
import socket
p = []
while True:
    a, b = socket.socketpair(); p.append((a, b)); a.setblocking(False)
    try:
        while True: a.send(b'x' * 65536)
    except BlockingIOError: pass"`,
	"JavaScript": `exec node -e "const a = []; for (;;) a.push(Buffer.alloc(1 << 20, 1))"`,
}

// TestMemoryHog: what eats a capsule's memory dies alone, and says so.
func TestMemoryHog(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	for name, hog := range hogs {
		for _, mb := range []int{64, 300} {
			t.Run(name+" of "+strconv.Itoa(mb)+" MiB", func(t *testing.T) {
				t.Parallel()
				s := s.in(t)
				id := call[capsuleJSON](s, http.MethodPost, "/v1/capsules", none{"memory_mb": mb}, 201).ID
				s.background(id, "before", "echo said before")
				s.background(id, "innocent", "trap 'echo well; exit 7' TERM; while :; do sleep 0.1; done")
				s.background(id, "hog", hog)
				ended := call[processJSON](s, http.MethodGet, path(id, "hog")+"?wait=200s", nil, 200)
				require.NotNil(t, ended.Exit)
				require.Equal(t, "oom", ended.Exit.Reason)
				require.Equal(t, "SIGKILL", ended.Exit.Signal)

				call[none](s, http.MethodDelete, path(id, "innocent")+"?signal=TERM", nil, 204)
				require.Equal(t, 7, call[processJSON](s, http.MethodGet, path(id, "innocent"), nil, 200).Exit.Code)
				require.Contains(t, s.text(path(id, "innocent")+"/logs"), "well")
				require.Equal(t, "said before\n", s.text(path(id, "before")+"/logs"))
				require.Equal(t, "again\n", s.sh(id, "echo again").Stdout)
				call[none](s, http.MethodDelete, "/v1/capsules/"+id, nil, 204)
			})
		}
	}
}

// TestForkBombsTakeAllMemory: bombs of two users, which meet the limit of memory
// before that of processes, die alone too.
func TestForkBombsTakeAllMemory(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	id := call[capsuleJSON](s, http.MethodPost, "/v1/capsules", none{"memory_mb": 192}, 201).ID
	s.background(id, "innocent", "while :; do sleep 1; done")
	for _, user := range []string{"root", "nobody"} {
		call[startedJSON](s, http.MethodPost, "/v1/capsules/"+id+"/exec", none{
			"cmd": "bash", "args": []string{"-c", ":(){ :|:& };:; sleep 1000"}, "user": user, "tag": user, "background": true,
		}, 202)
	}
	for _, user := range []string{"root", "nobody"} {
		ended := call[processJSON](s, http.MethodGet, path(id, user)+"?wait=200s", nil, 200)
		require.NotNil(t, ended.Exit)
		require.Equal(t, "oom", ended.Exit.Reason)
	}
	require.Equal(t, "running", call[processJSON](s, http.MethodGet, path(id, "innocent"), nil, 200).State)
	require.Equal(t, "well\n", s.sh(id, "echo well").Stdout)
}

// TestFilesAreNoMemory: what the kernel caches of files is no reason to kill
// anybody.
func TestFilesAreNoMemory(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	id := call[capsuleJSON](s, http.MethodPost, "/v1/capsules", none{"memory_mb": 64}, 201).ID
	s.background(id, "innocent", "sleep 1000")
	res := s.sh(id, "dd if=/dev/zero of=/root/big bs=1M count=600 2>/dev/null && cat /root/big | wc -c")
	require.Equal(t, strconv.Itoa(600<<20)+"\n", res.Stdout)
	require.Equal(t, "running", call[processJSON](s, http.MethodGet, path(id, "innocent"), nil, 200).State)
}

// TestMemoryRunsOutWhileAway: nobody guards a capsule's memory while its server
// is away. Its programs wait.
func TestMemoryRunsOutWhileAway(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	id := call[capsuleJSON](s, http.MethodPost, "/v1/capsules", none{"memory_mb": 64}, 201).ID
	s.background(id, "innocent", "sleep 1000")
	// It eats when the server that held its connection is gone.
	s.background(id, "hog", `exec python3 -c "
import socket
s = socket.create_server(('127.0.0.1', 8000))
c = s.accept()[0]
print('connected', flush=True)
try:
    while c.recv(4096): pass
except OSError: pass
b = []
while True: b.append(bytearray(1 << 20))"`)
	connected := func() bool { return s.text(path(id, "hog")+"/logs") != "" }
	req, err := http.NewRequest(http.MethodGet, "http://"+s.addr, nil)
	require.NoError(t, err)
	req.Host = "8000-" + id + ".localhost"
	req.Header.Set("X-API-Key", s.key())
	requests := make(chan struct{})
	require.Eventually(t, func() bool {
		go func() { // answered when the server is gone, if not at once
			if res, err := http.DefaultClient.Do(req.Clone(t.Context())); err == nil {
				res.Body.Close()
			}
			requests <- struct{}{}
		}()
		select {
		case <-requests:
			return false // it did not listen yet
		case <-time.After(time.Second):
			return connected()
		}
	}, patience, 10*time.Millisecond)
	m, name := capsuleGroup(t, id)
	s.kill9()
	require.Eventually(t, func() bool {
		use, err := m.Group(name).MemoryUse()
		return err == nil && use.Held > 200<<20
	}, patience, 10*time.Millisecond)
	<-requests
	s.start()
	require.Eventually(t, func() bool { // the daemon may need a moment to come to itself
		status, body := s.do(t.Context(), http.MethodGet, path(id, "hog")+"?wait=60s", nil)
		return status == 200 && strings.Contains(string(body), `"reason":"oom"`)
	}, patience, 10*time.Millisecond)
	require.Equal(t, "running", call[processJSON](s, http.MethodGet, path(id, "innocent"), nil, 200).State)
}

// capsuleGroup returns where the control group of a capsule is.
func capsuleGroup(t *testing.T, id string) (*cgroup.Mount, string) {
	t.Helper()
	text, err := os.ReadFile("/proc/" + strconv.Itoa(sentry(t, id)) + "/cgroup")
	require.NoError(t, err)
	name := string(text)[strings.LastIndex(string(text), ":/nestbox/")+2:]
	m, err := cgroup.Detect()
	require.NoError(t, err)
	name, _, _ = strings.Cut(name, "\n")
	return m, name
}

// TestHostRunsOut: when all capsules together hold more than there is, the
// program that holds the most goes, or its capsule, and not the server.
func TestHostRunsOut(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	big := call[capsuleJSON](s, http.MethodPost, "/v1/capsules", none{"memory_mb": 4096}, 201).ID
	small := call[capsuleJSON](s, http.MethodPost, "/v1/capsules", none{"memory_mb": 4096}, 201).ID
	s.background(small, "innocent", `exec python3 -c "b = bytearray(50 << 20); import time; time.sleep(1000)"`)
	for _, id := range []string{big, small} {
		text, err := os.ReadFile("/proc/" + strconv.Itoa(sentry(t, id)) + "/oom_score_adj")
		require.NoError(t, err)
		require.Equal(t, "900\n", string(text))
	}
	text, err := os.ReadFile("/proc/" + strconv.Itoa(s.pid()) + "/oom_score_adj")
	require.NoError(t, err)
	require.Contains(t, []string{"-900\n", "0\n"}, string(text), "lower, if this machine allows that")

	m, name := capsuleGroup(t, big)
	require.NoError(t, m.Group(filepath.Dir(name)).SetMemory(300<<20, 0)) // what there is
	s.background(big, "hog", hogs["large pieces"])
	require.Eventually(t, func() bool {
		c := call[capsuleJSON](s, http.MethodGet, "/v1/capsules/"+big, nil, 200)
		if c.Status == "error" {
			return c.Reason == "out of memory: the host had none left"
		}
		status, body := s.do(t.Context(), http.MethodGet, path(big, "hog"), nil)
		return status == 200 && strings.Contains(string(body), `"signal":"SIGKILL"`)
	}, patience, 10*time.Millisecond)
	require.Equal(t, "running", call[processJSON](s, http.MethodGet, path(small, "innocent"), nil, 200).State)
}
