// Package netns makes the network namespaces of sandboxes and connects into
// them. It is a leaf: it may import the standard library and netlink only.
//
// A sandbox has two namespaces, joined by one veth pair. The inner one belongs
// to the sandbox, whose own network stack takes the frames of eth0. The outer
// one is where this process stands when it dials in. Neither has a route to
// anywhere else and neither forwards, so that a sandbox can reach nothing.
package netns

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The ends of the veth pair. All sandboxes have the same: they never meet.
var (
	GuestAddr = netip.MustParseAddr("169.254.0.21") // eth0, in the inner namespace
	OuterAddr = netip.MustParseAddr("169.254.0.22") // gw0, in the outer namespace
)

const (
	guestLink = "eth0"
	outerLink = "gw0"
	linkBits  = 30
	inner     = ".guest" // what the name of an inner namespace ends with
)

// Dir is a directory of named namespaces. A name is a file on which the
// namespace is mounted, as `ip netns` does it, so that it lives on when the
// process that made it is gone.
type Dir string

// Inner returns the path of the sandbox's own namespace.
func (d Dir) Inner(id string) string { return filepath.Join(string(d), id+inner) }

func (d Dir) outer(id string) string { return filepath.Join(string(d), id) }

// Create makes both namespaces of a sandbox and joins them. What it leaves
// behind when it fails, Remove removes.
func (d Dir) Create(id string) error {
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return err
	}
	return OnThread(func() error {
		for _, path := range []string{d.Inner(id), d.outer(id)} {
			if err := makeNamed(path); err != nil {
				return fmt.Errorf("make network namespace %s: %w", filepath.Base(path), err)
			}
		}
		// The thread is now in the outer namespace.
		if err := connect(d.Inner(id)); err != nil {
			return fmt.Errorf("connect the network namespaces of %s: %w", id, err)
		}
		return nil
	})
}

// Remove removes what Create made, all or part of it.
func (d Dir) Remove(id string) error {
	var errs []error
	for _, path := range []string{d.outer(id), d.Inner(id)} {
		if err := removeNamed(path); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// List returns the ids of which there is a namespace, or half of one.
func (d Dir) List() ([]string, error) {
	entries, err := os.ReadDir(string(d))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	seen := map[string]bool{}
	for _, e := range entries {
		seen[strings.TrimSuffix(e.Name(), inner)] = true
	}
	return slices.Sorted(maps.Keys(seen)), err
}

// Open holds the outer namespace of a sandbox open, to dial from.
func (d Dir) Open(id string) (*NS, error) {
	f, err := os.Open(d.outer(id))
	if err != nil {
		return nil, err
	}
	if kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE); err != nil || kind != unix.CLONE_NEWNET {
		return nil, errors.Join(fmt.Errorf("%s is not a network namespace", f.Name()), f.Close())
	}
	return &NS{f: f}, nil
}

// NewEmpty makes a namespace with nothing in it that has no name: it ends when
// the file is closed and no process is in it.
func NewEmpty() (*os.File, error) {
	var f *os.File
	err := OnThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		f, err = os.Open(threadNet())
		return err
	})
	return f, err
}

// NS is an open network namespace.
type NS struct{ f *os.File }

// Close lets go of the namespace. Connections made through it live on.
func (n *NS) Close() error { return n.f.Close() }

// Dial connects to a TCP port of the sandbox.
func (n *NS) Dial(ctx context.Context, port uint16) (net.Conn, error) {
	var conn net.Conn
	err := OnThread(func() (err error) {
		if err := unix.Setns(int(n.f.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter the network namespace: %w", err)
		}
		// A socket belongs to the namespace of the thread that makes it; with a
		// literal address the dialer makes it on this one.
		var d net.Dialer
		conn, err = d.DialContext(ctx, "tcp4", net.JoinHostPort(GuestAddr.String(), strconv.Itoa(int(port))))
		return err
	})
	return conn, err
}
