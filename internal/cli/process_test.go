package cli_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestExec(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	dir := t.TempDir()
	s.env["HERE"] = "from here"

	r := s.start(nil, "exec", id, "--", "sh", "-c", "echo out; echo err >&2; exit 3").wait(3)
	require.Equal(t, "out\n", r.out.String())
	require.Equal(t, "err\n", r.err.String())
	require.Equal(t, "x -d --tag\n", s.ok("exec", id, "echo", "x", "-d", "--tag"), "flags of the command are the command's")
	require.Equal(t, "1 from here\n", s.ok("exec", "-e", "A=1", "-e", "HERE", id, "--", "sh", "-c", "echo $A $HERE"))
	require.Equal(t, dir+"\n", s.ok("exec", "-w", dir, id, "--", "pwd"))
	require.Equal(t, "late\n", s.ok("exec", id, "-e", "A=late", "--", "sh", "-c", "echo $A"), "flags after the capsule")
	s.start(nil, "exec", id, "--", "sh", "-c", "kill -TERM $$").wait(128 + 15)
	require.Contains(t, s.start(nil, "exec", "--timeout", "1s", id, "--", "sleep", "1000").wait(137).err.String(), "time limit")
}

func TestExecJSON(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	type view struct {
		Stdout, Stderr, Encoding, Reason string
		ExitCode                         int `json:"exit_code"`
	}
	r := s.start(nil, "exec", "--json", id, "--", "sh", "-c", "echo out; echo err >&2; exit 3").wait(3)
	require.Equal(t, view{"out\n", "err\n", "utf-8", "exited", 3}, decode[view](t, r.out.String()))
	require.Equal(t, view{"/wA=", "", "base64", "exited", 0}, decode[view](t, s.ok("exec", "--json", id, "--", "printf", `\377\000`)))
}

// TestReaderOfOutputLeaves is "| head": the process must not run on.
func TestReaderOfOutputLeaves(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	s.out = brokenPipe{}
	r := s.start(nil, "exec", id, "--", "yes").wait(141)
	require.Empty(t, r.err.String())
	s.out = nil
	require.Equal(t, "[]\n", s.ok("ps", "--json", id))
}

type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) { return 0, syscall.EPIPE }

func TestExecFailures(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	require.Contains(t, s.fails(127, "exec", id, "--", "no-such-program"), "no such program")
	require.Contains(t, s.fails(127, "exec", "-d", id, "--", "/no/such/program"), "no such program")
	require.Contains(t, s.fails(127, "exec", "-t", id, "--", "no-such-program"), "no such program")
	require.Contains(t, s.fails(126, "exec", id, "--", "/etc/passwd"), "not executable")
	require.Contains(t, s.fails(126, "exec", id, "--", "/etc"), "is a directory")
	require.Contains(t, s.fails(125, "exec", "-w", "/no/such", id, "--", "true"), "does not exist")
	require.Contains(t, s.fails(125, "exec", id), "which command?")
	require.Contains(t, s.fails(125, "exec", id, "--"), "which command?")
	require.Contains(t, s.fails(125, "exec", "--no-such-flag", id, "true"), "unknown flag")
	require.Contains(t, s.fails(125, "exec", "-e", "=x", id, "true"), "environment variable")
	require.Contains(t, s.fails(125, "exec", "-d", "--tag", "8080", id, "true"), "tag")
	require.Contains(t, s.fails(125, "exec", "cl-"+strings.Repeat("0", 25), "true"), "capsule not found")
	require.Contains(t, s.fails(125, "wait", id, "nobody"), "no process nobody")
	require.Contains(t, s.fails(1, "logs", id, "nobody"), "no process nobody")
	require.Contains(t, s.fails(1, "kill", "-s", "NOPE", id, "1"), "SIGTERM", "the known ones are listed")
}

func TestExecStdin(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	want := strings.Repeat("0123456789abcdef\n", 1<<16) // more than a pipe holds
	got := s.start(strings.NewReader(want), "exec", "-i", id, "--", "cat").wait(0).out.String()
	require.True(t, want == got, "%d bytes of %d", len(got), len(want))
	require.Empty(t, s.start(strings.NewReader("not passed on"), "exec", id, "--", "cat").wait(0).out.String())
}

