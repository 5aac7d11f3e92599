package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/guestrpc"
	"github.com/nestbox/nestbox/internal/sandbox"
	"github.com/nestbox/nestbox/internal/testbin"
)

const patience = 60 * time.Second

// awaitPort returns what is in a port file once there is one.
func awaitPort(t *testing.T, path string) string {
	t.Helper()
	var port string
	require.Eventually(t, func() bool {
		content, err := os.ReadFile(path)
		port = strings.TrimSpace(string(content))
		return err == nil
	}, patience, 10*time.Millisecond)
	require.NotEmpty(t, port, "the file is never seen half written")
	return port
}

func newClient(t *testing.T, port, token string) *guestrpc.Client {
	t.Helper()
	c := guestrpc.NewClient(guestrpc.ClientConfig{
		Dial: func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", "127.0.0.1:"+port)
		},
		Header: http.Header{guestrpc.TokenHeader: {token}},
	})
	t.Cleanup(c.Close)
	return c
}

func TestRun(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cfg := config{Listen: "127.0.0.1:0", PortFile: filepath.Join(t.TempDir(), "port"), Token: "right"}
	done := make(chan error, 1)
	go func() { done <- run(ctx, cfg, slog.New(slog.DiscardHandler)) }()
	port := awaitPort(t, cfg.PortFile)
	c := newClient(t, port, "right")
	info, err := c.Ping(t.Context())
	require.NoError(t, err)
	require.Equal(t, nestbox.Version, info.Version)
	_, err = newClient(t, port, "wrong").Ping(t.Context())
	require.Equal(t, nestbox.CodeGuest, nestbox.CodeOf(err))
	p, reader, err := c.Processes().Start(t.Context(), nestbox.ProcessSpec{Cmd: "sleep", Args: []string{"1000"}}, &guest.Attach{})
	require.NoError(t, err)
	defer reader.Close()
	cancel()
	require.NoError(t, <-done)
	require.ErrorIs(t, syscall.Kill(p.PID, 0), syscall.ESRCH, "what runs ends with envd")
	_, err = c.Ping(t.Context())
	require.Equal(t, nestbox.CodeGuest, nestbox.CodeOf(err))
}

func TestRunFails(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer taken.Close()
	log := slog.New(slog.DiscardHandler)
	require.ErrorIs(t, run(t.Context(), config{Listen: taken.Addr().String(), Token: "t"}, log), syscall.EADDRINUSE)
	none := filepath.Join(t.TempDir(), "none", "port")
	require.ErrorIs(t, run(t.Context(), config{Listen: "127.0.0.1:0", PortFile: none, Token: "t"}, log), os.ErrNotExist)
}

func TestConfig(t *testing.T) { // not parallel: it sets the environment
	t.Setenv(sandbox.EnvToken, "secret")
	cfg, err := parseConfig(nil, io.Discard)
	require.NoError(t, err)
	require.Equal(t, config{Listen: "0.0.0.0:49983", Cgroups: "/sys/fs/cgroup", LogLevel: slog.LevelWarn, Token: "secret"}, cfg)
	_, there := os.LookupEnv(sandbox.EnvToken)
	require.False(t, there, "children must not inherit the token")
	_, err = parseConfig(nil, io.Discard)
	require.ErrorIs(t, err, errNoToken)

	t.Setenv(sandbox.EnvToken, "secret")
	cfg, err = parseConfig([]string{"--listen", "127.0.0.1:0", "--port-file", "/p", "--cgroups", "/c", "--max-pids", "7", "--log-level", "debug"}, io.Discard)
	require.NoError(t, err)
	require.Equal(t, config{Listen: "127.0.0.1:0", PortFile: "/p", Cgroups: "/c", MaxPids: 7, LogLevel: slog.LevelDebug, Token: "secret"}, cfg)
	for _, args := range [][]string{{"--nope"}, {"argument"}, {"--log-level", "loud"}, {"--max-pids", "few"}, {"--max-pids", "-1"}} {
		t.Setenv(sandbox.EnvToken, "secret")
		_, err = parseConfig(args, io.Discard)
		require.Error(t, err)
	}
}

