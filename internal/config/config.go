// Package config holds the settings of the daemons, one documented struct
// each. A setting comes from, in rising order: the default in the code, the
// configuration file, the environment, the command line.
//
// It may import the root package only.
package config

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/caarlos0/env/v11"
	"go.yaml.in/yaml/v3"

	"github.com/nestbox/nestbox"
)

// Up is the configuration of `nestbox up`: control plane and host agent in one
// process.
type Up struct {
	// Dir holds all state: database, capsule records, templates, the writable
	// layers of capsules, and the first API key.
	Dir string `yaml:"dir" env:"NESTBOX_DIR"`
	// Listen is the address and port of the HTTP API and of capsule ports.
	Listen string `yaml:"listen" env:"NESTBOX_LISTEN"`
	// Domain is the domain under which capsule ports are reached:
	// http://<port>-<capsule>.<domain>:<listen port>/. Empty = PortDomain finds one.
	Domain string `yaml:"domain" env:"NESTBOX_DOMAIN"`
	// PublicURL is how clients reach the API, where that is not how requests come in:
	// through a proxy, or by a name. Empty = as each request shows.
	PublicURL string `yaml:"public_url" env:"NESTBOX_PUBLIC_URL"`
	// TLSCert and TLSKey are PEM files. With them the server speaks TLS and nothing else.
	TLSCert string `yaml:"tls_cert" env:"NESTBOX_TLS_CERT"`
	TLSKey  string `yaml:"tls_key" env:"NESTBOX_TLS_KEY"`
	// CORSOrigins are the origins, such as https://app.example.com, https://*.example.com
	// or *, whose pages may use the API.
	CORSOrigins []string `yaml:"cors_origins" env:"NESTBOX_CORS_ORIGINS"`
	// TrustedProxies are addresses and ranges of proxies before the server, whose
	// X-Forwarded-For, -Host and -Proto are believed.
	TrustedProxies []string `yaml:"trusted_proxies" env:"NESTBOX_TRUSTED_PROXIES"`
	// Database is a postgres:// URL, or empty for SQLite in Dir.
	Database string `yaml:"database" env:"NESTBOX_DATABASE"`
	// Platform is gVisor's platform: systrap (works everywhere) or kvm.
	Platform string `yaml:"platform" env:"NESTBOX_PLATFORM"`
	// Egress is whether capsules reach the internet of which nobody says otherwise: allow
	// or deny. Addresses that are private or the host's own none reaches.
	Egress string `yaml:"egress" env:"NESTBOX_EGRESS"`
	// EgressAllow are private ranges, in CIDR form, that capsules may reach all the same.
	EgressAllow []string `yaml:"egress_allow" env:"NESTBOX_EGRESS_ALLOW"`
	// EgressMbps is the most that each capsule may send, and receive, in megabits per
	// second; 0 = no limit.
	EgressMbps int `yaml:"egress_mbps" env:"NESTBOX_EGRESS_MBPS"`
	// CapsuleCA is a file of certificates (PEM) that programs in capsules trust besides
	// those that the host trusts: of a proxy that looks into TLS.
	CapsuleCA string `yaml:"capsule_ca" env:"NESTBOX_CAPSULE_CA"`
	// CapsuleProxy is the URL of a proxy that programs in capsules are told to use.
	CapsuleProxy string `yaml:"capsule_proxy" env:"NESTBOX_CAPSULE_PROXY"`
	// MaxConnections is how many connections clients may have at a time; 0 = two
	// fifths of the descriptors that the process may have.
	MaxConnections int `yaml:"max_connections" env:"NESTBOX_MAX_CONNECTIONS"`
	// MaxConnectionsPerAddress is how many of them may be of one peer address; 0 =
	// three quarters, which suits a server behind a proxy.
	MaxConnectionsPerAddress int `yaml:"max_connections_per_address" env:"NESTBOX_MAX_CONNECTIONS_PER_ADDRESS"`
	// MaxRequestsPerTeam is how many requests and streams one team may have at a
	// time; 0 = a third of MaxConnections.
	MaxRequestsPerTeam int `yaml:"max_requests_per_team" env:"NESTBOX_MAX_REQUESTS_PER_TEAM"`
	// MemoryLimitMB is what the server tries to stay below, in MiB; 0 = four fifths
	// of the limit of its control group, or else half of the machine's memory.
	MemoryLimitMB int `yaml:"memory_limit_mb" env:"NESTBOX_MEMORY_LIMIT_MB"`
	// LogLevel is debug, info, warn or error.
	LogLevel string `yaml:"log_level" env:"NESTBOX_LOG_LEVEL"`
}

// Values of Egress.
const (
	EgressOpen = "allow"
	EgressShut = "deny"
)

// Lifted returns EgressAllow, read.
func (c Up) Lifted() ([]netip.Prefix, error) {
	var lifted []netip.Prefix
	for _, text := range c.EgressAllow {
		p, err := netip.ParsePrefix(strings.TrimSpace(text))
		if err != nil || p != p.Masked() {
			return nil, fmt.Errorf("egress-allow: %q is not a range of addresses such as 10.1.0.0/16", text)
		}
		lifted = append(lifted, p)
	}
	return lifted, nil
}

