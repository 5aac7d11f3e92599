package nestbox

import (
	"net/netip"
	"slices"
	"strings"
	"time"
)

// NetworkPolicy says what a capsule may reach outside. Addresses that are private,
// local or of the host are never reached by it, whatever it says.
//
// An entry of a list is an address, a range of addresses in CIDR form, a name
// ("example.com"), all names below one ("*.example.com", which leaves out
// example.com itself), or any name ("*"). What Allow has is allowed; of the rest,
// what Deny has is denied; Internet decides what neither has. This is the order of
// E2B, which has no names in its deny list.
//
// Names are those that a program shows when it connects (TLS server name, HTTP host)
// to ports 80 and 443, and that it looks up. An allowed name is dialled as a name: the
// address that the program meant is of no account.
type NetworkPolicy struct {
	Internet bool     `json:"internet"`
	Allow    []string `json:"allow,omitempty"`
	Deny     []string `json:"deny,omitempty"`
	// EgressMbps is how much may be sent, and how much received, in megabits per second;
	// 0 = as much as there is.
	EgressMbps int `json:"egress_mbps,omitempty"`
}

// Limits of a policy.
const (
	MaxNetworkRules = 256 // in each list
	MaxEgressMbps   = 100_000
	maxNameBytes    = 253
)

// DenyAll reports whether the policy lets nothing out.
func (p NetworkPolicy) DenyAll() bool { return !p.Internet && len(p.Allow) == 0 }

// Validate returns CodeInvalid if the policy cannot be meant.
func (p NetworkPolicy) Validate() error {
	_, err := p.Rules()
	return err
}

// Rules returns the policy in the form that decides. CodeInvalid: it cannot be meant.
func (p NetworkPolicy) Rules() (*NetworkRules, error) {
	if p.EgressMbps < 0 || p.EgressMbps > MaxEgressMbps {
		return nil, Errorf(CodeInvalid, "network.egress_mbps must be between 0 and %d, not %d", MaxEgressMbps, p.EgressMbps)
	}
	r := &NetworkRules{internet: p.Internet}
	for _, list := range []struct {
		name    string
		entries []string
		into    *[]networkRule
	}{{"allow", p.Allow, &r.allow}, {"deny", p.Deny, &r.deny}} {
		if len(list.entries) > MaxNetworkRules {
			return nil, Errorf(CodeInvalid, "network.%s: more than %d entries", list.name, MaxNetworkRules)
		}
		for _, entry := range list.entries {
			rule, err := parseNetworkRule(entry)
			if err != nil {
				return nil, Errorf(CodeInvalid, "network.%s: %.80q %s", list.name, entry, err)
			}
			*list.into = append(*list.into, rule)
		}
	}
	if p.Internet && len(p.Allow) > 0 && len(p.Deny) == 0 {
		return nil, Errorf(CodeInvalid, "network.allow decides nothing as long as everything is allowed: set network.internet to false, or deny 0.0.0.0/0")
	}
	return r, nil
}

// NetworkRules are a policy in the form that decides. They never change.
type NetworkRules struct {
	internet    bool
	allow, deny []networkRule
}

// networkRule is one entry of a list: a range, or names.
type networkRule struct {
	text   string
	prefix netip.Prefix // invalid for names
	name   string       // for "*.x" what follows the star: ".x"; for "*" ""
	below  bool         // the name and all below it, "*" and "*.x"
}

// Destination is what a capsule wants to reach.
type Destination struct {
	Name string     // as the program shows it; "" = not known. Case and a final dot do not matter
	Addr netip.Addr // invalid if it is asked about a name only
}

// Verdict is what follows for a destination.
type Verdict struct {
	Allowed bool
	Rule    string // the entry that decided; "" = NetworkPolicy.Internet
	// ByName says that an allow rule decided by the name: it is the name that may be
	// reached, at whatever address it has, and not the address.
	ByName bool
}

// Decide is the one evaluation of a policy.
func (r *NetworkRules) Decide(d Destination) Verdict {
	name := strings.ToLower(strings.TrimSuffix(d.Name, "."))
	for _, rule := range r.allow {
		if rule.matches(name, d.Addr) {
			return Verdict{Allowed: true, Rule: rule.text, ByName: !rule.prefix.IsValid()}
		}
	}
	for _, rule := range r.deny {
		if rule.matches(name, d.Addr) {
			return Verdict{Rule: rule.text}
		}
	}
	return Verdict{Allowed: r.internet}
}

