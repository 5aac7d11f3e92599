package cli_test

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// window is a terminal with a program of ours in it.
type window struct {
	t    *testing.T
	file *os.File
	cmd  *exec.Cmd
	seen bytes.Buffer
}

// open runs a command line in a terminal of a size.
func (s *shell) open(rows, cols uint16, args ...string) *window {
	s.t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	require.NoError(s.t, err)
	w := &window{t: s.t, file: os.NewFile(uintptr(fd), "terminal"), cmd: s.program(args...)}
	s.t.Cleanup(func() { _ = w.file.Close() })
	require.NoError(s.t, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetUint32(fd, unix.TIOCGPTN)
	require.NoError(s.t, err)
	theirs, err := os.OpenFile("/dev/pts/"+strconv.Itoa(int(n)), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(s.t, err)
	w.resize(rows, cols)
	w.cmd.Stdin, w.cmd.Stdout, w.cmd.Stderr = theirs, theirs, theirs
	w.cmd.Env = append(w.cmd.Env, "TERM=xterm")
	// A child of ours in a session of its own would be taken for an orphan by the envd that
	// plays the capsule in this process.
	w.cmd.Args = append([]string{"setsid", "--fork", "--ctty", "--wait"}, w.cmd.Args...)
	w.cmd.Path, err = exec.LookPath("setsid")
	require.NoError(s.t, err)
	require.NoError(s.t, w.cmd.Start())
	require.NoError(s.t, theirs.Close())
	return w
}

func (w *window) resize(rows, cols uint16) {
	w.t.Helper()
	conn, err := w.file.SyscallConn()
	require.NoError(w.t, err)
	require.NoError(w.t, conn.Control(func(fd uintptr) {
		err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	}))
	require.NoError(w.t, err)
}

func (w *window) typeIn(text string) {
	w.t.Helper()
	_, err := w.file.WriteString(text)
	require.NoError(w.t, err)
}

// until reads until text was shown, and forgets what was shown up to it.
func (w *window) until(text string) {
	w.t.Helper()
	require.NoError(w.t, w.file.SetReadDeadline(time.Now().Add(patience)))
	buf := make([]byte, 4096)
	for {
		if _, after, found := strings.Cut(w.seen.String(), text); found {
			w.seen.Reset()
			w.seen.WriteString(after)
			return
		}
		n, err := w.file.Read(buf)
		require.NoError(w.t, err, "%q was not shown, but %q", text, w.seen.String())
		w.seen.Write(buf[:n])
	}
}

// code reads the rest, and waits for the end of the program.
func (w *window) code() int {
	w.t.Helper()
	rest, _ := io.ReadAll(w.file) // it ends with an error when the program does
	w.seen.Write(rest)
	err := w.cmd.Wait()
	require.NotNil(w.t, w.cmd.ProcessState, "%v, after %q", err, w.seen.String())
	return w.cmd.ProcessState.ExitCode()
}

func TestTerminal(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	w := s.open(33, 77, "exec", "-it", "--tag", "sh", "-e", "PS1=$ ", "-e", "HISTFILE=", id, "--", "bash", "--norc", "--noprofile")
	w.until("$ ")
	w.typeIn("stty size; echo $TERM\r")
	w.until("33 77")
	w.until("xterm")
	w.until("$ ")
	w.typeIn(`echo re''ady; until [ "$(stty size)" = "44 99" ]; do sleep 0.05; done; echo res''ized` + "\r")
	w.until("ready")
	w.resize(44, 99)
	w.until("resized")
	w.until("$ ")
	w.typeIn(`python3 -c 'print("u" + "p", flush=True); import time; time.sleep(1000)'` + "\r")
	w.until("up\r\n")
	w.typeIn("\x03")
	w.until("KeyboardInterrupt")
	w.until("$ ")
	s.server.Restart() // it is lost for a moment
	w.typeIn("X=kept; echo still ther''e\r")
	w.until("still there")
	w.typeIn("\x10") // held, until it is clear what it is for
	w.typeIn("\x11")
	w.until("detached; sh goes on")
	require.Zero(t, w.code())

	w = s.open(20, 60, "attach", "-t", id, "sh")
	w.until("still there")
	w.typeIn("echo $X agai''n; stty size\r")
	w.until("kept again")
	w.until("20 60")
	w.typeIn("exit 7\r")
	require.Equal(t, 7, w.code())

	require.Contains(t, s.fails(125, "attach", "-t", id, strings.TrimSpace(s.ok("exec", "-d", id, "sleep", "1000"))), "has no terminal")
	require.Contains(t, s.ok("exec", "-t", id, "tty"), "/dev/pts/")
	tag := strings.TrimSpace(s.ok("exec", "-dt", id, "--", "sh", "-c", "tty; exit 3"))
	s.fails(3, "wait", id, tag)
	require.Contains(t, s.ok("logs", id, tag), "/dev/pts/")
}

func TestShell(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	w := s.open(24, 80, "shell", s.capsule())
	w.typeIn("echo u''p $0\r")
	w.until("up bash")
	w.typeIn("exit 9\r")
	require.Equal(t, 9, w.code())
}
