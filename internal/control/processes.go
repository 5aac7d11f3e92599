package control

import (
	"context"
	"log/slog"
	"syscall"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// Processes are the use cases of the processes of a capsule. Every method asks
// first whether the caller owns the capsule and whether it runs, and notes that
// it is in use: CodeInvalid, CodeNotFound and CodeInvalidState as Capsules.Guest
// has them. Other errors are those of guest.Processes.
type Processes struct {
	cfg      Config
	capsules *Capsules
	ports    *Ports
}

// killIn bounds how long the end of a tree is waited for whose caller has left.
const killIn = 30 * time.Second

func (p *Processes) of(ctx context.Context, by Caller, id string) (guest.Processes, error) {
	g, err := p.capsules.Guest(ctx, by, id)
	if err != nil {
		return nil, err
	}
	return g.Processes(), nil
}

// Start starts a process in the background.
func (p *Processes) Start(ctx context.Context, by Caller, id string, spec nestbox.ProcessSpec) (nestbox.Process, error) {
	procs, err := p.of(ctx, by, id)
	if err != nil {
		return nestbox.Process{}, err
	}
	proc, _, err := procs.Start(ctx, spec, nil)
	return proc, err
}

// List returns the live processes, or with all also the remembered ones.
func (p *Processes) List(ctx context.Context, by Caller, id string, all bool) ([]nestbox.Process, error) {
	procs, err := p.of(ctx, by, id)
	if err != nil {
		return nil, err
	}
	return procs.List(ctx, all)
}

// Tree returns all processes of a capsule, whoever started them.
func (p *Processes) Tree(ctx context.Context, by Caller, id string) ([]nestbox.SystemProcess, error) {
	procs, err := p.of(ctx, by, id)
	if err != nil {
		return nil, err
	}
	return procs.Tree(ctx)
}

// Get returns one record.
func (p *Processes) Get(ctx context.Context, by Caller, id string, sel nestbox.Selector) (nestbox.Process, error) {
	procs, err := p.of(ctx, by, id)
	if err != nil {
		return nestbox.Process{}, err
	}
	return procs.Get(ctx, sel)
}

// Wait returns the record of the process that sel names now, once that has
// ended, or as it is after atMost.
func (p *Processes) Wait(ctx context.Context, by Caller, id string, sel nestbox.Selector, atMost time.Duration) (nestbox.Process, error) {
	procs, err := p.of(ctx, by, id)
	if err != nil {
		return nestbox.Process{}, err
	}
	proc, err := procs.Get(ctx, sel)
	if err != nil || !proc.Running() || atMost <= 0 {
		return proc, err
	}
	exact := nestbox.Selector{ID: proc.ID}
	waiting, cancel := context.WithTimeout(ctx, atMost)
	defer cancel()
	ended, err := procs.Wait(waiting, exact)
	if err != nil && waiting.Err() != nil && ctx.Err() == nil {
		return procs.Get(ctx, exact)
	}
	return ended, err
}

// Kill ends a whole process tree.
func (p *Processes) Kill(ctx context.Context, by Caller, id string, sel nestbox.Selector, how guest.Kill) error {
	capsule, g, err := p.capsules.use(ctx, by, id)
	if err != nil {
		return err
	}
	defer p.ports.end(capsule.ID)()
	_, err = g.Processes().Kill(ctx, sel, how)
	return err
}

// endsWithin is how long a process may take that got a signal to end, and that nobody
// waits for.
const endsWithin = 15 * time.Second

// Signal sends a signal to a process and its process group.
func (p *Processes) Signal(ctx context.Context, by Caller, id string, sel nestbox.Selector, sig syscall.Signal) error {
	capsule, g, err := p.capsules.use(ctx, by, id)
	if err != nil {
		return err
	}
	switch sig {
	case syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT:
		time.AfterFunc(endsWithin, p.ports.end(capsule.ID))
	}
	return g.Processes().Signal(ctx, sel, sig)
}

// Resize changes the size of a process's terminal.
func (p *Processes) Resize(ctx context.Context, by Caller, id string, sel nestbox.Selector, rows, cols int) error {
	procs, err := p.of(ctx, by, id)
	if err != nil {
		return err
	}
	return procs.Resize(ctx, sel, rows, cols)
}

// WriteStdin writes to the standard input of a process.
func (p *Processes) WriteStdin(ctx context.Context, by Caller, id string, sel nestbox.Selector, data []byte, eof bool) error {
	procs, err := p.of(ctx, by, id)
	if err != nil {
		return err
	}
	return procs.WriteStdin(ctx, sel, data, eof)
}

// Reading is a reader of one process's output, with the record as it stood when
// the reader was attached.
type Reading struct {
	guest.OutputReader
	Process nestbox.Process
	From    int64 // the offset at which the reader begins
}

// Attach returns a reader of the process that sel names now; it stays with that
// one whatever PID and tag come to mean. It begins exactly at Reading.From. Lines are
// those of stream; "" = of all.
func (p *Processes) Attach(ctx context.Context, by Caller, id string, sel nestbox.Selector, how guest.Attach, stream nestbox.Stream) (*Reading, error) {
	procs, err := p.of(ctx, by, id)
	if err != nil {
		return nil, err
	}
	proc, err := procs.Get(ctx, sel)
	if err != nil {
		return nil, err
	}
	exact := nestbox.Selector{ID: proc.ID}
	from := how.Since.Begins(proc.Output)
	if how.Since.Sought() {
		offset, err := procs.Locate(ctx, exact, how.Since, stream)
		if err != nil {
			return nil, err
		}
		from = max(from, offset)
	}
	reader, err := procs.Attach(ctx, exact, guest.Attach{Since: nestbox.Since{Offset: from}, Lossless: how.Lossless, Times: how.Times})
	if err != nil {
		return nil, err
	}
	return &Reading{OutputReader: reader, Process: proc, From: from}, nil
}

// Run is a process that its caller attends: one reader, which the process waits
// for, sees all of its output.
type Run struct {
	Reading
	procs  guest.Processes
	detach bool
	log    *slog.Logger
}

// Run starts a process and attends it. The start does not end with ctx, so that
// no process is started that nobody knows of. With detach the process lives on
// when its caller leaves.
func (p *Processes) Run(ctx context.Context, by Caller, id string, spec nestbox.ProcessSpec, detach bool) (*Run, error) {
	procs, err := p.of(ctx, by, id)
	if err != nil {
		return nil, err
	}
	proc, reader, err := procs.Start(context.WithoutCancel(ctx), spec, &guest.Attach{Lossless: true})
	if err != nil {
		return nil, err
	}
	return &Run{
		Reading: Reading{OutputReader: reader, Process: proc},
		procs:   procs, detach: detach, log: p.cfg.Log.With(keyCapsule, id),
	}, nil
}

func (r *Run) selector() nestbox.Selector { return nestbox.Selector{ID: r.Process.ID} }

// WriteStdin writes to the standard input of the process.
func (r *Run) WriteStdin(ctx context.Context, data []byte, eof bool) error {
	return r.procs.WriteStdin(ctx, r.selector(), data, eof)
}

// Kill ends the process and everything it started. Once begun it goes on
// without ctx, at most killIn.
func (r *Run) Kill(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killIn)
	defer cancel()
	_, err := r.procs.Kill(ctx, r.selector(), guest.Kill{})
	return err
}

// Abandon is for a caller that left before it was told the exit: unless the run
// is detached, it is killed.
func (r *Run) Abandon(ctx context.Context) {
	if r.detach {
		return
	}
	if err := r.Kill(ctx); err != nil {
		r.log.Warn("killing an abandoned process", "process", r.Process.ID, keyError, err)
	}
}
