package main

import (
	"testing"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"
)

// TestDetachedSettings: a detached server gets every setting that was given, and no
// password in its command line.
func TestDetachedSettings(t *testing.T) {
	t.Parallel()
	given := []string{
		"up", "--database=postgres://x:secret@y/z", "--dir=/tmp/a b", "--egress-allow=10.0.0.0/8", "--egress-allow=192.168.0.0/16",
		"--egress=allow", "--max-connections=7",
	}
	args := func(given []string) []string {
		cmd := newUp()
		var got []string
		cmd.RunE = func(cmd *cobra.Command, _ []string) error {
			got = argsOf(cmd, "detach", "database")
			return nil
		}
		cmd.SetArgs(given)
		require.NoError(t, cmd.Execute())
		return got
	}
	got := args(append(given[1:], "--detach"))
	require.ElementsMatch(t, append(given[2:], "up"), got)
	require.Equal(t, got, args(got[1:]), "and again")
}
