package client

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nestbox/nestbox"
)

// Cmd is a command in a capsule. It mirrors exec.Cmd of the standard library:
// fields are set, then Run, or Start and later Wait, is called once. It differs
// where a process of a capsule does:
//
//   - Reading goes on across lost connections and restarts of the server.
//     Output that is not kept any more is reported (see OnGap).
//   - Wait returns when the process has exited and all it had written by then
//     is read, even if something that it left behind still holds its standard
//     output (see UntilClosed).
//   - Killing, by the end of the context or by Timeout, ends the whole tree.
//   - With a Stdout or Stderr that fails, the process is killed, as SIGPIPE
//     would do.
//
// A Cmd is used by one goroutine at a time, but for Process.
type Cmd struct {
	Path    string            // a path, or a name looked up in the PATH of the capsule
	Args    []string          // arguments after the command's own name
	Env     map[string]string // added to, and winning over, the user's base environment
	Dir     string            // absolute; empty = the user's home
	User    string            // empty = root
	Tag     string            // empty = a new one; Process has it
	Timeout time.Duration     // 0 = none; to the second, rounded up

	// OnConflict is what to do if a live process has the Tag; "" = CodeConflict.
	OnConflict nestbox.TagConflict
	// IdleTimeout has it killed after so long without output; 0 = never; to the second.
	IdleTimeout time.Duration
	// Merge has standard error be standard output, so that what is written to both keeps
	// its order; all of it goes to Stdout.
	Merge bool

	// Terminal has it run in a terminal: all output goes to Stdout, and the end of Stdin
	// is not handed on, since a terminal has none.
	Terminal *nestbox.Terminal

	// Stdin is read in a goroutine, as for exec.Cmd. Unlike there, Wait does
	// not wait for a Read that hangs once the process has ended.
	Stdin  io.Reader
	Stdout io.Writer // nil = not kept
	Stderr io.Writer

	// OnGap, if set, is called for output that was lost because it was not
	// kept long enough: the bytes [from, to) of the output log. If it is nil,
	// Wait returns a *GapError.
	OnGap func(from, to int64)
	// UntilClosed makes Wait return only when no more output can come.
	UntilClosed bool
	// KeepRunning leaves the process running when the context ends, or when
	// its output cannot be written. Reading stops.
	KeepRunning bool

	Process *Process      // set by Start
	Exit    *nestbox.Exit // set by Wait, if the process has ended

	ctx       context.Context //nolint:containedctx // as in exec.Cmd
	procs     *Processes
	pipes     []io.Closer    // ours, closed when the process has ended
	stdinPipe *io.PipeReader // Stdin, if it is ours
	run       *running       // nil until started
	waited    bool
	capture   *prefixWriter // of stderr, for Output
}

// Process is a started process.
type Process struct {
	ID  nestbox.ProcessID
	PID int
	Tag string

	procs *Processes
}

// Resize changes the size of the process's terminal.
func (p *Process) Resize(ctx context.Context, rows, cols int) error {
	return p.procs.Resize(ctx, selector(p.ID), rows, cols)
}

// Kill ends the process and everything it started, at once.
func (p *Process) Kill(ctx context.Context) error {
	return p.procs.Kill(ctx, selector(p.ID), Kill{})
}

// Signal sends a signal, by name, to the process and its process group.
func (p *Process) Signal(ctx context.Context, name string) error {
	return p.procs.Signal(ctx, selector(p.ID), name)
}

// Command returns a Cmd that runs name, with args, in the capsule.
func (h *Capsule) Command(name string, args ...string) *Cmd {
	return h.CommandContext(context.Background(), name, args...)
}

// CommandContext is like Command; if ctx ends before the process does, the
// process and everything it started are killed (but see Cmd.KeepRunning).
func (h *Capsule) CommandContext(ctx context.Context, name string, args ...string) *Cmd {
	return &Cmd{Path: name, Args: args, ctx: ctx, procs: h.Processes}
}

// running is what goes on between Start and Wait.
type running struct {
	stream *Stream
	cancel context.CancelFunc // ends reading and feeding
	tasks  sync.WaitGroup     // reading, and watching the context
	ended  chan struct{}      // closed when reading has ended

	// Set by the reading goroutine before ended is closed.
	exit *nestbox.Exit
	errs []error

	stopFeeding context.CancelFunc
	inRead      atomic.Bool   // the feeding goroutine is, or soon will be, in Stdin.Read
	fed         chan struct{} // closed when feeding has ended
	feedErr     error         // set before fed is closed
}

