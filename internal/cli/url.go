package cli

import (
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox"
)

func newURL(a *app) *cobra.Command {
	expires := time.Hour
	cmd := &cobra.Command{
		Use:               "url <capsule> <port> [/path]",
		Short:             "Print a URL that reaches a port inside a capsule, until it expires",
		Args:              usual,
		ValidArgsFunction: a.completeCapsule,
		RunE: func(cmd *cobra.Command, args []string) error {
			port, err := parsePort(args[1])
			if err != nil {
				return err
			}
			if expires < time.Second {
				return nestbox.Errorf(nestbox.CodeInvalid, "--expires is less than a second")
			}
			if expires > maxExpires {
				return nestbox.Errorf(nestbox.CodeInvalid, "--expires is at most 7 days: a URL lets in whoever has it")
			}
			below := ""
			switch {
			case len(args) == 3 && !strings.HasPrefix(args[2], "/"):
				return nestbox.Errorf(nestbox.CodeInvalid, "%q is no path: it begins with no slash", args[2])
			case len(args) == 3:
				below = args[2]
			}
			capsule, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			u, err := capsule.Ports.URL(cmd.Context(), port, expires)
			if err != nil {
				return err
			}
			if u.URL, err = withPath(u.URL, below); err != nil {
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
	cmd.Flags().Var(&days{&expires}, "expires", "how long it works, such as 30m, 12h or 7d, which is the most")
	return cmd
}

// maxExpires is how long a URL may work.
const maxExpires = 7 * 24 * time.Hour

// withPath returns a URL with another path and query, which may be part of path; its
// own query, which lets in, stays too.
func withPath(address, path string) (string, error) {
	if path == "" {
		return address, nil
	}
	u, err := url.Parse(address)
	if err != nil {
		return "", err
	}
	asked, err := url.Parse(path)
	if err != nil || asked.Host != "" {
		return "", nestbox.Errorf(nestbox.CodeInvalid, "%q is no path of a URL", path)
	}
	u.Path, u.RawPath = strings.TrimSuffix(u.Path, "/")+asked.Path, strings.TrimSuffix(u.EscapedPath(), "/")+asked.EscapedPath()
	u.Fragment, u.RawFragment = asked.Fragment, asked.RawFragment
	if asked.RawQuery != "" {
		u.RawQuery = asked.RawQuery + "&" + u.RawQuery
	}
	return u.String(), nil
}

// days is a duration that is also written in days, as 7d.
type days struct{ d *time.Duration }

// String implements pflag.Value.
func (v *days) String() string { return v.d.String() }

// Type implements pflag.Value.
func (v *days) Type() string { return "duration" }

// Set implements pflag.Value.
func (v *days) Set(text string) error {
	if n, ok := strings.CutSuffix(text, "d"); ok {
		if count, err := strconv.ParseUint(n, 10, 16); err == nil {
			*v.d = time.Duration(count) * 24 * time.Hour
			return nil
		}
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		return nestbox.Errorf(nestbox.CodeInvalid, "%q is no duration, such as 30m, 12h or 7d", text)
	}
	*v.d = d
	return nil
}
