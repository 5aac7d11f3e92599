package cli

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox/client"
)

// completeWithin bounds how long a press of Tab may take.
const completeWithin = 2 * time.Second

// completeCapsule completes a first argument that is a capsule.
func (a *app) completeCapsule(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.completeCapsules(cmd, args, "")
}

// completeCapsules completes any number of capsules.
func (a *app) completeCapsules(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), completeWithin)
	defer cancel()
	c, err := a.client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var ids []string
	for capsule, err := range c.Capsules.List(ctx, client.ListCapsules{}) {
		if err != nil {
			break // what there is will do
		}
		ids = append(ids, cobra.CompletionWithDesc(capsule.ID, capsule.Info.Template+", "+string(capsule.Info.State)))
	}
	return ids, cobra.ShellCompDirectiveNoFileComp
}

// completeProcess completes a capsule and then a process of it, or several where the
// command takes them.
func (a *app) completeProcess(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 || len(args) > 1 && !strings.Contains(cmd.Use, "<process>…") {
		return a.completeCapsule(cmd, args, prefix)
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completeWithin)
	defer cancel()
	capsule, err := a.capsule(ctx, args[0])
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	procs, err := capsule.Processes.List(ctx, true)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var tags []string
	for _, p := range procs {
		tags = append(tags, cobra.CompletionWithDesc(p.Tag, commandLine(p)))
	}
	return tags, cobra.ShellCompDirectiveNoFileComp
}
