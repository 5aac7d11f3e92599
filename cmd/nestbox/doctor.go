package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox/internal/config"
	"github.com/nestbox/nestbox/internal/doctor"
)

func newDoctor() *cobra.Command {
	var asJSON bool
	settings := newSettings()
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Examine this machine, and say what is wrong and what to do",
		Long: `Examine this machine for what ` + "`nestbox up`" + ` with the same flags needs, and
say what is wrong and what to do about it. In the end a first capsule is started in
a directory of its own, and removed. A server that runs is not disturbed.

The exit code is 1 if anything fails; warnings do not count.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := settings.load(cmd)
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT)
			defer stop()
			found := examine(ctx, cfg)
			if asJSON {
				err = printFindingsJSON(cmd.OutOrStdout(), found)
			} else {
				err = printFindings(cmd.OutOrStdout(), found)
			}
			if err == nil && doctor.Worst(found) == doctor.Fail {
				err = errors.New("Nestbox does not work on this machine as it is")
			}
			return err
		},
	}
	settings.addFlags(cmd.Flags())
	cmd.Flags().BoolVar(&asJSON, "json", false, "output for programs")
	return cmd
}

// examine does the checks of the machine, and those that only a doctor does: the
// server finds these things out as it starts.
func examine(ctx context.Context, cfg config.Up) []doctor.Finding {
	found := doctor.Examine(doctor.Config{Dir: cfg.Dir, Platform: cfg.Platform, Egress: cfg.Egress == config.EgressOpen})
	first := doctor.Finding{Check: "first capsule", Status: doctor.Warn, Detail: "not tried: something that it needs fails"}
	if doctor.Worst(found) != doctor.Fail {
		first = firstCapsule(ctx, cfg)
	}
	found = append(found, portFree(ctx, cfg), domainResolves(ctx, cfg))
	if cfg.TLSCert != "" {
		found = append(found, certificateFits(cfg, time.Now()))
	}
	return append(found, first)
}

// portFree looks whether the server could listen where it is to.
func portFree(ctx context.Context, cfg config.Up) doctor.Finding {
	f := doctor.Finding{Check: "port", Status: doctor.OK, Detail: cfg.Listen}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", cfg.Listen)
	switch lock, lockErr := os.OpenFile(filepath.Join(cfg.Dir, "lock"), os.O_RDWR, 0); {
	case err == nil:
		_ = l.Close()
		if lockErr == nil {
			_ = lock.Close()
		}
		if host, _, _ := net.SplitHostPort(cfg.Listen); !isLoopback(host) && cfg.TLSCert == "" {
			f.Status = doctor.Warn
			f.Detail += " is open to the network, without TLS"
			f.Fix = "give --tls-cert and --tls-key, or listen on 127.0.0.1 behind a proxy that speaks TLS"
		}
		return f
	case lockErr == nil:
		defer lock.Close()
		if held(lock) {
			f.Detail += ", and a server of this directory runs"
			return f
		}
	}
	f.Status, f.Detail = doctor.Fail, err.Error()
	f.Fix = "stop what listens there (ss -ltnp), or use another --listen"
	return f
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// domainResolves looks whether names of capsule ports lead anywhere.
func domainResolves(ctx context.Context, cfg config.Up) doctor.Finding {
	domain, everywhere := cfg.PortDomain()
	f := doctor.Finding{Check: "domain", Status: doctor.OK, Detail: domain}
	if !everywhere {
		f.Detail += ": names below it are this machine, in browsers and curl"
		return f
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	name := "8000-example." + domain
	addrs, err := net.DefaultResolver.LookupHost(ctx, name)
	if err != nil {
		f.Status, f.Detail = doctor.Warn, name+" does not resolve: "+err.Error()
		f.Fix = "point *." + domain + " at this machine in the DNS"
		return f
	}
	f.Detail = name + " is " + strings.Join(addrs, ", ")
	return f
}

// expiresSoon is when a certificate should have been renewed: Let's Encrypt's last 90 days
// and are renewed 30 before.
const expiresSoon = 14 * 24 * time.Hour

// certificateFits looks whether clients will take the server's certificate, as far as that
// shows here.
func certificateFits(cfg config.Up, now time.Time) doctor.Finding {
	f := doctor.Finding{Check: "certificate", Status: doctor.OK}
	pair, err := tls.LoadX509KeyPair(cfg.TLSCert, cfg.TLSKey)
	if err != nil {
		f.Status, f.Detail, f.Fix = doctor.Fail, err.Error(), "--tls-cert and --tls-key name a certificate and its key, in PEM form"
		return f
	}
	domain, _ := cfg.PortDomain()
	names := []string{"8000-example." + domain}
	if u, err := cfg.Public(); err == nil && u != nil {
		names = append(names, u.Hostname())
	}
	f.Detail = "valid until " + pair.Leaf.NotAfter.UTC().Format(time.DateOnly)
	for _, name := range names {
		if err := pair.Leaf.VerifyHostname(name); err != nil {
			f.Status, f.Detail = doctor.Warn, "it is not for "+name
			f.Fix = "get one for the name of the API and for *." + domain
		}
	}
	if left := pair.Leaf.NotAfter.Sub(now); left < expiresSoon {
		f.Status, f.Fix = doctor.Warn, "renew it; the server reads it anew by itself"
	}
	return f
}

// firstCapsule boots a sandbox in a state directory of its own, beside the real
// one.
func firstCapsule(ctx context.Context, cfg config.Up) doctor.Finding {
	f := doctor.Finding{Check: "first capsule", Status: doctor.OK, Detail: "it ran"}
	began := time.Now()
	if err := tryCapsule(ctx, cfg); err != nil {
		f.Status, f.Detail = doctor.Fail, err.Error()
		f.Fix = "if nothing above is wrong, this is the kernel's or gVisor's own reason"
		return f
	}
	f.Detail += fmt.Sprintf("; with its template it took %v", time.Since(began).Round(10*time.Millisecond))
	return f
}

func tryCapsule(ctx context.Context, cfg config.Up) (err error) {
	near := cfg.Dir
	for {
		if _, err := os.Stat(near); err == nil || near == "/" {
			break
		}
		near = filepath.Dir(near)
	}
	dir, err := os.MkdirTemp(near, ".doctor-*")
	if err != nil {
		return err
	}
	var undo closers
	undo.add(func() error { return os.RemoveAll(dir) })
	defer func() { err = errors.Join(err, undo.close()) }()
	log := slog.New(slog.DiscardHandler)
	driver, images, err := openSandboxes(dir, cfg, nil, log, &undo)
	if err != nil {
		return err
	}
	return probe(ctx, driver, images, log)
}

func printFindingsJSON(w io.Writer, found []doctor.Finding) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(found)
}

func printFindings(w io.Writer, found []doctor.Finding) error {
	count := map[doctor.Status]int{}
	for _, f := range found {
		count[f.Status]++
		if _, err := fmt.Fprintf(w, "%-5s %-16s %s\n", marks[f.Status], f.Check, f.Detail); err != nil {
			return err
		}
		if f.Fix != "" {
			fmt.Fprintf(w, "%-5s %-16s -> %s\n", "", "", f.Fix)
		}
	}
	_, err := fmt.Fprintf(w, "%d checks: %d fail, %d with a warning\n", len(found), count[doctor.Fail], count[doctor.Warn])
	return err
}

var marks = map[doctor.Status]string{doctor.OK: "ok", doctor.Warn: "warn", doctor.Fail: "FAIL"}
