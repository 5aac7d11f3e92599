package demo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

const (
	webPort = 8000
	page    = "<h1>Hello from a capsule</h1>\n"
)

// sh runs a script in the capsule and returns what it wrote.
func (w *walk) sh(ctx context.Context, script string) (string, error) {
	out, err := w.capsule.CommandContext(ctx, "/bin/sh", "-c", script).Output()
	return string(out), err
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

func (w *walk) upload(ctx context.Context) error {
	if err := w.capsule.Files.Write(ctx, "/srv/site/index.html", strings.NewReader(page), client.WriteOptions{}); err != nil {
		return err
	}
	entries, err := w.capsule.Files.List(ctx, "/srv/site", 1)
	if err != nil {
		return err
	}
	for _, e := range entries {
		w.did("%s, %d bytes, owner %s", e.Path, e.Size, e.Owner)
	}
	return nil
}

func (w *walk) startWeb(ctx context.Context) error {
	begin := time.Now()
	p, err := w.capsule.Processes.Start(ctx, nestbox.ProcessSpec{
		Cmd: "python3", Args: []string{"-u", "-m", "http.server", fmt.Sprint(webPort), "--bind", "127.0.0.1"},
		Cwd: "/srv/site", Tag: "web",
	})
	if err != nil {
		return err
	}
	w.did("202 after %.1f ms: pid %d, tag %q", float64(time.Since(begin).Microseconds())/1000, p.PID, p.Tag)
	w.proves("the answer came once the program was running, and did not wait for it")
	return nil
}

func (w *walk) list(ctx context.Context) error {
	list, err := w.capsule.Processes.List(ctx, false)
	if err != nil {
		return err
	}
	for _, p := range list {
		w.did("pid %-5d tag %-6s %s %s", p.PID, p.Tag, p.Cmd, strings.Join(p.Args, " "))
	}
	if len(list) != 1 || list[0].Tag != "web" {
		return fmt.Errorf("expected the web server alone, got %d processes", len(list))
	}
	return nil
}

func (w *walk) reach(ctx context.Context) error {
	u, err := w.capsule.Ports.URL(ctx, webPort, time.Minute)
	if err != nil {
		return err
	}
	bare, _, _ := strings.Cut(u.URL, "?")
	if status, _, err := w.get(ctx, bare); err != nil || status != http.StatusUnauthorized {
		return errors.Join(fmt.Errorf("without a credential: status %d", status), err)
	}
	w.did("GET %s → 401 without a credential", bare)
	// The program may need a moment until it listens: 502 says that nothing does.
	for {
		status, body, err := w.get(ctx, u.URL)
		switch {
		case err != nil:
			return err
		case status == http.StatusOK && body == page:
			w.did("GET with the signed URL → 200 %s", oneLine(body))
			w.proves("a port that listens on the capsule's own loopback is reachable, by those only who may")
			return nil
		case status != http.StatusBadGateway:
			return fmt.Errorf("status %d: %s", status, body)
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

// get fetches a page. Browsers and curl know that every name below localhost
// is this machine; not every resolver does, so the connection goes straight to
// the server.
func (w *walk) get(ctx context.Context, page string) (int, string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, page, nil)
	if err != nil {
		return 0, "", err
	}
	server, err := url.Parse(w.server.URL())
	if err != nil {
		return 0, "", err
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, server.Host)
	}}
	defer transport.CloseIdleConnections()
	res, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return res.StatusCode, string(body), err
}

func (w *walk) readOutput(ctx context.Context) error {
	stream, err := w.capsule.Processes.Attach(ctx, "web", client.Attach{})
	if err != nil {
		return err
	}
	defer stream.Close()
	var got bytes.Buffer
	for !strings.Contains(got.String(), "GET / HTTP") {
		ev, err := stream.Next(ctx)
		if err != nil {
			return err
		}
		got.Write(ev.Data)
	}
	for line := range strings.Lines(got.String()) {
		w.did("│ %s", strings.TrimRight(line, "\n"))
	}
	w.proves("all of it from its first byte, though nobody was attached when it was written")
	return nil
}

// ticker writes lines with contents that cannot be guessed, and at the end the
// checksum of all of them, computed where they were written.
const ticker = `
import hashlib, os, time
h = hashlib.sha256()
for i in range(60):
    line = "%d %s\n" % (i, os.urandom(512).hex())
    h.update(line.encode())
    print(line, end="", flush=True)
    time.sleep(0.05)
print(h.hexdigest(), flush=True)
raise SystemExit(7)`

func (w *walk) leaveAndComeBack(ctx context.Context) error {
	p, err := w.capsule.Processes.Start(ctx, nestbox.ProcessSpec{Cmd: "python3", Args: []string{"-c", ticker}, Tag: "ticker"})
	if err != nil {
		return err
	}
	var got bytes.Buffer
	offset, err := w.readSome(ctx, &got, 8<<10)
	if err != nil {
		return err
	}
	w.did("pid %d writes random lines; read %d bytes of them, then hung up", p.PID, offset)

	if err := w.server.KillHard(); err != nil {
		return err
	}
	w.did("kill -9 of the server; the capsule goes on without it")
	if err := w.server.Start(ctx); err != nil {
		return err
	}
	list, err := w.capsule.Processes.List(ctx, false)
	if err != nil {
		return err
	}
	if len(list) != 2 {
		return fmt.Errorf("%d processes after the restart, expected 2", len(list))
	}
	w.did("started again: same capsule, same %d processes", len(list))

	if err := w.readRest(ctx, &got, offset); err != nil {
		return err
	}
	lines := strings.SplitAfter(strings.TrimSuffix(got.String(), "\n"), "\n")
	content, stated := strings.Join(lines[:len(lines)-1], ""), lines[len(lines)-1]
	if sum := fmt.Sprintf("%x", sha256.Sum256([]byte(content))); sum != stated {
		return fmt.Errorf("the joined output has checksum %s, the program says %s", sum, stated)
	}
	w.did("resumed at byte %d and read to the end: %d bytes, sha256 %.16s…", offset, got.Len(), stated)
	w.proves("the two halves join byte for byte: the checksum is the one the program computed")
	return nil
}

// readSome reads at least n bytes of the ticker and hangs up.
func (w *walk) readSome(ctx context.Context, to *bytes.Buffer, n int) (offset int64, err error) {
	stream, err := w.capsule.Processes.Attach(ctx, "ticker", client.Attach{})
	if err != nil {
		return 0, err
	}
	defer stream.Close()
	for to.Len() < n {
		ev, err := stream.Next(ctx)
		if err != nil {
			return 0, err
		}
		to.Write(ev.Data)
	}
	return stream.Offset(), nil
}

func (w *walk) readRest(ctx context.Context, to *bytes.Buffer, offset int64) error {
	stream, err := w.capsule.Processes.Attach(ctx, "ticker", client.Attach{Since: nestbox.Since{Offset: offset}})
	if err != nil {
		return err
	}
	defer stream.Close()
	for {
		ev, err := stream.Next(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if ev.Kind == nestbox.EventGap {
			return fmt.Errorf("bytes %d to %d are missing", ev.Offset, ev.To)
		}
		to.Write(ev.Data)
	}
}

func (w *walk) exitCode(ctx context.Context) error {
	p, err := w.capsule.Processes.Get(ctx, "ticker")
	if err != nil {
		return err
	}
	if p.Exit == nil || p.Exit.Code != 7 {
		return fmt.Errorf("expected exit code 7, got %+v", p.Exit)
	}
	w.did("ticker: %s with code %d at %s, %d bytes written", p.Exit.Reason, p.Exit.Code, p.Exit.At.Format(time.TimeOnly), p.Output.End)
	w.proves("an exit is a record, kept with its log after the process is gone")
	return nil
}

// family is a shell that starts an ordinary child, one in a session of its
// own, and one that is orphaned by a double fork.
const family = `
sleep 4321 &
setsid sleep 4321 &
(setsid sh -c 'sleep 4321 & exit' &)
wait`

// countFamily counts the sleepers without a ps that may not be there.
const countFamily = `n=0; for f in /proc/[0-9]*/cmdline; do [ "$(tr '\0' ' ' <$f 2>/dev/null)" = "sleep 4321 " ] && n=$((n+1)); done; echo $n`

func (w *walk) killTree(ctx context.Context) error {
	if _, err := w.capsule.Processes.Start(ctx, nestbox.ProcessSpec{Cmd: "/bin/sh", Args: []string{"-c", family}, Tag: "family"}); err != nil {
		return err
	}
	for n := ""; n != "3"; {
		out, err := w.sh(ctx, countFamily)
		if err != nil {
			return err
		}
		n = strings.TrimSpace(out)
	}
	w.did("a shell with a child, a setsid child and a double-forked orphan: 3 sleepers alive")
	begin := time.Now()
	if err := w.capsule.Processes.Kill(ctx, "family", client.Kill{Signal: "SIGTERM", Grace: time.Second}); err != nil {
		return err
	}
	took := time.Since(begin)
	left, err := w.sh(ctx, countFamily)
	if err != nil {
		return err
	}
	if strings.TrimSpace(left) != "0" {
		return fmt.Errorf("%s sleepers left", strings.TrimSpace(left))
	}
	w.did("killed in %d ms; sleepers alive: 0", took.Milliseconds())
	w.proves("kill means the whole tree, and the answer comes when none is left")
	return nil
}

// look tells what of a machine could be seen: homes, password hashes, the
// number of processes, and whether the server, a program of this machine, can
// be reached.
const look = `
import glob, os, socket
print("homes:", *sorted(os.listdir("/home")))
print("password hashes:", sum("$" in line for line in open("/etc/shadow")) if os.path.exists("/etc/shadow") else 0)
print("processes:", len(glob.glob("/proc/[0-9]*")))
for host in "127.0.0.1", "169.254.0.22", "169.254.169.254":
    try:
        with socket.create_connection((host, %s), 5) as c:
            c.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            if c.recv(1):
                print("reachable:", host)
    except OSError:
        pass`

func (w *walk) isolation(ctx context.Context) error {
	server, err := url.Parse(w.server.URL())
	if err != nil {
		return err
	}
	out, err := w.capsule.CommandContext(ctx, "python3", "-c", fmt.Sprintf(look, server.Port())).Output()
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(out)) {
		w.did("%s", strings.TrimSpace(line))
	}
	if !strings.Contains(string(out), "homes: user\npassword hashes: 0\n") || strings.Contains(string(out), "reachable") {
		return errors.New("something of this machine is visible")
	}
	w.proves("no home, secret or process of this machine is in there, and no way to its network")
	return nil
}

// network uses the world in which the demo runs: the names allowed.test and other.test are
// of servers there.
func (w *walk) network(ctx context.Context) error {
	if _, err := w.capsule.SetNetwork(ctx, nestbox.NetworkPolicy{Allow: []string{"allowed.test"}}); err != nil {
		return err
	}
	out, err := w.sh(ctx, "curl -sS http://allowed.test/; echo; curl -sS -m 10 http://other.test/ 2>&1; true")
	if err != nil {
		return err
	}
	answer, refused, _ := strings.Cut(out, "\n")
	w.did("http://allowed.test/ answers: %s", answer)
	w.did("http://other.test/: %s", oneLine(refused))
	if !strings.HasSuffix(answer, " allowed.test") || !strings.Contains(refused, "curl:") {
		return errors.New("the policy was not kept")
	}
	report, err := w.capsule.NetworkLog(ctx)
	if err != nil {
		return err
	}
	for _, f := range report.Recent {
		verdict := "refused"
		if f.Verdict.Allowed {
			verdict = "allowed"
		}
		w.did("the log says: %s %s %s", verdict, f.Protocol, f.Name)
	}
	w.proves("it reaches the name that it may, and no other; the server's owner sees both")
	return nil
}

// terminal types into a shell, leaves it in the middle, and comes back.
func (w *walk) terminal(ctx context.Context) error {
	p, err := w.capsule.Processes.Start(ctx, nestbox.ProcessSpec{
		Cmd: "bash", Args: []string{"--norc", "--noprofile"}, Tag: "shell", Terminal: &nestbox.Terminal{Rows: 24, Cols: 80},
		Env: map[string]string{"PS1": "$ ", "HISTFILE": ""},
	})
	if err != nil {
		return err
	}
	if err := w.typeAndSee(ctx, "MOOD=good; echo $((6 * 7))\r", "42\r\n"); err != nil {
		return err
	}
	w.did("typed into bash in a terminal of 24 rows and 80 columns, pid %d; then hung up without a word", p.PID)
	if err := w.typeAndSee(ctx, "tty; echo the mood is $MOOD\r", "the mood is good\r\n"); err != nil {
		return err
	}
	w.did("came back, saw the screen as it was, and went on: the mood is good")
	w.proves("a terminal is a process like any other: it outlives its connection")
	return w.capsule.Processes.Kill(ctx, "shell", client.Kill{})
}

// typeAndSee comes to the terminal, types, and leaves when it has seen something.
func (w *walk) typeAndSee(ctx context.Context, text, want string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	stream, err := w.capsule.Processes.Attach(ctx, "shell", client.Attach{})
	if err != nil {
		return err
	}
	defer stream.Close()
	if err := w.capsule.Processes.WriteStdin(ctx, "shell", []byte(text), false); err != nil {
		return err
	}
	var seen strings.Builder
	for !strings.Contains(seen.String(), want) {
		ev, err := stream.Next(ctx)
		if err != nil {
			return fmt.Errorf("%w, after %q", err, seen.String())
		}
		seen.Write(ev.Data)
	}
	return nil
}

// sleep waits for d or for the end of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

func (w *walk) watch(ctx context.Context) error {
	if _, err := w.capsule.Files.Mkdir(ctx, "/srv/src"); err != nil {
		return err
	}
	watch, err := w.capsule.Files.Watch(ctx, "/srv/src", client.WatchOptions{Recursive: true})
	if err != nil {
		return err
	}
	defer watch.Close()
	if _, err := w.sh(ctx, "mkdir -p /srv/src/a/b && echo 1 > /srv/src/a/b/main.py"); err != nil {
		return err
	}
	if err := w.told(ctx, watch, nestbox.FileEvent{Type: nestbox.FileWrite, Path: "/srv/src/a/b/main.py"}); err != nil {
		return err
	}
	if err := w.capsule.Files.Write(ctx, "/srv/src/a/new.txt", strings.NewReader("2\n"), client.WriteOptions{}); err != nil {
		return err
	}
	if err := w.told(ctx, watch, nestbox.FileEvent{Type: nestbox.FileWrite, Path: "/srv/src/a/new.txt"}); err != nil {
		return err
	}
	if _, err := w.sh(ctx, "mv /srv/src/a /srv/src/app"); err != nil {
		return err
	}
	moved := nestbox.FileEvent{Type: nestbox.FileRename, Path: "/srv/src/a", To: "/srv/src/app", Directory: true}
	if err := w.told(ctx, watch, moved); err != nil {
		return err
	}
	w.proves("what is made in a new directory is seen, although the directory came first")
	return nil
}

// told shows what a watch tells, until it tells of last.
func (w *walk) told(ctx context.Context, watch *client.Watch, last nestbox.FileEvent) error {
	for {
		e, err := watch.Next(ctx)
		if err != nil {
			return err
		}
		w.did("%-6s %s", e.Type, strings.TrimSuffix(e.Path+" -> "+e.To, " -> "))
		if e == last {
			return nil
		}
	}
}
