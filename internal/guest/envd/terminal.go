package envd

import (
	"context"
	"os"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest/outputlog"
)

// terminal is our end of a process's pseudoterminal; see pty(7). A nil one is of a
// process that has none.
type terminal struct {
	file *os.File // whose reader closes it

	mu  sync.Mutex
	now nestbox.Terminal
}

// state returns the terminal as it is now.
func (t *terminal) state() *nestbox.Terminal {
	if t == nil {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now
	return &now
}

// resize changes the size. The kernel tells the programs (SIGWINCH).
func (t *terminal) resize(rows, cols int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	err := control(t.file, func(fd int) error { return setSize(fd, rows, cols) })
	if err == nil {
		t.now.Rows, t.now.Cols = rows, cols
	}
	return err
}

func setSize(fd, rows, cols int) error {
	return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(rows), Col: uint16(cols)})
}

func control(file *os.File, do func(fd int) error) error {
	conn, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	if err := conn.Control(func(fd uintptr) { result = do(int(fd)) }); err != nil {
		return err
	}
	return result
}

// ttyGroup and ttyMode are what other users' programs may write to a terminal with:
// write(1) belongs to the group tty.
const (
	ttyGroup = 5
	ttyMode  = 0o620
)

// openTerminal makes the standard streams of a process that has a terminal, which is
// owner's; nil = ours. The caller closes both ends.
func openTerminal(want nestbox.Terminal, owner *syscall.Credential) (s *stdio, err error) {
	s = &stdio{theirs: [3]int{-1, -1, -1}}
	defer func() {
		if err != nil {
			s.closeTheirs()
			s.closeOurs()
			s, err = nil, resourceError("make a terminal", err)
		}
	}()
	ours, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	master := os.NewFile(uintptr(ours), "terminal")
	s.out = []output{{outputlog.Pty, master}}
	if err := unix.IoctlSetPointerInt(ours, unix.TIOCSPTLCK, 0); err != nil {
		return nil, err
	}
	n, err := unix.IoctlGetUint32(ours, unix.TIOCGPTN)
	if err != nil {
		return nil, err
	}
	theirs, err := unix.Open("/dev/pts/"+strconv.FormatUint(uint64(n), 10), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	s.theirs[0] = theirs
	s.files = []uintptr{uintptr(theirs), uintptr(theirs), uintptr(theirs)}
	if owner != nil { // where that cannot be, the user can use it all the same, but not open it by name
		_ = unix.Fchown(theirs, int(owner.Uid), ttyGroup)
		_ = unix.Fchmod(theirs, ttyMode)
	}
	if err := setSize(ours, want.Rows, want.Cols); err != nil {
		return nil, err
	}
	input, err := unix.FcntlInt(uintptr(ours), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	s.stdin = os.NewFile(uintptr(input), "terminal")
	s.terminal = &terminal{file: master, now: want}
	return s, nil
}

// Resize implements guest.Processes.
func (t *table) Resize(_ context.Context, sel nestbox.Selector, rows, cols int) error {
	size := nestbox.Terminal{Rows: rows, Cols: cols}
	if err := size.Validate(); err != nil || rows == 0 || cols == 0 {
		return nestbox.Errorf(nestbox.CodeInvalid, "a terminal has 1 to %[1]d rows and 1 to %[1]d columns, not %[2]d and %[3]d", nestbox.MaxTerminalSize, rows, cols)
	}
	p, err := t.find(sel)
	switch {
	case err != nil:
		return err
	case p.terminal == nil:
		return nestbox.Errorf(nestbox.CodeInvalidState, "process %s has no terminal", sel)
	}
	err = p.terminal.resize(rows, cols)
	if output, _ := p.log.State(); err != nil && output.Closed {
		return nestbox.Errorf(nestbox.CodeInvalidState, "process %s has ended", sel)
	}
	if err != nil {
		return nestbox.Errorf(nestbox.CodeGuest, "resize the terminal of process %s: %w", sel, err)
	}
	return nil
}
