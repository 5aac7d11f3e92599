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
	onlyName := nestbox.NetworkPolicy{Allow: []string{"allowed.test"}}
	e2b := nestbox.NetworkPolicy{Internet: true, Allow: []string{"*.allowed.test"}, Deny: []string{"0.0.0.0/0"}}
	all := nestbox.NetworkPolicy{Internet: true}
	only := func(allow ...string) nestbox.NetworkPolicy { return nestbox.NetworkPolicy{Allow: allow} }
	but := func(deny ...string) nestbox.NetworkPolicy { return nestbox.NetworkPolicy{Internet: true, Deny: deny} }
	http := func(name, ip string) func(*capsule) (string, error) {
		return func(c *capsule) (string, error) { return c.get("http", name, ip) }
	}
	https := func(name, ip string) func(*capsule) (string, error) {
		return func(c *capsule) (string, error) { return c.get("https", name, ip) }
	}
	tcp := func(address string) func(*capsule) (string, error) {
		return func(c *capsule) (string, error) { return c.echo("tcp4", address) }
	}
	udp := func(address string) func(*capsule) (string, error) {
		return func(c *capsule) (string, error) { return c.echo("udp4", address) }
	}
	const refused = ""
	for name, row := range map[string]struct {
		policy nestbox.NetworkPolicy
		do     func(*capsule) (string, error)
		want   string // what the world answers
	}{
		"all: http":                             {all, http("allowed.test", site), site + " allowed.test"},
		"all: https":                            {all, https("allowed.test", site), site + " allowed.test"},
		"all: another port":                     {all, tcp(site + ":7777"), "hello"},
		"all: UDP":                              {all, udp(site + ":7777"), "hello"},
		"all: QUIC":                             {all, udp(site + ":443"), "hello"},
		"all: nobody listens":                   {all, tcp(site + ":9"), refused},
		"all: a private address":                {all, tcp(private + ":7777"), refused},
		"all: a private address, UDP":           {all, udp(private + ":7777"), refused},
		"all: metadata":                         {all, http("metadata.test", metadata), refused},
		"all: the host":                         {all, tcp(hostIP + ":7777"), refused},
		"nothing: http":                         {nestbox.NetworkPolicy{}, http("allowed.test", site), refused},
		"nothing: UDP":                          {nestbox.NetworkPolicy{}, udp(site + ":7777"), refused},
		"a range: in it":                        {only("203.0.113.0/24"), tcp(site + ":7777"), "hello"},
		"a range: in it, UDP":                   {only("203.0.113.0/24"), udp(site + ":7777"), "hello"},
		"a range: outside":                      {only("203.0.113.0/24"), tcp(site2 + ":7777"), refused},
		"a range: a private one":                {only("10.0.0.0/8"), tcp(private + ":7777"), refused},
		"all but a range: in it":                {but("203.0.113.0/24"), tcp(site + ":7777"), refused},
		"all but a range: outside":              {but("203.0.113.0/24"), tcp(site2 + ":7777"), "hello"},
		"all but a name: http":                  {but("other.test"), http("other.test", site2), refused},
		"all but a name: https":                 {but("other.test"), https("other.test", site2), refused},
		"all but a name: another":               {but("other.test"), https("allowed.test", site), site + " allowed.test"},
		"all but a name: QUIC":                  {but("other.test"), udp(site + ":443"), refused},
		"a name: http":                          {onlyName, http("allowed.test", site), site + " allowed.test"},
		"a name: https":                         {onlyName, https("allowed.test", site), site + " allowed.test"},
		"a name: below it":                      {onlyName, https("www.allowed.test", site), refused},
		"a name: another":                       {onlyName, https("other.test", site2), refused},
		"a name: no name":                       {onlyName, http(site, site), refused},
		"a name: another port":                  {onlyName, tcp(site + ":7777"), refused},
		"a name: UDP":                           {onlyName, udp(site + ":443"), refused},
		"a name: shown to a foreign address":    {onlyName, http("allowed.test", site2), site + " allowed.test"},
		"a name: shown to a foreign one, https": {onlyName, https("allowed.test", site2), site + " allowed.test"},
		"a name: shown to a private address":    {onlyName, http("allowed.test", private), site + " allowed.test"},
		"a name: that is a private address":     {only("rebind.test"), http("rebind.test", site), refused},
		"a name: that is the host":              {only("host.test"), http("host.test", site), refused},
		"a name: that is metadata":              {only("*"), http("metadata.test", site), refused},
		"a name: that is a private address too": {only("both.test"), http("both.test", site), site + " both.test"},
		"a name: that is another's":             {only("alias.test"), http("alias.test", site2), site2 + " alias.test"},
		"a name: that does not exist":           {only("*"), http("nowhere.test", site), refused},
		"E2B: below a name":                     {e2b, https("www.allowed.test", site), site + " www.allowed.test"},
		"E2B: the name itself":                  {e2b, https("allowed.test", site), refused},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCapsule(t)
			c.open(row.policy)
			got, err := row.do(c)
			if row.want == refused {
				require.Error(t, err, got)
			} else {
				require.NoError(t, err)
			}
			require.Equal(t, row.want, got)
		})
	}
	t.Cleanup(func() {
		w, err := theWorld()
		require.NoError(t, err)
		for _, ip := range []string{private, metadata} {
			require.False(t, w.has(&w.seen, ip) || w.has(&w.seen, "udp "+ip), "%s was reached", ip)
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
		require.False(t, c.w.has(&c.w.asked, "secret-"), "a name that is not allowed tells nobody outside")
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
	find := func(match func(Flow) bool) Flow {
		var found Flow
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
	f := find(func(f Flow) bool { return f.Name == "allowed.test" && f.Protocol == TCP })
	require.Equal(t, nestbox.Verdict{Allowed: true, Rule: "allowed.test", ByName: true}, f.Verdict)
	require.Positive(t, f.Sent)
	require.Positive(t, f.Received)
	f = find(func(f Flow) bool { return f.Addr == netip.MustParseAddr(site2) })
	require.Equal(t, nestbox.Verdict{Allowed: true, Rule: site2}, f.Verdict)
	require.Equal(t, [2]int64{5, 5}, [2]int64{f.Sent, f.Received})
	f = find(func(f Flow) bool { return f.Addr == netip.MustParseAddr(site) && f.Port == 7777 })
	require.Equal(t, nestbox.Verdict{}, f.Verdict)
	f = find(func(f Flow) bool { return f.Name == "rebind.test" && f.Protocol == TCP })
	require.False(t, f.Verdict.Allowed)
	require.Equal(t, errNever.Error(), f.Reason)
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
