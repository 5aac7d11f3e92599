package nestbox_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/nestbox/nestbox"
)

func TestNetworkPolicy(t *testing.T) {
	t.Parallel()
	const site, other = "203.0.113.10", "198.51.100.10"
	only := func(allow ...string) nestbox.NetworkPolicy { return nestbox.NetworkPolicy{Allow: allow} }
	but := func(deny ...string) nestbox.NetworkPolicy { return nestbox.NetworkPolicy{Internet: true, Deny: deny} }
	e2b := nestbox.NetworkPolicy{Internet: true, Allow: []string{"example.com"}, Deny: []string{"0.0.0.0/0"}}
	yes, no := nestbox.Verdict{Allowed: true}, nestbox.Verdict{}
	by := func(rule string) nestbox.Verdict { return nestbox.Verdict{Allowed: true, Rule: rule, ByName: true} }
	at := func(rule string) nestbox.Verdict { return nestbox.Verdict{Allowed: true, Rule: rule} }
	denied := func(rule string) nestbox.Verdict { return nestbox.Verdict{Rule: rule} }
	for what, c := range map[string]struct {
		policy     nestbox.NetworkPolicy
		name, addr string
		want       nestbox.Verdict
		lookUp     bool // of the name
	}{
		"nothing is said":              {nestbox.NetworkPolicy{Internet: true}, "a.b", site, yes, true},
		"nothing is allowed":           {nestbox.NetworkPolicy{}, "a.b", site, no, false},
		"a range":                      {only("203.0.113.0/24"), "", site, at("203.0.113.0/24"), false},
		"an address":                   {only(site), "", site, at(site), false},
		"another address":              {only(site), "", other, no, false},
		"an IPv6 range":                {only("2001:db8::/32"), "", "2001:db8::1", at("2001:db8::/32"), false},
		"IPv4 in IPv6":                 {only("203.0.113.0/24"), "", "::ffff:203.0.113.10", at("203.0.113.0/24"), false},
		"a name":                       {only("example.com"), "example.com", other, by("example.com"), true},
		"its case, and a final dot":    {only("Example.com"), "eXample.com.", other, by("Example.com"), true},
		"below a name":                 {only("example.com"), "www.example.com", site, no, false},
		"all below":                    {only("*.example.com"), "a.b.example.com", site, by("*.example.com"), true},
		"all below leaves out itself":  {only("*.example.com"), "example.com", site, no, false},
		"an end that looks like it":    {only("*.example.com"), "notexample.com", site, no, false},
		"any name":                     {only("*"), "anything.org", site, by("*"), true},
		"any name, and none is known":  {only("*"), "", site, no, false},
		"no name is known":             {only("example.com"), "", site, no, false},
		"all but a range":              {but("203.0.113.0/24"), "", site, denied("203.0.113.0/24"), true},
		"all but another range":        {but("203.0.113.0/24"), "", other, yes, true},
		"all but a name":               {but("example.com"), "example.com", other, denied("example.com"), false},
		"all but a name, another":      {but("example.com"), "example.org", other, yes, true},
		"all but a name, none known":   {but("example.com"), "", other, yes, true},
		"E2B: an allowed name":         {e2b, "example.com", site, by("example.com"), true},
		"E2B: another name":            {e2b, "example.org", site, denied("0.0.0.0/0"), false},
		"allow wins over deny":         {nestbox.NetworkPolicy{Allow: []string{site}, Deny: []string{"203.0.113.0/24"}}, "", site, at(site), false},
		"all allowed but denied names": {nestbox.NetworkPolicy{Allow: []string{"0.0.0.0/0"}, Deny: []string{"example.com"}}, "example.org", site, at("0.0.0.0/0"), true},
	} {
		rules, err := c.policy.Rules()
		require.NoError(t, err, what)
		require.Equal(t, c.want, rules.Decide(nestbox.Destination{Name: c.name, Addr: netip.MustParseAddr(c.addr)}), what)
		if c.name != "" {
			require.Equal(t, c.lookUp, rules.MayLookUp(c.name), what)
		}
	}
}

