package edge

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
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
	http, https, h2c *http.Transport
}

func newInside(ports Ports) *inside {
	dial := func(ctx context.Context, _, addr string) (net.Conn, error) {
		t, err := parseAddr(addr)
		if err != nil {
			return nil, err
		}
		return ports.Dial(ctx, t.capsule, t.port)
	}
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
	i := &inside{http: transport(), https: transport(), h2c: transport()}
	// It is the capsule that the connection leads to, whoever the certificate names.
	i.https.TLSClientConfig = &tls.Config{InsecureSkipVerify: true, ServerName: "localhost"} //nolint:gosec // see above
	i.https.ForceAttemptHTTP2 = true
	i.h2c.Protocols = new(http.Protocols)
	i.h2c.Protocols.SetUnencryptedHTTP2(true)
	return i
}

// RoundTrip implements http.RoundTripper.
func (i *inside) RoundTrip(r *http.Request) (*http.Response, error) {
	switch protocol := protocolOf(r); {
	case protocol == nestbox.PortHTTPS:
		return i.https.RoundTrip(r)
	case protocol == nestbox.PortH2C && r.Header.Get("Upgrade") == "": // which is of HTTP/1.1 alone
		return i.h2c.RoundTrip(r)
	}
	return i.http.RoundTrip(r)
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

// CloseIdleConnections closes connections into capsules that nobody uses.
func (i *inside) CloseIdleConnections() {
	for _, t := range []*http.Transport{i.http, i.https, i.h2c} {
		t.CloseIdleConnections()
	}
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