// Run starts the command and waits for it.
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Start starts the command and returns once its program has been exec'ed.
// Wait must be called afterwards.
func (c *Cmd) Start() error {
	if c.run != nil {
		return nestbox.Errorf(nestbox.CodeInvalid, "client: already started")
	}
	spec := nestbox.ProcessSpec{
		Cmd: c.Path, Args: c.Args, Env: c.Env, Cwd: c.Dir, User: c.User, Tag: c.Tag,
		Stdin: c.Stdin != nil, Timeout: c.Timeout, IdleTimeout: c.IdleTimeout, OnConflict: c.OnConflict, Merge: c.Merge, Terminal: c.Terminal,
	}
	until := untilExit
	if c.UntilClosed {
		until = untilClosed
	}
	stream, err := c.procs.startStream(c.ctx, spec, until)
	if err != nil {
		c.closePipes(err)
		return err
	}
	c.Process = &Process{ID: stream.id, PID: stream.pid, Tag: stream.tag, procs: c.procs}
	ctx, cancel := context.WithCancel(context.WithoutCancel(c.ctx))
	c.run = &running{stream: stream, cancel: cancel, ended: make(chan struct{})}
	c.startFeeding(ctx)
	c.run.tasks.Go(func() { c.read(ctx) })
	c.run.tasks.Go(c.watch)
	return nil
}

// Wait waits until the command has exited and its output is read. It returns
// nil if the process exited with status 0 and nothing was lost, an *ExitError
// if it ended in any other way, and possibly others joined with it: a
// *GapError, an error of Stdout, Stderr or Stdin, the end of the context. A
// connection that broke for good is an error too; if even then the record of
// the process could be had, Exit is set.
func (c *Cmd) Wait() error {
	if c.run == nil || c.waited {
		return nestbox.Errorf(nestbox.CodeInvalid, "client: Wait without Start, or twice")
	}
	c.waited = true
	r := c.run
	r.tasks.Wait()
	r.stopFeeding()
	c.Exit = r.exit
	errs := r.errs
	if !r.inRead.Load() {
		<-r.fed
		if r.feedErr != nil {
			errs = append(errs, r.feedErr)
		}
	}
	r.cancel()
	if err := exitError(r.exit, c.capture); err != nil {
		if c.ctx.Err() != nil && r.exit.Reason == nestbox.ReasonKilled && len(errs) == 0 {
			errs = append(errs, contextError(c.ctx))
		}
		errs = append(errs, err)
	}
	if len(errs) == 1 {
		return errs[0]
	}
	return errors.Join(errs...)
}

// Output runs the command and returns its standard output. An *ExitError has
// the beginning of standard error, if Stderr was nil.
func (c *Cmd) Output() ([]byte, error) {
	if c.Stdout != nil {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "client: Stdout already set")
	}
	var stdout bytes.Buffer
	c.Stdout = &stdout
	if c.Stderr == nil {
		c.capture = &prefixWriter{}
		c.Stderr = c.capture
	}
	err := c.Run()
	return stdout.Bytes(), err
}

// CombinedOutput runs the command and returns its standard output and error,
// in the order in which they were written.
func (c *Cmd) CombinedOutput() ([]byte, error) {
	if c.Stdout != nil || c.Stderr != nil {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "client: Stdout or Stderr already set")
	}
	var both bytes.Buffer
	c.Stdout, c.Stderr, c.Merge = &both, &both, c.Terminal == nil
	err := c.Run()
	return both.Bytes(), err
}

// StdinPipe returns a pipe to the command's standard input. Closing it is end
// of file for the command. It is closed when the command has ended.
func (c *Cmd) StdinPipe() (io.WriteCloser, error) {
	if c.Stdin != nil || c.run != nil {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "client: Stdin already set, or already started")
	}
	r, w := io.Pipe()
	c.Stdin, c.stdinPipe = r, r
	c.pipes = append(c.pipes, r)
	return w, nil
}

// StdoutPipe returns a pipe from the command's standard output, which ends
// when the output does. It must be read to its end, or closed: unlike that of
// exec.Cmd, Wait waits for that and loses nothing.
func (c *Cmd) StdoutPipe() (io.ReadCloser, error) { return c.outputPipe(&c.Stdout) }

