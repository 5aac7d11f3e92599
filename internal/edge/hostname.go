package edge

import (
	"net"
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

// portLabel is what begins the host name of a port: something meant as a port
// number, a dash, and something meant as a capsule. Whatever looks so and is
// not exactly right is refused, rather than taken for the API.
var portLabel = regexp.MustCompile(`^([^.]*?)-(cl-[^.]*)$`)

// parseHost reads the Host of a request. It returns ok = false for one that is
// not meant for a port, and CodeInvalid for one that is, but is not canonical:
// a port is written without leading zeros or signs, so that no two spellings
// of one port can be treated differently on the way here.
func parseHost(hostport, domain string) (t target, ok bool, err error) {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	label, found := strings.CutSuffix(host, "."+domain)
	if !found {
		return target{}, false, nil
	}
	m := portLabel.FindStringSubmatch(label)
	if m == nil {
		return target{}, false, nil
	}
	port, err := parsePort(m[1])
	if err != nil {
		return target{}, true, err
	}
	if !nestbox.ValidID(nestbox.PrefixCapsule, m[2]) {
		return target{}, true, nestbox.Errorf(nestbox.CodeInvalid, "invalid capsule ID")
	}
	return target{capsule: m[2], port: port}, true, nil
}

var canonicalPort = regexp.MustCompile(`^[1-9][0-9]{0,4}$`)

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || !canonicalPort.MatchString(s) {
		return 0, nestbox.Errorf(nestbox.CodeInvalid, "%.20q is not a port: 1 to 65535, digits only, no leading zero", s)
	}
	return uint16(n), nil
}

// URL returns the address of a port of a capsule, on a server that listens on
// listenPort for domain. A token, if not empty, is part of it.
func URL(scheme, domain, listenPort, capsule string, port uint16, token string) string {
	u := url.URL{Scheme: scheme, Host: strconv.Itoa(int(port)) + "-" + capsule + "." + domain, Path: "/"}
	if listenPort != "" && !(scheme == "http" && listenPort == "80") && !(scheme == "https" && listenPort == "443") {
		u.Host = net.JoinHostPort(u.Host, listenPort)
	}
	if token != "" {
		u.RawQuery = url.Values{tokenParam: {token}}.Encode()
	}
	return u.String()
}
