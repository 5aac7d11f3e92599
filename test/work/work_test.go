package work

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestWork(t *testing.T) {
	s := newSite(t)
	t.Run("work", func(t *testing.T) {
		for name, test := range map[string]func(*site){
			"vite in a browser": vite, "gRPC": grpc, "venv": venv, "java": java,
			"nginx": nginx, "python server": pythonServer, "database": database,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				test(s.in(t))
			})
		}
	})
}

// venv copies a virtual environment in, whose interpreter is a link and whose scripts
// name it by its path.
func venv(s *site) {
	dir := s.write(map[string]string{"hello.py": "import greeting\nprint(greeting.WORDS)\n"})
	env := filepath.Join(dir, "env")
	s.run(dir, "/usr/bin/python3", "-m", "venv", "--without-pip", env)
	libs, err := filepath.Glob(filepath.Join(env, "lib/python3*/site-packages"))
	require.NoError(s.t, err)
	require.NoError(s.t, os.WriteFile(filepath.Join(libs[0], "greeting.py"), []byte("WORDS = 'from the environment'\n"), 0o644))
	id := s.capsule("512")
	s.nestbox("exec", id, "--", "mkdir", "-p", filepath.Dir(dir))
	s.nestbox("cp", "-r", dir, id+":"+filepath.Dir(dir))
	require.Equal(s.t, "from the environment", s.nestbox("exec", "-w", dir, id, "--", "env/bin/python", "hello.py"))
	require.Equal(s.t, env, s.nestbox("exec", "-w", dir, id, "--", "bash", "-c", `. env/bin/activate && python -c 'import sys; print(sys.prefix)'`))
	require.Regexp(s.t, "^Python 3", s.nestbox("exec", id, "--", "python", "-V"), "python is beside python3")
}

// java compiles and runs: its packages keep files in /etc.
func java(s *site) {
	dir := s.write(map[string]string{"Hello.java": `
import java.security.MessageDigest;
public class Hello {
    public static void main(String[] args) throws Exception {
        System.out.println(MessageDigest.getInstance("SHA-256").getProvider() + " " + args.length);
    }
}`})
	id := s.capsule("768")
	s.nestbox("cp", "-r", dir, id+":/root")
	s.nestbox("exec", "-w", "/root/project", id, "--", "javac", "Hello.java")
	require.Regexp(s.t, `^SUN version \S+ 2$`, s.nestbox("exec", "-w", "/root/project", id, "--", "java", "Hello", "a", "b"))
}

// endedWell waits for the end of a process that was told to end, and requires that it
// ended by itself.
func endedWell(s *site, id, tag string) {
	s.t.Helper()
	type process struct {
		Tag  string
		Exit *struct{ Code int }
	}
	var processes []process
	s.nestbox("wait", id, tag)
	require.NoError(s.t, json.Unmarshal([]byte(s.nestbox("ps", "--all", "--json", id)), &processes))
	processes = slices.DeleteFunc(processes, func(p process) bool { return p.Tag != tag })
	require.Len(s.t, processes, 1)
	require.NotNil(s.t, processes[0].Exit)
	require.Zero(s.t, processes[0].Exit.Code, "128 and more: by a signal")
}

// underLoad keeps asking for url over connections that are kept, until stop is called.
func underLoad(s *site, url string) (stop func()) {
	ctx, cancel := context.WithCancel(s.t.Context())
	done := make(chan struct{}, 8)
	for range cap(done) {
		go func() {
			defer func() { done <- struct{}{} }()
			client := s.http()
			defer client.CloseIdleConnections()
			for ctx.Err() == nil {
				req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
				if err != nil {
					return
				}
				if res, err := client.Do(req); err == nil {
					_, _ = io.Copy(io.Discard, res.Body)
					_ = res.Body.Close()
				}
			}
		}()
	}
	return func() {
		cancel()
		for range cap(done) {
			<-done
		}
	}
}

// stopped tells a busy server to end with a signal while it answers a slow request. The
// answer comes whole, and the server ends by itself.
func stopped(s *site, id, tag, signal, slow string, size int64) {
	s.t.Helper()
	stop := underLoad(s, slow[:strings.LastIndexByte(slow, '/')]+"/quick"+slow[strings.IndexByte(slow, '?'):])
	defer stop()
	res, err := s.http().Get(slow)
	require.NoError(s.t, err)
	defer res.Body.Close()
	require.Equal(s.t, http.StatusOK, res.StatusCode)
	body := bufio.NewReader(res.Body)
	_, err = body.Peek(1)
	require.NoError(s.t, err)
	s.nestbox("kill", "-s", signal, "--grace", "2m", id, tag)
	n, err := io.Copy(io.Discard, body)
	require.NoError(s.t, err, "after %d bytes", n)
	require.Equal(s.t, size, n)
	endedWell(s, id, tag)
}

