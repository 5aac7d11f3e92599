package netns_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox/internal/netns"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newDir(t *testing.T) netns.Dir { return netns.Dir(filepath.Join(t.TempDir(), "netns")) }

func mounts(t *testing.T, d netns.Dir) int {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	return strings.Count(string(text), string(d)+"/")
}

// inside runs f, which must not end the test, on a thread in a namespace.
func inside(t *testing.T, path string, f func() error) {
	t.Helper()
	require.NoError(t, netns.OnThread(func() error {
		ns, err := os.Open(path)
		if err != nil {
			return err
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	}))
}

func TestLife(t *testing.T) {
	t.Parallel()
	d := newDir(t)
	ids, err := d.List()
	require.NoError(t, err)
	require.Empty(t, ids)
	require.NoError(t, d.Create("a"))
	require.NoError(t, d.Create("b"))
	require.Error(t, d.Create("a"), "twice")
	require.Equal(t, 4, mounts(t, d))
	ids, err = d.List()
	require.NoError(t, err)
	require.Equal(t, []string{"a", "b"}, ids)
	for _, id := range []string{"a", "b", "a", "never"} {
		require.NoError(t, d.Remove(id))
	}
	require.Zero(t, mounts(t, d))
	ids, err = d.List()
	require.NoError(t, err)
	require.Empty(t, ids)
	_, err = d.Open("a")
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestDial(t *testing.T) {
	t.Parallel()
	d := newDir(t)
	require.NoError(t, d.Create("a"))
	t.Cleanup(func() { require.NoError(t, d.Remove("a")) })
	var listener net.Listener
	inside(t, d.Inner("a"), func() (err error) {
		listener, err = net.Listen("tcp", netip.AddrPortFrom(netns.GuestAddr, 0).String())
		return err
	})
	defer listener.Close()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, conn.RemoteAddr().String())
			_ = conn.Close()
		}
	}()
	ns, err := d.Open("a")
	require.NoError(t, err)
	defer ns.Close()
	port := netip.MustParseAddrPort(listener.Addr().String()).Port()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	conn, err := ns.Dial(ctx, port)
	require.NoError(t, err)
	defer conn.Close()
	from, err := io.ReadAll(conn)
	require.NoError(t, err)
	require.Equal(t, netns.OuterAddr, netip.MustParseAddrPort(string(from)).Addr())

	// From outside the namespace there is no way.
	require.NotEqual(t, port, 0)
	var dialer net.Dialer
	dialer.Timeout = 200 * time.Millisecond
	_, err = dialer.Dial("tcp", netip.AddrPortFrom(netns.GuestAddr, port).String())
	require.Error(t, err)
}

func TestLeadsNowhere(t *testing.T) {
	t.Parallel()
	d := newDir(t)
	require.NoError(t, d.Create("a"))
	t.Cleanup(func() { require.NoError(t, d.Remove("a")) })
	var links []net.Interface
	var addrs []net.Addr
	var dialErr, listenErr error
	inside(t, d.Inner("a"), func() (err error) {
		if links, err = net.Interfaces(); err != nil {
			return err
		}
		if addrs, err = net.InterfaceAddrs(); err != nil {
			return err
		}
		_, dialErr = net.DialTimeout("tcp", "169.254.169.254:80", time.Second)
		var l net.Listener
		if l, listenErr = net.Listen("tcp", "[::1]:0"); listenErr != nil {
			return nil
		}
		return l.Close()
	})
	require.ErrorIs(t, dialErr, unix.ENETUNREACH)
	require.NoError(t, listenErr)
	for _, l := range links {
		if l.Name != "lo" && l.Name != "eth0" { // a kernel may make idle tunnels
			require.Zero(t, l.Flags&net.FlagUp, l.Name)
		}
	}
	var have []string
	for _, a := range addrs {
		have = append(have, a.String())
	}
	require.ElementsMatch(t, []string{"127.0.0.1/8", "::1/128", "169.254.0.21/30"}, have)

	for _, path := range []string{d.Inner("a"), filepath.Join(string(d), "a")} {
		var routes, forward []byte
		inside(t, path, func() (err error) {
			if routes, err = os.ReadFile("/proc/thread-self/net/route"); err != nil {
				return err
			}
			forward, err = os.ReadFile("/proc/sys/net/ipv4/ip_forward")
			return err
		})
		require.NotRegexp(t, `(?m)^\S+\s00000000\s`, string(routes), "a default route")
		require.Equal(t, "0\n", string(forward))
	}
}

