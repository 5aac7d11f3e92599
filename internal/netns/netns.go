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
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The ends of the veth pair. All sandboxes have the same: they never meet.
var (
	GuestAddr = netip.MustParseAddr("169.254.0.21") // eth0, in the inner namespace
	OuterAddr = netip.MustParseAddr("169.254.0.22") // gw0, in the outer namespace
)

// OuterLink is the end of the pair in the outer namespace.
const OuterLink = "gw0"

const (
	guestLink = "eth0"
	linkBits  = 30
	inner     = ".guest" // what the name of an inner namespace ends with
)

// Dir is a directory of named namespaces. A name is a file on which the
// namespace is mounted, as `ip netns` does it, so that it lives on when the
// process that made it is gone.
type Dir string

// Inner returns the path of the sandbox's own namespace.
func (d Dir) Inner(id string) string { return filepath.Join(string(d), id+inner) }

// Outer returns the path of the namespace in which the other end of the sandbox's
// network is.
func (d Dir) Outer(id string) string { return filepath.Join(string(d), id) }

// Create makes both namespaces of a sandbox and joins them. What it leaves
// behind when it fails, Remove removes.
func (d Dir) Create(id string) error {
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return err
	}
	return OnThread(func() error {
		for _, path := range []string{d.Inner(id), d.Outer(id)} {
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

// Route makes the outer namespace the way out of the inner one. What becomes of what
// then arrives there is the business of whoever stands in it; by itself it is dropped.
func (d Dir) Route(id string) error {
	return In(d.Inner(id), func() error {
		return netlink.RouteReplace(&netlink.Route{Gw: OuterAddr.AsSlice()})
	})
}

// Remove removes what Create made, all or part of it.
func (d Dir) Remove(id string) error {
	var errs []error
	for _, path := range []string{d.Outer(id), d.Inner(id)} {
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
	f, err := os.Open(d.Outer(id))
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

// Dial connects to a TCP port of the sandbox. Only the socket is made in the
// namespace, on a thread of its own that ends with that; the connection is waited
// for by the poller. A connection that ctx gives up is closed.
func (n *NS) Dial(ctx context.Context, port uint16) (net.Conn, error) {
	fd := -1
	err := OnThread(func() (err error) {
		if err := unix.Setns(int(n.f.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter the network namespace: %w", err)
		}
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		return nil, err
	}
	address := netip.AddrPortFrom(GuestAddr, port)
	conn, err := connectSocket(ctx, fd, address)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(address), Err: err}
	}
	return conn, nil
}

// connectSocket connects a non-blocking socket, which it takes over.
func connectSocket(ctx context.Context, fd int, to netip.AddrPort) (net.Conn, error) {
	err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
	file := os.NewFile(uintptr(fd), "connection to a sandbox") // in the poller, since it is non-blocking
	defer file.Close()                                         // net.FileConn has a copy
	if errors.Is(err, unix.EINPROGRESS) {
		err = awaitConnected(ctx, file)
	}
	if err != nil {
		return nil, os.NewSyscallError("connect", err)
	}
	return net.FileConn(file)
}

// awaitConnected waits until a socket that is being connected is, has failed, or
// ctx ends.
func awaitConnected(ctx context.Context, file *os.File) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = file.SetWriteDeadline(time.Unix(1, 0)) })()
	var result error
	err = raw.Write(func(fd uintptr) bool {
		code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		switch {
		case err != nil:
			result = err
		case code != 0:
			result = unix.Errno(code)
		default: // connected, or on its way: the first look comes before any wait
			_, err := unix.Getpeername(int(fd))
			return !errors.Is(err, unix.ENOTCONN)
		}
		return true
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errors.Join(err, result)
}
