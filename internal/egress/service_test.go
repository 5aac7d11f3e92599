package egress

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/netns"
)

// serveDir is the egress process.
func serveDir(dir string) {
	own := netip.MustParseAddr(hostIP)
	var ranges []netip.Prefix
	if text := os.Getenv("EGRESS_TEST_LIFTED"); text != "" {
		ranges = append(ranges, netip.MustParsePrefix(text))
	}
	s, err := NewService(Config{
		Never: Never{Lifted: ranges, Own: func() []netip.Addr { return []netip.Addr{own} }},
		DNS:   worldDNS,
		Log:   slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}, dir)
	if err == nil {
		err = s.Serve(context.Background())
	}
	if !errors.Is(err, ErrServed) {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(1)
}

// host is a directory with an egress process that is kept running.
type host struct {
	*Client
	t   *testing.T
	dir string

	leave func() // as a server that stops
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, dir: filepath.Join(t.TempDir(), "egress")}
	h.Client = NewClient(h.dir)
	require.NoError(t, os.MkdirAll(h.dir, 0o700))
	ctx, stop := context.WithCancel(t.Context())
	var kept sync.WaitGroup
	kept.Go(func() { h.Keep(ctx, slog.New(slog.DiscardHandler), nil, h.command) })
	h.leave = func() { stop(); kept.Wait(); h.Close() }
	t.Cleanup(func() {
		h.leave()
		if pid := h.process(); pid != 0 {
			require.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
		}
	})
	return h
}

func (h *host) command() *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "EGRESS_TEST_SERVICE="+h.dir)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd
}

func (h *host) kill() {
	h.t.Helper()
	pid := h.process()
	require.NotZero(h.t, pid, "no egress process works on "+h.dir)
	require.NoError(h.t, syscall.Kill(pid, syscall.SIGKILL))
}

// process finds the process that has the directory's lock; 0 = none.
func (h *host) process() (pid int) {
	h.t.Helper()
	lock := filepath.Join(h.dir, lockFile)
	found, err := filepath.Glob("/proc/[0-9]*/fd/*")
	require.NoError(h.t, err)
	for _, link := range found {
		if path, err := os.Readlink(link); err == nil && path == lock {
			_, err := fmt.Sscanf(link, "/proc/%d/", &pid)
			require.NoError(h.t, err)
			return pid
		}
	}
	return 0
}

// TestServiceIsKilled: with the egress process flows end, and nothing gets out, until
// another is there, which does what the first was told.
func TestServiceIsKilled(t *testing.T) {
	t.Parallel()
	h, c := newHost(t), newCapsule(t)
	id := nestbox.NewID(nestbox.PrefixCapsule)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	require.NoError(t, h.Put(ctx, id, c.dir.Outer("c"), nestbox.NetworkPolicy{Allow: []string{site}}))
	for range 3 {
		live, err := c.dial("tcp4", site+":7777")
		require.NoError(t, err)
		_, err = live.Write([]byte("x"))
		require.NoError(t, err)
		_, err = live.Read(make([]byte, 1))
		require.NoError(t, err)
		_, err = c.echo("tcp4", site2+":7777")
		require.Error(t, err)

		h.kill()
		require.NoError(t, live.SetDeadline(time.Now().Add(patience)))
		_, err = live.Read(make([]byte, 1))
		require.ErrorContains(t, err, "reset")
		require.NoError(t, live.Close())
		require.Eventually(t, func() bool {
			text, err := c.echo("tcp4", site+":7777")
			return err == nil && text == "hello"
		}, patience, time.Millisecond)
	}
	require.NoError(t, h.Put(ctx, id, c.dir.Outer("c"), nestbox.NetworkPolicy{Allow: []string{site2}}))
	_, err := c.echo("tcp4", site+":7777")
	require.Error(t, err)
	require.Eventually(t, func() bool {
		report, err := h.Look(ctx, id)
		require.NoError(t, err)
		require.Equal(t, []string{site2}, report.Policy.Allow)
		return report.Allowed > 0 && report.Refused > 0 && len(report.Recent) > 1
	}, patience, time.Millisecond)

	require.NoError(t, h.Remove(ctx, id))
	require.NoError(t, h.Remove(ctx, id), "again")
	_, err = h.Look(ctx, id)
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
	h.kill()
	require.Error(t, netns.In(c.inner, func() error {
		_, err := net.DialTimeout("tcp4", site2+":7777", 300*time.Millisecond)
		return err
	}), "also for one that comes later")
	h.leave()
	require.Eventually(t, func() bool { return h.process() == 0 }, patience, 10*time.Millisecond, "nobody needs it")
}