// Whatever a Create that was killed left behind, Remove removes.
func TestRemoveHalf(t *testing.T) {
	t.Parallel()
	d := newDir(t)
	require.NoError(t, os.MkdirAll(string(d), 0o700))
	require.NoError(t, os.WriteFile(d.Inner("a"), nil, 0o400)) // killed before the mount
	ids, err := d.List()
	require.NoError(t, err)
	require.Equal(t, []string{"a"}, ids)
	_, err = d.Open("a")
	require.Error(t, err)
	require.NoError(t, d.Remove("a"))
	require.NoError(t, d.Create("a"))
	require.NoError(t, d.Remove("a"))
}

func TestOnThread(t *testing.T) {
	t.Parallel()
	before, err := os.Readlink("/proc/thread-self/ns/net")
	require.NoError(t, err)
	empty, err := netns.NewEmpty()
	require.NoError(t, err)
	defer empty.Close()
	var st unix.Stat_t
	require.NoError(t, unix.Fstat(int(empty.Fd()), &st))
	require.NotContains(t, before, strconv.FormatUint(st.Ino, 10))
	// Many threads come and go and none of the others has changed.
	for range 200 {
		require.NoError(t, netns.OnThread(func() error { return unix.Setns(int(empty.Fd()), unix.CLONE_NEWNET) }))
		after, err := os.Readlink("/proc/thread-self/ns/net")
		require.NoError(t, err)
		require.Equal(t, before, after)
	}
}

// TestDialPinsNoThread waits for connections that nothing accepts, by the
// hundred: they cost no thread each, and end when they are given up.
func TestDialPinsNoThread(t *testing.T) {
	t.Parallel()
	d := newDir(t)
	require.NoError(t, d.Create("a"))
	t.Cleanup(func() { require.NoError(t, d.Remove("a")) })
	// A listener whose backlog is full: what comes then is neither accepted nor
	// refused.
	var port uint16
	inside(t, d.Inner("a"), func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: netns.GuestAddr.As4()}), unix.Listen(fd, 1)); err != nil {
			return err
		}
		bound, err := unix.Getsockname(fd)
		if err != nil {
			return err
		}
		port = uint16(bound.(*unix.SockaddrInet4).Port)
		return nil
	})
	ns, err := d.Open("a")
	require.NoError(t, err)
	defer ns.Close()
	ctx, giveUp := context.WithCancel(t.Context())
	defer giveUp()
	const dials = 200
	var dialled sync.WaitGroup
	var connected atomic.Int64
	for range dials {
		dialled.Go(func() {
			conn, err := ns.Dial(ctx, port)
			if err == nil {
				connected.Add(1)
				_ = conn.Close()
			} else if !errors.Is(err, context.Canceled) {
				t.Errorf("%v", err)
			}
		})
	}
	require.Eventually(t, func() bool { return synSent(t, d) >= dials-10 }, time.Minute, 10*time.Millisecond, "connections on their way")
	require.Less(t, threads(t), dials/2)
	giveUp()
	dialled.Wait()
	require.Less(t, connected.Load(), int64(10))
}

// synSent counts the connections of the outer namespace that are on their way.
func synSent(t *testing.T, d netns.Dir) (n int) {
	inside(t, filepath.Join(string(d), "a"), func() error {
		text, err := os.ReadFile("/proc/thread-self/net/tcp")
		n = strings.Count(string(text), " 02 ")
		return err
	})
	return n
}

func threads(t *testing.T) int {
	entries, err := os.ReadDir("/proc/self/task")
	require.NoError(t, err)
	return len(entries)
}
