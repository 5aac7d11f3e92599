package cli

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

const detachDoc = "Ctrl-P Ctrl-Q detaches: the process goes on, and `nestbox attach -t` comes back to it."

func newShell(a *app) *cobra.Command {
	var f execFlags
	cmd := &cobra.Command{
		Use:   "shell [flags] <capsule>",
		Short: "Open a shell in a capsule",
		Long: `Open a login shell in a capsule, in a terminal: bash, or else sh. It lives through lost
connections and restarts of the server. ` + detachDoc,
		Args:              usual,
		ValidArgsFunction: a.completeCapsule,
		RunE: func(cmd *cobra.Command, args []string) error {
			capsule, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			spec, err := f.spec(a.LookupEnv, []string{"/bin/sh", "-c", "command -v bash >/dev/null && exec bash -l; exec sh -l"})
			if err != nil {
				return err
			}
			return a.execTerminal(cmd.Context(), capsule, spec)
		},
	}
	f.addTo(cmd.Flags())
	return passesExitCode(cmd)
}

// execTerminal starts a process in a terminal of the size of ours, and goes in front of
// it.
func (a *app) execTerminal(ctx context.Context, capsule *client.Capsule, spec nestbox.ProcessSpec) error {
	spec.Terminal = &nestbox.Terminal{Term: a.Getenv("TERM")}
	if spec.Terminal.Validate() != nil { // it is ours that is odd
		spec.Terminal.Term = ""
	}
	if tty, ok := a.tty(); ok {
		spec.Terminal.Cols, spec.Terminal.Rows = size(tty)
	}
	p, err := capsule.Processes.Start(ctx, spec)
	if err != nil {
		return err
	}
	return a.goInFront(ctx, capsule, p, client.Attach{UntilExit: true}, true, true)
}

// attachTerminal comes back to a process that has a terminal, and shows its last output.
func (a *app) attachTerminal(ctx context.Context, capsule *client.Capsule, sel string, how client.Attach, input bool) error {
	p, err := capsule.Processes.Get(ctx, sel)
	if err != nil {
		return err
	}
	if p.Terminal == nil {
		return nestbox.Errorf(nestbox.CodeInvalidState, "process %s has no terminal: attach without -t", sel)
	}
	return a.goInFront(ctx, capsule, p, how, input, false)
}

// goInFront passes on what is typed and shows what comes, until the process ends or
// somebody detaches. Signals are for a process that is ours; of another they detach.
func (a *app) goInFront(ctx context.Context, capsule *client.Capsule, p nestbox.Process, how client.Attach, input, ours bool) error {
	stream, err := capsule.Processes.Attach(ctx, p.ID.String(), how)
	if err != nil {
		return err
	}
	defer stream.Close()
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	defer a.watchSignals(ctx, capsule.Processes, p.ID, ours, cancel)()
	s := &session{a: a, procs: capsule.Processes, id: p.ID.String()}
	if tty, ok := a.tty(); ok && input {
		raw, err := term.MakeRaw(tty)
		if err != nil {
			return err
		}
		defer func() { _ = term.Restore(tty, raw) }()
		defer s.followSize(ctx, tty)()
	}
	if input && p.Running() {
		// Not waited for: it may hang in a read of the terminal.
		go func() {
			if s.typeIn(ctx) {
				cancel(errDetached)
			}
		}()
	}
	exit, err := a.follow(ctx, p.Tag, stream)
	switch {
	case exit != nil:
		return exitOf(*exit)
	case errors.Is(context.Cause(ctx), errDetached):
		a.warn("\r\ndetached; %s goes on\r", p.Tag)
		return nil
	}
	return err
}

// watchSignals passes on the signals that end a program, or detaches for them, until
// it is stopped.
func (a *app) watchSignals(ctx context.Context, procs *client.Processes, id nestbox.ProcessID, pass bool, detach context.CancelCauseFunc) (stop func()) {
	signals := make(chan os.Signal, 4)
	unsubscribe := a.Signals(signals)
	ended := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		if pass {
			a.passSignals(ctx, procs, id, signals, ended)
			return
		}
		select {
		case <-signals:
			detach(errDetached)
		case <-ended:
		}
	})
	return func() {
		unsubscribe()
		close(ended)
		watching.Wait()
	}
}

// tty returns the descriptor of the terminal that is typed in, if it is one.
func (a *app) tty() (int, bool) {
	file, ok := a.In.(*os.File)
	if !ok {
		return 0, false
	}
	fd := int(file.Fd())
	return fd, term.IsTerminal(fd)
}

func size(tty int) (cols, rows int) {
	cols, rows, err := term.GetSize(tty)
	if err != nil {
		return 0, 0
	}
	return min(cols, nestbox.MaxTerminalSize), min(rows, nestbox.MaxTerminalSize)
}

// session is somebody in front of a process's terminal.
type session struct {
	a     *app
	procs *client.Processes
	id    string
}

// followSize gives the process's terminal the size of ours, now and whenever that
// changes, until it is stopped.
func (s *session) followSize(ctx context.Context, tty int) (stop func()) {
	changes := make(chan os.Signal, 1)
	signal.Notify(changes, syscall.SIGWINCH)
	changes <- syscall.SIGWINCH // now
	done := make(chan struct{})
	go func() {
		for {
			select {
			case <-changes:
				if cols, rows := size(tty); cols > 0 && rows > 0 {
					_ = s.procs.Resize(ctx, s.id, rows, cols) // it may have ended; else the next one is right again
				}
			case <-done:
				return
			}
		}
	}()
	return func() {
		signal.Stop(changes)
		close(done)
	}
}

// The keys that detach, one after the other.
const (
	keyLeave1 = 0x10 // Ctrl-P
	keyLeave2 = 0x11 // Ctrl-Q
)

// typeIn passes on what is typed, until either side ends (false) or the keys that detach
// were typed (true).
func (s *session) typeIn(ctx context.Context) (detached bool) {
	buf := make([]byte, 32<<10)
	held := false // a Ctrl-P that may be the first of the two
	for {
		n, err := s.a.In.Read(buf)
		typed := buf[:n]
		if held && n > 0 {
			if typed[0] == keyLeave2 {
				return true
			}
			typed = append([]byte{keyLeave1}, typed...)
			held = false
		}
		for i, key := range typed {
			if key != keyLeave1 {
				continue
			}
			switch {
			case i+1 == len(typed):
				held = true
			case typed[i+1] == keyLeave2:
				s.send(ctx, typed[:i])
				return true
			}
		}
		if held {
			typed = typed[:len(typed)-1]
		}
		if !s.send(ctx, typed) {
			return false
		}
		if err != nil {
			if !errors.Is(err, io.EOF) && ctx.Err() == nil {
				s.a.warn("what is typed is no longer passed on: %v\r", err)
			}
			return false
		}
	}
}

// send passes on what was typed, and reports whether more can come.
func (s *session) send(ctx context.Context, typed []byte) bool {
	if len(typed) == 0 {
		return true
	}
	err := s.procs.WriteStdin(ctx, s.id, typed, false)
	switch code := nestbox.CodeOf(err); {
	case err == nil:
		return true
	case ctx.Err() != nil, code == nestbox.CodeInvalidState, code == nestbox.CodeNotFound: // it has ended
		return false
	}
	s.a.warn("what was typed may be lost: %v\r", err)
	return true
}
