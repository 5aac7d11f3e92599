package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

func newWatch(a *app) *cobra.Command {
	var opts client.WatchOptions
	cmd := &cobra.Command{
		Use:   "watch <capsule> <path>",
		Short: "Print what happens to files",
		Long: `Print what happens to a file, or to a directory and what is in it, one line for
each change: create, write, remove, rename or chmod, and the path. A line that
says overflow means that more happened than was kept: look at the files again.

It ends when what it watches is removed or renamed. With --json, each line is an
object as the API has it.`,
		Example: `  nestbox watch cl-12 /root
  nestbox watch -r cl-12 /root/project`,
		Args: usual, ValidArgsFunction: a.completeCapsule,
		RunE: func(cmd *cobra.Command, args []string) error {
			capsule, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			watch, err := capsule.Files.Watch(cmd.Context(), args[1], opts)
			if err != nil {
				return err
			}
			defer watch.Close()
			a.warn("watching %s", printable(args[1]))
			for {
				event, err := watch.Next(cmd.Context())
				if errors.Is(err, io.EOF) {
					return nil
				}
				if err == nil {
					err = a.printFileEvent(event)
				}
				if err != nil {
					return err
				}
			}
		},
	}
	cmd.Flags().BoolVarP(&opts.Recursive, "recursive", "r", false, "also what is in the directories below, and in those that are made later")
	return cmd
}

// fileEventJSON is an event as the API shows it.
type fileEventJSON struct {
	Type      string `json:"type"`
	Path      string `json:"path"`
	To        string `json:"to,omitempty"`
	Directory bool   `json:"directory,omitempty"`
}

// printFileEvent prints one line.
func (a *app) printFileEvent(e nestbox.FileEvent) error {
	if a.json {
		enc := json.NewEncoder(a.Out)
		enc.SetEscapeHTML(false)
		return enc.Encode(fileEventJSON{string(e.Type), nestbox.PathText(e.Path), nestbox.PathText(e.To), e.Directory})
	}
	slash := ""
	if e.Directory {
		slash = "/"
	}
	line := fmt.Sprintf("%-8s  %s%s", e.Type, e.Path, slash)
	if e.To != "" {
		line += fmt.Sprintf(" -> %s%s", e.To, slash)
	}
	return a.println(printable(line))
}