// TestBigOutput wants every byte of more output than any log keeps in memory.
func TestBigOutput(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	const lines = 2_000_000
	got := s.ok("exec", id, "--", "seq", strconv.Itoa(lines))
	var want strings.Builder
	for i := range lines {
		fmt.Fprintln(&want, i+1)
	}
	require.True(t, want.String() == got, "%d bytes of %d", len(got), want.Len())
}

func TestBackground(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	both := strings.TrimSpace(s.ok("exec", "-d", id, "--", "sh", "-c", "echo out; echo err >&2"))
	s.ok("wait", id, both)
	require.Len(t, s.ok("logs", id, both), len("out\nerr\n"))
	require.Equal(t, "err\n", s.ok("logs", "--stream", "stderr", id, both))
	require.Equal(t, "out\n", s.ok("logs", "--stream", "stdout", id, both))
	tag := strings.TrimSpace(s.ok("exec", "-d", id, "--", "sh", "-c", "echo hello; echo there; exit 4"))
	require.Regexp(t, `^proc-[0-9a-f]{8}$`, tag)
	require.Equal(t, "exited 4\n", s.start(nil, "wait", id, tag).wait(4).out.String())
	require.Equal(t, "hello\nthere\n", s.ok("logs", id, tag))
	require.Equal(t, "re\n", s.ok("logs", "--tail-bytes", "3", id, tag))
	require.Equal(t, "there\n", s.ok("logs", "--since", "6", id, tag))
	require.Empty(t, s.ok("logs", "--since", "now", id, tag))
	require.Contains(t, s.fails(1, "logs", "--since", "yesterday", id, tag), "since must be")
	require.Contains(t, s.fails(1, "logs", "--since", "1", "--tail-bytes", "1", id, tag), "none of the others can be")
	require.Contains(t, s.fails(1, "logs", "--since", "1", "--tail", "1", id, tag), "a time or a duration")

	type view struct {
		PID  int
		Tag  string
		Exit *struct{ Code int }
	}
	require.Equal(t, "[]\n", s.ok("ps", "--json", id))
	list := decode[[]view](t, s.ok("ps", "-a", "--json", id))
	require.Len(t, list, 2)
	require.Equal(t, 4, list[1].Exit.Code)
	require.Equal(t, tag, list[1].Tag)
	table := s.ok("ps", "-a", id)
	require.Contains(t, table, "exited 4")
	require.Contains(t, table, "sh -c echo hello;")

	started := decode[view](t, s.ok("exec", "-d", "--json", "--tag", "web", id, "--", "sleep", "1000"))
	require.Equal(t, "web", started.Tag)
	require.Contains(t, s.fails(125, "exec", "-d", "--tag", "web", id, "--", "true"), "web", "the tag is taken")
	require.Contains(t, s.ok("__complete", "kill", id, ""), "web\tsleep 1000")
	s.ok("kill", "-s", "term", "--grace", "10s", id, "web")
	require.Contains(t, s.start(nil, "wait", id, strconv.Itoa(started.PID)).wait(143).out.String(), "ended by SIGTERM (killed)")
}

func TestFollow(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	s.ok("exec", "-d", "-i", "--tag", "cat", id, "--", "cat")
	follow := s.start(nil, "logs", "-f", id, "cat")
	r, w := io.Pipe()
	attach := s.start(r, "attach", id, "cat")
	write := func(text string) {
		_, err := io.WriteString(w, text)
		require.NoError(t, err)
	}
	write("one\n")
	follow.sees("one\n")
	attach.sees("one\n")
	s.server.Restart()
	write("two\n")
	follow.sees("one\ntwo\n")
	attach.sees("one\ntwo\n")

	late := s.start(strings.NewReader(""), "attach", "--since", "4", id, "cat")
	late.sees("two\n")
	late.interrupt()
	require.Contains(t, late.wait(0).err.String(), "detached; cat goes on")
	require.Equal(t, "two\n", late.out.String())
	require.NoError(t, w.Close()) // end of file for cat
	attach.wait(0)
	follow.wait(0)
	require.Equal(t, "one\ntwo\n", follow.out.String())
}

