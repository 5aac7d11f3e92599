package conformance

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/guesttest"
	"github.com/nestbox/nestbox/internal/hostagent"
	"github.com/nestbox/nestbox/internal/hostagent/hostrpc"
	"github.com/nestbox/nestbox/internal/hostagent/hosttest"
	"github.com/nestbox/nestbox/internal/image"
	"github.com/nestbox/nestbox/internal/sandbox/gvisor"
	"github.com/nestbox/nestbox/internal/sandbox/gvisor/runsc"
	"github.com/nestbox/nestbox/internal/testbin"
)

// TestMain lets this test binary be the runsc of its sandboxes.
func TestMain(m *testing.M) {
	runsc.Maybe()
	os.Exit(m.Run())
}

// newManager returns a host agent with gVisor on directories of its own.
func newManager(t *testing.T) *hostagent.Manager {
	t.Helper()
	m, _ := newHost(t)
	return m
}

// newHost returns a host agent and its images.
func newHost(t *testing.T) (*hostagent.Manager, *image.Store) {
	t.Helper()
	dir := tempDir(t)
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	images, err := image.NewStore(image.Config{Dir: filepath.Join(dir, "images"), Log: log})
	require.NoError(t, err)
	driver, err := gvisor.New(gvisor.Config{
		StateDir: filepath.Join(dir, "sandboxes"),
		RunDir:   filepath.Join(dir, "run"),
		Envd:     testbin.Envd(t),
		Log:      log,
	})
	require.NoError(t, err)
	m, err := hostagent.Open(t.Context(), hostagent.Config{
		Dir:    filepath.Join(dir, "host"),
		Info:   nestbox.HostInfo{ID: nestbox.NewID(nestbox.PrefixHost)},
		Driver: driver,
		Images: images,
		Log:    log,
	})
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		list, err := m.List(ctx)
		require.NoError(t, err)
		for _, s := range list {
			require.NoError(t, m.Destroy(ctx, s.ID))
		}
		left, err := driver.List(ctx)
		require.NoError(t, err)
		require.Empty(t, left, "every sandbox leaves without a trace")
		require.NoError(t, m.Close())
		require.NoError(t, driver.Close())
	})
	return m, images
}

// tempDir is short, for sockets, and open to traversal, for the users of
// sandboxes; t.TempDir is neither.
func tempDir(t *testing.T) string {
	dir, err := os.MkdirTemp("", "nb-*")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o711))
	t.Cleanup(func() {
		showCrashes(t, filepath.Join(dir, "sandboxes"))
		require.NoError(t, os.RemoveAll(dir))
	})
	return dir
}

// showCrashes prints how each log of a crash of gVisor begins.
func showCrashes(t *testing.T, stateDir string) {
	logs, err := filepath.Glob(filepath.Join(stateDir, "crashes", "*.log"))
	require.NoError(t, err)
	for _, path := range logs {
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		t.Logf("%s:\n%.16000s", path, text)
	}
}

// overRPC returns the RPC twin of a host.
func overRPC(t *testing.T, host hostagent.Host) *hostrpc.Client {
	t.Helper()
	const token = "the host's token"
	server := httptest.NewServer(hostrpc.NewHandler(host, token))
	t.Cleanup(server.Close)
	client := hostrpc.NewClient(func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", server.Listener.Addr().String())
	}, token)
	t.Cleanup(client.Close)
	return client
}

// crash kills the sentry of a capsule, as the host's OOM killer would.
func crash(t *testing.T, id string) { signalSentry(t, id, syscall.SIGKILL) }

func signalSentry(t *testing.T, id string, sig syscall.Signal) {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	require.NoError(t, err)
	for _, p := range paths {
		data, err := os.ReadFile(p)
		if err != nil || !bytes.HasPrefix(data, []byte("runsc-sandbox")) || !bytes.Contains(data, []byte(id)) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(p)))
		require.NoError(t, err)
		require.NoError(t, syscall.Kill(pid, sig))
		return
	}
	require.FailNow(t, "no sentry found", id)
}

