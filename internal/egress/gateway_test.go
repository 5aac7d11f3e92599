package egress

import (
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/egress/world"
	"github.com/nestbox/nestbox/internal/netns"
)

func (c *capsule) open(p nestbox.NetworkPolicy) {
	c.t.Helper()
	g, err := Open(c.config(), "c", c.dir.Outer("c"), p)
	require.NoError(c.t, err)
	c.g = g
	c.t.Cleanup(func() { require.NoError(c.t, g.Close()) })
}

// TestPolicy tries every way out under every kind of policy, as programs see it.
func TestPolicy(t *testing.T) {
	t.Parallel()
	for _, row := range world.Table() {
		t.Run(row.What, func(t *testing.T) {
			t.Parallel()
			c := newCapsule(t)
			c.open(row.Policy)
			got, err := c.try(row.Try)
			if row.Want == world.Refused {
				require.Error(t, err, got)
			} else {
				require.NoError(t, err)
			}
			require.Equal(t, row.Want, got)
		})
	}
	t.Cleanup(func() {
		w, err := world.Join()
		require.NoError(t, err)
		for _, ip := range []string{private, metadata} {
			require.False(t, w.Seen(ip) || w.Seen("udp "+ip), "%s was reached", ip)
		}
	})
}

// TestLookups: names are looked up by us, whatever server the capsule means, only
// where they may be reached, and without addresses that may not.
func TestLookups(t *testing.T) {
	t.Parallel()
	c := newCapsule(t)
	c.open(nestbox.NetworkPolicy{Allow: []string{"allowed.test", "both.test", "alias.test", "rebind.test"}})
	for _, network := range []string{"udp4", "tcp4"} {
		for name, want := range map[string]string{
			"allowed.test.": site, "ALLOWED.test.": site, "both.test.": site, "alias.test.": site2, "rebind.test.": "",
		} {
			for _, server := range []string{"169.254.0.22:53", "9.9.9.9:53", private + ":53"} {
				answer, err := c.lookUp(network, server, name, dns.TypeA)
				require.NoError(t, err, name)
				require.Equal(t, dns.RcodeSuccess, answer.Rcode, name)
				var ips []string
				for _, r := range answer.Answer {
					if a, ok := r.(*dns.A); ok {
						ips = append(ips, a.A.String())
					}
				}
				require.Equal(t, want, strings.Join(ips, " "), name)
			}
		}
		for _, kind := range []uint16{dns.TypeAAAA, dns.TypeHTTPS, dns.TypeSVCB} {
			answer, err := c.lookUp(network, "8.8.8.8:53", "allowed.test.", kind)
			require.NoError(t, err)
			require.Equal(t, dns.RcodeSuccess, answer.Rcode)
			require.Empty(t, answer.Answer)
		}
		for _, kind := range []uint16{dns.TypeA, dns.TypeTXT, dns.TypeNULL} {
			answer, err := c.lookUp(network, "8.8.8.8:53", "secret-"+network+".other.test.", kind)
			require.NoError(t, err)
			require.Equal(t, dns.RcodeRefused, answer.Rcode)
		}
		require.False(t, c.w.Asked("secret-"), "a name that is not allowed tells nobody outside")
	}
	answer, err := c.lookUp("udp4", "8.8.8.8:53", "allowed.test.", dns.TypeTXT)
	require.NoError(t, err)
	require.True(t, answer.Truncated)
	answer, err = c.lookUp("tcp4", "8.8.8.8:53", "allowed.test.", dns.TypeTXT)
	require.NoError(t, err)
	require.Len(t, answer.Answer, 40)
}

