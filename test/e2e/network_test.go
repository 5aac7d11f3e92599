package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/egress/world"
)

// TestMain runs the tests in a network of their own, with a world beyond it: what
// capsules reach depends on no machine.
func TestMain(m *testing.M) {
	world.InOwnNetwork()
	w, err := world.Join()
	if err == nil {
		err = w.Resolve()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "the world:", err)
		os.Exit(1)
	}
	code := m.Run()
	w.Remove()
	os.Exit(code)
}

// tries is a program that tries what it is told, all of it at once, and says what came
// back.
const tries = `
import json, socket, ssl, sys
from concurrent.futures import ThreadPoolExecutor

context = ssl.create_default_context(cafile="/tmp/ca.pem")

def attempt(a):
    try:
        host, _, port = a["address"].partition(":")
        port = int(port or {"http": 80, "https": 443}[a["kind"]])
        if a["kind"] == "udp":
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
                s.settimeout(2)
                s.connect((host, port))
                s.send(b"hello")
                return s.recv(100).decode()
        with socket.create_connection((host, port), 30) as s:
            if a["kind"] == "https":
                s = context.wrap_socket(s, server_hostname=a["name"])
            if a["kind"] == "tcp":
                s.sendall(b"hello")
                return s.recv(5).decode()
            s.sendall(b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % a["name"].encode())
            answer = b""
            while True:
                more = s.recv(10000)
                if not more:
                    break
                answer += more
            return answer.decode().partition("\r\n\r\n")[2]
    except OSError:
        return ""

with ThreadPoolExecutor(20) as pool:
    print(json.dumps(list(pool.map(attempt, json.loads(sys.argv[1])))))
`

// newNetworkCapsule creates a capsule with a policy, in which tries can run.
func (s *server) newNetworkCapsule(policy any) string {
	s.t.Helper()
	w, err := world.Join()
	require.NoError(s.t, err)
	body := none{}
	if policy != nil {
		body["network"] = policy
	}
	id := call[capsuleJSON](s, http.MethodPost, "/v1/capsules", body, 201).ID
	require.Zero(s.t, s.sh(id, "cat > /tmp/ca.pem <<'EOF'\n"+string(w.RootPEM)+"EOF").ExitCode)
	return id
}

// try runs attempts in a capsule.
func (s *server) try(id string, attempts []world.Try) (answers []string) {
	s.t.Helper()
	text, err := json.Marshal(attempts)
	require.NoError(s.t, err)
	res := call[execJSON](s, http.MethodPost, "/v1/capsules/"+id+"/exec",
		none{"cmd": "python3", "args": []string{"-c", tries, string(text)}, "timeout_sec": 100}, 200)
	require.Zero(s.t, res.ExitCode, res.Stderr)
	require.NoError(s.t, json.Unmarshal([]byte(res.Stdout), &answers))
	return answers
}

// requireRows sets each policy of the table on a running capsule, and tries its rows.
func (s *server) requireRows(id string) {
	s.t.Helper()
	groups := map[string][]world.Row{}
	for _, row := range world.Table() {
		key := fmt.Sprint(row.Policy)
		groups[key] = append(groups[key], row)
	}
	for _, key := range slices.Sorted(maps.Keys(groups)) {
		rows := groups[key]
		call[none](s, http.MethodPut, "/v1/capsules/"+id+"/network", rows[0].Policy, 200)
		attempts := make([]world.Try, len(rows))
		for i, row := range rows {
			attempts[i] = row.Try
		}
		for i, got := range s.try(id, attempts) {
			require.Equal(s.t, rows[i].Want, got, "%s: %+v", rows[i].What, rows[i])
		}
	}
}

// egressPID is that of the egress process of the server's directory; 0 = there is none.
func (s *server) egressPID() int {
	s.t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	require.NoError(s.t, err)
	for _, p := range paths {
		data, err := os.ReadFile(p)
		if err != nil || !strings.Contains(string(data), "\x00egress\x00--dir\x00") {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(p)))
		require.NoError(s.t, err)
		if log, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/2", pid)); err == nil && strings.HasPrefix(log, s.dir) {
			return pid
		}
	}
	return 0
}

