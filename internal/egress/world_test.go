package egress

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	vns "github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox/internal/netns"
)

const patience = time.Minute

// TestMain runs the tests in a process whose network is its own, which plays the host:
// beyond it is a world that the tests make.
func TestMain(m *testing.M) {
	if dir := os.Getenv("EGRESS_TEST_SERVICE"); dir != "" {
		serveDir(dir)
	}
	if os.Getenv("EGRESS_TEST") == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), "EGRESS_TEST=1")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		err := cmd.Run()
		var exit *exec.ExitError
		switch {
		case errors.As(err, &exit):
			os.Exit(exit.ExitCode())
		case err != nil:
			fmt.Fprintln(os.Stderr, "these tests need root:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil { // names of namespaces are mounts
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	const of = "github.com/nestbox/nestbox/internal/egress.(*world)." // which lasts as long as the process
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction(of+"accept"), goleak.IgnoreAnyFunction(of+"echoUDP"), goleak.IgnoreAnyFunction(of+"serveNames"),
		goleak.Cleanup(func(code int) {
			if w, err := theWorld(); err == nil {
				_ = w.dir.Remove("world") // best effort: it is a folder for temporary files
				_ = os.Remove(string(w.dir))
			}
			os.Exit(code)
		}))
}

// Addresses of the world. The last two are never reached.
const (
	site     = "203.0.113.10"
	site2    = "198.51.100.10"
	nameIP   = "8.8.8.8"
	metadata = "169.254.169.254"
	private  = "10.0.0.1"
	hostIP   = "192.0.2.1" // of the host, on the way to the world
	worldIP  = "192.0.2.2"
)

// zone is what the world's name server knows.
var zone = map[string][]string{
	"allowed.test.":     {site},
	"www.allowed.test.": {site},
	"other.test.":       {site2},
	"rebind.test.":      {private},
	"metadata.test.":    {metadata},
	"host.test.":        {hostIP},
	"both.test.":        {private, site},
}

// world is a network beyond the host with servers in it.
type world struct {
	dir   netns.Dir
	path  string // of its namespace
	roots *x509.CertPool

	mu    sync.Mutex
	asked []string // names
	seen  []string // addresses that were connected to
}

// theWorld is made once: it belongs to the process.
var theWorld = sync.OnceValues(newWorld)

func newWorld() (*world, error) {
	dir, err := os.MkdirTemp("", "nestbox-world-*")
	if err != nil {
		return nil, err
	}
	w := &world{dir: netns.Dir(dir), path: netns.Dir(dir).Inner("world"), roots: x509.NewCertPool()}
	if err := netns.Dir(dir).Create("world"); err != nil { // of which the one half is used
		return nil, err
	}
	if err := w.join(); err != nil {
		return nil, err
	}
	return w, w.serve()
}

// join makes the way between the host and the world.
func (w *world) join() error {
	there, err := vns.GetFromPath(w.path)
	if err != nil {
		return err
	}
	defer there.Close()
	here, err := netlink.NewHandle()
	if err != nil {
		return err
	}
	defer here.Close()
	in, err := netlink.NewHandleAt(there)
	if err != nil {
		return err
	}
	defer in.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "up0"
	if err := here.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "world0", PeerNamespace: netlink.NsFd(there)}); err != nil {
		return err
	}
	for _, l := range []struct {
		h     *netlink.Handle
		link  string
		addrs []string
	}{
		{here, "lo", nil}, {here, "up0", []string{hostIP + "/24"}}, {in, "world0", []string{worldIP + "/24"}},
		{in, "lo", []string{site + "/32", site2 + "/32", nameIP + "/32", metadata + "/32", private + "/32"}},
	} {
		link, err := l.h.LinkByName(l.link)
		if err != nil {
			return err
		}
		for _, text := range l.addrs {
			addr, err := netlink.ParseAddr(text)
			if err != nil {
				return err
			}
			if err := l.h.AddrAdd(link, addr); err != nil {
				return err
			}
		}
		if err := l.h.LinkSetUp(link); err != nil {
			return err
		}
	}
	return here.RouteAdd(&netlink.Route{Gw: net.ParseIP(worldIP)})
}

func (w *world) serve() error {
	config, err := w.certificates()
	if err != nil {
		return err
	}
	return netns.In(w.path, func() error {
		ctx, lc := context.Background(), &net.ListenConfig{}
		for port, serve := range map[string]func(net.Conn){
			"80": w.answerHTTP, "443": func(c net.Conn) { w.answerHTTP(tls.Server(c, config)) }, "7777": w.echo,
		} {
			l, err := lc.Listen(ctx, "tcp4", ":"+port)
			if err != nil {
				return err
			}
			go w.accept(l, serve)
		}
		for _, ip := range []string{site, site2, private, metadata} {
			for _, port := range []string{"7777", "443"} {
				conn, err := lc.ListenPacket(ctx, "udp4", ip+":"+port)
				if err != nil {
					return err
				}
				go w.echoUDP(conn, ip+":"+port)
			}
		}
		packets, err := lc.ListenPacket(ctx, "udp4", nameIP+":53")
		if err != nil {
			return err
		}
		stream, err := lc.Listen(ctx, "tcp4", nameIP+":53")
		if err != nil {
			return err
		}
		handler := dns.HandlerFunc(w.answerName)
		go w.serveNames(&dns.Server{PacketConn: packets, Handler: handler})
		go w.serveNames(&dns.Server{Listener: stream, Handler: handler})
		return nil
	})
}

