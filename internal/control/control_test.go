package control

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/store"
	"github.com/nestbox/nestbox/internal/testpg"
)

var postgres *testpg.Server

func TestMain(m *testing.M) {
	code, err := run(m)
	if err == nil && code == 0 {
		err = goleak.Find()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	if postgres, err = testpg.Start(context.Background()); err != nil {
		return 1, err
	}
	code = m.Run()
	return code, postgres.Stop()
}

// clock is a time that only tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2026, 11, 5, 4, 3, 2, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// world is a control plane with what it needs.
type world struct {
	*Control
	store *store.Store
	host  *fakeHost
	clock *clock
	me    Caller
}

func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldOn(t, "sqlite:"+filepath.Join(t.TempDir(), "nestbox.db"))
}

func newWorldOn(t *testing.T, dsn string) *world {
	t.Helper()
	s, err := store.Open(t.Context(), dsn, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	w := &world{store: s, clock: newClock()}
	w.host = newFakeHost(w.clock.Now)
	w.restart()
	w.me = w.newTeam(t)
	return w
}

// restart is a new control plane process.
func (w *world) restart() {
	w.Control = New(Config{Store: w.store, Host: w.host, Log: slog.New(slog.DiscardHandler), Now: w.clock.Now})
}

// newTeam returns a caller of a new team.
func (w *world) newTeam(t require.TestingT) Caller {
	team, err := w.Keys.CreateTeam(context.Background(), "team")
	require.NoError(t, err)
	key, _, err := w.Keys.Create(context.Background(), team.ID, "key")
	require.NoError(t, err)
	return Caller{TeamID: team.ID, KeyID: key.ID}
}

func (w *world) create(t require.TestingT) nestbox.Capsule {
	c, err := w.Capsules.Create(context.Background(), w.me, nestbox.CapsuleSpec{})
	require.NoError(t, err)
	return c
}

func (w *world) get(t require.TestingT, id string) nestbox.Capsule {
	c, err := w.store.Capsule(context.Background(), id)
	require.NoError(t, err)
	return c
}

func (w *world) pass(t require.TestingT) { require.NoError(t, w.Reconciler.pass(context.Background())) }

// newEmptyControl returns a control plane without any team.
func newEmptyControl(t *testing.T) *Control {
	t.Helper()
	s, err := store.Open(t.Context(), "sqlite:"+filepath.Join(t.TempDir(), "nestbox.db"), slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return New(Config{Store: s, Log: slog.New(slog.DiscardHandler)})
}

// onBoth runs a test on both databases.
func onBoth(t *testing.T, test func(t *testing.T, w *world)) {
	t.Parallel()
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		test(t, newWorld(t))
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		test(t, newWorldOn(t, postgres.Database(t, "")))
	})
}
