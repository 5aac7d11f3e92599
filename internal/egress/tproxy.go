package egress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/netns"
)

// In a capsule's outer namespace all that comes out of the capsule is marked, and
// delivered to our sockets by TPROXY, whatever its destination. What is marked counts
// as local. All else is dropped.
const (
	tableName = "nestbox"
	proxyPort = 15001
	dnsPort   = 53
	localMark = 1
	routes    = 100 // the routing table of what is marked
)

// sockets are those of a Gateway, in the outer namespace.
type sockets struct {
	path        string
	tcp, dnsTCP net.Listener
	udp, dnsUDP *net.UDPConn
}

func (s *sockets) close() error {
	var errs []error
	for _, c := range []interface{ Close() error }{s.tcp, s.dnsTCP, s.udp, s.dnsUDP} {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// openSockets prepares the namespace at a path, which may have been prepared before,
// and opens the sockets in it.
func openSockets(path string) (*sockets, error) {
	s := &sockets{path: path}
	err := netns.In(path, func() error {
		if err := prepare(); err != nil {
			return err
		}
		return s.open()
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (s *sockets) open() (err error) {
	ctx := context.Background()
	lc := net.ListenConfig{Control: transparent}
	if s.tcp, err = lc.Listen(ctx, "tcp4", fmt.Sprintf(":%d", proxyPort)); err != nil {
		return err
	}
	if s.dnsTCP, err = lc.Listen(ctx, "tcp4", fmt.Sprintf(":%d", dnsPort)); err != nil {
		return errors.Join(err, s.tcp.Close())
	}
	for _, u := range []struct {
		conn **net.UDPConn
		port int
	}{{&s.udp, proxyPort}, {&s.dnsUDP, dnsPort}} {
		conn, err := lc.ListenPacket(ctx, "udp4", fmt.Sprintf(":%d", u.port))
		if err != nil {
			err = errors.Join(err, s.tcp.Close(), s.dnsTCP.Close())
			if s.udp != nil {
				err = errors.Join(err, s.udp.Close())
			}
			return err
		}
		*u.conn = conn.(*net.UDPConn)
	}
	return nil
}

// transparent makes a socket take what is for any address, and say for which.
func transparent(network, _ string, c syscall.RawConn) error {
	var result error
	err := c.Control(func(fd uintptr) {
		options := []int{unix.IP_TRANSPARENT}
		if network == "udp4" {
			options = append(options, unix.IP_RECVORIGDSTADDR)
		}
		for _, option := range options {
			result = errors.Join(result, unix.SetsockoptInt(int(fd), unix.SOL_IP, option, 1))
		}
		result = errors.Join(result, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	})
	return errors.Join(err, result)
}

// prepare sets up the thread's namespace.
func prepare() error {
	h, err := netlink.NewHandle()
	if err != nil {
		return err
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find the loopback: %w", err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring the loopback up: %w", err)
	}
	rule := netlink.NewRule()
	rule.Mark, rule.Table, rule.Family = localMark, routes, netlink.FAMILY_V4
	if err := h.RuleAdd(rule); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add the routing rule: %w", err)
	}
	_, everywhere, _ := net.ParseCIDR("0.0.0.0/0")
	route := netlink.Route{LinkIndex: lo.Attrs().Index, Dst: everywhere, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Table: routes}
	if err := h.RouteReplace(&route); err != nil {
		return fmt.Errorf("add the route: %w", err)
	}
	if err := prepareTable(); err != nil {
		return nestbox.Errorf(nestbox.CodeUnsupported, "set up TPROXY (kernel modules nf_tables and nft_tproxy): %w", err)
	}
	return nil
}

// prepareTable replaces the namespace's nftables table, all at once.
func prepareTable() error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: tableName}
	c.AddTable(t) // so that there is one to delete
	c.DelTable(t)
	c.AddTable(t)
	drop, accept := nftables.ChainPolicyDrop, nftables.ChainPolicyAccept
	chain := func(name string, hook *nftables.ChainHook, priority *nftables.ChainPriority, policy *nftables.ChainPolicy) *nftables.Chain {
		return c.AddChain(&nftables.Chain{Name: name, Table: t, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: priority, Policy: policy})
	}
	pre := chain("pre", nftables.ChainHookPrerouting, nftables.ChainPriorityMangle, &accept)
	in := chain("in", nftables.ChainHookInput, nftables.ChainPriorityFilter, &drop)
	chain("forward", nftables.ChainHookForward, nftables.ChainPriorityFilter, &drop)
	add := func(ch *nftables.Chain, parts ...[]expr.Any) {
		r := &nftables.Rule{Table: t, Chain: ch}
		for _, p := range parts {
			r.Exprs = append(r.Exprs, p...)
		}
		c.AddRule(r)
	}
	// Nothing here tracks connections: a flood would fill the tables of that.
	for _, protocol := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		add(pre, fromCapsule(protocol), port(expr.CmpOpEq, dnsPort), proxyTo(dnsPort), verdict(expr.VerdictAccept))
		if protocol == unix.IPPROTO_TCP { // what belongs to connections that we made into the capsule
			add(pre, fromCapsule(protocol), toUs(), verdict(expr.VerdictReturn))
		}
		add(pre, fromCapsule(protocol), proxyTo(proxyPort), verdict(expr.VerdictAccept))
	}
	add(in, isMarked(), verdict(expr.VerdictAccept))
	add(in, fromCapsule(unix.IPPROTO_TCP), toUs(), port(expr.CmpOpNeq, proxyPort), verdict(expr.VerdictAccept))
	return c.Flush()
}

func verdict(kind expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: kind}} }

// fromCapsule: iifname "gw0" meta l4proto …
func fromCapsule(protocol byte) []expr.Any {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, netns.OuterLink)
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{protocol}},
	}
}

// toUs: ip daddr …, the outer address.
func toUs() []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: netns.OuterAddr.AsSlice()},
	}
}

// port: th dport …
func port(op expr.CmpOp, port uint16) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: op, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
	}
}

// proxyTo: meta mark set 1 tproxy to :…
func proxyTo(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: binaryutil.NativeEndian.PutUint32(localMark)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
		&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
		&expr.TProxy{Family: unix.NFPROTO_IPV4, TableFamily: unix.NFPROTO_IPV4, RegPort: 1},
	}
}

// isMarked: meta mark 1.
func isMarked() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(localMark)},
	}
}
