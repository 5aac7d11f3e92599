package cli

import (
	"context"
	"errors"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

func newAttach(a *app) *cobra.Command {
	var since string
	var noStdin, noEOF, terminal bool
	cmd := &cobra.Command{
		Use:   "attach <capsule> <process>",
		Short: "Follow a process and write to its standard input",
		Long: `Follow a process, named by its tag or PID, and exit as it does. Its output
comes from the oldest byte that is kept (or from --since). If its standard input
is open, it gets what is typed here; an end of input is passed on if there was
any input, unless --no-eof says that there is more to come from others. Ctrl-C
detaches: the process goes on.

With -t this terminal goes in front of the process's, and shows the last of its output
again (or what --since says). ` + detachDoc,
		Args:              usual,
		ValidArgsFunction: a.completeProcess,
		RunE: func(cmd *cobra.Command, args []string) error {
			how := client.Attach{UntilExit: true}
			var err error
			if how.Since, err = nestbox.ParseSince(since); err != nil {
				return err
			}
			capsule, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if terminal {
				if !cmd.Flags().Changed("since") {
					how.Since = nestbox.Since{Tail: lastScreen}
				}
				return a.attachTerminal(cmd.Context(), capsule, args[1], how, !noStdin)
			}
			return a.attach(cmd.Context(), capsule, args[1], how, !noStdin, !noEOF)
		},
	}
	cmd.Flags().StringVar(&since, "since", "start", "where to begin: start (the oldest byte kept), now, how long ago (5m), a time, or a position in bytes")
	cmd.Flags().BoolVarP(&terminal, "terminal", "t", false, "go in front of the process's terminal")
	cmd.Flags().BoolVar(&noEOF, "no-eof", false, "leave the process's standard input open when ours ends")
	cmd.Flags().BoolVar(&noStdin, "no-stdin", false, "do not pass on standard input")
	return passesExitCode(cmd)
}

// lastScreen is how much of its output a terminal shows again, in bytes.
const lastScreen = 64 << 10

// errDetached is why an attach ended that Ctrl-C ended.
var errDetached = errors.New("detached")

func (a *app) attach(ctx context.Context, capsule *client.Capsule, sel string, how client.Attach, stdin, passEOF bool) error {
	proc, err := capsule.Processes.Get(ctx, sel)
	if err != nil {
		return err
	}
	stream, err := capsule.Processes.Attach(ctx, sel, how)
	if err != nil {
		return err
	}
	defer stream.Close()
	if how.Since == (nestbox.Since{}) && proc.Output.Start > 0 {
		a.reportGap(0, proc.Output.Start)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	interrupts := make(chan os.Signal, 1)
	defer a.Signals(interrupts)()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-interrupts:
			cancel(errDetached)
		case <-ctx.Done():
		}
	}()
	if stdin && proc.Stdin && proc.Running() {
		// Not waited for: it may hang in a read of the terminal.
		go a.forwardStdin(ctx, capsule.Processes, proc.ID, passEOF)
	}
	exit, err := a.follow(ctx, proc.Tag, stream)
	detached := errors.Is(context.Cause(ctx), errDetached)
	cancel(nil)
	<-watched
	switch {
	case exit != nil:
		return exitOf(*exit)
	case detached:
		a.warn("detached; %s goes on (at byte %d of its output)", proc.Tag, stream.Offset())
		return nil
	}
	return err
}

// follow prints the output of a process until its exit.
func (a *app) follow(ctx context.Context, tag string, stream *client.Stream) (*nestbox.Exit, error) {
	for {
		ev, err := stream.Next(ctx)
		if err != nil {
			return nil, err
		}
		if a.json {
			if err := a.printEvent(tag, ev); err != nil {
				return nil, err
			}
		}
		switch {
		case ev.Kind == nestbox.EventExit:
			return ev.Exit, nil
		case a.json:
		case ev.Kind == nestbox.EventData:
			w := a.Out
			if ev.Stream == nestbox.Stderr {
				w = a.Err
			}
			if _, err := w.Write(ev.Data); err != nil {
				return nil, err
			}
		case ev.Kind == nestbox.EventGap:
			a.reportGap(ev.Offset, ev.To)
		}
	}
}

// forwardStdin passes on standard input until either side ends.
func (a *app) forwardStdin(ctx context.Context, procs *client.Processes, id nestbox.ProcessID, passEOF bool) {
	buf := make([]byte, 64<<10)
	any := false
	for {
		n, readErr := a.In.Read(buf)
		any = any || n > 0
		eof := errors.Is(readErr, io.EOF) && any && passEOF
		if n > 0 || eof {
			err := procs.WriteStdin(ctx, id.String(), buf[:n], eof)
			if err != nil && ctx.Err() == nil && nestbox.CodeOf(err) != nestbox.CodeInvalidState {
				a.warn("standard input is no longer passed on: %v", err)
			}
			if err != nil {
				return
			}
		}
		if readErr != nil {
			return
		}
	}
}
