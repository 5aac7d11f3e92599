package hostrpc

import (
	"net/netip"

	"github.com/nestbox/nestbox"
	hostv1 "github.com/nestbox/nestbox/gen/nestbox/host/v1"
)

func policyToWire(p nestbox.NetworkPolicy) *hostv1.NetworkPolicy {
	return &hostv1.NetworkPolicy{Internet: p.Internet, Allow: p.Allow, Deny: p.Deny, EgressMbps: int32(p.EgressMbps)}
}

func policyFromWire(p *hostv1.NetworkPolicy) nestbox.NetworkPolicy {
	return nestbox.NetworkPolicy{Internet: p.GetInternet(), Allow: p.GetAllow(), Deny: p.GetDeny(), EgressMbps: int(p.GetEgressMbps())}
}

func reportToWire(r nestbox.NetworkReport) *hostv1.NetworkResponse {
	out := &hostv1.NetworkResponse{
		Policy: policyToWire(r.Policy), Allowed: r.Allowed, Refused: r.Refused, Sent: r.Sent, Received: r.Received,
	}
	for _, f := range r.Recent {
		out.Recent = append(out.Recent, flowToWire(f))
	}
	return out
}

func reportFromWire(r *hostv1.NetworkResponse) nestbox.NetworkReport {
	out := nestbox.NetworkReport{
		Policy: policyFromWire(r.GetPolicy()), Allowed: r.GetAllowed(), Refused: r.GetRefused(), Sent: r.GetSent(), Received: r.GetReceived(),
	}
	for _, f := range r.GetRecent() {
		out.Recent = append(out.Recent, flowFromWire(f))
	}
	return out
}

func flowToWire(f nestbox.NetworkFlow) *hostv1.NetworkFlow {
	return &hostv1.NetworkFlow{
		Name: f.Name, Addr: f.Addr.AsSlice(), Protocol: string(f.Protocol), Port: uint32(f.Port),
		Allowed: f.Verdict.Allowed, Rule: f.Verdict.Rule, ByName: f.Verdict.ByName, Reason: f.Reason,
		At: timeToWire(f.At), Open: f.Open, Sent: f.Sent, Received: f.Received,
	}
}

func flowFromWire(f *hostv1.NetworkFlow) nestbox.NetworkFlow {
	addr, _ := netip.AddrFromSlice(f.GetAddr()) // without one: the zero Addr
	return nestbox.NetworkFlow{
		Destination: nestbox.Destination{Name: f.GetName(), Addr: addr},
		Protocol:    nestbox.NetworkProtocol(f.GetProtocol()),
		Port:        uint16(f.GetPort()),
		Verdict:     nestbox.Verdict{Allowed: f.GetAllowed(), Rule: f.GetRule(), ByName: f.GetByName()},
		Reason:      f.GetReason(),
		At:          timeFromWire(f.GetAt()),
		Open:        f.GetOpen(),
		Sent:        f.GetSent(),
		Received:    f.GetReceived(),
	}
}
