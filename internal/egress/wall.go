package egress

import (
	"fmt"
	"hash/fnv"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// wall is a second refusal of what Never has, by the host's own kernel: a table of
// nftables that drops what the egress process sends there, whatever it believes. What
// other programs send it does not touch.
type wall struct {
	table *nftables.Table
	mark  uint32
}

// newWall returns the wall of the process that works on a directory, which has a mark of
// its own: others may lift other ranges.
func newWall(dir string) wall {
	h := fnv.New32a()
	_, _ = h.Write([]byte(dir))
	id := h.Sum32()
	return wall{
		table: &nftables.Table{Family: nftables.TableFamilyINet, Name: fmt.Sprintf("nestbox-egress-%08x", id)},
		mark:  markBase | id&0xffff,
	}
}

// raise puts the wall up, or replaces it. Where the kernel cannot tell its own addresses
// (nft_fib), those outside of never are left to the process.
func (w wall) raise(lifted []netip.Prefix) error {
	if w.build(lifted, true) == nil {
		return nil
	}
	return w.build(lifted, false)
}

func (w wall) build(lifted []netip.Prefix, own bool) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	c.AddTable(w.table) // so that there is one to delete
	c.DelTable(w.table)
	c.AddTable(w.table)
	accept := nftables.ChainPolicyAccept
	chain := c.AddChain(&nftables.Chain{
		Name: "out", Table: w.table, Type: nftables.ChainTypeFilter, Policy: &accept,
		Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFilter,
	})
	add := func(exprs []expr.Any, kind expr.VerdictKind) {
		c.AddRule(&nftables.Rule{Table: w.table, Chain: chain, Exprs: append(exprs, &expr.Verdict{Kind: kind})})
	}
	add([]expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(w.mark)},
	}, expr.VerdictReturn)
	for _, p := range lifted {
		add(toRange(p), expr.VerdictReturn)
	}
	for _, p := range never {
		add(toRange(p), expr.VerdictDrop)
	}
	if own {
		add([]expr.Any{ // fib daddr type local
			&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
		}, expr.VerdictDrop)
	}
	return c.Flush()
}

// remove takes the wall down.
func (w wall) remove() error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	c.DelTable(w.table)
	return c.Flush()
}

// toRange: meta nfproto … ip daddr …
func toRange(p netip.Prefix) []expr.Any {
	family, offset, bytes := byte(unix.NFPROTO_IPV4), uint32(16), uint32(4)
	if p.Addr().Is6() {
		family, offset, bytes = unix.NFPROTO_IPV6, 24, 16
	}
	mask := make([]byte, bytes)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: bytes},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: bytes, Mask: mask, Xor: make([]byte, bytes)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}
}