// TestBinary runs envd as it is shipped.
func TestBinary(t *testing.T) {
	t.Parallel()
	binary := testbin.Envd(t)

	noToken := exec.CommandContext(t.Context(), binary, "--listen", "127.0.0.1:0")
	noToken.Env = []string{}
	out, err := noToken.CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), sandbox.EnvToken)

	portFile := filepath.Join(t.TempDir(), "port")
	cmd := exec.CommandContext(t.Context(), binary, "--listen", "127.0.0.1:0", "--port-file", portFile)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), sandbox.EnvToken + "=token"}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	require.NoError(t, cmd.Start())
	c := newClient(t, awaitPort(t, portFile), "token")
	p, reader, err := c.Processes().Start(t.Context(), nestbox.ProcessSpec{Cmd: "sh", Args: []string{"-c", "env; grep ^Cap /proc/self/status"}}, &guest.Attach{})
	require.NoError(t, err)
	require.NotEqual(t, cmd.Process.Pid, p.PID)
	var output []byte
	for err == nil {
		var event nestbox.OutputEvent
		event, err = reader.Next(t.Context())
		output = append(output, event.Data...)
	}
	require.Equal(t, io.EOF, err)
	require.NotContains(t, string(output), "token")
	requireWithheld(t, string(output))
	require.NoError(t, cmd.Process.Signal(syscall.SIGHUP), "which it survives")
	_, err = c.Ping(t.Context())
	require.NoError(t, err)
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(t, cmd.Wait(), "stderr: %s", &stderr)
	require.Empty(t, stderr.String())
}

// requireWithheld requires that what would exempt a fork bomb from its limit is
// not passed on, also to root.
func requireWithheld(t *testing.T, output string) {
	t.Helper()
	lines := regexp.MustCompile(`(?m)^Cap(\w+):\s+([0-9a-f]+)$`).FindAllStringSubmatch(output, -1)
	require.Len(t, lines, 5)
	for _, line := range lines {
		set, err := strconv.ParseUint(line[2], 16, 64)
		require.NoError(t, err)
		for _, c := range withheld {
			require.Zero(t, set>>c&1, "capability %d in %s", c, line[1])
		}
	}
}

// TestInheritedSignals: programs start with default dispositions and an empty
// mask, whatever the daemon was started with.
func TestInheritedSignals(t *testing.T) {
	t.Parallel()
	portFile := filepath.Join(t.TempDir(), "port")
	cmd := exec.Command("env", "--ignore-signal=HUP", "--ignore-signal=INT", "--ignore-signal=PIPE", "--ignore-signal=USR2", "--ignore-signal=RTMAX", "--block-signal=USR1", "--block-signal=TERM",
		testbin.Envd(t), "--listen", "127.0.0.1:0", "--port-file", portFile)
	cmd.Env = append(os.Environ(), "NESTBOX_TOKEN=right")
	cmd.Stderr = os.Stderr
	require.NoError(t, cmd.Start())
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	c := newClient(t, awaitPort(t, portFile), "right")
	for range 20 { // on whichever thread
		_, reader, err := c.Processes().Start(t.Context(), nestbox.ProcessSpec{Cmd: "grep", Args: []string{"-E", "^Sig(Blk|Ign)", "/proc/self/status"}}, &guest.Attach{Lossless: true})
		require.NoError(t, err)
		var text []byte
		for {
			ev, err := reader.Next(t.Context())
			if err != nil {
				require.ErrorIs(t, err, io.EOF)
				break
			}
			text = append(text, ev.Data...)
		}
		require.Equal(t, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n", string(text))
	}
}

// TestOutOfDescriptors: what cannot be looked up because descriptors have run
// out is not said not to exist.
func TestOutOfDescriptors(t *testing.T) {
	t.Parallel()
	portFile := filepath.Join(t.TempDir(), "port")
	cmd := exec.Command(testbin.Envd(t), "--listen", "127.0.0.1:0", "--port-file", portFile)
	cmd.Env = append(os.Environ(), "NESTBOX_TOKEN=right")
	require.NoError(t, cmd.Start())
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	c := newClient(t, awaitPort(t, portFile), "right")
	start := func() error {
		_, _, err := c.Processes().Start(t.Context(), nestbox.ProcessSpec{Cmd: "true", User: "nobody"}, nil)
		return err
	}
	_, err := c.Ping(t.Context()) // on the connection that the calls below use too
	require.NoError(t, err)

	require.NoError(t, unix.Prlimit(cmd.Process.Pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: 1 << 10}, nil))
	require.Equal(t, nestbox.CodeExhausted, nestbox.CodeOf(start()))
	require.NoError(t, unix.Prlimit(cmd.Process.Pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1 << 10, Max: 1 << 10}, nil))
	require.NoError(t, start())
}

func TestHeapMayGrow(t *testing.T) {
	t.Parallel()
	for live, want := range map[uint64]int{
		0: mostGrowth, 1 << 20: mostGrowth, 4 << 20: 200, 8 << 20: heapGrowth, 12 << 20: heapGrowth, 1 << 30: heapGrowth,
	} {
		require.Equal(t, want, growthOf(live, smallHeap), live)
	}
}