// TestServiceGoesOn: it outlives its server as long as there are capsules, and ends for
// one that wants other settings.
func TestServiceGoesOn(t *testing.T) {
	t.Parallel()
	h, c := newHost(t), newCapsule(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	id := nestbox.NewID(nestbox.PrefixCapsule)
	require.NoError(t, h.Put(ctx, id, c.dir.Outer("c"), nestbox.NetworkPolicy{Internet: true}))
	pid := h.process()
	h.leave()
	text, err := c.echo("tcp4", site+":7777")
	require.NoError(t, err)
	require.Equal(t, "hello", text)
	require.Equal(t, pid, h.process())

	var kept sync.WaitGroup
	later, stop := context.WithCancel(ctx)
	defer kept.Wait()
	defer stop()
	kept.Go(func() {
		h.Keep(later, slog.New(slog.DiscardHandler), []netip.Prefix{netip.MustParsePrefix(lifted + "/32")}, func() *exec.Cmd {
			cmd := h.command()
			cmd.Env = append(cmd.Env, "EGRESS_TEST_LIFTED="+lifted+"/32")
			return cmd
		})
	})
	require.Eventually(t, func() bool { return h.process() != pid && h.process() != 0 }, patience, 10*time.Millisecond)
	require.Eventually(t, func() bool {
		text, err := c.echo("tcp4", lifted+":7777")
		return err == nil && text == "hello"
	}, patience, 10*time.Millisecond)
}

// TestServiceTolerates: what is wrong with one capsule is no other's.
func TestServiceTolerates(t *testing.T) {
	t.Parallel()
	h, c := newHost(t), newCapsule(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	garbage, gone, well := nestbox.NewID(nestbox.PrefixCapsule), nestbox.NewID(nestbox.PrefixCapsule), nestbox.NewID(nestbox.PrefixCapsule)
	other := newCapsule(t)
	require.NoError(t, h.Put(ctx, gone, other.dir.Outer("c"), nestbox.NetworkPolicy{Internet: true}))
	require.NoError(t, h.Put(ctx, well, c.dir.Outer("c"), nestbox.NetworkPolicy{Internet: true}))
	for _, bad := range []error{
		h.Put(ctx, "cl-x", c.dir.Outer("c"), nestbox.NetworkPolicy{}),
		h.Put(ctx, garbage, "relative", nestbox.NetworkPolicy{}),
		h.Put(ctx, garbage, c.dir.Outer("c"), nestbox.NetworkPolicy{Allow: []string{"?"}}),
	} {
		require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(bad), bad)
	}
	require.Error(t, h.Put(ctx, garbage, "/no/such/namespace", nestbox.NetworkPolicy{}))
	require.NoError(t, os.WriteFile(filepath.Join(h.dir, garbage+stateEnd), []byte("{"), 0o600))
	require.NoError(t, other.dir.Remove("c"))
	require.NoError(t, other.dir.Create("elsewhere")) // what is removed at the end
	h.kill()
	require.Eventually(t, func() bool {
		text, err := c.echo("tcp4", site+":7777")
		return err == nil && text == "hello"
	}, patience, time.Millisecond)
	_, err := h.Look(ctx, gone)
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
	require.NoFileExists(t, filepath.Join(h.dir, gone+stateEnd))
	require.FileExists(t, filepath.Join(h.dir, garbage+stateEnd), "it may be mended")
	require.NoError(t, other.dir.Remove("elsewhere"))
}