func TestInterrupts(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	r := s.start(nil, "exec", id, "--", "sh", "-c", "trap 'echo caught' INT; echo ready; while :; do sleep 0.05; done")
	r.sees("ready")
	r.interrupt()
	r.sees("caught")
	r.interrupt()
	r.wait(137)
	require.Equal(t, "[]\n", s.ok("ps", "--json", id))
}

// TestRealSignals runs the program as a process: a reader that leaves, and a
// Ctrl-C.
func TestRealSignals(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	cmd := s.program("exec", id, "--", "yes")
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	_, err = io.ReadFull(stdout, make([]byte, 2))
	require.NoError(t, err)
	require.NoError(t, stdout.Close())
	require.Error(t, cmd.Wait())
	require.Equal(t, 141, cmd.ProcessState.ExitCode())
	require.Equal(t, "[]\n", s.ok("ps", "--json", id))

	cmd = s.program("exec", id, "--", "sh", "-c", "trap 'exit 9' INT; echo ready; while :; do sleep 0.05; done")
	stdout, err = cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	_, err = io.ReadFull(stdout, make([]byte, len("ready")))
	require.NoError(t, err)
	require.NoError(t, cmd.Process.Signal(os.Interrupt))
	require.Error(t, cmd.Wait())
	require.Equal(t, 9, cmd.ProcessState.ExitCode())
}

// TestExecThroughRestarts restarts the server under a command and wants its
// output whole.
func TestExecThroughRestarts(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	r := s.start(nil, "exec", id, "--", "sh", "-c", "for i in $(seq 200); do echo $i; sleep 0.02; done; exit 6")
	for i := range 4 {
		r.sees("\n" + strconv.Itoa(40*i+10) + "\n")
		s.server.Restart()
	}
	r.wait(6)
	var want strings.Builder
	for i := range 200 {
		fmt.Fprintln(&want, i+1)
	}
	require.Equal(t, want.String(), r.out.String())
	require.Empty(t, r.err.String())
}

// TestWaitTimeout gives up; the process goes on.
func TestWaitTimeout(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	s.ok("exec", "-d", "--tag", "long", id, "--", "sleep", "1000")
	began := time.Now()
	require.Contains(t, s.fails(125, "wait", "--timeout", "100ms", id, "long"), "gave up waiting")
	require.GreaterOrEqual(t, time.Since(began), 100*time.Millisecond)
	require.Contains(t, s.ok("ps", id), "long")
}

// TestSignalsArePassedOn: those that end a program reach the process, whose end is
// waited for; without one, all is killed.
func TestSignalsArePassedOn(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	for sig, name := range map[syscall.Signal]string{syscall.SIGTERM: "TERM", syscall.SIGHUP: "HUP", syscall.SIGQUIT: "QUIT"} {
		cmd := s.program("exec", id, "--", "sh", "-c", "trap 'echo "+name+"; exit 7' "+name+"; echo ready; while :; do sleep 0.05; done")
		var errs bytes.Buffer
		cmd.Stderr = &errs
		stdout, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		_, err = io.ReadFull(stdout, make([]byte, len("ready\n")))
		require.NoError(t, err)
		require.NoError(t, cmd.Process.Signal(sig))
		rest, err := io.ReadAll(stdout)
		require.NoError(t, err)
		require.Equal(t, name+"\n", string(rest))
		require.Error(t, cmd.Wait())
		require.Equal(t, 7, cmd.ProcessState.ExitCode())
		require.NotContains(t, errs.String(), "goroutine")
	}
	r := s.start(nil, "exec", id, "--", "sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done")
	terminal := s.start(strings.NewReader(""), "exec", "-it", id, "--", "sh", "-c", "trap 'echo caught; exit 8' HUP; echo ready; while :; do sleep 0.05; done")
	r.sees("ready")
	r.signal(syscall.SIGTERM)
	terminal.sees("ready")
	terminal.signal(syscall.SIGHUP)
	terminal.wait(8)
	r.wait(137) // in the end
}