// ByName reports whether names decide anything, so that they must be found out.
func (r *NetworkRules) ByName() bool {
	isName := func(rule networkRule) bool { return !rule.prefix.IsValid() }
	return slices.ContainsFunc(r.allow, isName) || slices.ContainsFunc(r.deny, isName)
}

// MayLookUp reports whether a name may be looked up. Where nothing is allowed but what
// is listed, a lookup of anything else would only tell somebody outside.
func (r *NetworkRules) MayLookUp(name string) bool {
	v := r.Decide(Destination{Name: name})
	if v.Rule != "" {
		return v.Allowed
	}
	everything := func(rule networkRule) bool {
		return rule.prefix.IsValid() && rule.prefix.Bits() == 0 && rule.prefix.Addr().Is4()
	}
	return slices.ContainsFunc(r.allow, everything) || r.internet && !slices.ContainsFunc(r.deny, everything)
}

func (rule networkRule) matches(name string, addr netip.Addr) bool {
	switch {
	case rule.prefix.IsValid():
		return addr.IsValid() && rule.prefix.Contains(addr.Unmap())
	case name == "":
		return false
	case rule.below:
		return strings.HasSuffix(name, rule.name)
	}
	return name == rule.name
}

type ruleError string

func (e ruleError) Error() string { return string(e) }

// parseNetworkRule reads one entry.
func parseNetworkRule(text string) (networkRule, error) {
	rule := networkRule{text: text}
	if addr, err := netip.ParseAddr(text); err == nil {
		if addr.IsUnspecified() || addr.Zone() != "" {
			return rule, ruleError("is not an address that can be reached; a range is written 0.0.0.0/0")
		}
		addr = addr.Unmap()
		rule.prefix = netip.PrefixFrom(addr, addr.BitLen())
		return rule, nil
	}
	if strings.Contains(text, "/") {
		prefix, err := netip.ParsePrefix(text)
		if err != nil || prefix.Addr().Is4In6() {
			return rule, ruleError("is not a range of addresses, such as 203.0.113.0/24")
		}
		if prefix != prefix.Masked() {
			return rule, ruleError("has bits beyond its length: it may mean " + prefix.Masked().String())
		}
		rule.prefix = prefix
		return rule, nil
	}
	name := strings.ToLower(text)
	switch {
	case name == "*":
		rule.below = true
		return rule, nil
	case strings.HasPrefix(name, "*."):
		rule.below, rule.name = true, name[1:]
		name = name[2:]
	default:
		rule.name = name
	}
	if !ValidHostName(name) {
		return rule, ruleError("is neither an address, a range such as 203.0.113.0/24, nor a name such as example.com or *.example.com")
	}
	return rule, nil
}

// ValidHostName reports whether s can be the name of a host on the internet: dotted
// labels of letters, digits, "-" and "_", with one that is no number last (RFC 1123
// section 2.1). Other scripts are written in their ASCII form.
func ValidHostName(s string) bool {
	if len(s) == 0 || len(s) > maxNameBytes {
		return false
	}
	labels := strings.Split(s, ".")
	for _, label := range labels {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' || strings.ContainsFunc(label, notInLabel) {
			return false
		}
	}
	return strings.ContainsFunc(labels[len(labels)-1], func(r rune) bool { return r < '0' || r > '9' })
}

func notInLabel(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_'
}

// NetworkReport is what a running capsule reached outside, and what it was refused.
type NetworkReport struct {
	Policy   NetworkPolicy // in force
	Allowed  int64         // flows, those that go on left out
	Refused  int64
	Sent     int64 // bytes out of the capsule, in flows that have ended
	Received int64
	// Recent are the last flows, the oldest first, with those that go on at the end.
	Recent []NetworkFlow
}

// NetworkFlow is a connection, a pair of UDP addresses, or a lookup of a name.
type NetworkFlow struct {
	Destination
	Protocol NetworkProtocol
	Port     uint16
	Verdict  Verdict
	Reason   string // why it was refused or failed, beyond the rule; "" = by the policy
	At       time.Time
	Open     bool  // it goes on
	Sent     int64 // bytes out of the capsule
	Received int64
}

// NetworkProtocol is of a NetworkFlow.
type NetworkProtocol string

// The protocols.
const (
	NetworkTCP NetworkProtocol = "tcp"
	NetworkUDP NetworkProtocol = "udp"
	NetworkDNS NetworkProtocol = "dns" // a lookup, which we answer
)
