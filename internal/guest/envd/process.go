package envd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/outputlog"
)

// process is one process that was started by the API: its leader, its tree
// and its output.
type process struct {
	id        nestbox.ProcessID // in the order of starts; set with started
	tag       string
	mark      string // value of markVariable in the whole tree
	spec      nestbox.ProcessSpec
	cwd       string
	user      string
	startedAt time.Time
	log       *outputlog.Log
	out       []output
	terminal  *terminal  // nil = it has none
	stdin     *stdinPipe // nil if it is /dev/null

	started chan struct{} // closed when what follows is set
	pid     int
	child   *child
	group   *treeGroup
	timer   *time.Timer // nil without a timeout
	idle    *idleTimer  // nil without a limit of silence

	done chan struct{} // closed when the exit is recorded

	requestKeys []string // that led to it; guarded by table.mu

	mu      sync.Mutex
	args    []string
	argsCut bool               // args are only the first of them
	intent  nestbox.ExitReason // why it is being killed, if it is
}

// record returns what the API shows of the process.
func (p *process) record() nestbox.Process {
	output, exit := p.log.State()
	p.mu.Lock()
	args, cut := p.args, p.argsCut
	p.mu.Unlock()
	r := nestbox.Process{
		ID: p.id, PID: p.pid, Tag: p.tag, Cmd: p.spec.Cmd, Args: args, ArgsCut: cut,
		Cwd: nestbox.PathText(p.cwd), User: p.user, Stdin: p.stdin.isOpen(),
		StartedAt: p.startedAt, Output: output, Terminal: p.terminal.state(),
	}
	if exit != nil {
		e := *exit
		r.Exit = &e
	}
	return r
}

// cutArgs leaves the first arguments, and returns how many bytes that freed.
func (p *process) cutArgs() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	before := argBytes(p.args)
	var cut bool
	p.args, cut = cutArgs(p.args, nestbox.MaxListedArgs)
	p.argsCut = p.argsCut || cut
	return before - argBytes(p.args)
}

// argBytes is what arguments take of memory.
func (p *process) argBytes() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return argBytes(p.args)
}

func argBytes(args []string) int {
	n := 0
	for _, arg := range args {
		n += len(arg) + 16 // its header
	}
	return n
}

// ended reports whether the exit is recorded.
func (p *process) ended() bool {
	_, exit := p.log.State()
	return exit != nil
}

// intend notes why the process is about to be killed. The first reason stays.
func (p *process) intend(reason nestbox.ExitReason) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.intent == "" {
		p.intent = reason
	}
}

// recordExit takes over what the leader had written, however much others
// still write, and then records its end.
func (p *process) recordExit(status unix.WaitStatus, at time.Time) {
	p.log.End(p.exitOf(status, at), func(fill fillFunc) {
		for _, o := range p.out {
			drain(fill, o)
		}
	})
}

// fillFunc reads once from a stream into a log.
type fillFunc = func(stream int, read func([]byte) (int, error)) (int, error)

func (p *process) exitOf(status unix.WaitStatus, at time.Time) nestbox.Exit {
	p.mu.Lock()
	defer p.mu.Unlock()
	exit := nestbox.Exit{Code: status.ExitStatus(), Reason: nestbox.ReasonExited, At: at}
	if status.Signaled() {
		sig := status.Signal()
		exit.Code = 128 + int(sig)
		exit.Reason = nestbox.ReasonSignalled
		if exit.Signal = nestbox.SignalName(sig); exit.Signal == "" {
			exit.Signal = fmt.Sprintf("SIG%d", int(sig)) // a real-time signal
		}
	}
	if p.intent != "" {
		exit.Reason = p.intent
	}
	return exit
}

// pump moves one stream into the log until its end. No buffer is held while
// there is nothing to read. It calls after without a lock after every read.
func (p *process) pump(o output, after func()) {
	stream, file := o.stream, o.file
	defer func() { _ = file.Close() }()
	conn, err := file.SyscallConn()
	if err != nil {
		return
	}
	enlarged := false
	for p.log.WaitRoom() {
		var n int
		var readErr error
		err := conn.Read(func(fd uintptr) bool {
			n, readErr = p.log.Fill(stream, func(buf []byte) (int, error) { return readNow(int(fd), buf) })
			if n >= enlargeAt && !enlarged {
				enlarge(fd)
				enlarged = true
			}
			return !errors.Is(readErr, unix.EAGAIN)
		})
		if err != nil || readErr != nil || n == 0 {
			return
		}
		p.idle.hear()
		after()
	}
}

