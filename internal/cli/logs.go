package cli

import (
	"context"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

// limited is a context that ends after d, if d is not 0.
func limited(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if d <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, d)
}

func newLogs(a *app) *cobra.Command {
	var opts client.LogOptions
	var since, stream string
	var tail int64
	cmd := &cobra.Command{
		Use:   "logs <capsule> <process>",
		Short: "Print what a process has written",
		Long: `Print what a process, named by its tag or PID, has written to stdout and
stderr, in that order. Positions count the bytes of both together; output that
is no longer kept is reported on standard error.`,
		Args:              usual,
		ValidArgsFunction: a.completeProcess,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if opts.Since, err = parseSince(cmd, since, tail); err != nil {
				return err
			}
			if opts.Stream = nestbox.Stream(stream); stream != "" && opts.Stream != nestbox.Stdout && opts.Stream != nestbox.Stderr {
				return nestbox.Errorf(nestbox.CodeInvalid, "--stream is stdout or stderr, not %q", stream)
			}
			capsule, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			opts.OnGap = a.reportGap
			logs, err := capsule.Processes.Logs(cmd.Context(), args[1], opts)
			if err != nil {
				return err
			}
			defer logs.Close()
			_, err = io.Copy(a.Out, logs)
			return err
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&opts.Follow, "follow", "f", false, "go on with what comes, until the process and all that hold its output have ended")
	f.StringVar(&since, "since", "start", "where to begin: start (the oldest byte kept), now, or a position in bytes")
	f.Int64Var(&tail, "tail", 0, "only the last so many bytes")
	f.StringVar(&stream, "stream", "", "only stdout, or only stderr")
	cmd.MarkFlagsMutuallyExclusive("since", "tail")
	return cmd
}

func parseSince(cmd *cobra.Command, since string, tail int64) (nestbox.Since, error) {
	s, err := nestbox.ParseSince(since)
	if err != nil {
		return s, err
	}
	if !cmd.Flags().Changed("tail") {
		return s, nil
	}
	if tail < 0 {
		return s, nestbox.Errorf(nestbox.CodeInvalid, "--tail is negative")
	}
	return nestbox.Since{Tail: tail, Now: tail == 0}, nil
}

func (a *app) reportGap(from, to int64) {
	a.warn("%d bytes of output are no longer kept: %d to %d", to-from, from, to)
}
