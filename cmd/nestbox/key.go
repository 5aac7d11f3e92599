package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
	"github.com/nestbox/nestbox/internal/store"
)

// newKey is `nestbox key …`: API keys, for an operator who can read the database. It
// works beside a running server.
func newKey() *cobra.Command {
	var team string
	settings := newSettings()
	cmd := &cobra.Command{Use: "key", Short: "Make, list and delete API keys (on the server's machine)"}
	p := cmd.PersistentFlags()
	settings.addStateFlags(p)
	p.StringVar(&team, "team", "", "team id (default: the first team)")

	with := func(f func(cmd *cobra.Command, keys *control.Keys, team string, args []string) error) func(*cobra.Command, []string) error {
		return func(cmd *cobra.Command, args []string) (err error) {
			cfg, err := settings.load(cmd)
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			db, err := store.Open(ctx, databaseURL(cfg), slog.New(slog.DiscardHandler))
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, db.Close()) }()
			keys := control.New(control.Config{Store: db, Log: slog.New(slog.DiscardHandler)}).Keys
			if team == "" {
				if team, err = firstTeam(ctx, keys); err != nil {
					return err
				}
			}
			return f(cmd, keys, team, args)
		}
	}
	cmd.AddCommand(
		&cobra.Command{Use: "create [name]", Short: "Make a key; it is shown once", Args: cobra.MaximumNArgs(1), RunE: with(createKey)},
		&cobra.Command{Use: "ls", Short: "List the keys of a team", Args: cobra.NoArgs, RunE: with(listKeys)},
		&cobra.Command{Use: "rm <key id>", Short: "Delete a key", Args: cobra.ExactArgs(1), RunE: with(deleteKey)},
		&cobra.Command{Use: "team <name>", Short: "Make a further team and print its id", Args: cobra.ExactArgs(1), RunE: with(createTeam)},
	)
	return cmd
}

func firstTeam(ctx context.Context, keys *control.Keys) (string, error) {
	teams, err := keys.Teams(ctx)
	if err != nil {
		return "", err
	}
	if len(teams) == 0 {
		return "", nestbox.Errorf(nestbox.CodeNotFound, "there is no team yet: the first `nestbox up` makes one")
	}
	return teams[0].ID, nil
}

func createKey(cmd *cobra.Command, keys *control.Keys, team string, args []string) error {
	name := "Unnamed API Key"
	if len(args) == 1 {
		name = args[0]
	}
	key, secret, err := keys.Create(cmd.Context(), team, name)
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "%s (%s); this is the only time the key is shown:\n", key.ID, key.Name)
	fmt.Fprintln(cmd.OutOrStdout(), secret)
	return nil
}

func listKeys(cmd *cobra.Command, keys *control.Keys, team string, _ []string) error {
	list, err := keys.List(cmd.Context(), team)
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tNAME\tKEY\tCREATED\tLAST USED")
	for _, k := range list {
		used := "never"
		if !k.LastUsed.IsZero() {
			used = k.LastUsed.Format(time.RFC3339)
		}
		fmt.Fprintf(w, "%s\t%s\t%s…\t%s\t%s\n", k.ID, k.Name, k.Prefix, k.CreatedAt.Format(time.RFC3339), used)
	}
	return w.Flush()
}

func deleteKey(cmd *cobra.Command, keys *control.Keys, team string, args []string) error {
	return keys.Delete(cmd.Context(), team, args[0])
}

func createTeam(cmd *cobra.Command, keys *control.Keys, _ string, args []string) error {
	team, err := keys.CreateTeam(cmd.Context(), args[0])
	if err != nil {
		return err
	}
	fmt.Fprintln(cmd.OutOrStdout(), team.ID)
	return nil
}
