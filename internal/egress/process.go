package egress

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
)

// Run is the egress process: it serves what is in dir until ctx ends, or nobody needs
// it any more. ErrServed: another one does.
func Run(ctx context.Context, dir string, lifted []netip.Prefix, log *slog.Logger) error {
	wall := newWall(dir)
	s, err := NewService(Config{
		Never: Never{Lifted: lifted, Own: cached(ownAddresses)},
		Mark:  wall.mark,
		DNS:   cached(hostDNS),
		Log:   log,
	}, dir)
	if err != nil {
		return err
	}
	if err := wall.raise(lifted); err != nil {
		return errors.Join(fmt.Errorf("put up the wall in the host's firewall: %w", err), s.Close())
	}
	log.Info("the egress of capsules is served", "dir", dir, "lifted", lifted)
	err = s.Serve(ctx)
	if s.unused() { // then nothing stays behind
		err = errors.Join(err, wall.remove())
		for _, path := range []string{filepath.Join(dir, socketFile), filepath.Join(dir, lockFile), dir, filepath.Dir(dir)} {
			_ = os.Remove(path) // folders only if nothing is in them
		}
	}
	return errors.Join(err, s.Close())
}

// Probe reports whether this machine's capsules can be served: CodeUnsupported if its
// kernel lacks what that needs. It leaves no trace.
func Probe() error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends, and its namespace with it
		result <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("make a network namespace: %w", err)
			}
			if err := prepare(); err != nil {
				return err
			}
			s := &sockets{}
			if err := s.open(); err != nil {
				return nestbox.Errorf(nestbox.CodeUnsupported, "open transparent sockets: %w", err)
			}
			return s.close()
		}()
	}()
	return <-result
}

// cacheFor is how long what is read of the host's network counts.
const cacheFor = 5 * time.Second

func cached[T any](read func() []T) func() []T {
	var mu sync.Mutex
	var value []T
	var at time.Time
	return func() []T {
		mu.Lock()
		defer mu.Unlock()
		if at.IsZero() || time.Since(at) > cacheFor {
			value, at = read(), time.Now()
		}
		return value
	}
}

// ownAddresses are those of the host's links.
func ownAddresses() (own []netip.Addr) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil // what is left are the ranges
	}
	for _, a := range addrs {
		if ip, ok := a.(*net.IPNet); ok {
			if addr, ok := netip.AddrFromSlice(ip.IP); ok {
				own = append(own, addr.Unmap())
			}
		}
	}
	return own
}

// hostDNS are the servers that the host asks.
func hostDNS() (servers []netip.AddrPort) {
	config, err := dns.ClientConfigFromFile("/etc/resolv.conf")
	if err != nil {
		return nil
	}
	for _, text := range config.Servers {
		if addr, err := netip.ParseAddr(text); err == nil {
			servers = append(servers, netip.AddrPortFrom(addr, dnsPort))
		}
	}
	return servers
}
