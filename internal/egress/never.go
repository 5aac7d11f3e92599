package egress

import (
	"errors"
	"net/netip"
	"slices"
)

// errNever refuses an address that no policy can allow.
var errNever = errors.New("the address is private, local or of the host")

// never are the ranges that no capsule reaches: those that are private, shared, local,
// for documentation of the host's own network, for benchmarks, multicast or reserved
// (RFC 6890), and what carries IPv4 addresses in IPv6 ones.
var never = func() (ranges []netip.Prefix) {
	for _, text := range []string{
		"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
		"192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4",
		"::/96", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32",
	} {
		ranges = append(ranges, netip.MustParsePrefix(text))
	}
	return ranges
}()

// Never is what no capsule reaches.
type Never struct {
	// Lifted are ranges that the operator lets capsules reach all the same.
	Lifted []netip.Prefix
	// Own are addresses of the host, which are never reached unless they are lifted.
	Own func() []netip.Addr // nil = none but those in the ranges
}

// Has reports whether an address is never reached.
func (n Never) Has(addr netip.Addr) bool {
	addr = addr.Unmap().WithZone("")
	contains := func(p netip.Prefix) bool { return p.Contains(addr) }
	switch {
	case slices.ContainsFunc(n.Lifted, contains):
		return false
	case !addr.IsValid() || slices.ContainsFunc(never, contains):
		return true
	}
	return n.Own != nil && slices.Contains(n.Own(), addr)
}
