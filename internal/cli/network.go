package cli

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/nestbox/nestbox"
)

// networkFlags say what a capsule may reach outside.
type networkFlags struct {
	allow, deny        []string
	internet, internot bool
	mbps               int
}

func (n *networkFlags) add(f *pflag.FlagSet) {
	f.StringSliceVar(&n.allow, "allow", nil, "reach this (an address, a range, a name, *.name or *) and, unless --internet is there too, nothing else")
	f.StringSliceVar(&n.deny, "deny", nil, "do not reach this, but everything else")
	f.BoolVar(&n.internet, "internet", false, "reach what neither --allow nor --deny has")
	f.BoolVar(&n.internot, "no-network", false, "reach nothing outside")
	f.IntVar(&n.mbps, "egress-mbps", 0, "megabits per second that it may send, and receive (default as the operator has it)")
}

// policy returns what the flags say; nil if they say nothing.
func (n *networkFlags) policy(cmd *cobra.Command) (*nestbox.NetworkPolicy, error) {
	given := func(name string) bool { return cmd.Flags().Changed(name) }
	switch {
	case n.internot && (n.internet || len(n.allow)+len(n.deny) > 0):
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "--no-network goes with none of --internet, --allow and --deny")
	case given("egress-mbps") && !n.internot && !given("internet") && !given("allow") && !given("deny"):
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "--egress-mbps needs --internet, --allow or --deny beside it")
	case !n.internot && !given("internet") && !given("allow") && !given("deny"):
		return nil, nil
	}
	p := nestbox.NetworkPolicy{
		Internet: n.internet || !n.internot && !given("internet") && len(n.allow) == 0,
		Allow:    n.allow, Deny: n.deny, EgressMbps: n.mbps,
	}
	return &p, p.Validate()
}

func newNetwork(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "network <capsule>",
		Short: "Show what a capsule may reach outside; set it, or see what it reached",
		Args:  usual, ValidArgsFunction: a.completeCapsule,
		RunE: func(cmd *cobra.Command, args []string) error {
			h, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			p, err := h.Network(cmd.Context())
			if err != nil {
				return err
			}
			return a.printPolicy(p)
		},
	}
	cmd.AddCommand(newNetworkSet(a), newNetworkLog(a))
	return cmd
}

func newNetworkSet(a *app) *cobra.Command {
	var flags networkFlags
	cmd := &cobra.Command{
		Use:   "set <capsule>",
		Short: "Replace what a running capsule may reach outside",
		Long: `Replace what a running capsule may reach outside: the flags say all of it.
Connections that are not allowed any more are cut, others go on.`,
		Example: `  nestbox network set cl-12 --allow pypi.org --allow files.pythonhosted.org
  nestbox network set cl-12 --deny 203.0.113.0/24
  nestbox network set cl-12 --no-network`,
		Args: usual, ValidArgsFunction: a.completeCapsule,
		RunE: func(cmd *cobra.Command, args []string) error {
			policy, err := flags.policy(cmd)
			if err == nil && policy == nil {
				err = nestbox.Errorf(nestbox.CodeInvalid, "say what it may reach: --internet, --allow, --deny or --no-network")
			}
			if err != nil {
				return err
			}
			h, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			now, err := h.SetNetwork(cmd.Context(), *policy)
			if err != nil {
				return err
			}
			return a.printPolicy(now)
		},
	}
	flags.add(cmd.Flags())
	return cmd
}

func (a *app) printPolicy(p nestbox.NetworkPolicy) error {
	if a.json {
		return a.printJSON(p)
	}
	return a.println(inWords(p))
}