func TestNetworkPolicyRefuses(t *testing.T) {
	t.Parallel()
	for _, entry := range []string{
		"", " ", "0.0.0.0", "::", "203.0.113.0/33", "203.0.113.1/24", "1.2.3", "1.2.3.4.5", "exa mple.com", "-a.com", "a..b", ".com", "a.com.",
		"*.", "**.a.com", "a.*.com", "*a.com", "http://a.com", "a.com:80", "bücher.de", "fe80::1%eth0", strings.Repeat("a.", 200) + "com", "::ffff:1.2.3.4/120",
	} {
		for _, p := range []nestbox.NetworkPolicy{{Allow: []string{entry}}, {Internet: true, Deny: []string{entry}}} {
			require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(p.Validate()), "%q", entry)
		}
	}
	for what, p := range map[string]nestbox.NetworkPolicy{
		"an allow list that decides nothing": {Internet: true, Allow: []string{"example.com"}},
		"too many entries":                   {Allow: slices.Repeat([]string{"a.com"}, nestbox.MaxNetworkRules+1)},
	} {
		require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(p.Validate()), what)
	}
}

// TestNetworkPolicyProperties: whatever the policy, the order within a list is of no
// account, an allowed entry never denies, a denied one never allows, and what may be
// reached by its name may be looked up.
func TestNetworkPolicyProperties(t *testing.T) {
	t.Parallel()
	names := []string{"a.com", "b.a.com", "c.b.a.com", "org.net"}
	entry := rapid.SampledFrom([]string{"a.com", "*.a.com", "*.com", "*", "b.a.com", "10.0.0.0/8", "203.0.113.0/24", "203.0.113.10", "0.0.0.0/0", "2001:db8::/32"})
	list := rapid.SliceOfN(entry, 0, 5)
	rapid.Check(t, func(t *rapid.T) {
		p := nestbox.NetworkPolicy{Internet: rapid.Bool().Draw(t, "internet"), Allow: list.Draw(t, "allow"), Deny: list.Draw(t, "deny")}
		rules, err := p.Rules()
		if err != nil {
			require.True(t, p.Internet && len(p.Deny) == 0 && len(p.Allow) > 0, err)
			return
		}
		d := nestbox.Destination{
			Name: rapid.SampledFrom(append(names, "")).Draw(t, "name"),
			Addr: netip.MustParseAddr(rapid.SampledFrom([]string{"203.0.113.10", "10.1.2.3", "8.8.8.8", "2001:db8::1"}).Draw(t, "addr")),
		}
		v := rules.Decide(d)
		change := func(f func(*nestbox.NetworkPolicy)) nestbox.Verdict {
			changed := nestbox.NetworkPolicy{Internet: p.Internet, Allow: slices.Clone(p.Allow), Deny: slices.Clone(p.Deny)}
			f(&changed)
			rules, err := changed.Rules()
			if err != nil {
				return v
			}
			return rules.Decide(d)
		}
		require.Equal(t, v.Allowed, change(func(p *nestbox.NetworkPolicy) { slices.Reverse(p.Allow); slices.Reverse(p.Deny) }).Allowed)
		more := entry.Draw(t, "more")
		if v.Allowed {
			require.True(t, change(func(p *nestbox.NetworkPolicy) { p.Allow = append(p.Allow, more) }).Allowed)
		} else {
			require.False(t, change(func(p *nestbox.NetworkPolicy) { p.Deny = append(p.Deny, more) }).Allowed)
		}
		if v.ByName {
			require.True(t, rules.MayLookUp(d.Name))
		}
		if p.DenyAll() {
			require.False(t, v.Allowed)
			require.False(t, rules.MayLookUp("a.com"))
		}
	})
}