func TestEnvironment(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	file := filepath.Join(t.TempDir(), "env")
	require.NoError(t, os.WriteFile(file, []byte("\uFEFF# comment\n\nA=of the file\r\n  B='x y' # no comment\nHERE\nMISSING\nC=\nD=1"), 0o600))
	s.env["HERE"] = "and there"
	s.env["EMPTY"] = ""
	got := s.ok("exec", "--env-file", file, "-e", "D=2", "-e", "EMPTY", "-e", "NOT_SET", id, "--", "env")
	for _, want := range []string{"A=of the file\n", "B='x y' # no comment\n", "HERE=and there\n", "C=\n", "D=2\n", "EMPTY=\n"} {
		require.Contains(t, got, want)
	}
	require.NotContains(t, got, "MISSING")
	require.NotContains(t, got, "NOT_SET")
	require.NoError(t, os.WriteFile(file, []byte("A=1\nnot a name=x\n"), 0o600))
	require.Contains(t, s.fails(125, "exec", "--env-file", file, id, "--", "env"), "line 2")
}

func TestUsers(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	for user, want := range map[string]string{
		"0":                   "0:0",
		"nobody":              "65534:65534",
		"12345":               "12345:0",
		"12345:23456":         "12345:23456",
		"root:nogroup":        "0:65534",
		"nobody:0":            "65534:0",
		"4294967294:00000001": "4294967294:1",
	} {
		require.Equal(t, want+"\n", s.ok("exec", "-w", "/", "-u", user, id, "--", "sh", "-c", "echo $(id -u):$(id -g)"), user)
	}
	require.Equal(t, "groups=23456\n", s.ok("exec", "-u", "12345:23456", id, "--", "sh", "-c", "id | sed 's/.* groups/groups/'"))
	for _, user := range []string{"nosuch", "nosuch:0", "0:nosuch", ":0", "1:2:3", "4294967295", "-1", "0:-1"} {
		s.fails(125, "exec", "-u="+user, id, "--", "true")
	}
}

func TestSeveralNames(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	for _, tag := range []string{"a", "b", "c"} {
		s.ok("exec", "-d", "--tag", tag, id, "--", "sh", "-c", "trap 'echo hup' HUP; echo up; while :; do sleep 0.05; done")
	}
	follow := s.start(nil, "logs", "-f", id, "a")
	follow.sees("up")
	s.ok("kill", "-HUP", id, "a")
	follow.sees("hup")
	s.ok("kill", "-9", id, "a")
	require.Contains(t, s.fails(1, "kill", "-s", "15", "--grace", "20s", id, "nobody", "b", "c"), "nobody: no process")
	require.Equal(t, "a: ended by SIGKILL (killed)\nb: ended by SIGTERM (killed)\n", s.start(nil, "wait", id, "a", "b").wait(137).out.String())
	require.Contains(t, s.start(nil, "wait", "--json", id, "b", "a").wait(143).out.String(), `"tag": "a"`)
	table := s.ok("ps", "-a", id)
	for _, column := range []string{"STARTED", "ENDED", "FOR", "ended by SIGTERM"} {
		require.Contains(t, table, column)
	}
	require.Contains(t, s.fails(1, "kill", "-s", "99", id, "a"), "unknown signal")
	require.Contains(t, s.fails(1, "kill", id), "which process?")
	require.Contains(t, s.fails(1, "ps", id, "x"), "one argument too many")
}

func TestSend(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	s.ok("exec", "-d", "-i", "--tag", "cat", id, "--", "cat")
	follow := s.start(nil, "logs", "-f", id, "cat")
	s.ok("send", id, "cat", "two", "words")
	follow.sees("two words\n")
	s.ok("send", "-n", id, "cat", "no newline")
	follow.sees("no newline")
	require.Empty(t, s.start(strings.NewReader("from a pipe"), "send", id, "cat").wait(0).out.String())
	attached := s.start(strings.NewReader(" and attached"), "attach", "--no-eof", id, "cat")
	attached.sees(" and attached")
	s.start(strings.NewReader(""), "send", "--eof", id, "cat").wait(0)
	attached.wait(0)
	follow.wait(0)
	require.Equal(t, "two words\nno newlinefrom a pipe and attached", follow.out.String())
	require.Contains(t, s.fails(1, "send", id, "cat", "late"), "no open standard input")
	require.Contains(t, s.fails(1, "send", id), "which process?")
}

