package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

func newPs(a *app) *cobra.Command {
	var all, tree bool
	cmd := &cobra.Command{
		Use:   "ps <capsule>",
		Short: "List the processes that were started in a capsule",
		Long: `List the processes that were started in a capsule. With --tree it is all processes
that run there, whoever started them, below their parents, with the TCP ports that they
listen on.`,
		Args:              usual,
		ValidArgsFunction: a.completeCapsule,
		RunE: func(cmd *cobra.Command, args []string) error {
			capsule, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if tree {
				return a.printTree(cmd.Context(), capsule)
			}
			procs, err := capsule.Processes.List(cmd.Context(), all)
			if err != nil {
				return err
			}
			return a.printProcesses(procs, all)
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "also those that have ended and are remembered")
	cmd.Flags().BoolVar(&tree, "tree", false, "all processes that run, with what they use and the ports they listen on")
	cmd.MarkFlagsMutuallyExclusive("all", "tree")
	return cmd
}

func (a *app) printProcesses(procs []nestbox.Process, all bool) error {
	if a.json {
		views := make([]processJSON, len(procs))
		for i, p := range procs {
			views[i] = processView(p)
		}
		return a.printJSON(views)
	}
	header := []string{"ID", "PID", "TAG", "STATE", "STARTED", "FOR", "OUTPUT", "COMMAND"}
	if all {
		header = slices.Insert(header, 5, "ENDED")
	}
	t := a.table(header...)
	now := time.Now()
	for _, p := range procs {
		state, until, ended := "running", now, "-"
		if p.Exit != nil {
			state, until, ended = ending(*p.Exit), p.Exit.At, stamp(p.Exit.At)
		}
		row := []string{
			p.ID.String(), strconv.Itoa(p.PID), p.Tag, state, stamp(p.StartedAt), roughly(until.Sub(p.StartedAt)),
			strconv.FormatInt(p.Output.End, 10), commandLine(p),
		}
		if all {
			row = slices.Insert(row, 5, ended)
		}
		t.row(row...)
	}
	return t.flush()
}

// roughly shows a duration as a person reads it. The clocks of two machines may make
// it negative.
func roughly(d time.Duration) string {
	d = max(0, d)
	switch {
	case d < time.Second:
		return strconv.FormatInt(d.Milliseconds(), 10) + "ms"
	case d < time.Minute:
		return strconv.FormatFloat(d.Seconds(), 'f', 1, 64) + "s"
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd%02dh", int(d.Hours())/24, int(d.Hours())%24)
}

const maxCommandLine = 80

// commandLine shows what was started, in one line that is not too long.
func commandLine(p nestbox.Process) string {
	return cutText(strings.Join(append([]string{p.Cmd}, p.Args...), " "), maxCommandLine)
}

// cutText returns at most so many characters.
func cutText(text string, most int) string {
	s := []rune(text)
	if len(s) > most {
		s = append(s[:most-1], '…')
	}
	return string(s)
}

func newKill(a *app) *cobra.Command {
	var how client.Kill
	cmd := &cobra.Command{
		Use:   "kill [-9 | -TERM | …] <capsule> <process>…",
		Short: "End processes and everything that they started",
		Long: `End processes and everything that they started, and return when none of it is
left. A process is named by its tag, id or PID. Without a signal it is killed at once;
with TERM, INT, QUIT or ABRT it has the time of --grace to end by itself. Any other
signal, such as HUP or USR1, is sent and nothing more, unless --grace is given.`,
		Example: `  nestbox kill cl-4f web worker
  nestbox kill -TERM --grace 30s cl-4f db
  nestbox kill -HUP cl-4f nginx`,
		Args:              usual,
		ValidArgsFunction: a.completeProcess,
		RunE: func(cmd *cobra.Command, args []string) error {
			if how.Grace < 0 {
				return nestbox.Errorf(nestbox.CodeInvalid, "--grace is negative")
			}
			capsule, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			end, err := ends(how.Signal, cmd.Flags().Changed("grace"))
			if err != nil {
				return err
			}
			return forEach(args[1:], func(name string) error {
				if end {
					return capsule.Processes.Kill(cmd.Context(), name, how)
				}
				return capsule.Processes.Signal(cmd.Context(), name, how.Signal)
			})
		},
	}
	cmd.Flags().StringVarP(&how.Signal, "signal", "s", "", "signal to send, by name or number (default SIGKILL)")
	cmd.Flags().DurationVar(&how.Grace, "grace", 0, "how long after the signal what is left is killed (default 5s)")
	_ = cmd.RegisterFlagCompletionFunc("signal", cobra.FixedCompletions(nestbox.SignalNames(), cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// ends reports whether whoever sends the signal wants the process to end.
func ends(signal string, graceGiven bool) (bool, error) {
	if signal == "" || graceGiven {
		return true, nil
	}
	sig, err := nestbox.ParseSignal(signal)
	switch sig {
	case syscall.SIGKILL, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGABRT:
		return true, err
	}
	return false, err
}

// forEach does something for each of several names, also after a failure, and returns
// what failed. With several, each error says of which.
func forEach(names []string, do func(string) error) error {
	var errs []error
	for _, name := range names {
		err := do(name)
		if err != nil && len(names) > 1 {
			err = fmt.Errorf("%s: %w", name, err)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func newWait(a *app) *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "wait <capsule> <process>…",
		Short: "Wait until processes have ended, and exit as they did",
		Long: `Wait until processes have ended. The exit code is that of the first in the line that
did not end with 0.`,
		Args:              usual,
		ValidArgsFunction: a.completeProcess,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := limited(cmd.Context(), timeout)
			defer cancel()
			capsule, err := a.capsule(ctx, args[0])
			if err != nil {
				return err
			}
			return a.waitFor(ctx, capsule, args[1:])
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "give up waiting after so long (default never); the process goes on")
	return passesExitCode(cmd)
}

// waitFor waits for processes, one after the other, and tells how each has ended.
func (a *app) waitFor(ctx context.Context, capsule *client.Capsule, names []string) error {
	var first error // that is not 0
	views := []processJSON{}
	err := forEach(names, func(name string) error {
		p, err := capsule.Processes.Wait(ctx, name)
		if err != nil {
			return err
		}
		if first == nil {
			first = exitOf(*p.Exit)
		}
		views = append(views, processView(p))
		switch {
		case a.json:
			return nil
		case len(names) > 1:
			return a.println(name + ": " + ending(*p.Exit))
		}
		return a.println(ending(*p.Exit))
	})
	switch {
	case err != nil:
	case a.json && len(views) == 1:
		err = a.printJSON(views[0])
	case a.json:
		err = a.printJSON(views)
	}
	if err != nil {
		return err
	}
	return first
}