// StderrPipe is like StdoutPipe, for standard error.
func (c *Cmd) StderrPipe() (io.ReadCloser, error) { return c.outputPipe(&c.Stderr) }

func (c *Cmd) outputPipe(where *io.Writer) (io.ReadCloser, error) {
	if *where != nil || c.run != nil {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "client: output already set, or already started")
	}
	r, w := io.Pipe()
	*where = w
	c.pipes = append(c.pipes, w)
	return r, nil
}

// closePipes ends what hangs in a pipe of ours. Readers of output get err, or
// io.EOF if it is nil.
func (c *Cmd) closePipes(err error) {
	for _, p := range c.pipes {
		if w, ok := p.(*io.PipeWriter); ok {
			_ = w.CloseWithError(err)
			continue
		}
		_ = p.Close()
	}
}

// read copies the output until it ends, and finds out how the process did.
func (c *Cmd) read(ctx context.Context) {
	r := c.run
	defer close(r.ended)
	defer r.stream.Close()
	for {
		ev, err := r.stream.Next(ctx)
		if errors.Is(err, io.EOF) {
			c.closePipes(nil)
			return
		}
		if err == nil {
			err = c.take(ev)
		} else if c.ctx.Err() != nil {
			err = contextError(c.ctx) // which is why ctx ended too
		}
		if err != nil {
			c.closePipes(err)
			c.settle(ctx, err)
			return
		}
	}
}

// take handles one event.
func (c *Cmd) take(ev nestbox.OutputEvent) error {
	switch ev.Kind {
	case nestbox.EventData:
		w := c.Stdout
		if ev.Stream == nestbox.Stderr {
			w = c.Stderr
		}
		if w == nil {
			return nil
		}
		if n, err := w.Write(ev.Data); err != nil {
			return &writeError{ev.Stream, err}
		} else if n < len(ev.Data) {
			return &writeError{ev.Stream, io.ErrShortWrite}
		}
	case nestbox.EventGap:
		if c.OnGap != nil {
			c.OnGap(ev.Offset, ev.To)
			return nil
		}
		c.run.errs = append(c.run.errs, &GapError{From: ev.Offset, To: ev.To})
	case nestbox.EventExit:
		c.run.exit = ev.Exit
		c.run.stopFeeding()
	}
	return nil
}

// Time limits of what is done after the command's context has ended.
const (
	killWithin = 30 * time.Second
	readWithin = 10 * time.Second
)

// settle is for a command whose output could not be read, or written, to its
// end: what became of the process is asked of its record, never made up.
func (c *Cmd) settle(ctx context.Context, cause error) {
	c.run.errs = append(c.run.errs, cause)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killWithin)
	defer cancel()
	var w *writeError
	if errors.As(cause, &w) && !c.KeepRunning && c.run.exit == nil {
		if err := c.Process.Kill(ctx); err != nil {
			c.run.errs = append(c.run.errs, err)
		}
	}
	if c.run.exit != nil {
		return
	}
	proc, err := c.procs.Get(ctx, selector(c.Process.ID))
	if err == nil {
		c.run.exit = proc.Exit
	}
}

// watch acts on the end of the context.
func (c *Cmd) watch() {
	r := c.run
	select {
	case <-r.ended:
		return
	case <-c.ctx.Done():
	}
	if !c.KeepRunning {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(c.ctx), killWithin)
		err := c.Process.Kill(ctx)
		cancel()
		if err == nil {
			timer := time.NewTimer(readWithin)
			defer timer.Stop()
			select { // the last words
			case <-r.ended:
			case <-timer.C:
			}
		}
	}
	r.cancel()
	c.closePipes(contextError(c.ctx))
}

// writeError is a failure of the caller's Stdout or Stderr.
type writeError struct {
	stream nestbox.Stream
	err    error
}

func (e *writeError) Error() string { return "write " + string(e.stream) + ": " + e.err.Error() }
func (e *writeError) Unwrap() error { return e.err }

// prefixWriter keeps the first bytes of what is written.
type prefixWriter struct{ buf bytes.Buffer }

const maxPrefix = 64 << 10

func (w *prefixWriter) Write(p []byte) (int, error) {
	w.buf.Write(p[:min(len(p), maxPrefix-w.buf.Len())])
	return len(p), nil
}