func TestMergeAndIdle(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	r := s.start(nil, "exec", "--merge", id, "--", "sh", "-c", "echo 1; echo 2 >&2; echo 3").wait(0)
	require.Equal(t, "1\n2\n3\n", r.out.String())
	r = s.start(nil, "exec", "--idle-timeout", "1s", id, "--", "sh", "-c", "echo up; sleep 1000").wait(137)
	require.Contains(t, r.err.String(), "wrote nothing for too long")
}

func TestLogs(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	for _, tag := range []string{"a", "b"} {
		s.ok("exec", "-d", "--merge", "--tag", tag, id, "--", "sh", "-c", "seq 1 5; echo err >&2; printf "+tag)
		s.ok("wait", id, tag)
	}
	require.Equal(t, "err\na", s.ok("logs", "-n", "2", id, "a"))
	require.Equal(t, "", s.ok("logs", "-n", "2", "--stream", "stderr", id, "a"))
	require.Equal(t, "", s.ok("logs", "-n", "0", id, "a"))
	require.Equal(t, "", s.ok("logs", "--since", "0s", id, "a"))
	require.Equal(t, "1\n2\n3\n4\n5\nerr\na", s.ok("logs", "--since", "1h", "--lossless", id, "a"))
	require.Regexp(t, `^20\S+Z err\n20\S+Z a$`, s.ok("logs", "-t", "-n", "2", id, "a"))
	require.Equal(t, "a | err\na | a\nb | err\nb | b\n", s.ok("logs", "-n", "2", id, "a", "b"))
	require.Regexp(t, `^a \| 20\S+Z a\nb \| 20\S+Z b\n$`, s.ok("logs", "-t", "-n", "1", id, "a", "b"))
	both := s.ok("logs", "-f", id, "b", "a")
	require.Contains(t, both, "a | 5\n")
	require.Contains(t, both, "b | b\n")
	event := decode[map[string]any](t, s.ok("logs", "--json", "-t", "-n", "1", id, "a"))
	require.Equal(t, []any{"a", "stdout", "a", 14.0, 15.0}, []any{event["process"], event["type"], event["data"], event["offset"], event["end"]})
	require.Contains(t, event, "at")
	require.Contains(t, s.ok("attach", "--json", id, "a"), `"type":"exit"`)
	require.Contains(t, s.fails(1, "logs", id, "nobody", "a"), "nobody: no process")
	require.Contains(t, s.fails(1, "logs", "--stream", "both", id, "a"), "--stream")
	require.Contains(t, s.fails(1, "logs", "-n", "-1", id, "a"), "negative")
	quiet := s.start(nil, "logs", "-f", "-n", "1", id, "late")
	quiet.wait(1)
	s.ok("exec", "-d", "--tag", "late", id, "--", "sh", "-c", "echo one; sleep 1000")
	follow := s.start(nil, "logs", "-f", "-n", "1", id, "late")
	follow.sees("one\n")
	require.Equal(t, "", s.ok("logs", "--since", "0s", id, "late"), "it ends although the process goes on")
	s.ok("kill", id, "late")
	follow.wait(0)
}

func TestTree(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	s.ok("exec", "-d", "--tag", "parent", id, "--", "sh", "-c", "sleep 1234.5 & wait")
	var table string
	require.Eventually(t, func() bool {
		table = s.ok("ps", "--tree", id)
		return strings.Contains(table, "sleep 1234.5\n")
	}, patience, 10*time.Millisecond)
	require.Regexp(t, `(?m)^PID +OF +USER +STATE +CPU +MEMORY +PORTS +COMMAND$`, table)
	require.Regexp(t, `(?m)^\d+ +parent +\S+ +[RSD] +\S+ +\S+ MB +- +sh -c sleep 1234.5 & wait\n\d+ +parent +\S+ .*   sleep 1234.5$`, table)
	require.Contains(t, s.ok("ps", "--tree", "--json", id), `"cmd": "sleep 1234.5"`)
	require.Contains(t, s.fails(1, "ps", "--tree", "-a", id), "none of the others can be")
}
