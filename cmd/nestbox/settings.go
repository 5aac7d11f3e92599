package main

import (
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/nestbox/nestbox/internal/config"
)

// settings are those of `nestbox up`, from all the places where they may be.
type settings struct {
	file  string
	flags config.Up
}

func newSettings() *settings { return &settings{flags: config.DefaultUp()} }

// addStateFlags adds those that say where the state is.
func (s *settings) addStateFlags(f *pflag.FlagSet) {
	f.StringVar(&s.file, "config", "", "YAML file with settings")
	f.StringVar(&s.flags.Dir, "dir", s.flags.Dir, "folder of all state")
	f.StringVar(&s.flags.Database, "database", "", "postgres:// URL (default: SQLite in the state folder)")
}

// addFlags adds all of them.
func (s *settings) addFlags(f *pflag.FlagSet) {
	s.addStateFlags(f)
	flags := &s.flags
	f.StringVar(&flags.Listen, "listen", flags.Listen, "address and port to listen on")
	f.StringVar(&flags.Domain, "domain", "", "domain of capsule ports: http://<port>-<capsule>.<domain>:<listen port>/ (default the host of --public-url, else localhost)")
	f.StringVar(&flags.PublicURL, "public-url", "", "how clients reach the API, such as https://nestbox.example.com (default as their requests show)")
	f.StringVar(&flags.TLSCert, "tls-cert", "", "certificate (PEM file) to serve TLS with, read anew when it changes")
	f.StringVar(&flags.TLSKey, "tls-key", "", "its key (PEM file)")
	f.StringSliceVar(&flags.CORSOrigins, "cors-origins", nil, "origins, such as https://app.example.com or *, whose pages may use the API (default none)")
	f.StringSliceVar(&flags.TrustedProxies, "trusted-proxies", nil, "addresses and ranges of proxies whose X-Forwarded-For, -Host and -Proto are believed")
	f.StringVar(&flags.Platform, "platform", flags.Platform, "gVisor platform: systrap or kvm")
	f.StringVar(&flags.Egress, "egress", flags.Egress, "whether capsules reach the internet unless their create says otherwise: allow or deny")
	f.IntVar(&flags.EgressMbps, "egress-mbps", 0, "most that each capsule may send, and receive, in megabits per second (default no limit)")
	f.StringSliceVar(&flags.EgressAllow, "egress-allow", nil, "private ranges (CIDR) that capsules may reach all the same")
	f.StringVar(&flags.CapsuleCA, "capsule-ca", "", "certificates (PEM file) that programs in capsules trust besides the host's")
	f.StringVar(&flags.CapsuleProxy, "capsule-proxy", "", "URL of a proxy that programs in capsules are told to use")
	f.IntVar(&flags.MaxConnections, "max-connections", 0, "connections of clients at a time (default 2/5 of the descriptors)")
	f.IntVar(&flags.MaxConnectionsPerAddress, "max-connections-per-address", 0, "of one peer address (default 3/4 of them)")
	f.IntVar(&flags.MaxRequestsPerTeam, "max-requests-per-team", 0, "requests and streams of one team at a time (default 1/3 of them)")
	f.IntVar(&flags.MemoryLimitMB, "memory-limit-mb", 0, "what the server tries to stay below, in MiB (default 4/5 of its control group's limit, else half of the machine)")
	f.StringVar(&flags.LogLevel, "log-level", flags.LogLevel, "debug, info, warn or error")
}

// load returns the settings, with the flags that were given as the last word
// over file and environment.
func (s *settings) load(cmd *cobra.Command) (config.Up, error) {
	cfg := config.DefaultUp()
	if err := config.Load(&cfg, s.file, environ()); err != nil {
		return cfg, err
	}
	for name, set := range map[string]func(){
		"dir":    func() { cfg.Dir = s.flags.Dir },
		"listen": func() { cfg.Listen = s.flags.Listen },
		"domain": func() { cfg.Domain = s.flags.Domain },

		"public-url":      func() { cfg.PublicURL = s.flags.PublicURL },
		"tls-cert":        func() { cfg.TLSCert = absolute(s.flags.TLSCert) },
		"tls-key":         func() { cfg.TLSKey = absolute(s.flags.TLSKey) },
		"cors-origins":    func() { cfg.CORSOrigins = s.flags.CORSOrigins },
		"trusted-proxies": func() { cfg.TrustedProxies = s.flags.TrustedProxies },

		"database":  func() { cfg.Database = s.flags.Database },
		"platform":  func() { cfg.Platform = s.flags.Platform },
		"log-level": func() { cfg.LogLevel = s.flags.LogLevel },

		"egress":       func() { cfg.Egress = s.flags.Egress },
		"egress-mbps":  func() { cfg.EgressMbps = s.flags.EgressMbps },
		"egress-allow": func() { cfg.EgressAllow = s.flags.EgressAllow },

		"capsule-ca":    func() { cfg.CapsuleCA = absolute(s.flags.CapsuleCA) },
		"capsule-proxy": func() { cfg.CapsuleProxy = s.flags.CapsuleProxy },

		"max-connections":             func() { cfg.MaxConnections = s.flags.MaxConnections },
		"max-connections-per-address": func() { cfg.MaxConnectionsPerAddress = s.flags.MaxConnectionsPerAddress },
		"max-requests-per-team":       func() { cfg.MaxRequestsPerTeam = s.flags.MaxRequestsPerTeam },
		"memory-limit-mb":             func() { cfg.MemoryLimitMB = s.flags.MemoryLimitMB },
	} {
		if cmd.Flags().Changed(name) {
			set()
		}
	}
	cfg.Dir = absolute(cfg.Dir)
	return cfg, cfg.Validate()
}

func environ() map[string]string {
	env := map[string]string{}
	for _, kv := range os.Environ() {
		k, v, _ := strings.Cut(kv, "=")
		env[k] = v
	}
	return env
}
