package edge

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/nestbox/nestbox"
)

// Outside is how clients reach the server, which is not always how their requests
// reach it: a proxy may stand in between.
type Outside struct {
	// Base has the scheme and host of the API, as the operator says; nil = as each
	// request shows.
	Base *url.URL
	// Domain is that of capsule ports, in lower case: "localhost".
	Domain string
	// Everywhere is whether names below Domain lead here from wherever clients are.
	// Else that is so only of clients which reach the server as localhost.
	Everywhere bool
	// Trusted are the proxies whose X-Forwarded-For, -Host and -Proto are believed.
	Trusted []netip.Prefix
}

// visit is a request as its client made it.
type visit struct {
	scheme string // http or https
	host   string // as in the client's URL: with a port, where it is not the scheme's own
	client string // its address
}

type visitKey struct{}

// forwardedHost is the form of a host that a proxy may hand on.
var forwardedHost = regexp.MustCompile(`^[A-Za-z0-9._:\[\]-]{1,300}$`)

// visit reads how the client made a request. CodeInvalid: a trusted proxy says what
// cannot be meant.
func (o Outside) visit(r *http.Request) (visit, error) {
	v := visit{scheme: "http", host: r.Host}
	peer := peerOf(r.RemoteAddr)
	v.client = peer.String()
	switch {
	case r.TLS != nil:
		v.scheme = "https"
	case o.Base != nil: // the one address that there is, whatever stands before us
		v.scheme = o.Base.Scheme
	}
	if !o.trusts(peer) {
		return v, nil
	}
	if host := last(r.Header.Values("X-Forwarded-Host")); host != "" {
		if !forwardedHost.MatchString(host) {
			return v, nestbox.Errorf(nestbox.CodeInvalid, "the X-Forwarded-Host of the proxy is no host")
		}
		v.host = host
	}
	switch proto := strings.ToLower(last(r.Header.Values("X-Forwarded-Proto"))); proto {
	case "":
	case "http", "ws":
		v.scheme = "http"
	case "https", "wss":
		v.scheme = "https"
	default:
		return v, nestbox.Errorf(nestbox.CodeInvalid, "the X-Forwarded-Proto of the proxy is neither http nor https")
	}
	v.client = o.clientOf(peer, r.Header.Values("X-Forwarded-For"))
	return v, nil
}

// clientOf returns the last address before the trusted proxies, each of which has
// added whom it got the request from.
func (o Outside) clientOf(peer netip.Addr, forwardedFor []string) string {
	hops := strings.Split(strings.Join(forwardedFor, ","), ",")
	client := peer
	for _, hop := range slices.Backward(hops) {
		hop = strings.TrimSpace(hop)
		addr, err := netip.ParseAddr(strings.Trim(hop, "[]"))
		if err != nil {
			withPort, err := netip.ParseAddrPort(hop)
			if err != nil {
				break // what is before it nobody can vouch for
			}
			addr = withPort.Addr()
		}
		if client = addr.Unmap(); !o.trusts(client) {
			break
		}
	}
	return client.String()
}

func (o Outside) trusts(addr netip.Addr) bool {
	return slices.ContainsFunc(o.Trusted, func(p netip.Prefix) bool { return p.Contains(addr) })
}

func peerOf(remote string) netip.Addr {
	addr, _ := netip.ParseAddrPort(remote) // the zero one is nobody's
	return addr.Addr().Unmap()
}

// last returns the last of several values: the one that the nearest proxy wrote.
func last(values []string) string {
	all := strings.Join(values, ",")
	return strings.TrimSpace(all[strings.LastIndexByte(all, ',')+1:])
}

// PortURL returns the address of a port of a capsule for the client whose request ctx
// is of. A token, if not empty, is part of it.
func (o Outside) PortURL(ctx context.Context, capsule string, port uint16, token string) string {
	v, _ := ctx.Value(visitKey{}).(visit)
	if o.Base != nil {
		v.scheme, v.host = o.Base.Scheme, o.Base.Host
	}
	u := url.URL{Scheme: v.scheme, Host: v.host, Path: "/"}
	if o.hasNames(v.host) {
		u.Host = strconv.Itoa(int(port)) + "-" + capsule + "." + o.Domain
		if _, p, err := net.SplitHostPort(v.host); err == nil && p != map[string]string{"http": "80", "https": "443"}[v.scheme] {
			u.Host = net.JoinHostPort(u.Host, p)
		}
	} else {
		u.Path = target{capsule, port}.path() + "/"
	}
	if token != "" {
		u.RawQuery = url.Values{tokenParam: {token}}.Encode()
	}
	return u.String()
}

// hasNames reports whether a client that reaches the server as host also finds the
// host names of ports.
func (o Outside) hasNames(host string) bool {
	if o.Everywhere {
		return true
	}
	name := hostname(host)
	addr, err := netip.ParseAddr(strings.Trim(name, "[]"))
	return name == o.Domain || strings.HasSuffix(name, "."+o.Domain) || name == "localhost" || err == nil && addr.IsLoopback()
}

// hostname returns the name of a host, in lower case, without its port.
func hostname(hostport string) string {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	return strings.TrimSuffix(strings.ToLower(host), ".")
}

// forwarded are the headers that tell a program where a request came from. What a
// client says there itself goes no further.
var forwarded = []string{
	"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Port", "X-Forwarded-Prefix",
	"X-Forwarded-Server", "X-Forwarded-Ssl", "X-Forwarded-Scheme", "X-Real-Ip", "X-Scheme",
}

// tell sets those headers. The client's address is the only one of X-Forwarded-For, so
// that a program which trusts one proxy and one which trusts all see the same.
func (v visit) tell(h http.Header) {
	for _, name := range forwarded {
		h.Del(name)
	}
	h.Set("X-Forwarded-For", v.client)
	h.Set("X-Forwarded-Host", v.host)
	h.Set("X-Forwarded-Proto", v.scheme)
}