// CapsuleCertificates returns what is in CapsuleCA; nil if there is none.
func (c Up) CapsuleCertificates() ([]byte, error) {
	if c.CapsuleCA == "" {
		return nil, nil
	}
	text, err := os.ReadFile(c.CapsuleCA)
	if err != nil {
		return nil, fmt.Errorf("capsule-ca: %w", err)
	}
	rest := text
	for n := 0; ; n++ {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			if n == 0 || len(bytes.TrimSpace(rest)) > 0 {
				return nil, fmt.Errorf("capsule-ca: %s does not consist of certificates in PEM form", c.CapsuleCA)
			}
			return text, nil
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil || block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("capsule-ca: %s has something that is no certificate (block %d)", c.CapsuleCA, n+1)
		}
	}
}

// CapsuleEnv returns what all processes in capsules have in their environment because of
// CapsuleCA, which they find at bundle, and CapsuleProxy.
func (c Up) CapsuleEnv(bundle string) map[string]string {
	env := map[string]string{}
	if c.CapsuleCA != "" {
		for _, name := range []string{"SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"} {
			env[name] = bundle
		}
	}
	if c.CapsuleProxy != "" {
		for name, value := range map[string]string{
			"HTTP_PROXY": c.CapsuleProxy, "HTTPS_PROXY": c.CapsuleProxy, "NO_PROXY": "localhost,127.0.0.1,::1",
		} {
			env[name], env[strings.ToLower(name)] = value, value // programs agree on neither
		}
	}
	return env
}

// DefaultUp returns the settings of `nestbox up` that nobody changed.
func DefaultUp() Up {
	return Up{
		Dir:      "/var/lib/nestbox",
		Listen:   "127.0.0.1:8080",
		Platform: "systrap",
		Egress:   EgressOpen,
		LogLevel: "info",
	}
}

// Load fills cfg from a YAML file, if path is not empty, and then from the
// environment. An unknown key in the file is an error. The command line is
// the caller's business, and so is Validate after it.
func Load(cfg any, path string, environ map[string]string) error {
	if path != "" {
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		dec := yaml.NewDecoder(bytes.NewReader(data))
		dec.KnownFields(true)
		if err := dec.Decode(cfg); err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return env.ParseWithOptions(cfg, env.Options{Environment: environ})
}

var domainPattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$`)

// Validate reports the first setting that cannot work.
func (c Up) Validate() error {
	if c.Dir == "" || !filepath.IsAbs(c.Dir) {
		return fmt.Errorf("dir %q is not an absolute path", c.Dir)
	}
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		return fmt.Errorf("listen %q is not address:port: %w", c.Listen, err)
	}
	if c.Domain != "" && !domainPattern.MatchString(c.Domain) {
		return fmt.Errorf("domain %q is not a host name", c.Domain)
	}
	if err := c.validateOutside(); err != nil {
		return err
	}
	if c.Database != "" && !strings.HasPrefix(c.Database, "postgres://") && !strings.HasPrefix(c.Database, "postgresql://") {
		return errors.New("database is not a postgres:// URL") // never shown: it may hold a password
	}
	for name, n := range map[string]int{
		"max_connections": c.MaxConnections, "max_connections_per_address": c.MaxConnectionsPerAddress,
		"max_requests_per_team": c.MaxRequestsPerTeam, "memory_limit_mb": c.MemoryLimitMB,
	} {
		if n < 0 {
			return fmt.Errorf("%s is negative", name)
		}
	}
	switch c.Platform {
	case "systrap", "kvm", "ptrace":
	default:
		return fmt.Errorf("platform %q is none of systrap, kvm, ptrace", c.Platform)
	}
	switch c.Egress {
	case EgressOpen, EgressShut:
	default:
		return fmt.Errorf("egress %q is neither %s nor %s", c.Egress, EgressOpen, EgressShut)
	}
	if c.EgressMbps < 0 || c.EgressMbps > nestbox.MaxEgressMbps {
		return fmt.Errorf("egress-mbps must be between 0 and %d, not %d", nestbox.MaxEgressMbps, c.EgressMbps)
	}
	if _, err := c.CapsuleCertificates(); err != nil {
		return err
	}
	if u, err := url.Parse(c.CapsuleProxy); c.CapsuleProxy != "" && (err != nil || u.Host == "" || !slices.Contains([]string{"http", "https", "socks5", "socks5h"}, u.Scheme)) {
		return errors.New("capsule-proxy is not a URL such as http://proxy.example.com:3128") // which may have a password
	}
	if _, err := c.Lifted(); err != nil {
		return err
	}
	switch c.LogLevel {
	case "debug", "info", "warn", "error":
	default:
		return fmt.Errorf("log level %q is none of debug, info, warn, error", c.LogLevel)
	}
	return nil
}