// traffic sends and receives without end, and says when something came through.
const traffic = `while :; do python3 - <<'EOF'
import socket
try:
    with socket.create_connection(("` + world.Site + `", 7777), 5) as s:
        s.settimeout(5)
        for i in range(1000):
            s.sendall(b"x" * 1000)
            if s.recv(1):
                print("through", flush=True)
except OSError:
    pass
EOF
done`

// TestNetworkPolicy tries every row of the table from inside a real capsule, and again
// after both server and egress process were killed under load.
func TestNetworkPolicy(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	id, closed := s.newNetworkCapsule(nil), s.newNetworkCapsule(none{"internet": false})
	s.requireRows(id)

	call[none](s, http.MethodPut, "/v1/capsules/"+id+"/network", none{"internet": true}, 200)
	s.background(id, "load", traffic)
	s.background(closed, "load", traffic)
	through := func(id string) int { return strings.Count(s.text(path(id, "load")+"/logs"), "through") }
	goesOn := func() {
		t.Helper()
		n := through(id)
		require.Eventually(t, func() bool { return through(id) > n }, patience, 10*time.Millisecond)
	}
	goesOn()
	for range 3 {
		old := s.egressPID()
		require.NotZero(t, old)
		require.NoError(t, syscall.Kill(old, syscall.SIGKILL))
		require.Eventually(t, func() bool { pid := s.egressPID(); return pid != 0 && pid != old }, patience, 10*time.Millisecond)
		goesOn()
	}
	s.kill9()
	goesOnWithout := s.egressPID()
	require.NotZero(t, goesOnWithout)
	s.start()
	goesOn()
	require.Equal(t, goesOnWithout, s.egressPID(), "the egress process outlives the server")
	s.kill9()
	require.NoError(t, syscall.Kill(s.egressPID(), syscall.SIGKILL)) // now nobody is there
	s.start()
	goesOn()
	require.Zero(t, through(closed))
	call[none](s, http.MethodDelete, path(id, "load"), nil, 204)
	s.requireRows(id)
}

// TestNetworkDefaults: what the operator says holds where nobody says otherwise.
func TestNetworkDefaults(t *testing.T) {
	t.Parallel()
	site := []world.Try{{Kind: "http", Name: "allowed.test", Address: world.Site}, {Kind: "tcp", Address: world.Lifted + ":7777"}}
	reached := world.Site + " allowed.test"
	open := newServer(t, "--egress-allow", world.Lifted+"/32", "--egress-mbps", "100")
	shut := newServer(t, "--egress", "deny")
	for what, c := range map[string]struct {
		s       *server
		network any
		want    []string
	}{
		"open":                   {open, nil, []string{reached, "hello"}},
		"open, none":             {open, none{"internet": false}, []string{"", ""}},
		"open, the rest":         {open, none{"deny": []string{"203.0.113.0/24"}}, []string{"", "hello"}},
		"open, some":             {open, none{"allow": []string{"allowed.test"}}, []string{reached, ""}},
		"shut":                   {shut, nil, []string{"", ""}},
		"shut, but for this one": {shut, none{"internet": true}, []string{reached, ""}},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			s := c.s.in(t)
			require.Equal(t, c.want, s.try(s.newNetworkCapsule(c.network), site))
		})
	}
	require.Contains(t, call[errorJSON](open, http.MethodPost, "/v1/capsules", none{"network": none{"egress_mbps": 101}}, 400).Error.Message, "at most 100 here")
	for _, bad := range []any{
		none{"allow": []string{"http://x"}}, none{"allow": "x"}, none{"alow": []string{}}, none{"internet": "yes"}, none{"egress_mbps": -1}, []int{1},
	} {
		call[errorJSON](open, http.MethodPost, "/v1/capsules", none{"network": bad}, 400)
	}
}

