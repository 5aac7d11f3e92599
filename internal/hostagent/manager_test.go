package hostagent_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/hostagent"
	"github.com/nestbox/nestbox/internal/hostagent/hostrpc"
	"github.com/nestbox/nestbox/internal/hostagent/hosttest"
	"github.com/nestbox/nestbox/internal/image"
	"github.com/nestbox/nestbox/internal/sandbox/fake"
	"github.com/nestbox/nestbox/internal/testbin"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// countedImages has one image, that the fake driver does not look into.
type countedImages struct {
	mu   sync.Mutex
	uses map[string]int
}

func (i *countedImages) Names() []string { return []string{nestbox.TemplateMinimal} }

func (i *countedImages) Acquire(name string) (image.Root, error) {
	if name != nestbox.TemplateMinimal {
		return image.Root{}, nestbox.Errorf(nestbox.CodeNotFound, "template not found")
	}
	i.Use("one")
	return image.Root{Image: "one", Dir: "/"}, nil
}

func (i *countedImages) Use(image string)     { i.count(image, 1) }
func (i *countedImages) Release(image string) { i.count(image, -1) }
func (i *countedImages) Sweep()               { i.count("swept", 1) }

func (i *countedImages) count(image string, n int) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.uses == nil {
		i.uses = map[string]int{}
	}
	i.uses[image] += n
}

// of returns how many uses of an image are counted.
func (i *countedImages) of(image string) int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.uses[image]
}

// machine is what survives a host agent: directories and sandboxes.
type machine struct {
	t      *testing.T
	dir    string
	driver *fake.Driver
	images *countedImages // of the Manager that was opened last
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	m := &machine{t: t, dir: t.TempDir()}
	driver, err := fake.New(filepath.Join(m.dir, "sandboxes"), testbin.Envd(t))
	require.NoError(t, err)
	m.driver = driver
	t.Cleanup(func() {
		ids, err := driver.List(context.Background())
		require.NoError(t, err)
		for _, id := range ids {
			require.NoError(t, driver.Destroy(context.Background(), id))
		}
		require.NoError(t, driver.Close())
	})
	return m
}

// open starts a host agent.
func (m *machine) open() *hostagent.Manager {
	m.t.Helper()
	m.images = new(countedImages)
	host, err := hostagent.Open(m.t.Context(), hostagent.Config{
		Dir: m.dir, Driver: m.driver, Images: m.images,
		Log: slog.New(slog.NewTextHandler(m.t.Output(), nil)),
	})
	require.NoError(m.t, err)
	m.t.Cleanup(func() { require.NoError(m.t, host.Close()) })
	return host
}

func (m *machine) crash(t *testing.T, id string) { require.NoError(t, m.driver.Crash(id)) }

func TestManager(t *testing.T) {
	t.Parallel()
	hosttest.Run(t, func(t *testing.T) hosttest.Subject {
		m := newMachine(t)
		return hosttest.Subject{Host: m.open(), Crash: m.crash}
	})
}

func TestManagerOverRPC(t *testing.T) {
	t.Parallel()
	hosttest.Run(t, func(t *testing.T) hosttest.Subject {
		m := newMachine(t)
		server := httptest.NewServer(hostrpc.NewHandler(m.open(), "token"))
		t.Cleanup(server.Close)
		client := hostrpc.NewClient(dialer(server), "token")
		t.Cleanup(client.Close)
		return hosttest.Subject{Host: client, Crash: m.crash}
	})
}

func dialer(server *httptest.Server) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", server.Listener.Addr().String())
	}
}

func TestRPCNeedsTheToken(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(hostrpc.NewHandler(newMachine(t).open(), "token"))
	t.Cleanup(server.Close)
	for _, token := range []string{"", "Token", "token2"} {
		client := hostrpc.NewClient(dialer(server), token)
		_, err := client.List(t.Context())
		require.Equal(t, nestbox.CodeUnauthenticated, nestbox.CodeOf(err), "%q: %v", token, err)
		client.Close()
	}
}

func newID() string { return nestbox.NewID(nestbox.PrefixCapsule) }

func spec() nestbox.CapsuleSpec { return nestbox.CapsuleSpec{}.WithDefaults() }

