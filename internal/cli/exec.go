package cli

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

// execFlags are the flags of nestbox exec.
type execFlags struct {
	detach, stdin  bool
	terminal       bool
	tag, dir, user string
	env            envFlags
	timeout, idle  time.Duration
	merge          bool
	onConflict     string
}

func newExec(a *app) *cobra.Command {
	var f execFlags
	cmd := &cobra.Command{
		Use:   "exec [flags] <capsule> [--] <command> [argument…]",
		Short: "Run a command in a capsule",
		Long: `Run a command in a capsule. Its output comes as it is written, through lost
connections and restarts of the server, and nestbox exits with its exit code
(127 if there is no such program, 126 if it cannot be executed, 125 for a failure
of nestbox itself). Ctrl-C sends it SIGINT, as TERM, HUP and QUIT are passed on; a
second Ctrl-C, or ten seconds, kill it and everything it started.

With -d it runs in the background: its tag is printed, which names it for ps,
logs, attach, wait and kill.

With -it it runs in a terminal, with this one in front of it: Ctrl-C is a key like any
other. ` + detachDoc,
		Example: `  nestbox exec cl-4f -- sh -c 'echo hello; exit 3'
  nestbox exec -d --tag web cl-4f -- python3 -m http.server 8000
  tar c . | nestbox exec -i cl-4f -- tar x -C /srv`,
		Args:              usual,
		ValidArgsFunction: a.completeCapsule,
	}
	fl := cmd.Flags()
	fl.SetInterspersed(false)
	fl.BoolVarP(&f.detach, "detach", "d", false, "run in the background")
	fl.BoolVarP(&f.stdin, "stdin", "i", false, "pass on standard input; with -d: keep it open for later")
	fl.BoolVarP(&f.terminal, "terminal", "t", false, "run it in a terminal; with -i: this one in front of it")
	f.addTo(fl)
	fl.DurationVar(&f.timeout, "timeout", 0, "kill it and everything it started after so long (default never)")
	fl.DurationVar(&f.idle, "idle-timeout", 0, "kill it and everything it started after so long without output (default never)")
	fl.BoolVar(&f.merge, "merge", false, "have its standard error be its standard output, so that what it writes to both keeps its order")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		args, err := commandArgs(cmd, args)
		if err != nil {
			return err
		}
		capsule, err := a.capsule(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		spec, err := f.spec(a.LookupEnv, args[1:])
		if err != nil {
			return err
		}
		if f.terminal {
			if a.json && !f.detach {
				return errors.New("--json goes with no terminal, unless -d is there too")
			}
			spec.Terminal = &nestbox.Terminal{}
		}
		if f.detach {
			return a.execDetached(cmd.Context(), capsule, spec)
		}
		if f.terminal && f.stdin {
			return a.execTerminal(cmd.Context(), capsule, spec)
		}
		return a.execAttached(cmd.Context(), capsule, spec)
	}
	return passesExitCode(cmd)
}

// commandArgs returns the capsule and the command. Flags may also stand
// between the two: no command begins with a dash.
func commandArgs(cmd *cobra.Command, args []string) ([]string, error) {
	capsule, rest := args[0], args[1:]
	if len(rest) > 0 && strings.HasPrefix(rest[0], "-") {
		if err := cmd.Flags().Parse(rest); err != nil {
			return nil, err
		}
		rest = cmd.Flags().Args()
	}
	if len(rest) == 0 {
		return nil, errors.New("which command? nestbox exec <capsule> -- <command>")
	}
	return append([]string{capsule}, rest...), nil
}

// addTo adds the flags that all commands have that start something.
func (f *execFlags) addTo(fl *pflag.FlagSet) {
	fl.StringVar(&f.tag, "tag", "", "name of the process (default a new one)")
	f.env.add(fl)
	fl.StringVar(&f.onConflict, "on-conflict", "", "if a live process has the tag: replace it, or return it and start nothing (default an error)")
	fl.StringVarP(&f.dir, "workdir", "w", "", "working directory (default the user's home)")
	fl.StringVarP(&f.user, "user", "u", "", "user or user:group, by name or number (default root)")
}

func (f execFlags) spec(lookup func(string) (string, bool), command []string) (nestbox.ProcessSpec, error) {
	spec := nestbox.ProcessSpec{
		Cmd: command[0], Args: command[1:], Cwd: f.dir, User: f.user, Tag: f.tag,
		Stdin: f.stdin, Timeout: f.timeout, IdleTimeout: f.idle, Merge: f.merge, OnConflict: nestbox.TagConflict(f.onConflict),
	}
	var err error
	if spec.Env, err = f.env.read(lookup); err != nil {
		return spec, err
	}
	return spec, spec.Validate()
}

