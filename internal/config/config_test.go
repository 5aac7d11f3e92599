package config

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestLoadOrder(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "nestbox.yaml")
	require.NoError(t, os.WriteFile(file, []byte("domain: boxes.example\nlisten: 0.0.0.0:80\n"), 0o600))

	cfg := DefaultUp()
	require.NoError(t, Load(&cfg, file, map[string]string{"NESTBOX_LISTEN": "127.0.0.1:9000"}))
	require.Equal(t, "boxes.example", cfg.Domain, "from the file")
	require.Equal(t, "127.0.0.1:9000", cfg.Listen, "the environment wins over the file")
	require.Equal(t, "systrap", cfg.Platform, "the default stays")
	require.NoError(t, cfg.Validate())
}

func TestLoadRefusesUnknownKeys(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "nestbox.yaml")
	require.NoError(t, os.WriteFile(file, []byte("lisen: 0.0.0.0:80\n"), 0o600))
	cfg := DefaultUp()
	require.ErrorContains(t, Load(&cfg, file, nil), "lisen")
}

func TestValidate(t *testing.T) {
	t.Parallel()
	require.NoError(t, DefaultUp().Validate())
	for name, spoil := range map[string]func(*Up){
		"relative dir":     func(c *Up) { c.Dir = "state" },
		"no port":          func(c *Up) { c.Listen = "localhost" },
		"bad domain":       func(c *Up) { c.Domain = "a b" },
		"upper domain":     func(c *Up) { c.Domain = "Example" },
		"unknown database": func(c *Up) { c.Database = "mysql://x" },
		"unknown platform": func(c *Up) { c.Platform = "vmware" },
		"unknown level":    func(c *Up) { c.LogLevel = "loud" },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := DefaultUp()
			spoil(&cfg)
			require.Error(t, cfg.Validate())
		})
	}
}

func TestValidateHidesTheDatabaseURL(t *testing.T) {
	t.Parallel()
	cfg := DefaultUp()
	cfg.Database = "mysql://user:secret@host/db"
	require.NotContains(t, cfg.Validate().Error(), "secret")
}

func TestCapsuleCertificates(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "ca.pem")
	c := DefaultUp()
	c.CapsuleCA = file
	require.ErrorContains(t, c.Validate(), "no such file")
	for _, bad := range []string{
		"", "garbage", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
	} {
		require.NoError(t, os.WriteFile(file, []byte(bad), 0o600))
		require.ErrorContains(t, c.Validate(), "capsule-ca", bad)
	}
	c = DefaultUp()
	for _, bad := range []string{"proxy:3128", "ftp://x", "http://", "http://user:secret@"} {
		c.CapsuleProxy = bad
		require.ErrorContains(t, c.Validate(), "capsule-proxy is not a URL", bad)
	}
	c.CapsuleProxy = "http://proxy:3128"
	require.NoError(t, c.Validate())
	require.Equal(t, "http://proxy:3128", c.CapsuleEnv("/ca")["https_proxy"])
}

func TestOutside(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		set        func(*Up)
		domain     string
		everywhere bool
		bad        bool
	}{
		"nothing":              {func(*Up) {}, "localhost", false, false},
		"a domain":             {func(c *Up) { c.Domain = "boxes.example" }, "boxes.example", true, false},
		"below localhost":      {func(c *Up) { c.Domain = "nest.localhost" }, "nest.localhost", false, false},
		"a public name":        {func(c *Up) { c.PublicURL = "https://Nest.example:8443/" }, "nest.example", true, false},
		"both":                 {func(c *Up) { c.PublicURL, c.Domain = "https://nest.example", "boxes.example" }, "boxes.example", true, false},
		"a public address":     {func(c *Up) { c.PublicURL = "http://192.0.2.7:8080" }, "localhost", false, false},
		"one of version 6":     {func(c *Up) { c.PublicURL = "http://[2001:db8::1]" }, "localhost", false, false},
		"no scheme":            {func(c *Up) { c.PublicURL = "nest.example" }, "", false, true},
		"another scheme":       {func(c *Up) { c.PublicURL = "ftp://nest.example" }, "", false, true},
		"a path":               {func(c *Up) { c.PublicURL = "https://nest.example/api" }, "", false, true},
		"a password":           {func(c *Up) { c.PublicURL = "https://a:b@nest.example" }, "", false, true},
		"a certificate alone":  {func(c *Up) { c.TLSCert = "/cert.pem" }, "", false, true},
		"a key alone":          {func(c *Up) { c.TLSKey = "/key.pem" }, "", false, true},
		"proxies":              {func(c *Up) { c.TrustedProxies = []string{"10.0.0.0/8", "::1", "192.0.2.7"} }, "localhost", false, false},
		"a proxy by name":      {func(c *Up) { c.TrustedProxies = []string{"proxy.example"} }, "", false, true},
		"an origin":            {func(c *Up) { c.CORSOrigins = []string{"https://app.example", "https://*.app.example:8443", "*"} }, "localhost", false, false},
		"no origin":            {func(c *Up) { c.CORSOrigins = []string{"app.example"} }, "", false, true},
		"a page":               {func(c *Up) { c.CORSOrigins = []string{"https://app.example/page"} }, "", false, true},
		"a range that is none": {func(c *Up) { c.TrustedProxies = []string{"10.1.2.3/8"} }, "", false, true},
	} {
		up := DefaultUp()
		c.set(&up)
		require.Equal(t, c.bad, up.Validate() != nil, name)
		if !c.bad {
			domain, everywhere := up.PortDomain()
			require.Equal(t, c.domain, domain, name)
			require.Equal(t, c.everywhere, everywhere, name)
		}
	}
}