// TestRestartFindsEverything ends one host agent, without any goodbye to its
// capsules, and starts another: same capsule, same process, same output.
func TestRestartFindsEverything(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	first := m.open()
	status, err := first.Create(t.Context(), newID(), spec())
	require.NoError(t, err)
	g, err := first.Guest(t.Context(), status.ID)
	require.NoError(t, err)
	started, reader, err := g.Processes().Start(t.Context(), nestbox.ProcessSpec{Cmd: "sh", Args: []string{"-c", "echo here; exec sleep 1000"}}, &guest.Attach{})
	require.NoError(t, err)
	ev, err := reader.Next(t.Context())
	require.NoError(t, err)
	require.NoError(t, reader.Close())
	require.NoError(t, first.Close())

	second := m.open()
	found, err := second.Get(t.Context(), status.ID)
	require.NoError(t, err)
	require.Equal(t, status, found)
	g, err = second.Guest(t.Context(), status.ID)
	require.NoError(t, err)
	p, err := g.Processes().Get(t.Context(), nestbox.Selector{Tag: started.Tag})
	require.NoError(t, err)
	require.Equal(t, started.PID, p.PID)
	require.Equal(t, ev.End(), p.Output.End)
}

// TestRestartAfterDeath starts a host agent after a sandbox died while none
// ran: the capsule is there, dead, with a reason.
func TestRestartAfterDeath(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	first := m.open()
	status, err := first.Create(t.Context(), newID(), spec())
	require.NoError(t, err)
	require.NoError(t, first.Close())
	m.crash(t, status.ID)

	for range 2 { // it stays so
		host := m.open()
		found, err := host.Get(t.Context(), status.ID)
		require.NoError(t, err)
		require.Equal(t, hostagent.StateDead, found.State)
		require.NotEmpty(t, found.Reason)
		require.NoError(t, host.Close())
	}
}

// TestDestroyAtDeath destroys capsules in the moment in which their death is
// noticed: their records do not come back.
func TestDestroyAtDeath(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	host := m.open()
	const many = 32
	errs := make(chan error, many)
	for range many {
		status, err := host.Create(t.Context(), newID(), spec())
		require.NoError(t, err)
		go func() {
			err := m.driver.Crash(status.ID)
			for found := status; err == nil && found.State != hostagent.StateDead; {
				found, err = host.Get(t.Context(), status.ID)
			}
			errs <- errors.Join(err, host.Destroy(t.Context(), status.ID))
		}()
	}
	for range many {
		require.NoError(t, <-errs)
	}
	require.NoError(t, host.Close())
	left, err := filepath.Glob(filepath.Join(m.dir, "capsules", "*"))
	require.NoError(t, err)
	require.Empty(t, left)
}

// TestRestartCleansUp starts a host agent on what a kill -9 in the middle of
// Create, or of a write, leaves.
func TestRestartCleansUp(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	first := m.open()
	status, err := first.Create(t.Context(), newID(), spec())
	require.NoError(t, err)
	require.NoError(t, first.Close())

	// As if the agent had died before it wrote that the capsule runs.
	path := filepath.Join(m.dir, "capsules", status.ID+".json")
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Contains(t, string(data), `"state":"running"`)
	interrupted := []byte(strings.Replace(string(data), `"state":"running"`, `"state":"starting"`, 1))
	require.NoError(t, os.WriteFile(path, interrupted, 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(m.dir, "capsules", ".new-123"), []byte(`{"id":`), 0o600))

	m.requireEmpty(m.open())
}

// requireEmpty requires that what a start had to remove is removed, soon.
func (m *machine) requireEmpty(host *hostagent.Manager) {
	m.t.Helper()
	require.Eventually(m.t, func() bool {
		list, err := host.List(m.t.Context())
		require.NoError(m.t, err)
		return len(list) == 0
	}, time.Minute, time.Millisecond)
	entries, err := os.ReadDir(filepath.Join(m.dir, "capsules"))
	require.NoError(m.t, err)
	require.Empty(m.t, entries)
	traces, err := m.driver.List(m.t.Context())
	require.NoError(m.t, err)
	require.Empty(m.t, traces)
}