func (w *world) accept(l net.Listener, serve func(net.Conn)) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		w.note(&w.seen, addrOf(conn.LocalAddr()).String())
		go serve(conn)
	}
}

func (w *world) serveNames(s *dns.Server) { _ = s.ActivateAndServe() }

func (w *world) note(list *[]string, what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	*list = append(*list, what)
}

// has reports whether something was noted that begins so.
func (w *world) has(list *[]string, prefix string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range *list {
		if strings.HasPrefix(s, prefix) {
			return true
		}
	}
	return false
}

// answerHTTP says where it was reached, and by what name.
func (w *world) answerHTTP(conn net.Conn) {
	defer conn.Close()
	req, err := http.ReadRequest(bufio.NewReader(conn))
	if err != nil {
		return
	}
	text := fmt.Sprintf("%s %s", addrOf(conn.LocalAddr()).Addr(), req.Host)
	fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(text), text)
}

func (w *world) echo(conn net.Conn) {
	defer conn.Close()
	_, _ = io.Copy(conn, conn)
}

func (w *world) echoUDP(conn net.PacketConn, at string) {
	buf := make([]byte, 2000)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		w.note(&w.seen, "udp "+at)
		_, _ = conn.WriteTo(buf[:n], from)
	}
}

func (w *world) answerName(out dns.ResponseWriter, question *dns.Msg) {
	q := question.Question[0]
	w.note(&w.asked, strings.ToLower(q.Name))
	answer := new(dns.Msg).SetReply(question)
	name := q.Name
	if strings.EqualFold(name, "alias.test.") {
		name = "other.test."
		answer.Answer = append(answer.Answer, &dns.CNAME{Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeCNAME, Class: dns.ClassINET, Ttl: 1}, Target: name})
	}
	ips, known := zone[strings.ToLower(name)]
	switch {
	case !known:
		answer.SetRcode(question, dns.RcodeNameError)
	case q.Qtype == dns.TypeA:
		for _, ip := range ips {
			answer.Answer = append(answer.Answer, &dns.A{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1}, A: net.ParseIP(ip)})
		}
	case q.Qtype == dns.TypeTXT:
		for range 40 { // more than fits a packet
			answer.Answer = append(answer.Answer, &dns.TXT{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 1}, Txt: []string{strings.Repeat("x", 100)}})
		}
		if _, udp := out.RemoteAddr().(*net.UDPAddr); udp {
			answer.Truncate(dns.MinMsgSize)
		}
	}
	_ = out.WriteMsg(answer)
}

// certificates makes an authority, and what it signs for any name.
func (w *world) certificates() (*tls.Config, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "the world"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	text, err := x509.CreateCertificate(rand.Reader, authority, authority, key.Public(), key)
	if err != nil {
		return nil, err
	}
	root, err := x509.ParseCertificate(text)
	if err != nil {
		return nil, err
	}
	w.roots.AddCert(root)
	return &tls.Config{GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		leaf := &x509.Certificate{
			SerialNumber: big.NewInt(2), DNSNames: []string{hello.ServerName}, NotBefore: root.NotBefore, NotAfter: root.NotAfter,
		}
		text, err := x509.CreateCertificate(rand.Reader, leaf, root, key.Public(), key)
		return &tls.Certificate{Certificate: [][]byte{text}, PrivateKey: key}, err
	}}, nil
}

// capsule is a network namespace that a Gateway serves.
type capsule struct {
	t     *testing.T
	w     *world
	dir   netns.Dir
	inner string
	g     *Gateway

	mu    sync.Mutex
	flows []Flow
}

func newCapsule(t *testing.T) *capsule {
	t.Helper()
	w, err := theWorld()
	require.NoError(t, err)
	dir := netns.Dir(filepath.Join(t.TempDir(), "ns"))
	c := &capsule{t: t, w: w, dir: dir, inner: dir.Inner("c")}
	require.NoError(t, dir.Create("c"))
	t.Cleanup(func() { require.NoError(t, dir.Remove("c")) })
	require.NoError(t, netns.In(c.inner, func() error {
		return netlink.RouteAdd(&netlink.Route{Gw: netns.OuterAddr.AsSlice()})
	}))
	return c
}

func (c *capsule) config() Config {
	own := netip.MustParseAddr(hostIP)
	return Config{
		Never: Never{Own: func() []netip.Addr { return []netip.Addr{own} }},
		DNS:   []netip.AddrPort{netip.MustParseAddrPort(nameIP + ":53")},
		Counted: func(_ string, f Flow) {
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
		conn = tls.Client(conn, &tls.Config{ServerName: name, RootCAs: c.w.roots})
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
