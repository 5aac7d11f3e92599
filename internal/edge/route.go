package edge

import (
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	"github.com/nestbox/nestbox"
)

// target is a port of a capsule.
type target struct {
	capsule string
	port    uint16
}

// addr is the form in which a target travels through http.Transport, which
// keeps its connections apart by it.
func (t target) addr() string { return net.JoinHostPort(t.capsule, strconv.Itoa(int(t.port))) }

func parseAddr(addr string) (target, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return target{}, err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	return target{capsule: host, port: uint16(n)}, err
}

// path is where the API's host has the target.
func (t target) path() string {
	return "/v1/capsules/" + t.capsule + "/ports/" + strconv.Itoa(int(t.port)) + "/proxy"
}

// route is how a request names its target.
type route struct {
	target
	prefix string // that all paths of the target have on the API's host
	header bool   // it is headers that name the target
	short  bool   // the path is the prefix and nothing more
}

// named reports whether the target has a host name of its own, and so an origin.
func (r route) named() bool { return r.prefix == "" && !r.header }

// below returns the path of a URL below the prefix.
func (r route) below(u *url.URL) (path, rawPath string) {
	if r.prefix == "" {
		return u.Path, u.RawPath
	}
	rawPath = u.EscapedPath()[len(r.prefix):]
	path, err := url.PathUnescape(rawPath)
	if err != nil {
		path = rawPath // cannot be: the whole was read
	}
	return path, rawPath
}

// Headers that name the target, for clients with one base URL for all: those of E2B's
// SDK with E2B_SANDBOX_URL.
const (
	capsuleHeader = "E2b-Sandbox-Id"
	portHeader    = "E2b-Sandbox-Port"
)

// pathForm is the other way. It takes what is not canonical too, which is refused then.
var pathForm = regexp.MustCompile(`^(/v1/capsules/([^/]+)/ports/([^/]+)/proxy)(/|$)`)

// parseRoute finds the target of a request to host: first in the host name, then in the
// path, then in headers. It returns ok = false if none names one, and CodeInvalid if one
// does that is not canonical.
func parseRoute(r *http.Request, host, domain string) (_ route, ok bool, err error) {
	t, ok, err := parseHost(host, domain)
	if ok || err != nil {
		return route{target: t}, ok, err
	}
	if m := pathForm.FindStringSubmatch(r.URL.EscapedPath()); m != nil {
		t, err := parseTarget(m[3], m[2])
		return route{target: t, prefix: m[1], short: m[4] == ""}, true, err
	}
	capsule, port := r.Header.Values(capsuleHeader), r.Header.Values(portHeader)
	if len(capsule)+len(port) == 0 {
		return route{}, false, nil
	}
	if len(capsule) != 1 || len(port) != 1 {
		return route{}, true, nestbox.Errorf(nestbox.CodeInvalid, "%s and %s go together, once each", capsuleHeader, portHeader)
	}
	t, err = parseTarget(port[0], capsule[0])
	return route{target: t, header: true}, true, err
}

func parseTarget(port, capsule string) (target, error) {
	n, err := parsePort(port)
	if err != nil {
		return target{}, err
	}
	if !nestbox.ValidID(nestbox.PrefixCapsule, capsule) {
		return target{}, nestbox.Errorf(nestbox.CodeInvalid, "invalid capsule ID")
	}
	return target{capsule: capsule, port: n}, nil
}

// toDirectory sends a client to the path with a slash at its end, which relative links
// need.
func toDirectory(w http.ResponseWriter, r *http.Request) {
	to := "proxy/"
	if r.URL.RawQuery != "" {
		to += "?" + r.URL.RawQuery
	}
	w.Header().Set("Location", to)
	w.WriteHeader(http.StatusPermanentRedirect)
}

// portLabel is what begins the host name of a port: something meant as a port
// number, a dash, and something meant as a capsule. Whatever looks so and is
// not exactly right is refused, rather than taken for the API.
var portLabel = regexp.MustCompile(`^([^.]*?)-(cl-[^.]*)$`)

// parseHost reads the Host of a request. It returns ok = false for one that is
// not meant for a port, and CodeInvalid for one that is, but is not canonical:
// a port is written without leading zeros or signs, so that no two spellings
// of one port can be treated differently on the way here.
func parseHost(hostport, domain string) (t target, ok bool, err error) {
	label, found := strings.CutSuffix(hostname(hostport), "."+domain)
	if !found {
		return target{}, false, nil
	}
	m := portLabel.FindStringSubmatch(label)
	if m == nil {
		return target{}, false, nil
	}
	t, err = parseTarget(m[1], m[2])
	return t, true, err
}

var canonicalPort = regexp.MustCompile(`^[1-9][0-9]{0,4}$`)

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || !canonicalPort.MatchString(s) {
		return 0, nestbox.Errorf(nestbox.CodeInvalid, "%.20q is not a port: 1 to 65535, digits only, no leading zero", s)
	}
	return uint16(n), nil
}