// TestNetworkLog: what was reached and refused is listed, by name where there is one, and
// names are looked up by the capsule's own resolv.conf.
func TestNetworkLog(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	id := s.newNetworkCapsule(none{"allow": []string{"*.allowed.test"}})
	require.Equal(t, world.Site+" www.allowed.test", s.sh(id, "curl -sS http://www.allowed.test/").Stdout)
	require.Equal(t, world.Site+" www.allowed.test", s.sh(id, "curl -sS --cacert /tmp/ca.pem https://www.allowed.test/").Stdout)
	require.NotZero(t, s.sh(id, "curl -sS http://other.test/").ExitCode, "no lookup")
	require.NotZero(t, s.sh(id, "curl -sS --resolve other.test:80:"+world.Site2+" http://other.test/").ExitCode)
	type flow struct {
		Protocol, Name, Address, Verdict, Rule string
		Port                                   int
		Open                                   bool
	}
	var got []flow
	require.Eventually(t, func() bool {
		got = call[struct{ Recent []flow }](s, http.MethodGet, "/v1/capsules/"+id+"/network/log", nil, 200).Recent
		return !slices.ContainsFunc(got, func(f flow) bool { return f.Open })
	}, patience, 10*time.Millisecond)
	for _, want := range []flow{
		{Protocol: "tcp", Name: "www.allowed.test", Address: world.Site, Verdict: "allowed", Rule: "*.allowed.test", Port: 80},
		{Protocol: "tcp", Name: "www.allowed.test", Address: world.Site, Verdict: "allowed", Rule: "*.allowed.test", Port: 443},
		{Protocol: "dns", Name: "other.test", Verdict: "refused", Port: 53},
		{Protocol: "tcp", Name: "other.test", Address: world.Site2, Verdict: "refused", Port: 80},
	} {
		require.Contains(t, got, want)
	}
	require.Equal(t, nestbox.NetworkPolicy{Allow: []string{"*.allowed.test"}, Deny: []string{}},
		call[nestbox.NetworkPolicy](s, http.MethodGet, "/v1/capsules/"+id+"/network", nil, 200))
}

// TestBehindAProxy: programs trust the certificates and use the proxy that the operator
// names, also in capsules that start after a restart.
func TestBehindAProxy(t *testing.T) {
	t.Parallel()
	w, err := world.Join()
	require.NoError(t, err)
	ca := filepath.Join(stateDir(t), "ca.pem")
	require.NoError(t, os.WriteFile(ca, w.RootPEM, 0o600))
	s := newServer(t, "--capsule-ca", ca)
	id := s.newCapsule()
	fetch := `curl -sS https://www.allowed.test/ && echo && python3 -c 'import urllib.request; print(urllib.request.urlopen("https://www.allowed.test/").read().decode())'`
	answer := world.Site + " www.allowed.test\n"
	res := s.sh(id, fetch)
	require.Equal(t, answer+answer, res.Stdout, res.Stderr)
	require.Equal(t, "mine", s.sh(id, "SSL_CERT_FILE=mine; printf $SSL_CERT_FILE").Stdout)

	s.kill9()
	s.args = []string{"--capsule-proxy", "http://" + world.Site + ":80"}
	s.start()
	id = s.newCapsule()
	require.Equal(t, world.Site+" nowhere.test", s.sh(id, "curl -sS http://nowhere.test/").Stdout, "the proxy answers for all")
	require.Empty(t, s.sh(id, "set | grep NESTBOX_ENV").Stdout)
}

// TestGitClone clones over HTTP and TLS by an allowed name.
func TestGitClone(t *testing.T) {
	t.Parallel()
	w, err := world.Join()
	require.NoError(t, err)
	out, err := exec.Command("sh", "-ec", `
		cd "$1"; git init -q repo; cd repo; echo content > file; git add file
		git -c user.name=x -c user.email=x@example.com commit -qm first
		git clone -q --bare . "$2/repo.git"; git -C "$2/repo.git" update-server-info`, "sh", t.TempDir(), w.Files).CombinedOutput()
	require.NoError(t, err, "%s", out)
	s := newServer(t)
	id := s.newNetworkCapsule(none{"allow": []string{"*.allowed.test"}})
	for scheme, dir := range map[string]string{"http": "a", "https": "b"} {
		res := s.sh(id, "export GIT_SSL_CAINFO=/tmp/ca.pem; cd /srv && git clone -q "+scheme+"://www.allowed.test/files/repo.git "+dir+" && cat "+dir+"/file")
		require.Equal(t, "content\n", res.Stdout, res.Stderr)
	}
	require.NotZero(t, s.sh(id, "git clone -q http://other.test/files/repo.git /srv/c").ExitCode)
}
