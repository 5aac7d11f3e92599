package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

var regexpID = regexp.MustCompile(`cl-[0-9a-z]{25}`)

// load is what TestLoad does to a server, beside whom another team works.
type load struct {
	*server
	mine    string // the key of the attacker's team, in the server's file
	capsule string // of the attacker
	victim  string // the key of the other team
	theirs  string // its capsule
}

// TestLoad saturates a server from outside without a key and with one team's key:
// /health and another team's commands go on being answered, and afterwards the
// server is what it was.
func TestLoad(t *testing.T) {
	s := newServer(t)
	l := &load{server: s, mine: s.key(), capsule: s.newCapsule()}
	team := strings.TrimSpace(s.nestbox("key", "team", "others"))
	l.victim = strings.TrimSpace(s.nestbox("key", "create", "--team", team))
	status, body := l.as(t.Context(), l.victim, http.MethodPost, "/v1/capsules", strings.NewReader("{}"))
	require.Equal(t, http.StatusCreated, status, body)
	l.theirs = regexpID.FindString(body)
	defer l.as(context.WithoutCancel(t.Context()), l.victim, http.MethodDelete, "/v1/capsules/"+l.theirs, nil)
	l.work(t, 5)
	before := l.usage(t)

	for _, phase := range []struct {
		name   string
		attack func(*testing.T) (hold func())
	}{
		{"10,000 idle connections", func(t *testing.T) func() { return l.connections(t, 10_000, "") }},
		{"10,000 half-open requests", func(t *testing.T) func() {
			return l.connections(t, 10_000, "GET /v1/capsules HTTP/1.1\r\nHost: x\r\nX-API-Key: "+l.mine[:10])
		}},
		{"10,000 bodies that never come, without a key", func(t *testing.T) func() {
			return l.connections(t, 10_000, "POST /v1/capsules HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{")
		}},
		{"1,000 slow uploads", func(t *testing.T) func() {
			return l.connections(t, 1_000, "PUT /v1/capsules/"+l.capsule+"/files?path=/tmp/f HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\nX-API-Key: "+l.mine+"\r\n\r\nsome")
		}},
		{"64 of the largest requests", l.largest},
	} {
		t.Run(phase.name, func(t *testing.T) {
			release := phase.attack(t)
			l.work(t, 20)
			release()
		})
	}
	require.Eventually(t, func() bool {
		now := l.usage(t)
		return now.descriptors <= before.descriptors+20 && now.threads <= before.threads+20 && now.residentMiB <= before.residentMiB+96
	}, patience, 500*time.Millisecond, "%+v, before %+v", &lazyUsage{l, t}, before)
	l.work(t, 5)
}

// lazyUsage shows the usage at the time that it is printed.
type lazyUsage struct {
	l *load
	t *testing.T
}

func (u *lazyUsage) String() string { return fmt.Sprintf("%+v", u.l.usage(u.t)) }

// as makes a request with a key.
func (l *load) as(ctx context.Context, key, method, path string, body io.Reader) (int, string) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://"+l.addr+path, body)
	if err != nil {
		return 0, err.Error()
	}
	req.Header.Set("X-API-Key", key)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return 0, err.Error()
	}
	return res.StatusCode, string(text)
}

// work is what others do meanwhile: all of it must be answered.
func (l *load) work(t *testing.T, times int) {
	t.Helper()
	var took []time.Duration
	for i := range times {
		began := time.Now()
		status, body := l.as(t.Context(), l.victim, http.MethodGet, "/health", nil)
		require.Equal(t, http.StatusOK, status, body)
		status, body = l.as(t.Context(), l.victim, http.MethodPost, "/v1/capsules/"+l.theirs+"/exec", strings.NewReader(`{"cmd":"echo","args":["well"]}`))
		require.Equal(t, http.StatusOK, status, body)
		require.Contains(t, body, `well\n`)
		for _, key := range []string{l.mine, l.victim} { // seeing what there is works for every team
			status, body = l.as(t.Context(), key, http.MethodGet, "/v1/capsules", nil)
			require.Equal(t, http.StatusOK, status, "%d: %s", i, body)
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	t.Logf("of %d rounds: median %v, longest %v", times, took[len(took)/2], took[len(took)-1])
}

// connections opens connections, each of which sends text and then nothing.
// Those that the server closes are its choice.
func (l *load) connections(t *testing.T, n int, text string) (release func()) {
	t.Helper()
	var mu sync.Mutex
	var conns []net.Conn
	var opening sync.WaitGroup
	for range 50 {
		opening.Go(func() {
			for range n / 50 {
				conn, err := net.DialTimeout("tcp", l.addr, patience)
				if err != nil {
					t.Errorf("connect: %v", err)
					return
				}
				_, _ = io.WriteString(conn, text) // it may be closed already
				mu.Lock()
				conns = append(conns, conn)
				mu.Unlock()
			}
		})
	}
	opening.Wait()
	return func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}
}

// largest sends the largest legal requests of every kind, again and again until
// it is released.
func (l *load) largest(t *testing.T) (release func()) {
	escaped := strings.Repeat(`\u0001`, 130_000)
	bodies := map[string]string{
		"/v1/capsules/" + l.capsule + "/exec":              `{"cmd":"true","args":["` + strings.Repeat(escaped+`","`, 7) + `"]}`,
		"/v1/capsules/" + l.capsule + "/processes/x/stdin": `{"data":"` + strings.Repeat("a", 4<<20) + `"}`,
		"/v1/capsules": `{"metadata":{` + strings.Repeat(`"k":"v",`, 1<<20) + `"k":"v"}}`,
		"/v1/capsules/" + l.capsule + "/files/list":         `{"path":"/","depth":64}`,
		"/v1/capsules/" + l.capsule + "/exec?":              `{"cmd":"head","args":["-c","33554432","/dev/zero"]}`,
		"/v1/capsules/" + l.capsule + "/files/stream/write": strings.Repeat("x", 8<<20),
		"/v1/capsules/" + l.capsule + "/processes/x/signal": "[" + strings.Repeat("0,", 4<<20) + "0]",
		"/v1/capsules/" + l.capsule + "/ports/8080/url":     `{"expires_sec":` + strings.Repeat("1", 8<<20) + `}`,
	}
	ctx, cancel := context.WithCancel(t.Context())
	var senders sync.WaitGroup
	for path, body := range bodies {
		for range 8 {
			senders.Go(func() {
				for round := 0; ctx.Err() == nil && round < 20; round++ {
					status, text := l.as(ctx, l.mine, http.MethodPost, path, strings.NewReader(body))
					if status >= 500 && status != http.StatusServiceUnavailable {
						t.Errorf("%s: %d %.300s", path, status, text)
					}
				}
			})
		}
	}
	return func() { cancel(); senders.Wait() }
}

// usage is what the server process uses.
type usage struct{ descriptors, threads, residentMiB int }

func (l *load) usage(t *testing.T) usage {
	t.Helper()
	proc := "/proc/" + strconv.Itoa(l.cmd.Process.Pid)
	count := func(dir string) int {
		entries, err := os.ReadDir(filepath.Join(proc, dir))
		require.NoError(t, err)
		return len(entries)
	}
	text, err := os.ReadFile(proc + "/statm")
	require.NoError(t, err)
	pages, err := strconv.Atoi(strings.Fields(string(text))[1])
	require.NoError(t, err)
	return usage{count("fd"), count("task"), pages * os.Getpagesize() >> 20}
}
