package cli

import (
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

func newPs(a *app) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:               "ps <capsule>",
		Short:             "List the processes that were started in a capsule",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeCapsule,
		RunE: func(cmd *cobra.Command, args []string) error {
			capsule, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			procs, err := capsule.Processes.List(cmd.Context(), all)
			if err != nil {
				return err
			}
			return a.printProcesses(procs)
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "also those that have ended and are remembered")
	return cmd
}

func (a *app) printProcesses(procs []nestbox.Process) error {
	if a.json {
		views := make([]processJSON, len(procs))
		for i, p := range procs {
			views[i] = processView(p)
		}
		return a.printJSON(views)
	}
	t := a.table("ID", "PID", "TAG", "STATE", "STARTED", "OUTPUT", "COMMAND")
	for _, p := range procs {
		state := "running"
		if p.Exit != nil {
			state = ending(*p.Exit)
		}
		t.row(p.ID.String(), strconv.Itoa(p.PID), p.Tag, state, stamp(p.StartedAt), strconv.FormatInt(p.Output.End, 10), commandLine(p))
	}
	return t.flush()
}

const maxCommandLine = 80

// commandLine shows what was started, in one line that is not too long.
func commandLine(p nestbox.Process) string {
	s := []rune(strings.Join(append([]string{p.Cmd}, p.Args...), " "))
	if len(s) > maxCommandLine {
		s = append(s[:maxCommandLine-1], '…')
	}
	return string(s)
}

func newKill(a *app) *cobra.Command {
	var how client.Kill
	cmd := &cobra.Command{
		Use:   "kill <capsule> <process>",
		Short: "End a process and everything it started",
		Long: `End a process and everything it started, and return when none of it is left.
The process is named by its tag, id or PID. Without a signal it is killed at once;
with one, such as TERM, it has the time of --grace to end by itself.`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeProcess,
		RunE: func(cmd *cobra.Command, args []string) error {
			if how.Grace < 0 {
				return nestbox.Errorf(nestbox.CodeInvalid, "--grace is negative")
			}
			capsule, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return capsule.Processes.Kill(cmd.Context(), args[1], how)
		},
	}
	cmd.Flags().StringVarP(&how.Signal, "signal", "s", "", "signal to send first (default SIGKILL)")
	cmd.Flags().DurationVar(&how.Grace, "grace", 0, "how long after the signal what is left is killed (default 5s)")
	_ = cmd.RegisterFlagCompletionFunc("signal", cobra.FixedCompletions(nestbox.SignalNames(), cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func newWait(a *app) *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:               "wait <capsule> <process>",
		Short:             "Wait until a process has ended, and exit as it did",
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeProcess,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := limited(cmd.Context(), timeout)
			defer cancel()
			capsule, err := a.capsule(ctx, args[0])
			if err != nil {
				return err
			}
			p, err := capsule.Processes.Wait(ctx, args[1])
			if err != nil {
				return err
			}
			if a.json {
				err = a.printJSON(processView(p))
			} else {
				err = a.println(ending(*p.Exit))
			}
			if err != nil {
				return err
			}
			return exitOf(*p.Exit)
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "give up waiting after so long (default never); the process goes on")
	return passesExitCode(cmd)
}