// TestPolicyChanges: what a new policy denies is cut, and what it allows lives.
func TestPolicyChanges(t *testing.T) {
	t.Parallel()
	c := newCapsule(t)
	c.open(nestbox.NetworkPolicy{Internet: true})
	stays, err := c.dial("tcp4", site+":7777")
	require.NoError(t, err)
	defer stays.Close()
	goes, err := c.dial("tcp4", site2+":7777")
	require.NoError(t, err)
	defer goes.Close()
	packets, err := c.dial("udp4", site2+":7777")
	require.NoError(t, err)
	defer packets.Close()
	says := func(conn io.ReadWriter) error {
		buf := make([]byte, 5)
		if _, err := conn.Write([]byte("hello")); err != nil {
			return err
		}
		_, err := io.ReadFull(conn, buf)
		return err
	}
	for range 3 {
		for _, conn := range []io.ReadWriter{stays, goes, packets} {
			require.NoError(t, says(conn))
		}
	}
	require.NoError(t, c.g.Set(nestbox.NetworkPolicy{Allow: []string{site}}))
	require.NoError(t, says(stays))
	require.NoError(t, goes.SetDeadline(time.Now().Add(patience)))
	require.ErrorContains(t, says(goes), "reset")
	require.NoError(t, packets.SetDeadline(time.Now().Add(300*time.Millisecond)))
	require.Error(t, says(packets))
	require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(c.g.Set(nestbox.NetworkPolicy{Allow: []string{"?"}})))
	require.NoError(t, says(stays), "a policy that cannot be meant changes nothing")
	require.NoError(t, c.g.Set(nestbox.NetworkPolicy{Internet: true}))
	require.NoError(t, packets.SetDeadline(time.Now().Add(patience)))
	require.NoError(t, says(packets), "and it may again")
}

// TestFlowsAreCounted: each flow is told once, with what decided and how much went by.
func TestFlowsAreCounted(t *testing.T) {
	t.Parallel()
	c := newCapsule(t)
	c.open(nestbox.NetworkPolicy{Allow: []string{"allowed.test", "rebind.test", site2}})
	_, err := c.get("http", "allowed.test", site)
	require.NoError(t, err)
	_, err = c.echo("tcp4", site2+":7777")
	require.NoError(t, err)
	_, err = c.echo("tcp4", site+":7777")
	require.Error(t, err)
	_, err = c.get("http", "rebind.test", site)
	require.Error(t, err)
	find := func(match func(nestbox.NetworkFlow) bool) nestbox.NetworkFlow {
		var found nestbox.NetworkFlow
		require.Eventually(t, func() bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			for _, f := range c.flows {
				if match(f) {
					found = f
					return true
				}
			}
			return false
		}, patience, time.Millisecond)
		return found
	}
	f := find(func(f nestbox.NetworkFlow) bool { return f.Name == "allowed.test" && f.Protocol == nestbox.NetworkTCP })
	require.Equal(t, nestbox.Verdict{Allowed: true, Rule: "allowed.test", ByName: true}, f.Verdict)
	require.Positive(t, f.Sent)
	require.Positive(t, f.Received)
	f = find(func(f nestbox.NetworkFlow) bool { return f.Addr == netip.MustParseAddr(site2) })
	require.Equal(t, nestbox.Verdict{Allowed: true, Rule: site2}, f.Verdict)
	require.Equal(t, [2]int64{5, 5}, [2]int64{f.Sent, f.Received})
	f = find(func(f nestbox.NetworkFlow) bool { return f.Addr == netip.MustParseAddr(site) && f.Port == 7777 })
	require.Equal(t, nestbox.Verdict{}, f.Verdict)
	f = find(func(f nestbox.NetworkFlow) bool { return f.Name == "rebind.test" && f.Protocol == nestbox.NetworkTCP })
	require.False(t, f.Verdict.Allowed)
	require.Equal(t, errNever.Error(), f.Reason)
}

// TestOpenFlowsAreShown: also with the name, if nothing is decided by it.
func TestOpenFlowsAreShown(t *testing.T) {
	t.Parallel()
	c := newCapsule(t)
	c.open(nestbox.NetworkPolicy{Internet: true})
	conn, err := c.dial("tcp4", site+":80")
	require.NoError(t, err)
	defer conn.Close()
	_, err = conn.Write([]byte("GET / HTTP/1.1\r\nHost: allowed.test\r\n\r\n"))
	require.NoError(t, err)
	_, err = conn.Read(make([]byte, 1))
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		open := c.g.open()
		return len(open) == 1 && open[0].Open && open[0].Name == "allowed.test" && open[0].Sent > 0
	}, patience, time.Millisecond)
	require.NoError(t, conn.Close())
	require.Eventually(t, func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.g.open()) == 0 && len(c.flows) == 1 && c.flows[0].Name == "allowed.test"
	}, patience, time.Millisecond)
}

