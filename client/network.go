package client

import (
	"context"
	"net/http"
	"net/netip"
	"time"

	"github.com/nestbox/nestbox"
)

// Network returns what the capsule may reach outside.
func (h *Capsule) Network(ctx context.Context) (p nestbox.NetworkPolicy, err error) {
	return p, h.c.call(ctx, http.MethodGet, h.path("/network"), nil, nil, &p)
}

// SetNetwork replaces what the running capsule may reach outside, and returns what is
// then in force: the operator may limit the speed. Connections that it does not allow are
// cut, others go on. CodeInvalid: policy cannot be meant. CodeInvalidState: the capsule
// does not run. CodeUnsupported: it has no way out.
func (h *Capsule) SetNetwork(ctx context.Context, policy nestbox.NetworkPolicy) (p nestbox.NetworkPolicy, err error) {
	return p, h.c.call(ctx, http.MethodPut, h.path("/network"), nil, policy, &p)
}

// NetworkLog returns what the running capsule reached outside, and was refused. Its
// errors are those of SetNetwork.
func (h *Capsule) NetworkLog(ctx context.Context) (nestbox.NetworkReport, error) {
	var out networkLogBody
	if err := h.c.call(ctx, http.MethodGet, h.path("/network/log"), nil, nil, &out); err != nil {
		return nestbox.NetworkReport{}, err
	}
	return out.domain(), nil
}

type networkLogBody struct {
	Policy   nestbox.NetworkPolicy `json:"policy"`
	Allowed  int64                 `json:"allowed"`
	Refused  int64                 `json:"refused"`
	Sent     int64                 `json:"sent"`
	Received int64                 `json:"received"`
	Recent   []networkFlowBody     `json:"recent"`
}

type networkFlowBody struct {
	At       time.Time  `json:"at"`
	Protocol string     `json:"protocol"`
	Name     string     `json:"name"`
	Address  netip.Addr `json:"address"`
	Port     uint16     `json:"port"`
	Verdict  string     `json:"verdict"`
	Rule     string     `json:"rule"`
	Reason   string     `json:"reason"`
	Open     bool       `json:"open"`
	Sent     int64      `json:"sent"`
	Received int64      `json:"received"`
}

func (b networkLogBody) domain() nestbox.NetworkReport {
	report := nestbox.NetworkReport{Policy: b.Policy, Allowed: b.Allowed, Refused: b.Refused, Sent: b.Sent, Received: b.Received}
	for _, f := range b.Recent {
		report.Recent = append(report.Recent, nestbox.NetworkFlow{
			Destination: nestbox.Destination{Name: f.Name, Addr: f.Address},
			Protocol:    nestbox.NetworkProtocol(f.Protocol), Port: f.Port,
			Verdict: nestbox.Verdict{Allowed: f.Verdict == "allowed", Rule: f.Rule},
			Reason:  f.Reason, At: f.At, Open: f.Open, Sent: f.Sent, Received: f.Received,
		})
	}
	return report
}
