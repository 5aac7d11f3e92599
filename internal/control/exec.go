package control

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// MaxExecOutput is how much output, in bytes of stdout and stderr together,
// Exec keeps.
const MaxExecOutput = 32 << 20

// overdue is how long the end of a process is waited for after its time was up.
const overdue = 15 * time.Second

// ExecResult is a process that ran to its end.
type ExecResult struct {
	Process   nestbox.Process // as started, with its Exit
	Truncated bool            // there was more output than MaxExecOutput, or than there was room for
	Duration  time.Duration   // from the request to the exit, as seen from here
}

// Exec runs a process in the foreground: it starts it, writes its output to stdout
// and stderr up to the leader's exit, and returns how it ended. Descendants that hold the output open are not
// waited for. Output over MaxExecOutput is read, so that the process does not
// stall, and dropped. If ctx ends, the process goes on: CodeCanceled, or
// CodeTimeout. With spec.Stdin, input is its whole standard input.
func (p *Processes) Exec(ctx context.Context, by Caller, id string, spec nestbox.ProcessSpec, input []byte, stdout, stderr io.Writer) (ExecResult, error) {
	procs, err := p.of(ctx, by, id)
	if err != nil {
		return ExecResult{}, err
	}
	if spec.Timeout > 0 { // which is for the capsule's daemon to keep, and not believed
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, spec.Timeout+overdue, nestbox.Errorf(nestbox.CodeTimeout,
			"the process did not end although its time was up"))
		defer cancel()
	}
	begun := p.cfg.Now()
	proc, reader, err := procs.Start(ctx, spec, &guest.Attach{Lossless: true})
	if err != nil {
		return ExecResult{}, err
	}
	c := collector{processes: procs, reader: reader, room: MaxExecOutput, stdout: stdout, stderr: stderr, result: ExecResult{Process: proc}}
	feeding, stopFeeding := context.WithCancel(ctx)
	var feeder sync.WaitGroup
	if input != nil {
		feeder.Go(func() {
			// What is not read is of no interest: the program has its reasons.
			_ = procs.WriteStdin(feeding, nestbox.Selector{ID: proc.ID}, input, true)
		})
	}
	err = c.run(ctx)
	stopFeeding()
	feeder.Wait()
	c.result.Duration = p.cfg.Now().Sub(begun)
	if err != nil {
		return ExecResult{}, err
	}
	return c.result, nil
}

// collector reads a process's output to its exit.
type collector struct {
	processes guest.Processes
	reader    guest.OutputReader
	stdout    io.Writer
	stderr    io.Writer
	room      int // left of MaxExecOutput
	result    ExecResult
	next      int64 // the offset that was reached
}

// maxCuts bounds how often in a row a reader is attached again without having
// read anything.
const maxCuts = 3

func (c *collector) run(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, c.reader.Close()) }()
	for cuts := 0; ; {
		event, err := c.reader.Next(ctx)
		switch {
		case err == nil:
			cuts = 0
			if c.take(event) {
				return nil
			}
		case ctx.Err() != nil:
			return endOf(ctx)
		case errors.Is(err, io.EOF):
			return c.askRecord(ctx, nestbox.Errorf(nestbox.CodeGuest, "the output of process %d ended without its exit", c.result.Process.PID))
		case cuts == maxCuts:
			return c.askRecord(ctx, nestbox.Errorf(nestbox.CodeGuest, "lost the output of process %d, which goes on: %w", c.result.Process.PID, err))
		default:
			cuts++
			if err := c.attachAgain(ctx); err != nil {
				return err
			}
		}
	}
}

// askRecord is for output that cannot be read to its end: how the process ended is
// asked of its record, never made up. cause is the error if it has not.
func (c *collector) askRecord(ctx context.Context, cause error) error {
	proc, err := c.processes.Get(ctx, nestbox.Selector{ID: c.result.Process.ID})
	if err != nil || proc.Exit == nil {
		return cause
	}
	c.result.Process.Exit, c.result.Truncated = proc.Exit, true
	return nil
}

func (c *collector) attachAgain(ctx context.Context) error {
	reader, err := c.processes.Attach(ctx, nestbox.Selector{ID: c.result.Process.ID},
		guest.Attach{Since: nestbox.Since{Offset: c.next}, Lossless: true})
	if err != nil {
		return err
	}
	_ = c.reader.Close() // it is cut: how it ends is of no interest
	c.reader = reader
	return nil
}

// take adds one event to the result, and reports whether it is the exit.
func (c *collector) take(event nestbox.OutputEvent) bool {
	r := &c.result
	c.next = event.End()
	r.Process.Output.End = c.next
	switch event.Kind {
	case nestbox.EventData:
		kept, total := c.stdout, &r.Process.Output.Stdout
		if event.Stream == nestbox.Stderr {
			kept, total = c.stderr, &r.Process.Output.Stderr
		}
		*total += int64(len(event.Data))
		data := event.Data[:min(len(event.Data), c.room)]
		c.room -= len(data)
		if _, err := kept.Write(data); err != nil {
			c.room, r.Truncated = 0, true // the process is read on, so that it does not stall
		}
		r.Truncated = r.Truncated || len(data) < len(event.Data)
	case nestbox.EventGap:
		r.Truncated = true
	case nestbox.EventExit:
		r.Process.Exit = event.Exit
		return true
	}
	return false
}

// endOf is the error of a context that has ended.
func endOf(ctx context.Context) error {
	err := ctx.Err()
	if cause, ok := errors.AsType[*nestbox.Error](context.Cause(ctx)); ok {
		return cause
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return &nestbox.Error{Code: nestbox.CodeTimeout, Message: "the time for the request ran out; the process goes on", Err: err}
	}
	return &nestbox.Error{Code: nestbox.CodeCanceled, Message: "the caller went away; the process goes on", Err: err}
}
