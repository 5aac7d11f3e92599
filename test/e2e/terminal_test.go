package e2e

import (
	"context"
	"strings"
	"testing"

	"github.com/hinshun/vt10x"
	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

// display is what somebody in front of a capsule's terminal sees.
type display struct {
	t      *testing.T
	ctx    context.Context //nolint:containedctx // of the test
	procs  *client.Processes
	tag    string
	stream *client.Stream
	vt     vt10x.Terminal
}

const rows, cols = 24, 80

// newDisplay opens a shell in a terminal.
func newDisplay(t *testing.T, s *server, id string) *display {
	t.Helper()
	c, err := client.New(client.Config{BaseURL: "http://" + s.addr, APIKey: s.key()})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	d := &display{t: t, ctx: ctx, procs: c.Capsule(id).Processes, tag: "screen"}
	_, err = d.procs.Start(ctx, nestbox.ProcessSpec{
		Cmd: "bash", Args: []string{"--norc", "--noprofile"}, Tag: d.tag, Terminal: &nestbox.Terminal{Rows: rows, Cols: cols},
		Env: map[string]string{"PS1": "$ ", "HISTFILE": ""},
	})
	require.NoError(t, err)
	d.comeBack()
	return d
}

// comeBack looks at the terminal with a new display, which is empty at first.
func (d *display) comeBack() {
	d.t.Helper()
	if d.stream != nil {
		require.NoError(d.t, d.stream.Close())
	}
	var err error
	d.stream, err = d.procs.Attach(d.ctx, d.tag, client.Attach{})
	require.NoError(d.t, err)
	d.vt = vt10x.New(vt10x.WithSize(cols, rows))
}

func (d *display) typeIn(text string) {
	d.t.Helper()
	require.NoError(d.t, d.procs.WriteStdin(d.ctx, d.tag, []byte(text), false))
}

// lines are the lines of the screen, without what is blank at their ends.
func (d *display) lines() []string {
	lines := strings.Split(d.vt.String(), "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " \x00")
	}
	return lines
}

// until waits until the screen looks as it should.
func (d *display) until(ok func(lines []string) bool) {
	d.t.Helper()
	for !ok(d.lines()) {
		ev, err := d.stream.Next(d.ctx)
		require.NoError(d.t, err, "the screen is\n%s", strings.Join(d.lines(), "\n"))
		_, err = d.vt.Write(ev.Data)
		require.NoError(d.t, err)
	}
}

// shows waits for a line.
func (d *display) shows(line string) {
	d.t.Helper()
	d.until(func(lines []string) bool {
		for _, l := range lines {
			if l == line {
				return true
			}
		}
		return false
	})
}

// ends waits for the last line that is not blank.
func (d *display) ends(line string) {
	d.t.Helper()
	d.until(func(lines []string) bool {
		return strings.HasSuffix(strings.TrimRight(strings.Join(lines, "\n"), "\n"), "\n"+line)
	})
}

// TestScreens types into programs of every kind, and compares what the screen shows, also
// to somebody who comes later.
func TestScreens(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	id := s.newCapsule()
	d := newDisplay(t, s, id)
	d.shows("$")
	d.typeIn("echo one; printf 'a\\tb\\rc\\n'; printf '\\033[31mred\\033[0m\\n'\r")
	d.shows("one")
	d.shows("c       b")
	d.shows("red")
	d.ends("$")

	d.typeIn("python3 -iq\r")
	d.ends(">>>")
	d.typeIn("6 *\x7f* 7\r") // a slip of the finger
	d.shows("42")
	d.typeIn("\x04")
	d.ends("$")

	// A program that draws: it clears the screen and writes into its corners.
	d.typeIn(`printf '\033[2J\033[1;1Htop\033[24;75Hend\033[12;38Hmiddle'; read -r x` + "\r")
	d.until(func(lines []string) bool {
		return lines[0] == "top" && strings.TrimLeft(lines[11], " ") == "middle" && strings.TrimLeft(lines[23], " ") == "end"
	})
	s.kill9()
	s.start()
	d.comeBack()
	d.until(func(lines []string) bool {
		return lines[0] == "top" && strings.TrimLeft(lines[11], " ") == "middle" && strings.TrimLeft(lines[23], " ") == "end"
	})
	d.typeIn("\r")

	// What of these the host has, the template has.
	for program, try := range map[string]func(){
		"less": func() {
			d.typeIn("clear; seq 1 1000 | less\r")
			d.until(func(lines []string) bool { return lines[0] == "1" && lines[22] == "23" })
			d.typeIn("G")
			d.until(func(lines []string) bool { return lines[22] == "1000" })
			d.typeIn("q")
		},
		"vim": func() {
			d.typeIn("clear; vim -u NONE -n /tmp/text\r")
			d.until(func(lines []string) bool { return lines[1] == "~" && lines[22] == "~" })
			d.typeIn("ifirst\rsecond\x1b1Gdd:wq\r")
			d.until(func(lines []string) bool { return strings.Contains(strings.Join(lines, "\n"), "written") })
			d.typeIn("clear; cat /tmp/text\r")
			d.shows("second")
		},
		"tmux": func() {
			d.typeIn("clear; tmux -f /dev/null new -s inner 'echo in tmux; exec sh -i'\r")
			d.until(func(lines []string) bool { return lines[0] == "in tmux" && strings.HasPrefix(lines[23], "[inner]") })
			d.typeIn("exit\r")
			d.until(func(lines []string) bool { return strings.Contains(strings.Join(lines, "\n"), "[exited]") })
		},
	} {
		if s.sh(id, "command -v "+program).ExitCode == 0 {
			try()
			d.typeIn("clear; echo d''one " + program + "\r")
			d.shows("done " + program)
		}
	}
	d.typeIn("exit 6\r")
	p, err := d.procs.Wait(d.ctx, d.tag)
	require.NoError(t, err)
	require.Equal(t, 6, p.Exit.Code)
}
