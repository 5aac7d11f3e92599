package nestbox

import (
	"maps"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// PortSettings say how a port of a capsule is reached from outside. The zero value is
// that of a port of which its owner has said nothing.
type PortSettings struct {
	// Public lets in whoever knows the address, without a credential.
	Public bool `json:"public,omitempty"`
	// HostHeader is the host, such as localhost:5173, that the program is to think it is
	// reached as; "" = the one that the client asked.
	HostHeader string `json:"host_header,omitempty"`
	// Protocol is what the program speaks; "" = PortHTTP, but for gRPC PortH2C.
	Protocol PortProtocol `json:"protocol,omitempty"`
	// CORSOrigins are the origins whose pages may read what the port answers: "*" = all,
	// https://*.example.com = all below. None = those that the program says.
	CORSOrigins []string `json:"cors_origins,omitempty"`
}

// PortProtocol is what a program speaks on its port.
type PortProtocol string

// The protocols.
const (
	PortHTTP  PortProtocol = "http"  // HTTP/1.1
	PortHTTPS PortProtocol = "https" // TLS with any certificate; HTTP/2 if the program offers it
	PortH2C   PortProtocol = "h2c"   // HTTP/2 in clear, as gRPC has it
)

// Limits of port settings.
const (
	MaxPortSettings = 64 // ports of one capsule that have some
	MaxOrigins      = 16
	maxOrigin       = 262 // bytes: a scheme, a name and a port
)

// IsZero reports whether s says nothing.
func (s PortSettings) IsZero() bool {
	return !s.Public && s.HostHeader == "" && s.Protocol == "" && len(s.CORSOrigins) == 0
}

// Validate returns CodeInvalid if s cannot be meant.
func (s PortSettings) Validate() error {
	switch s.Protocol {
	case "", PortHTTP, PortHTTPS, PortH2C:
	default:
		return Errorf(CodeInvalid, "protocol %.40q is none of http, https and h2c", s.Protocol)
	}
	if s.HostHeader != "" && !validHost(s.HostHeader) {
		return Errorf(CodeInvalid, "host_header %.80q is not a host such as localhost:5173", s.HostHeader)
	}
	return ValidateOrigins(s.CORSOrigins)
}

var hostPattern = regexp.MustCompile(`^[a-zA-Z0-9_]([a-zA-Z0-9_.-]*[a-zA-Z0-9_])?$`)

// validHost reports whether s is a name or address, with or without a port.
func validHost(s string) bool {
	u, err := url.Parse("http://" + s)
	if err != nil || u.Host != s || len(s) > maxOrigin || strings.HasSuffix(s, ":") {
		return false
	}
	if port := u.Port(); port != "" {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return false
		}
	}
	if strings.HasPrefix(s, "[") {
		_, err := netip.ParseAddr(u.Hostname())
		return err == nil
	}
	return hostPattern.MatchString(u.Hostname())
}

// ValidateOrigins returns CodeInvalid if a list has what is no origin of a page, "*", or
// of the form https://*.example.com.
func ValidateOrigins(origins []string) error {
	if len(origins) > MaxOrigins {
		return Errorf(CodeInvalid, "more than %d origins", MaxOrigins)
	}
	for _, origin := range origins {
		scheme, host, found := strings.Cut(origin, "://")
		host = strings.TrimPrefix(host, "*.")
		if origin != "*" && (!found || scheme != "http" && scheme != "https" || host == "" || !validHost(host)) {
			return Errorf(CodeInvalid, "%.80q is not an origin such as https://app.example.com, https://*.example.com or *", origin)
		}
	}
	return nil
}

// PortsWithSettings returns the ports that a capsule has settings of, in order.
func (c Capsule) PortsWithSettings() []uint16 { return slices.Sorted(maps.Keys(c.Ports)) }
