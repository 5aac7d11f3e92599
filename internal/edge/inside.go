package edge

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
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
	kept  atomic.Pointer[transports] // whose connections more than one request may use
	once  *transports                // whose connections are for one request each

	mu     sync.Mutex
	ending map[string]int // capsules in which something is to end
}

// transports are one for each protocol.
type transports struct{ http, https, h2c *http.Transport }

func newInside(ports Ports) *inside {
	i := &inside{ports: ports, ending: map[string]int{}}
	i.kept.Store(newTransports(i.dial))
	i.once = newTransports(i.dial)
	for _, t := range i.once.all() {
		t.DisableKeepAlives = true
	}
	return i
}

func (t *transports) all() []*http.Transport { return []*http.Transport{t.http, t.https, t.h2c} }

func (i *inside) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	t, err := parseAddr(addr)
	if err != nil {
		return nil, err
	}
	return i.ports.Dial(ctx, t.capsule, t.port)
}

func newTransports(dial func(ctx context.Context, network, addr string) (net.Conn, error)) *transports {
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
	t := &transports{http: transport(), https: transport(), h2c: transport()}
	// It is the capsule that the connection leads to, whoever the certificate names.
	t.https.TLSClientConfig = &tls.Config{InsecureSkipVerify: true, ServerName: "localhost"} //nolint:gosec // see above
	t.https.ForceAttemptHTTP2 = true
	t.h2c.Protocols = new(http.Protocols)
	t.h2c.Protocols.SetUnencryptedHTTP2(true)
	return t
}

// RoundTrip implements http.RoundTripper.
func (i *inside) RoundTrip(r *http.Request) (*http.Response, error) {
	t := i.kept.Load()
	if i.isEnding(passageOf(r.Context()).capsule) { // looked at after Load: see begin
		t = i.once
	}
	switch protocol := protocolOf(r); {
	case protocol == nestbox.PortHTTPS:
		return t.https.RoundTrip(r)
	case protocol == nestbox.PortH2C && r.Header.Get("Upgrade") == "": // which is of HTTP/1.1 alone
		return t.h2c.RoundTrip(r)
	}
	return t.http.RoundTrip(r)
}

// renew has no request use a connection that is there already: each is closed now, or
// when the request that is on it ends.
func (i *inside) renew() {
	for _, t := range i.kept.Swap(newTransports(i.dial)).all() {
		t.CloseIdleConnections()
	}
}

// begin has no connection into a capsule be used twice until done is called.
func (i *inside) begin(capsule string) (done func()) {
	i.mu.Lock()
	i.ending[capsule]++
	i.mu.Unlock()
	i.renew()
	return sync.OnceFunc(func() {
		i.mu.Lock()
		defer i.mu.Unlock()
		if i.ending[capsule]--; i.ending[capsule] == 0 {
			delete(i.ending, capsule)
		}
	})
}

func (i *inside) isEnding(capsule string) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.ending[capsule] > 0
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
