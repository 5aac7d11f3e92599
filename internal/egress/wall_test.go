package egress

import (
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/egress/world"
)

// TestWall: the host's kernel refuses by itself what no capsule may reach, and nobody
// else anything.
func TestWall(t *testing.T) {
	t.Parallel()
	_, err := world.Join()
	require.NoError(t, err)
	w, other := newWall("a"), newWall("b")
	require.NotEqual(t, w.mark, other.mark)
	reach := func(as wall, address string) error {
		d := net.Dialer{Timeout: 200 * time.Millisecond, Control: func(_, _ string, c syscall.RawConn) error { return mark(c, as.mark) }}
		conn, err := d.Dial("tcp", address)
		if err == nil {
			err = conn.Close()
		}
		return err
	}
	const private = lifted + ":7777" // at times
	require.NoError(t, reach(w, private))
	require.NoError(t, w.raise(nil))
	require.Error(t, reach(w, private))
	require.NoError(t, reach(w, site+":7777"))
	require.NoError(t, reach(other, private))
	require.NoError(t, reach(wall{}, private))
	require.NoError(t, w.raise([]netip.Prefix{netip.MustParsePrefix(lifted + "/32")}))
	require.NoError(t, reach(w, private))
	require.Error(t, reach(w, metadata+":80"))

	own, err := net.Listen("tcp", hostIP+":0")
	require.NoError(t, err)
	defer own.Close()
	require.Error(t, reach(w, own.Addr().String()), "the host's own address")
	require.NoError(t, reach(other, own.Addr().String()))
	require.NoError(t, w.remove())
	require.NoError(t, reach(w, own.Addr().String()))
}

// TestForeignFirewall: a table that forwards nothing, as Docker's and ufw's, changes
// nothing. It stays for all tests.
func TestForeignFirewall(t *testing.T) {
	t.Parallel()
	c := newCapsule(t)
	nft, err := nftables.New()
	require.NoError(t, err)
	drop := nftables.ChainPolicyDrop
	table := nft.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "foreign"})
	nft.AddChain(&nftables.Chain{
		Name: "forward", Table: table, Type: nftables.ChainTypeFilter, Policy: &drop,
		Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter,
	})
	require.NoError(t, nft.Flush())
	c.open(nestbox.NetworkPolicy{Internet: true})
	for _, network := range []string{"tcp4", "udp4"} {
		text, err := c.echo(network, site+":7777")
		require.NoError(t, err)
		require.Equal(t, "hello", text)
	}
}