// shutDown ends everything that waits for the process. It lives on.
func (p *process) shutDown() {
	p.log.Abort()
	for _, o := range p.out {
		_ = o.file.Close()
	}
	p.stdin.close()
	p.stopTimers()
}

func (p *process) stopTimers() {
	if p.timer != nil {
		p.timer.Stop()
	}
	p.idle.stop()
}

// idleTimer calls a function once nothing was heard for a while. A nil one never does.
type idleTimer struct {
	limit time.Duration
	heard atomic.Int64 // after begun, in nanoseconds
	begun time.Time
	timer *time.Timer
}

func newIdleTimer(limit time.Duration, quiet func()) *idleTimer {
	i := &idleTimer{limit: limit, begun: time.Now()}
	armed := make(chan struct{})
	i.timer = time.AfterFunc(limit, func() {
		<-armed
		if left := limit - (time.Since(i.begun) - time.Duration(i.heard.Load())); left > 0 {
			i.timer.Reset(left)
			return
		}
		quiet()
	})
	close(armed)
	return i
}

// hear begins the time anew. It costs next to nothing: output may come in bytes.
func (i *idleTimer) hear() {
	if i != nil {
		i.heard.Store(int64(time.Since(i.begun)))
	}
}

func (i *idleTimer) stop() {
	if i != nil {
		i.timer.Stop()
	}
}

// terminalHolds is more than a terminal keeps for its reader.
const terminalHolds = 64 << 10

// drain reads what is in a pipe now, and not what is written to it meanwhile.
func drain(fill fillFunc, o output) {
	stream := o.stream
	conn, err := o.file.SyscallConn()
	if err != nil {
		return // closed: it was read to its end
	}
	_ = conn.Control(func(fd uintptr) {
		pending, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ) // FIONREAD
		if stream == outputlog.Pty {                            // Linux does not count what it is still about to hand over
			pending, err = terminalHolds, nil
		}
		if err != nil {
			return
		}
		for pending > 0 {
			n, err := fill(stream, func(buf []byte) (int, error) { return readNow(int(fd), buf) })
			if err != nil || n <= 0 {
				return
			}
			pending -= n
		}
	})
}

// readNow reads without waiting: EAGAIN if there is nothing.
func readNow(fd int, buf []byte) (int, error) {
	for {
		n, err := unix.Read(fd, buf)
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// stdinPipe is our end of a process's standard input. A nil one is never open.
type stdinPipe struct {
	file   *os.File
	turn   chan struct{} // holds one token, which the writer takes
	mu     sync.Mutex
	closed bool
}

func newStdinPipe(file *os.File) *stdinPipe {
	if file == nil {
		return nil
	}
	s := &stdinPipe{file: file, turn: make(chan struct{}, 1)}
	s.turn <- struct{}{}
	return s
}

func (s *stdinPipe) isOpen() bool {
	if s == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.closed
}

func (s *stdinPipe) close() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.closed = true
		_ = s.file.Close()
	}
}

// write writes all of data, one caller after another, and then closes the
// pipe if eof.
func (s *stdinPipe) write(ctx context.Context, data []byte, eof bool) error {
	select {
	case <-s.turn:
		defer func() { s.turn <- struct{}{} }()
	case <-ctx.Done():
		return guest.ContextError(ctx)
	}
	if !s.isOpen() {
		return errNoStdin()
	}
	if err := s.writeAll(ctx, data); err != nil {
		return err
	}
	if eof {
		s.close()
	}
	return nil
}

func (s *stdinPipe) writeAll(ctx context.Context, data []byte) error {
	if len(data) == 0 {
		return nil
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = s.file.SetWriteDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	n, err := s.file.Write(data)
	if !stop() {
		<-interrupted
		_ = s.file.SetWriteDeadline(time.Time{})
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		e := nestbox.Errorf(nestbox.CodeOf(guest.ContextError(ctx)), "%d of %d bytes were written to standard input, which is full", n, len(data))
		e.Err = ctx.Err()
		return e
	case errors.Is(err, syscall.EPIPE):
		s.close()
		return nestbox.Errorf(nestbox.CodeInvalidState, "nobody reads the process's standard input any more; %d of %d bytes were written", n, len(data))
	case errors.Is(err, os.ErrClosed):
		return errNoStdin()
	}
	return nestbox.Errorf(nestbox.CodeGuest, "write to standard input: %w", err)
}

func errNoStdin() error {
	return nestbox.Errorf(nestbox.CodeInvalidState, "the process has no open standard input")
}