// TestRestartRemovesStrangers starts a host agent where a sandbox runs that it
// has no record of: a Create that was killed before it wrote one cannot be.
func TestRestartRemovesStrangers(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	first := m.open()
	status, err := first.Create(t.Context(), newID(), spec())
	require.NoError(t, err)
	require.NoError(t, first.Close())
	require.NoError(t, os.Remove(filepath.Join(m.dir, "capsules", status.ID+".json")))

	m.requireEmpty(m.open())
}

// TestGarbageRecord does not guess: a capsule whose record cannot be read is set
// aside with its sandbox, and nobody else notices, until it is destroyed.
func TestGarbageRecord(t *testing.T) {
	t.Parallel()
	for name, garbage := range map[string]string{
		"no JSON": "garbage", "empty": "", "half": `{"version":1,"id":"`, "of another": `{"version":1,"id":"cl-0000000000000000000000000"}`,
		"of a later version": `{"version":99}`, "another kind": `[]`, "large": strings.Repeat("x", 1<<20),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t)
			first := m.open()
			bad, err := first.Create(t.Context(), newID(), spec())
			require.NoError(t, err)
			good, err := first.Create(t.Context(), newID(), spec())
			require.NoError(t, err)
			require.NoError(t, first.Close())
			path := filepath.Join(m.dir, "capsules", bad.ID+".json")
			require.NoError(t, os.WriteFile(path, []byte(garbage), 0o600))
			require.NoError(t, os.WriteFile(filepath.Join(m.dir, "capsules", "notes.txt"), []byte("mine"), 0o600))

			host := m.open()
			status, err := host.Get(t.Context(), bad.ID)
			require.NoError(t, err)
			require.Equal(t, hostagent.StateAside, status.State)
			require.Contains(t, status.Reason, "record")
			_, err = host.Guest(t.Context(), bad.ID)
			require.Equal(t, nestbox.CodeInvalidState, nestbox.CodeOf(err))
			kept, err := os.ReadFile(path)
			require.NoError(t, err)
			require.Equal(t, garbage, string(kept))
			traces, err := m.driver.List(t.Context())
			require.NoError(t, err)
			require.Contains(t, traces, bad.ID)

			status, err = host.Get(t.Context(), good.ID)
			require.NoError(t, err)
			require.Equal(t, hostagent.StateRunning, status.State)
			another, err := host.Create(t.Context(), newID(), spec())
			require.NoError(t, err)
			for _, id := range []string{another.ID, good.ID, bad.ID} {
				require.NoError(t, host.Destroy(t.Context(), id))
			}
			require.NoError(t, os.Remove(filepath.Join(m.dir, "capsules", "notes.txt")))
			m.requireEmpty(host)
		})
	}
}

// TestImageInUse: the image of a capsule is in use from its start to its end, over
// restarts too, and that of one that did not start is not.
func TestImageInUse(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	host := m.open()
	id := newID()
	_, err := host.Create(t.Context(), id, spec())
	require.NoError(t, err)
	m.driver.FailNextCreate(nestbox.Errorf(nestbox.CodeExhausted, "no room"))
	_, err = host.Create(t.Context(), newID(), spec())
	require.Error(t, err)
	_, err = host.Create(t.Context(), id, spec())
	require.Equal(t, nestbox.CodeConflict, nestbox.CodeOf(err))
	require.Equal(t, 1, m.images.of("one"))
	require.NoError(t, host.Close())
	host = m.open()
	require.Equal(t, 1, m.images.of("one"))
	require.Equal(t, 1, m.images.of("swept"))
	require.NoError(t, host.Destroy(t.Context(), id))
	require.Zero(t, m.images.of("one"))
	require.NoError(t, host.Close())
}

// TestFailedCreateLeavesNothing lets the driver fail, and envd never answer.
func TestFailedCreateLeavesNothing(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	host := m.open()
	m.driver.FailNextCreate(nestbox.Errorf(nestbox.CodeExhausted, "no room"))
	_, err := host.Create(t.Context(), newID(), spec())
	require.Equal(t, nestbox.CodeExhausted, nestbox.CodeOf(err))

	never := make(chan struct{})
	m.driver.BlockCreate(never)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err = host.Create(ctx, newID(), spec())
	require.Error(t, err)

	list, err := host.List(t.Context())
	require.NoError(t, err)
	require.Empty(t, list)
	entries, err := os.ReadDir(filepath.Join(m.dir, "capsules"))
	require.NoError(t, err)
	require.Empty(t, entries)
}
