package egress

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/egress/world"
	"github.com/nestbox/nestbox/internal/netns"
)

const patience = time.Minute

func TestMain(m *testing.M) {
	if dir := os.Getenv("EGRESS_TEST_SERVICE"); dir != "" {
		serveDir(dir)
	}
	world.InOwnNetwork()
	const of = "github.com/nestbox/nestbox/internal/egress/world.(*World)." // which lasts as long as the process
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction(of+"accept"), goleak.IgnoreAnyFunction(of+"echoUDP"), goleak.IgnoreAnyFunction(of+"serveNames"),
		goleak.Cleanup(func(code int) {
			if w, err := world.Join(); err == nil {
				w.Remove()
			}
			os.Exit(code)
		}))
}

// Addresses of the world.
const (
	site     = world.Site
	site2    = world.Site2
	nameIP   = world.NameServer
	metadata = world.Metadata
	private  = world.Private
	lifted   = world.Lifted
	hostIP   = world.Host
)

// capsule is a network namespace that a Gateway serves.
type capsule struct {
	t     *testing.T
	w     *world.World
	dir   netns.Dir
	inner string
	g     *Gateway

	mu    sync.Mutex
	flows []nestbox.NetworkFlow
}

func newCapsule(t *testing.T) *capsule {
	t.Helper()
	w, err := world.Join()
	require.NoError(t, err)
	dir := netns.Dir(filepath.Join(t.TempDir(), "ns"))
	c := &capsule{t: t, w: w, dir: dir, inner: dir.Inner("c")}
	require.NoError(t, dir.Create("c"))
	t.Cleanup(func() { require.NoError(t, dir.Remove("c")) })
	require.NoError(t, dir.Route("c"))
	return c
}

func worldDNS() []netip.AddrPort { return []netip.AddrPort{netip.MustParseAddrPort(nameIP + ":53")} }

func (c *capsule) config() Config {
	own := netip.MustParseAddr(hostIP)
	return Config{
		Never: Never{Own: func() []netip.Addr { return []netip.Addr{own} }},
		DNS:   worldDNS,
		Counted: func(_ string, f nestbox.NetworkFlow) {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.flows = append(c.flows, f)
		},
	}
}

// dial connects from inside.
func (c *capsule) dial(network, address string) (conn net.Conn, err error) {
	err = netns.In(c.inner, func() error {
		d := net.Dialer{Timeout: patience}
		conn, err = d.Dial(network, address)
		return err
	})
	return conn, err
}

// get fetches a page from an address under a name, and returns what it says.
func (c *capsule) get(scheme, name, ip string) (string, error) {
	port := map[string]string{"http": "80", "https": "443"}[scheme]
	conn, err := c.dial("tcp4", ip+":"+port)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if scheme == "https" {
		conn = tls.Client(conn, &tls.Config{ServerName: name, RootCAs: c.w.Roots})
	}
	if _, err := fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", name); err != nil {
		return "", err
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return string(text), err
}

func (c *capsule) try(a world.Try) (string, error) {
	switch a.Kind {
	case "http", "https":
		return c.get(a.Kind, a.Name, a.Address)
	}
	return c.echo(a.Kind+"4", a.Address)
}

// echo sends a few bytes and returns what comes back.
func (c *capsule) echo(network, address string) (string, error) {
	conn, err := c.dial(network, address)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if network == "udp4" {
		_ = conn.SetDeadline(time.Now().Add(500 * time.Millisecond))
	} else {
		_ = conn.SetDeadline(time.Now().Add(patience))
	}
	if _, err := conn.Write([]byte("hello")); err != nil {
		return "", err
	}
	buf := make([]byte, 100)
	n, err := conn.Read(buf)
	return string(buf[:n]), err
}

// lookUp asks a server for a name.
func (c *capsule) lookUp(network, server, name string, kind uint16) (*dns.Msg, error) {
	conn, err := c.dial(network, server)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	client := dns.Client{Net: network, Timeout: patience}
	answer, _, err := client.ExchangeWithConn(new(dns.Msg).SetQuestion(name, kind), &dns.Conn{Conn: conn})
	return answer, err
}
