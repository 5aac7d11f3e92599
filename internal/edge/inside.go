package edge

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nestbox/nestbox"
)

// How connections into capsules are kept.
const (
	idlePerTarget = 8
	idleAtAll     = 512
	idleFor       = time.Second // a server that is to end may wait for them
	maxHeader     = 64 << 10    // bytes of a program's answer before its body
	tlsTakes      = 10 * time.Second
)

// inside carries requests into capsules, in the protocol of the program.
type inside struct {
	ports Ports
	kept  atomic.Pointer[kept]
}

// kept are connections that more than one request may use, by protocol.
type kept struct{ http, https, h2c *http.Transport }

func newInside(ports Ports) *inside {
	i := &inside{ports: ports}
	i.kept.Store(newKept(i.dial))
	return i
}

func (i *inside) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	t, err := parseAddr(addr)
	if err != nil {
		return nil, err
	}
	return i.ports.Dial(ctx, t.capsule, t.port)
}

func newKept(dial func(ctx context.Context, network, addr string) (net.Conn, error)) *kept {
	transport := func() *http.Transport {
		return &http.Transport{
			DialContext:         dial,
			DisableCompression:  true, // bodies pass as they are
			MaxIdleConns:        idleAtAll,
			MaxIdleConnsPerHost: idlePerTarget,
			IdleConnTimeout:     idleFor,
			TLSHandshakeTimeout: tlsTakes,
			ReadBufferSize:      4 << 10,
			WriteBufferSize:     4 << 10,

			MaxResponseHeaderBytes: maxHeader,
		}
	}
	k := &kept{http: transport(), https: transport(), h2c: transport()}
	// It is the capsule that the connection leads to, whoever the certificate names.
	k.https.TLSClientConfig = &tls.Config{InsecureSkipVerify: true, ServerName: "localhost"} //nolint:gosec // see above
	k.https.ForceAttemptHTTP2 = true
	k.h2c.Protocols = new(http.Protocols)
	k.h2c.Protocols.SetUnencryptedHTTP2(true)
	return k
}

// RoundTrip implements http.RoundTripper.
func (i *inside) RoundTrip(r *http.Request) (*http.Response, error) {
	k := i.kept.Load()
	switch protocol := protocolOf(r); {
	case protocol == nestbox.PortHTTPS:
		return k.https.RoundTrip(r)
	case protocol == nestbox.PortH2C && r.Header.Get("Upgrade") == "": // which is of HTTP/1.1 alone
		return k.h2c.RoundTrip(r)
	}
	return k.http.RoundTrip(r)
}

// renew has no request use a connection that is there already: each is closed now, or
// when the request that is on it ends.
func (i *inside) renew() {
	old := i.kept.Swap(newKept(i.dial))
	for _, t := range []*http.Transport{old.http, old.https, old.h2c} {
		t.CloseIdleConnections()
	}
}

// protocolOf returns what the program speaks that a request is for.
func protocolOf(r *http.Request) nestbox.PortProtocol {
	set := passageOf(r.Context()).settings.Protocol
	kind, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	if set == "" && (kind == "application/grpc" || strings.HasPrefix(kind, "application/grpc+")) {
		return nestbox.PortH2C // there is no gRPC over anything less
	}
	return set
}

// rewrite makes the request that goes into the capsule: everything but our
// credentials, and where it came from.
func rewrite(pr *httputil.ProxyRequest) {
	p := passageOf(pr.In.Context())
	path, rawPath := p.below(pr.In.URL)
	pr.Out.URL = &url.URL{
		Scheme: "http", Host: p.addr(), Path: path, RawPath: rawPath,
		RawQuery: pr.In.URL.RawQuery, ForceQuery: pr.In.URL.ForceQuery,
	}
	if p.settings.Protocol == nestbox.PortHTTPS {
		pr.Out.URL.Scheme = "https"
	}
	strip(pr.Out)
	seen := p.visit
	if p.settings.HostHeader != "" {
		seen = p.pretend(pr.Out.Header)
	}
	pr.Out.Host = seen.host // development servers compare it
	seen.tell(pr.Out.Header)
	if p.prefix != "" {
		pr.Out.Header.Set("X-Forwarded-Prefix", p.prefix)
	}
}

// pretend has the program believe that it was reached under the host of its settings, in
// all that a request says of that: some compare the host with what else there is. It
// returns the visit that the program sees.
func (p passage) pretend(h http.Header) visit {
	seen := visit{scheme: "http", host: p.settings.HostHeader, client: p.visit.client}
	if p.settings.Protocol == nestbox.PortHTTPS {
		seen.scheme = "https"
	}
	outside, inside := p.visit.scheme+"://"+p.visit.host, seen.scheme+"://"+seen.host
	for _, name := range []string{"Origin", "Referer"} { // those of other pages stay
		keepValues(h, name, func(value string) (string, bool) {
			if rest, ok := strings.CutPrefix(value, outside); ok && (rest == "" || rest[0] == '/') {
				return inside + rest, true
			}
			return value, true
		})
	}
	return seen
}
