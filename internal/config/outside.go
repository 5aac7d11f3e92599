package config

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strings"

	"github.com/nestbox/nestbox"
)

// localDomain leads to the machine that asks, on every machine.
const localDomain = "localhost"

// Public returns PublicURL, read; nil if there is none.
func (c Up) Public() (*url.URL, error) {
	if c.PublicURL == "" {
		return nil, nil
	}
	u, err := url.Parse(c.PublicURL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.User != nil ||
		strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, errors.New("public-url is not a scheme and a host, such as https://nestbox.example.com")
	}
	return &url.URL{Scheme: u.Scheme, Host: strings.ToLower(u.Host)}, nil
}

// PortDomain returns the domain of capsule ports, and whether names below it lead here
// from wherever clients are: Domain, or else the host of PublicURL, or else localhost.
func (c Up) PortDomain() (domain string, everywhere bool) {
	domain = c.Domain
	if u, err := c.Public(); domain == "" && err == nil && u != nil && domainPattern.MatchString(u.Hostname()) {
		if _, err := netip.ParseAddr(u.Hostname()); err != nil {
			domain = u.Hostname()
		}
	}
	if domain == "" {
		domain = localDomain
	}
	return domain, domain != localDomain && !strings.HasSuffix(domain, "."+localDomain)
}

// Proxies returns TrustedProxies, read.
func (c Up) Proxies() ([]netip.Prefix, error) {
	var proxies []netip.Prefix
	for _, text := range c.TrustedProxies {
		text = strings.TrimSpace(text)
		if addr, err := netip.ParseAddr(text); err == nil && addr.Zone() == "" {
			proxies = append(proxies, netip.PrefixFrom(addr, addr.BitLen()))
			continue
		}
		p, err := netip.ParsePrefix(text)
		if err != nil || p != p.Masked() {
			return nil, fmt.Errorf("trusted-proxies: %q is neither an address nor a range of addresses such as 10.1.0.0/16", text)
		}
		proxies = append(proxies, p)
	}
	return proxies, nil
}

func (c Up) validateOutside() error {
	if (c.TLSCert == "") != (c.TLSKey == "") {
		return errors.New("tls-cert and tls-key go together")
	}
	if _, err := c.Public(); err != nil {
		return err
	}
	if _, err := c.Proxies(); err != nil {
		return err
	}
	if err := nestbox.ValidateOrigins(c.CORSOrigins); err != nil {
		return fmt.Errorf("cors-origins: %w", err)
	}
	return nil
}
