package cli

import (
	"context"
	"errors"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox/client"
)

func newSend(a *app) *cobra.Command {
	var noNewline, eof bool
	cmd := &cobra.Command{
		Use:   "send <capsule> <process> [text…]",
		Short: "Write to the standard input of a process, which stays open",
		Long: `Write a line to the standard input of a process, named by its tag, id or PID, which
stays open for more. Without a text, all of our standard input is written as it is.`,
		Example: `  nestbox send cl-4f repl 'print(6 * 7)'
  nestbox send --eof cl-4f sort < names`,
		Args:              usual,
		ValidArgsFunction: a.completeProcess,
		RunE: func(cmd *cobra.Command, args []string) error {
			capsule, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if len(args) == 2 {
				return sendAll(cmd.Context(), capsule.Processes, args[1], a.In, eof)
			}
			text := strings.Join(args[2:], " ")
			if !noNewline {
				text += "\n"
			}
			return capsule.Processes.WriteStdin(cmd.Context(), args[1], []byte(text), eof)
		},
	}
	cmd.Flags().BoolVarP(&noNewline, "no-newline", "n", false, "do not end the text with a newline")
	cmd.Flags().BoolVar(&eof, "eof", false, "close the process's standard input afterwards")
	return cmd
}

// sendAll writes all of r to a process.
func sendAll(ctx context.Context, procs *client.Processes, sel string, r io.Reader, eof bool) error {
	buf := make([]byte, 256<<10)
	for {
		n, err := io.ReadFull(r, buf)
		last := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !last {
			return err
		}
		if n > 0 || eof {
			if err := procs.WriteStdin(ctx, sel, buf[:n], eof && last); err != nil {
				return err
			}
		}
		if last {
			return nil
		}
	}
}