// inWords says in one line what a policy lets through.
func inWords(p nestbox.NetworkPolicy) string {
	everything := "nothing else"
	if p.Internet {
		everything = "all else"
	}
	parts := []string{}
	if len(p.Allow) > 0 {
		parts = append(parts, "allow "+strings.Join(p.Allow, " "))
	}
	if len(p.Deny) > 0 {
		parts = append(parts, "deny "+strings.Join(p.Deny, " "))
	}
	switch {
	case len(parts) > 0:
		parts = append(parts, everything)
	case p.Internet:
		parts = append(parts, "internet")
	default:
		parts = append(parts, "none")
	}
	if p.EgressMbps > 0 {
		parts = append(parts, fmt.Sprintf("%d Mbit/s", p.EgressMbps))
	}
	return strings.Join(parts, "; ")
}

// networkLogJSON is a log as the API shows it.
type networkLogJSON struct {
	Policy   nestbox.NetworkPolicy `json:"policy"`
	Allowed  int64                 `json:"allowed"`
	Refused  int64                 `json:"refused"`
	Sent     int64                 `json:"sent"`
	Received int64                 `json:"received"`
	Recent   []networkFlowJSON     `json:"recent"`
}

type networkFlowJSON struct {
	At       string `json:"at"`
	Protocol string `json:"protocol"`
	Name     string `json:"name,omitempty"`
	Address  string `json:"address,omitempty"`
	Port     uint16 `json:"port"`
	Verdict  string `json:"verdict"`
	Rule     string `json:"rule,omitempty"`
	Reason   string `json:"reason,omitempty"`
	Open     bool   `json:"open"`
	Sent     int64  `json:"sent"`
	Received int64  `json:"received"`
}

func networkLogView(r nestbox.NetworkReport) networkLogJSON {
	view := networkLogJSON{
		Policy: r.Policy, Allowed: r.Allowed, Refused: r.Refused, Sent: r.Sent, Received: r.Received, Recent: []networkFlowJSON{},
	}
	for _, f := range r.Recent {
		flow := networkFlowJSON{
			At: stamp(f.At), Protocol: string(f.Protocol), Name: f.Name, Port: f.Port, Verdict: "refused",
			Rule: f.Verdict.Rule, Reason: f.Reason, Open: f.Open, Sent: f.Sent, Received: f.Received,
		}
		if f.Addr.IsValid() {
			flow.Address = f.Addr.String()
		}
		if f.Verdict.Allowed {
			flow.Verdict = "allowed"
		}
		view.Recent = append(view.Recent, flow)
	}
	return view
}

func newNetworkLog(a *app) *cobra.Command {
	var refused bool
	cmd := &cobra.Command{
		Use:   "log <capsule>",
		Short: "Show what a running capsule reached outside lately, and was refused",
		Args:  usual, ValidArgsFunction: a.completeCapsule,
		RunE: func(cmd *cobra.Command, args []string) error {
			h, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			report, err := h.NetworkLog(cmd.Context())
			if err != nil {
				return err
			}
			if refused {
				report.Recent = slices.DeleteFunc(report.Recent, func(f nestbox.NetworkFlow) bool { return f.Verdict.Allowed })
			}
			v := networkLogView(report)
			if a.json {
				return a.printJSON(v)
			}
			t := a.table("TIME", "VERDICT", "PROTOCOL", "TO", "RULE", "SENT", "RECEIVED", "NOTE")
			for _, f := range v.Recent {
				note := f.Reason
				if f.Open {
					note = "open"
				}
				t.row(f.At, f.Verdict, f.Protocol, f.to(), f.Rule, strconv.FormatInt(f.Sent, 10), strconv.FormatInt(f.Received, 10), note)
			}
			return t.flush()
		},
	}
	cmd.Flags().BoolVar(&refused, "refused", false, "only what was refused")
	return cmd
}

// to names where a flow went.
func (f networkFlowJSON) to() string {
	port := strconv.Itoa(int(f.Port))
	switch {
	case f.Protocol == string(nestbox.NetworkDNS):
		return f.Name
	case f.Name == "":
		return net.JoinHostPort(f.Address, port)
	case f.Address == "":
		return net.JoinHostPort(f.Name, port)
	}
	return net.JoinHostPort(f.Name, port) + " (" + f.Address + ")"
}