// TestSpeed: what a capsule sends takes as long as its limit has it, until that is lifted.
func TestSpeed(t *testing.T) {
	t.Parallel()
	c := newCapsule(t)
	c.open(nestbox.NetworkPolicy{Internet: true, EgressMbps: 8})
	fetch := func(bytes int) time.Duration {
		conn, err := c.dial("tcp4", site+":7777")
		require.NoError(t, err)
		defer conn.Close()
		go func() { _, _ = conn.Write(make([]byte, bytes)) }()
		start := time.Now()
		_, err = io.ReadFull(conn, make([]byte, bytes))
		require.NoError(t, err)
		return time.Since(start)
	}
	const mb = 1_000_000
	require.Greater(t, fetch(mb), 700*time.Millisecond, "a burst is free")
	require.NoError(t, c.g.Set(nestbox.NetworkPolicy{Internet: true}))
	fetch(100 * mb) // which would take longer than the test may
	require.Eventually(t, func() bool { return len(c.g.open()) == 0 }, patience, time.Millisecond)
	require.NoError(t, c.g.Set(nestbox.NetworkPolicy{Internet: true, EgressMbps: 1}))

	// Datagrams beyond the limit are lost.
	conn, err := c.dial("udp4", site+":7777")
	require.NoError(t, err)
	defer conn.Close()
	for range 100 {
		_, err = conn.Write(make([]byte, 10_000))
		require.NoError(t, err)
	}
	require.Eventually(t, func() bool {
		open := c.g.open()
		return len(open) == 1 && open[0].Sent > 0
	}, patience, time.Millisecond)
	require.Less(t, c.g.open()[0].Sent, int64(mb/2))
}

// TestLimits: a capsule that opens connections without end costs a bounded number.
func TestLimits(t *testing.T) {
	t.Parallel()
	c := newCapsule(t)
	cfg := c.config()
	cfg.Limits = Limits{TCP: 5, UDP: 3, Peek: 100 * time.Millisecond}
	g, err := Open(cfg, "c", c.dir.Outer("c"), nestbox.NetworkPolicy{Internet: true, Deny: []string{"other.test"}})
	require.NoError(t, err)
	defer func() { require.NoError(t, g.Close()) }()
	answered := 0
	for range 20 {
		conn, err := c.dial("tcp4", site+":7777")
		if err != nil { // it was reset that soon
			continue
		}
		defer conn.Close()
		require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
		_, _ = conn.Write([]byte("x")) // it may be reset already
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			answered++
		}
	}
	require.Equal(t, 5, answered)
}

// TestClosedWithout: where no Gateway stands, and after it is gone, nothing gets out.
func TestClosedWithout(t *testing.T) {
	t.Parallel()
	c := newCapsule(t)
	g, err := Open(c.config(), "c", c.dir.Outer("c"), nestbox.NetworkPolicy{Internet: true})
	require.NoError(t, err)
	_, err = c.echo("tcp4", site+":7777")
	require.NoError(t, err)
	live, err := c.dial("tcp4", site+":7777")
	require.NoError(t, err)
	defer live.Close()
	require.NoError(t, g.Close())
	require.NoError(t, live.SetDeadline(time.Now().Add(patience)))
	_, err = live.Read(make([]byte, 1))
	require.ErrorContains(t, err, "reset")
	require.Error(t, netns.In(c.inner, func() error {
		_, err := net.DialTimeout("tcp4", site+":7777", 300*time.Millisecond)
		return err
	}))
	c.open(nestbox.NetworkPolicy{Internet: true}) // as another process would
	_, err = c.echo("tcp4", site+":7777")
	require.NoError(t, err)
}

func TestNever(t *testing.T) {
	t.Parallel()
	n := Never{Lifted: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}, Own: func() []netip.Addr { return []netip.Addr{netip.MustParseAddr(hostIP)} }}
	for addr, want := range map[string]bool{
		"8.8.8.8": false, "10.0.0.1": true, "10.1.2.3": false, "127.0.0.1": true, "169.254.169.254": true, "100.64.0.1": true, "0.0.0.0": true,
		"224.0.0.1": true, "255.255.255.255": true, "::ffff:10.0.0.1": true, "::ffff:8.8.8.8": false, "::1": true, "fe80::1": true, "fd00::1": true,
		"64:ff9b::a00:1": true, "2001:4860:4860::8888": false, hostIP: true, "::": true, "192.168.255.255": true, "172.32.0.1": false,
	} {
		require.Equal(t, want, n.Has(netip.MustParseAddr(addr)), addr)
	}
	require.True(t, n.Has(netip.Addr{}))
}