func nginx(s *site) {
	dir := s.write(map[string]string{
		"nginx.conf": `daemon off; worker_processes 2; pid /run/nginx.pid; error_log stderr;
events {}
http {
  include /etc/nginx/mime.types; access_log off; keepalive_timeout 1h;
  server { listen 8000; root /srv/project/www; location /slow { limit_rate 100k; } }
}`,
		"www/slow": strings.Repeat("x", 300_000), "www/quick": "quick",
	})
	id := s.capsule("512")
	s.nestbox("cp", "-r", dir, id+":/srv")
	s.nestbox("exec", id, "--", "chmod", "-R", "a+rX", "/srv")
	s.nestbox("exec", "-d", "--tag", "web", id, "--", "nginx", "-c", "/srv/project/nginx.conf")
	status, body := s.ask(s.nestbox("url", id, "8000", "/quick"))
	require.Equal(s.t, "quick", body, status)
	stopped(s, id, "web", "QUIT", s.nestbox("url", id, "8000", "/slow"), 300_000)
}

// pythonServer is one that waits for all its connections before it ends.
func pythonServer(s *site) {
	dir := s.write(map[string]string{"server.py": `
import http.server, signal, threading, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        slow = self.path.startswith("/slow")
        self.send_response(200)
        self.send_header("Content-Length", "30" if slow else "5")
        self.end_headers()
        for part in range(3) if slow else []:
            self.wfile.write(b"0123456789")
            time.sleep(0.5)
        if not slow:
            self.wfile.write(b"quick")
    def log_message(self, *args): pass
class Server(http.server.ThreadingHTTPServer):
    daemon_threads = False
server = Server(("", 8000), Handler)
signal.signal(signal.SIGTERM, lambda *a: threading.Thread(target=server.shutdown).start())
server.serve_forever()
server.server_close()
`})
	id := s.capsule("512")
	s.nestbox("cp", "-r", dir, id+":/srv")
	s.nestbox("exec", "-d", "--tag", "web", id, "--", "python3", "/srv/project/server.py")
	_, body := s.ask(s.nestbox("url", id, "8000", "/quick"))
	require.Equal(s.t, "quick", body)
	stopped(s, id, "web", "TERM", s.nestbox("url", id, "8000", "/slow"), 30)
}

// database runs PostgreSQL in a capsule and works on it from here, with its own client.
func database(s *site) {
	id := s.capsule("512")
	s.nestbox("exec", "-u", "user", id, "--", "bash", "-c", "/usr/lib/postgresql/*/bin/initdb -D /tmp/data -A trust >/dev/null")
	s.nestbox("exec", "-d", "--tag", "db", "-u", "user", id, "--", "bash", "-c",
		"exec /usr/lib/postgresql/*/bin/postgres -D /tmp/data -k /tmp -c listen_addresses=127.0.0.1 -c fsync=off")
	ctx, cancel := context.WithCancel(s.t.Context())
	forward := s.command(ctx, "port-forward", id, "5432:0")
	said, err := forward.StdoutPipe()
	require.NoError(s.t, err)
	require.NoError(s.t, forward.Start())
	defer func() {
		cancel()
		_ = forward.Wait()
	}()
	line, err := bufio.NewReader(said).ReadString('\n')
	require.NoError(s.t, err)
	at := strings.Fields(line[strings.Index(line, "127.0.0.1:")+len("127.0.0.1:"):])[0]
	psql := func(sql string) string {
		return s.run("", "psql", "-h", "127.0.0.1", "-p", at, "-U", "user", "-d", "postgres", "-Atc", sql)
	}
	require.Eventually(s.t, func() bool {
		return s.command(s.t.Context(), "exec", id, "--", "bash", "-c", "/usr/lib/postgresql/*/bin/pg_isready -h 127.0.0.1").Run() == nil
	}, patience, patience/1000)
	psql("CREATE TABLE numbers AS SELECT n, repeat('x', 1000) AS filler FROM generate_series(1, 20000) AS n")
	require.Len(s.t, strings.Split(psql("SELECT n, filler FROM numbers ORDER BY n"), "\n"), 20000)
	require.Equal(s.t, "200010000", psql("SELECT sum(n) FROM numbers"))
	s.nestbox("kill", "-s", "INT", "--grace", "2m", id, "db") // fast shutdown: it does not wait for clients
	endedWell(s, id, "db")
}
