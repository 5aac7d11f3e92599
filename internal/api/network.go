package api

import (
	"context"
	"net/http"
	"net/netip"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
)

// networkBody is a policy as it is asked for.
type networkBody struct {
	Internet   *bool    `json:"internet,omitempty" doc:"Whether it reaches what neither list has. Left out = only what is in allow, if something is; else as the operator has it for all"`
	Allow      []string `json:"allow,omitempty" doc:"Addresses, ranges (CIDR), names, *.name (all below) or * (any name); what is here is allowed whatever deny says. At most 256"`
	Deny       []string `json:"deny,omitempty" doc:"The same, for what is denied; 0.0.0.0/0 = everything that allow does not have. At most 256"`
	EgressMbps int      `json:"egress_mbps,omitempty" doc:"Megabits per second each way; 0 = as the operator has it"`
}

func (b networkBody) policy(byDefault nestbox.NetworkPolicy) nestbox.NetworkPolicy {
	p := nestbox.NetworkPolicy{Allow: b.Allow, Deny: b.Deny, EgressMbps: b.EgressMbps}
	switch {
	case b.Internet != nil:
		p.Internet = *b.Internet
	case len(b.Allow) == 0:
		p.Internet = byDefault.Internet
	}
	return p
}

// networkPolicy is a policy as it is in force.
type networkPolicy struct {
	Internet   bool     `json:"internet" doc:"Whether it reaches what neither list has"`
	Allow      []string `json:"allow" nullable:"false"`
	Deny       []string `json:"deny" nullable:"false"`
	EgressMbps int      `json:"egress_mbps" doc:"Megabits per second each way; 0 = no limit"`
}

func toPolicy(p nestbox.NetworkPolicy) networkPolicy {
	return networkPolicy{Internet: p.Internet, Allow: orEmpty(p.Allow), Deny: orEmpty(p.Deny), EgressMbps: p.EgressMbps}
}

func orEmpty(list []string) []string {
	if list == nil {
		return []string{}
	}
	return list
}

type networkInput struct {
	CapsulePath
	Body networkBody
}

type networkOutput struct {
	Body networkPolicy
}

// networkLog is what a capsule reached, and was refused.
type networkLog struct {
	Policy   networkPolicy `json:"policy"`
	Allowed  int64         `json:"allowed" doc:"Connections and lookups that have ended"`
	Refused  int64         `json:"refused"`
	Sent     int64         `json:"sent" doc:"Bytes of those that have ended"`
	Received int64         `json:"received"`
	Recent   []networkFlow `json:"recent" nullable:"false" doc:"The last hundred that have ended or were refused, the oldest first, and then the last hundred of those that go on"`
}

type networkFlow struct {
	At       time.Time `json:"at"`
	Protocol string    `json:"protocol" enum:"tcp,udp,dns" doc:"dns = a lookup of a name"`
	Name     string    `json:"name,omitempty" doc:"As the program showed it: TLS server name, HTTP host, or what it looked up"`
	Address  string    `json:"address,omitempty" doc:"As the program meant it"`
	Port     uint16    `json:"port"`
	Verdict  string    `json:"verdict" enum:"allowed,refused"`
	Rule     string    `json:"rule,omitempty" doc:"The entry that decided; none = internet did"`
	Reason   string    `json:"reason,omitempty" doc:"Why it was refused, or failed, beyond the policy"`
	Open     bool      `json:"open" doc:"It goes on"`
	Sent     int64     `json:"sent" doc:"Bytes out of the capsule"`
	Received int64     `json:"received"`
}

func toFlow(f nestbox.NetworkFlow) networkFlow {
	out := networkFlow{
		At: f.At.UTC(), Protocol: string(f.Protocol), Name: f.Name, Port: f.Port, Verdict: "refused",
		Rule: f.Verdict.Rule, Reason: f.Reason, Open: f.Open, Sent: f.Sent, Received: f.Received,
	}
	if f.Verdict.Allowed {
		out.Verdict = "allowed"
	}
	if f.Addr != (netip.Addr{}) {
		out.Address = f.Addr.String()
	}
	return out
}

func toNetworkLog(r nestbox.NetworkReport) networkLog {
	log := networkLog{
		Policy: toPolicy(r.Policy), Allowed: r.Allowed, Refused: r.Refused, Sent: r.Sent, Received: r.Received,
		Recent: make([]networkFlow, 0, len(r.Recent)),
	}
	for _, f := range r.Recent {
		log.Recent = append(log.Recent, toFlow(f))
	}
	return log
}

type networkLogOutput struct {
	Body networkLog
}

func examplePolicy() networkPolicy {
	return networkPolicy{Allow: []string{"203.0.113.0/24", "*.example.com"}, Deny: []string{}}
}

func (s *server) registerNetwork() {
	const tag = "Network"
	register(s, operation{
		id: "getNetwork", method: http.MethodGet, path: "/v1/capsules/{id}/network", tag: tag,
		summary: "Get what a capsule may reach outside",
		answer:  examplePolicy(),
		errors:  []int{http.StatusNotFound},
	}, s.getNetwork)
	register(s, operation{
		id: "setNetwork", method: http.MethodPut, path: "/v1/capsules/{id}/network", tag: tag,
		summary: "Replace what a running capsule may reach outside",
		about: "The whole policy is replaced. Connections that the new one denies are cut, others go on. " +
			"Private, link-local and metadata addresses, and the host's own, are never reached.",
		request: networkBody{Allow: []string{"203.0.113.0/24", "*.example.com"}},
		answer:  examplePolicy(),
		errors:  []int{http.StatusNotFound, http.StatusConflict, http.StatusNotImplemented, http.StatusBadGateway, http.StatusServiceUnavailable},
	}, s.setNetwork)
	register(s, operation{
		id: "getNetworkLog", method: http.MethodGet, path: "/v1/capsules/{id}/network/log", tag: tag,
		summary: "Get what a running capsule reached outside, and was refused",
		answer: networkLog{
			Policy: examplePolicy(), Allowed: 1,
			Recent: []networkFlow{{
				At: exampleCapsule().CreatedAt, Protocol: "tcp", Name: "www.example.com", Address: "203.0.113.7", Port: 443,
				Verdict: "allowed", Rule: "*.example.com", Sent: 517, Received: 4096,
			}},
		},
		errors: []int{http.StatusNotFound, http.StatusConflict, http.StatusNotImplemented, http.StatusBadGateway, http.StatusServiceUnavailable},
	}, s.getNetworkLog)
}

func (s *server) getNetwork(ctx context.Context, caller control.Caller, in *CapsulePath) (*networkOutput, error) {
	c, err := s.control.Capsules.Get(ctx, caller, in.ID)
	if err != nil {
		return nil, err
	}
	return &networkOutput{Body: toPolicy(c.NetworkPolicy())}, nil
}

func (s *server) setNetwork(ctx context.Context, caller control.Caller, in *networkInput) (*networkOutput, error) {
	policy, err := s.control.Capsules.SetNetwork(ctx, caller, in.ID, in.Body.policy(s.control.Capsules.DefaultNetwork()))
	if err != nil {
		return nil, err
	}
	return &networkOutput{Body: toPolicy(policy)}, nil
}

func (s *server) getNetworkLog(ctx context.Context, caller control.Caller, in *CapsulePath) (*networkLogOutput, error) {
	report, err := s.control.Capsules.Network(ctx, caller, in.ID)
	if err != nil {
		return nil, err
	}
	return &networkLogOutput{Body: toNetworkLog(report)}, nil
}