func (a *app) execDetached(ctx context.Context, capsule *client.Capsule, spec nestbox.ProcessSpec) error {
	p, err := capsule.Processes.Start(ctx, spec)
	if err != nil {
		return err
	}
	if !a.json {
		return a.println(p.Tag)
	}
	return a.printJSON(struct {
		SandboxID string `json:"sandbox_id"`
		Cmd       string `json:"cmd"`
		ID        string `json:"id"`
		PID       int    `json:"pid"`
		Tag       string `json:"tag"`
	}{capsule.ID, p.Cmd, p.ID.String(), p.PID, p.Tag})
}

func (a *app) execAttached(ctx context.Context, capsule *client.Capsule, spec nestbox.ProcessSpec) error {
	// The signals that would end ctx are for the process.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	cmd := capsule.CommandContext(ctx, spec.Cmd, spec.Args...)
	cmd.Env, cmd.Dir, cmd.User, cmd.Tag, cmd.Timeout = spec.Env, spec.Cwd, spec.User, spec.Tag, spec.Timeout
	cmd.Terminal, cmd.IdleTimeout, cmd.Merge = spec.Terminal, spec.IdleTimeout, spec.Merge
	cmd.OnConflict = spec.OnConflict
	cmd.Stdout, cmd.Stderr = a.Out, a.Err
	var captured execJSON
	if a.json {
		cmd.Stdout, cmd.Stderr = &captured.stdout, &captured.stderr
	}
	if spec.Stdin {
		cmd.Stdin = a.In
	}
	began := time.Now()
	signals := make(chan os.Signal, 4)
	defer a.Signals(signals)()
	if err := cmd.Start(); err != nil {
		return err
	}
	var watcher sync.WaitGroup
	ended := make(chan struct{})
	watcher.Go(func() { a.passSignals(ctx, capsule.Processes, cmd.Process.ID, signals, ended) })
	err := cmd.Wait()
	close(ended)
	watcher.Wait()
	if a.json && cmd.Exit != nil {
		if err := a.printJSON(captured.view(capsule.ID, cmd, time.Since(began))); err != nil {
			return err
		}
	}
	return passOn(err)
}

const (
	// signalWithin bounds how long passing on a signal may take.
	signalWithin = 10 * time.Second
	// endWithin is how long a process has that was told to end.
	endWithin = 10 * time.Second
)

// passSignals passes on the signals that end a program to the process and its group.
// A second Ctrl-C kills everything, as does time.
func (a *app) passSignals(ctx context.Context, procs *client.Processes, id nestbox.ProcessID, signals <-chan os.Signal, ended <-chan struct{}) {
	var overdue <-chan time.Time
	interrupted := false
	for {
		kill := false
		var sig os.Signal
		select {
		case <-ended:
			return
		case <-overdue:
			kill = true
		case sig = <-signals:
			kill = sig == syscall.SIGINT && interrupted
			interrupted = interrupted || sig == syscall.SIGINT
		}
		if overdue == nil {
			timer := time.NewTimer(endWithin)
			defer timer.Stop()
			overdue = timer.C
		}
		within, cancel := context.WithTimeout(ctx, signalWithin)
		var err error
		if kill {
			err = procs.Kill(within, id.String(), client.Kill{})
		} else if s, ok := sig.(syscall.Signal); ok {
			err = procs.Signal(within, id.String(), nestbox.SignalName(s))
		}
		cancel()
		if err != nil && nestbox.CodeOf(err) != nestbox.CodeInvalidState { // it has just ended
			a.warn("cannot pass on the signal: %v", err)
		}
	}
}

// exitPipe is what a shell shows for a program whose reader went away.
const exitPipe = 128 + int(syscall.SIGPIPE)

// passOn turns what Wait says into the end of the program: the exit code of
// the process, and what went wrong beside it.
func passOn(err error) error {
	var exit *client.ExitError
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.EPIPE):
		return &exitCode{code: exitPipe} // as with "| head": nothing to complain of
	case !errors.As(err, &exit):
		return own(err)
	case err == error(exit) && exit.Reason != nestbox.ReasonTimeout && exit.Reason != nestbox.ReasonIdle && exit.Reason != nestbox.ReasonOOM:
		return &exitCode{code: exit.Code}
	}
	return &exitCode{code: exit.Code, err: err}
}