// TestFrozenSandbox stops a whole sandbox: calls say that it does not answer,
// the host knows since when, it is well again when it goes on, and destroying a
// frozen one waits for nothing.
func TestFrozenSandbox(t *testing.T) {
	t.Parallel()
	host := newManager(t)
	began := time.Now()
	status, err := host.Create(t.Context(), nestbox.NewID(nestbox.PrefixCapsule), nestbox.CapsuleSpec{}.WithDefaults())
	require.NoError(t, err)
	g, err := host.Guest(t.Context(), status.ID)
	require.NoError(t, err)
	signalSentry(t, status.ID, syscall.SIGSTOP)
	_, err = g.Processes().List(t.Context(), true)
	require.Equal(t, nestbox.CodeTimeout, nestbox.CodeOf(err), "%v", err)
	_, err = g.Dial(t.Context(), 80)
	require.Equal(t, nestbox.CodeTimeout, nestbox.CodeOf(err), "%v", err)
	frozen, err := host.Get(t.Context(), status.ID)
	require.NoError(t, err)
	require.Equal(t, hostagent.StateRunning, frozen.State)
	require.True(t, frozen.UnresponsiveSince.After(began))

	signalSentry(t, status.ID, syscall.SIGCONT)
	_, err = g.Processes().List(t.Context(), true)
	require.NoError(t, err)
	well, err := host.Get(t.Context(), status.ID)
	require.NoError(t, err)
	require.True(t, well.UnresponsiveSince.IsZero())

	signalSentry(t, status.ID, syscall.SIGSTOP)
	require.NoError(t, host.Destroy(t.Context(), status.ID))
}

func TestHost(t *testing.T) {
	t.Parallel()
	hosttest.Run(t, func(t *testing.T) hosttest.Subject {
		return hosttest.Subject{Host: newManager(t), Crash: crash}
	})
}

func TestHostOverRPC(t *testing.T) {
	t.Parallel()
	hosttest.Run(t, func(t *testing.T) hosttest.Subject {
		return hosttest.Subject{Host: overRPC(t, newManager(t)), Crash: crash}
	})
}

// newGuest returns the guest of a new capsule, as the control plane of another
// machine would see it.
func newGuest(t *testing.T) guest.Guest {
	t.Helper()
	host := overRPC(t, newManager(t))
	status, err := host.Create(t.Context(), nestbox.NewID(nestbox.PrefixCapsule), nestbox.CapsuleSpec{}.WithDefaults())
	require.NoError(t, err)
	g, err := host.Guest(t.Context(), status.ID)
	require.NoError(t, err)
	return g
}

func TestProcesses(t *testing.T) {
	t.Parallel()
	guesttest.RunProcesses(t, newGuest)
}

// TestTreeCannotEscape: where there are control groups, a tree is killed whole
// although one of it has left nothing by which it could be found: no parent, no
// session and no environment of the tree's.
func TestTreeCannotEscape(t *testing.T) {
	t.Parallel()
	procs := newGuest(t).Processes()
	for _, kill := range []guest.Kill{{}, {Signal: syscall.SIGTERM}} {
		p, reader, err := procs.Start(t.Context(), nestbox.ProcessSpec{
			Cmd: "/bin/sh", Args: []string{"-c", "(setsid env -i /bin/sh -c 'echo $$; exec /bin/sleep 1000' &); exit 0"},
		}, &guest.Attach{})
		require.NoError(t, err)
		defer reader.Close()
		event, err := reader.Next(t.Context())
		for err == nil && event.Kind != nestbox.EventData {
			event, err = reader.Next(t.Context())
		}
		require.NoError(t, err)
		escaped := strings.TrimSpace(string(event.Data))
		_, err = procs.Wait(t.Context(), nestbox.Selector{PID: p.PID})
		require.NoError(t, err)
		require.True(t, exists(t, procs, escaped))
		_, err = procs.Kill(t.Context(), nestbox.Selector{PID: p.PID}, kill)
		require.NoError(t, err)
		require.False(t, exists(t, procs, escaped))
	}
}

// exists reports whether there is a process of that PID in the guest.
func exists(t *testing.T, procs guest.Processes, pid string) bool {
	t.Helper()
	p, _, err := procs.Start(t.Context(), nestbox.ProcessSpec{Cmd: "/usr/bin/test", Args: []string{"-d", "/proc/" + pid}}, nil)
	require.NoError(t, err)
	p, err = procs.Wait(t.Context(), nestbox.Selector{PID: p.PID})
	require.NoError(t, err)
	return p.Exit.Code == 0
}

func TestFiles(t *testing.T) {
	t.Parallel()
	guesttest.RunFiles(t, newGuest)
}

func TestWatch(t *testing.T) {
	t.Parallel()
	guesttest.RunWatch(t, newGuest)
}

func TestDial(t *testing.T) {
	t.Parallel()
	guesttest.RunDial(t, newGuest)
}
