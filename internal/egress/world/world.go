// Package world is a world beyond a host, for tests and the demo of what capsules reach: servers
// at public, private and metadata addresses, a name server, and certificates for any name.
package world

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	vns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox/internal/netns"
)

// InOwnNetwork is called first of all, in TestMain for example. It returns in a process whose network
// and mounts are its own, which plays the host: the one that called exits with its code.
func InOwnNetwork() {
	const inside = "NESTBOX_OWN_NETWORK"
	if os.Getenv(inside) == "" {
		os.Exit(again(inside))
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil { // names of namespaces are mounts
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// again runs the process again, and returns its exit code.
func again(variable string) int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), variable+"=1")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return max(exit.ExitCode(), 1)
	case err != nil:
		fmt.Fprintln(os.Stderr, "these tests need root:", err)
		return 1
	}
	return 0
}

// Addresses of the world.
const (
	Site       = "203.0.113.10"
	Site2      = "198.51.100.10"
	NameServer = "8.8.8.8"
	Metadata   = "169.254.169.254"
	Private    = "10.0.0.1"
	Lifted     = "10.99.0.1" // private too, and sometimes reached
	Host       = "192.0.2.1" // of the host, on the way to the world
	worldIP    = "192.0.2.2"
)

// zone is what the world's name server knows.
var zone = map[string][]string{
	"allowed.test.":     {Site},
	"www.allowed.test.": {Site},
	"other.test.":       {Site2},
	"rebind.test.":      {Private},
	"metadata.test.":    {Metadata},
	"host.test.":        {Host},
	"both.test.":        {Private, Site},
}

// World is a network beyond the host with servers in it, which last as long as the
// process. It is safe for concurrent use.
type World struct {
	Roots   *x509.CertPool
	RootPEM []byte
	Files   string // a directory, which is served at /files/

	dir  netns.Dir
	path string // of its namespace

	mu    sync.Mutex
	asked []string // names
	seen  []string // addresses that were connected to
}

// Join returns the world of this process, and makes it the first time: what the host
// does not have itself is there.
var Join = sync.OnceValues(newWorld)

// Resolve has this process and its children ask the world's name server. It needs mounts
// of its own (InOwnNetwork).
func (w *World) Resolve() error {
	path := filepath.Join(string(w.dir), "resolv.conf")
	if err := os.WriteFile(path, []byte("nameserver "+NameServer+"\n"), 0o644); err != nil { //nolint:gosec // as it is
		return err
	}
	return unix.Mount(path, "/etc/resolv.conf", "", unix.MS_BIND, "")
}

// Remove removes what of the world is a file.
func (w *World) Remove() {
	_ = w.dir.Remove("world") // best effort: it is a folder for temporary files
	_ = os.RemoveAll(string(w.dir))
}

func newWorld() (*World, error) {
	dir, err := os.MkdirTemp("", "nestbox-world-*")
	if err != nil {
		return nil, err
	}
	w := &World{dir: netns.Dir(dir), path: netns.Dir(dir).Inner("world"), Roots: x509.NewCertPool(), Files: filepath.Join(dir, "files")}
	if err := netns.Dir(dir).Create("world"); err != nil { // of which the one half is used
		return nil, err
	}
	if err := w.join(); err != nil {
		return nil, err
	}
	return w, w.serve()
}

// join makes the way between the host and the world.
func (w *World) join() error {
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
		{here, "lo", nil}, {here, "up0", []string{Host + "/24"}}, {in, "world0", []string{worldIP + "/24"}},
		{in, "lo", []string{Site + "/32", Site2 + "/32", NameServer + "/32", Metadata + "/32", Private + "/32", Lifted + "/32"}},
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

func (w *World) serve() error {
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
		for _, ip := range []string{Site, Site2, Private, Metadata} {
			for _, port := range []string{"7777", "443"} {
				conn, err := lc.ListenPacket(ctx, "udp4", ip+":"+port)
				if err != nil {
					return err
				}
				go w.echoUDP(conn, ip+":"+port)
			}
		}
		packets, err := lc.ListenPacket(ctx, "udp4", NameServer+":53")
		if err != nil {
			return err
		}
		stream, err := lc.Listen(ctx, "tcp4", NameServer+":53")
		if err != nil {
			return err
		}
		handler := dns.HandlerFunc(w.answerName)
		go w.serveNames(&dns.Server{PacketConn: packets, Handler: handler})
		go w.serveNames(&dns.Server{Listener: stream, Handler: handler})
		return nil
	})
}

func (w *World) accept(l net.Listener, serve func(net.Conn)) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		w.note(&w.seen, conn.LocalAddr().String())
		go serve(conn)
	}
}

func (w *World) serveNames(s *dns.Server) { _ = s.ActivateAndServe() }

func (w *World) note(list *[]string, what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	*list = append(*list, what)
}

// Asked reports whether a name that begins so was looked up.
func (w *World) Asked(prefix string) bool { return w.has(&w.asked, prefix) }

// Seen reports whether something came to an address ("203.0.113.10:80", "udp
// 203.0.113.10:7777") that begins so.
func (w *World) Seen(prefix string) bool { return w.has(&w.seen, prefix) }

func (w *World) has(list *[]string, prefix string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.ContainsFunc(*list, func(s string) bool { return strings.HasPrefix(s, prefix) })
}

// answerHTTP says where it was reached, and by what name, or gives a file.
func (w *World) answerHTTP(conn net.Conn) {
	defer conn.Close()
	req, err := http.ReadRequest(bufio.NewReader(conn))
	if err != nil {
		return
	}
	if name, ok := strings.CutPrefix(req.URL.Path, "/files/"); ok {
		w.answerFile(conn, name)
		return
	}
	host, _, _ := net.SplitHostPort(conn.LocalAddr().String())
	text := fmt.Sprintf("%s %s", host, req.Host)
	fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(text), text)
}

func (w *World) answerFile(conn net.Conn, name string) {
	data, err := os.ReadFile(filepath.Join(w.Files, filepath.Clean("/"+name)))
	status := "200 OK"
	if err != nil {
		status = "404 Not Found"
	}
	fmt.Fprintf(conn, "HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n", status, len(data))
	_, _ = conn.Write(data)
}

func (w *World) echo(conn net.Conn) {
	defer conn.Close()
	_, _ = io.Copy(conn, conn)
}

func (w *World) echoUDP(conn net.PacketConn, at string) {
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

func (w *World) answerName(out dns.ResponseWriter, question *dns.Msg) {
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
func (w *World) certificates() (*tls.Config, error) {
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
	w.Roots.AddCert(root)
	w.RootPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: text})
	return &tls.Config{GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		leaf := &x509.Certificate{
			SerialNumber: big.NewInt(2), DNSNames: []string{hello.ServerName}, NotBefore: root.NotBefore, NotAfter: root.NotAfter,
		}
		text, err := x509.CreateCertificate(rand.Reader, leaf, root, key.Public(), key)
		return &tls.Certificate{Certificate: [][]byte{text}, PrivateKey: key}, err
	}}, nil
}
