package guesttest

import (
	"bytes"
	"context"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// screen is a terminal with somebody in front of it.
type screen struct {
	t    *testing.T
	g    guest.Processes
	p    nestbox.Process
	r    guest.OutputReader
	seen bytes.Buffer
	exit *nestbox.Exit
}

func openScreen(t *testing.T, g guest.Processes, spec nestbox.ProcessSpec) *screen {
	t.Helper()
	if spec.Terminal == nil {
		spec.Terminal = &nestbox.Terminal{}
	}
	p, r := startAttached(t, g, spec, &guest.Attach{})
	return &screen{t: t, g: g, p: p, r: r}
}

func (s *screen) typeIn(text string) {
	s.t.Helper()
	require.NoError(s.t, s.g.WriteStdin(waiting(s.t), exact(s.p), []byte(text), false))
}

// until reads until text was shown, and forgets what was shown up to it.
func (s *screen) until(text string) {
	s.t.Helper()
	ctx := waiting(s.t)
	for {
		if _, after, found := strings.Cut(s.seen.String(), text); found {
			s.seen.Reset()
			s.seen.WriteString(after)
			return
		}
		require.True(s.t, s.next(ctx), "%q was not shown, but %q", text, s.seen.String())
	}
}

// next takes one event, and reports whether there was one.
func (s *screen) next(ctx context.Context) bool {
	s.t.Helper()
	event, err := s.r.Next(ctx)
	if err != nil {
		return false
	}
	switch event.Kind {
	case nestbox.EventData:
		require.Equal(s.t, nestbox.Pty, event.Stream)
		s.seen.Write(event.Data)
	case nestbox.EventExit:
		s.exit = event.Exit
	}
	return true
}

// end reads until no more output can come.
func (s *screen) end() nestbox.Exit {
	s.t.Helper()
	ctx := waiting(s.t)
	for s.next(ctx) {
	}
	require.NoError(s.t, ctx.Err())
	require.NotNil(s.t, s.exit)
	return *s.exit
}

// bash is a shell without any settings of the machine's.
func bash() nestbox.ProcessSpec {
	return nestbox.ProcessSpec{Cmd: "bash", Args: []string{"--norc", "--noprofile", "-i"}, Env: map[string]string{"PS1": "$ ", "HISTFILE": ""}}
}

func testTerminal(t *testing.T, g guest.Processes) {
	s := openScreen(t, g, shell(`tty; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo all; stty size; echo $TERM; exec 3<>/dev/tty && echo controlling >&3; exit 3`))
	require.Equal(t, &nestbox.Terminal{Rows: 24, Cols: 80, Term: "xterm-256color"}, s.p.Terminal)
	exit := s.end()
	require.Equal(t, 3, exit.Code)
	lines := strings.Split(s.seen.String(), "\r\n")
	require.Regexp(t, `^/dev/pts/\d+$`, lines[0])
	require.Equal(t, []string{"all", "24 80", "xterm-256color", "controlling", ""}, lines[1:])

	p, err := g.Get(waiting(t), exact(s.p))
	require.NoError(t, err)
	require.False(t, p.Stdin)
	require.True(t, p.Output.Closed)
	require.Equal(t, p.Output.End, p.Output.Pty)
	require.Zero(t, p.Output.Stdout+p.Output.Stderr)
	tr := &transcript{} // again, from the log
	r, err := g.Attach(waiting(t), exact(s.p), guest.Attach{})
	require.NoError(t, err)
	defer r.Close()
	tr.readAll(t, r)
	require.Equal(t, s.seen.String(), string(tr.pty))
	require.Equal(t, nestbox.CodeInvalidState, nestbox.CodeOf(g.Resize(waiting(t), exact(s.p), 10, 10)))

	spec := shell("stty size; echo $TERM $X")
	spec.Terminal, spec.Env = &nestbox.Terminal{Rows: 50, Cols: 132, Term: "screen"}, map[string]string{"TERM": "dumb", "X": "y"}
	s = openScreen(t, g, spec)
	s.end()
	require.Equal(t, "50 132\r\ndumb y\r\n", s.seen.String())

	for _, bad := range []nestbox.Terminal{{Rows: -1}, {Cols: 1 << 16}, {Term: "../x"}, {Term: strings.Repeat("x", 100)}} {
		spec.Terminal = &bad
		_, _, err := g.Start(waiting(t), spec, nil)
		requireError(t, nestbox.CodeInvalid, err)
	}
}

// testTerminalInput: what is typed goes through the line discipline, and bytes through a
// raw terminal as they are.
func testTerminalInput(t *testing.T, g guest.Processes) {
	s := openScreen(t, g, shell(`echo ready; while read -r line; do echo "<$line>"; done; echo over; trap 'echo int; exit 5' INT; echo waits; while :; do sleep 0.05; done`))
	require.True(t, s.p.Stdin)
	s.until("ready\r\n")
	s.typeIn("on\x7fe\r") // backspace, return
	s.until("<oe>")
	s.typeIn("\x04")
	s.until("over")
	s.until("waits")
	s.typeIn("\x03")
	s.until("int")
	require.Equal(t, 5, s.end().Code)

	s = openScreen(t, g, python(`
import os, sys, tty
tty.setraw(0)
os.write(1, b"ready")
left = 256
while left:
    got = os.read(0, left)
    os.write(1, got)
    left -= len(got)
`))
	s.until("ready")
	var all []byte
	for b := range 256 {
		all = append(all, byte(b))
	}
	s.typeIn(string(all))
	require.Zero(t, s.end().Code)
	require.Equal(t, all, s.seen.Bytes())

	err := g.WriteStdin(waiting(t), exact(openScreen(t, g, shell("sleep 1000")).p), nil, true)
	require.Contains(t, requireError(t, nestbox.CodeInvalidState, err).Message, "Ctrl-D")
}

func testTerminalResize(t *testing.T, g guest.Processes) {
	s := openScreen(t, g, shell(`trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done`))
	s.until("ready")
	require.NoError(t, g.Resize(waiting(t), exact(s.p), 40, 100))
	s.until("40 100")
	p, err := g.Get(waiting(t), exact(s.p))
	require.NoError(t, err)
	require.Equal(t, 40, p.Terminal.Rows)
	require.Equal(t, 100, p.Terminal.Cols)
	for _, bad := range [][2]int{{0, 1}, {1, 0}, {-1, 1}, {1, 1 << 20}} {
		requireError(t, nestbox.CodeInvalid, g.Resize(waiting(t), exact(s.p), bad[0], bad[1]))
	}
	plain := start(t, g, shell("sleep 1000"))
	requireError(t, nestbox.CodeInvalidState, g.Resize(waiting(t), exact(plain), 10, 10))
	requireError(t, nestbox.CodeNotFound, g.Resize(waiting(t), nestbox.Selector{Tag: "nobody"}, 10, 10))
}

// testTerminalJobs: a shell controls its jobs. The job says whether it is in front, so that
// keys meet it and not the shell.
func testTerminalJobs(t *testing.T, g guest.Processes) {
	dir := scratch(t, g)
	output(t, g, "cat > "+dir+`/job <<'EOF'
import os, time
was = None
while True:
    now = os.tcgetpgrp(0) == os.getpgrp()
    if now != was:
        print("in front" if now else "behind", flush=True)
    was = now
    time.sleep(0.02)
EOF`)
	s := openScreen(t, g, bash())
	s.until("$ ")
	s.typeIn("python3 " + dir + "/job\r")
	s.until("in front")
	s.typeIn("\x1a")
	s.until("Stopped")
	s.until("$ ")
	s.typeIn("bg\r")
	s.until("behind")
	s.typeIn("fg\r")
	s.until("in front")
	s.typeIn("\x03")
	s.until("KeyboardInterrupt")
	s.until("$ ")
	s.typeIn("exit 7\r")
	require.Equal(t, 7, s.end().Code)
}

// testTerminalHangUp: what runs in a terminal is told when its shell ends, and when
// somebody hangs up.
func testTerminalHangUp(t *testing.T, g guest.Processes) {
	dir := scratch(t, g)
	s := openScreen(t, g, shell(`sh -c 'trap "echo hup > `+dir+`/told; exit" HUP; echo ready; while :; do sleep 0.05; done'`))
	s.until("ready")
	require.NoError(t, g.Signal(waiting(t), exact(s.p), syscall.SIGHUP))
	s.end()
	require.Equal(t, "hup", output(t, g, "cat "+dir+"/told"))

	s = openScreen(t, g, bash())
	s.until("$ ")
	p, err := g.Kill(waiting(t), exact(s.p), guest.Kill{})
	require.NoError(t, err)
	require.Equal(t, nestbox.ReasonKilled, p.Exit.Reason)
	require.Equal(t, "SIGKILL", s.end().Signal)
}

// testTerminalUser: the terminal is the user's own, who may open it by name.
func testTerminalUser(t *testing.T, g guest.Processes) {
	name := strings.Split(output(t, g, `grep '^[a-z]' /etc/passwd | grep -v ^root: | tail -n 1`), ":")[0]
	spec := shell(`echo again > $(tty); stat -c '%U %a' $(tty)`)
	spec.User, spec.Cwd = name, "/"
	s := openScreen(t, g, spec)
	require.Zero(t, s.end().Code)
	require.Equal(t, "again\r\n"+name+" 620\r\n", s.seen.String())
}
