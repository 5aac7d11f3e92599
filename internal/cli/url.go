package cli

import (
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox"
)

func newURL(a *app) *cobra.Command {
	var expires time.Duration
	cmd := &cobra.Command{
		Use:               "url <capsule> <port>",
		Short:             "Print a URL that reaches a port inside a capsule, until it expires",
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeCapsule,
		RunE: func(cmd *cobra.Command, args []string) error {
			port, err := strconv.ParseUint(args[1], 10, 16)
			if err != nil || port == 0 {
				return nestbox.Errorf(nestbox.CodeInvalid, "%q is not a port: 1 to 65535", args[1])
			}
			if expires < time.Second {
				return nestbox.Errorf(nestbox.CodeInvalid, "--expires is less than a second")
			}
			capsule, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			u, err := capsule.Ports.URL(cmd.Context(), uint16(port), expires)
			if err != nil {
				return err
			}
			if !a.json {
				return a.println(u.URL)
			}
			return a.printJSON(struct {
				URL       string    `json:"url"`
				Token     string    `json:"token"`
				ExpiresAt time.Time `json:"expires_at"`
			}(u))
		},
	}
	cmd.Flags().DurationVar(&expires, "expires", time.Hour, "how long it works")
	return cmd
}
