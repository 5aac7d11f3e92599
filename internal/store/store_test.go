package store_test

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

// postgres is started by TestMain, and template is a database with all tables.
var (
	postgres *testpg.Server
	template string
)

func TestMain(m *testing.M) {
	if dsn := os.Getenv(writerDSN); dsn != "" {
		os.Exit(writeForEver(dsn))
	}
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
	ctx := context.Background()
	if postgres, err = testpg.Start(ctx); err != nil {
		return 1, err
	}
	defer func() {
		if stopped := postgres.Stop(); err == nil {
			err = stopped
		}
	}()
	template, err = postgres.Template(ctx, func(dsn string) error {
		s, err := store.Open(ctx, dsn, slog.New(slog.DiscardHandler))
		if err != nil {
			return err
		}
		return s.Close()
	})
	if err != nil {
		return 1, err
	}
	return m.Run(), nil
}

// forEachDB runs a test on each database, with the address of a new one.
func forEachDB(t *testing.T, test func(t *testing.T, dsn string)) {
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		test(t, "sqlite:"+filepath.Join(t.TempDir(), "nestbox.db"))
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		test(t, postgres.Database(t, template))
	})
}

// forEachStore is forEachDB with an open store.
func forEachStore(t *testing.T, test func(t *testing.T, s *store.Store)) {
	t.Parallel()
	forEachDB(t, func(t *testing.T, dsn string) { test(t, open(t, dsn)) })
}

func open(t *testing.T, dsn string) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), dsn, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

// epoch is an odd instant, to see what is lost on the way to the disk and back.
var epoch = time.Date(2026, 11, 5, 4, 3, 2, 123456000, time.UTC)

var host = nestbox.HostInfo{ID: nestbox.NewID(nestbox.PrefixHost), Driver: "fake", Version: "1", CPUs: 4, MemoryMB: 8192, Templates: []string{"minimal", "python"}}

func addTeam(t *testing.T, s *store.Store) nestbox.Team {
	t.Helper()
	team := nestbox.Team{ID: nestbox.NewID(nestbox.PrefixTeam), Name: "Ünïcode ' team", CreatedAt: epoch}
	require.NoError(t, s.CreateTeam(t.Context(), team))
	return team
}

func newKey(team string) nestbox.APIKey {
	secret := nestbox.NewAPIKey()
	return nestbox.APIKey{
		ID: nestbox.NewID(nestbox.PrefixKey), TeamID: team, Name: "a key", Prefix: secret[:10],
		Hash: nestbox.HashAPIKey(secret), CreatedAt: epoch,
	}
}

func newCapsule(team string, created time.Time) nestbox.Capsule {
	return nestbox.Capsule{
		ID: nestbox.NewID(nestbox.PrefixCapsule), TeamID: team, HostID: host.ID,
		CapsuleSpec: nestbox.CapsuleSpec{
			Template: "minimal", Resources: nestbox.Resources{VCPUs: 1, MemoryMB: 2, DiskMB: 3, PidsMax: 4},
			TimeoutSec: nestbox.MaxTimeoutSec, Metadata: map[string]string{"k": "v\x00\"'?$1", "ключ": "値"},
		},
		State:     nestbox.StateStarting,
		CreatedAt: created, LastActiveAt: created, UpdatedAt: created,
	}
}

func addCapsule(t *testing.T, s *store.Store, team string, created time.Time) nestbox.Capsule {
	t.Helper()
	c := newCapsule(team, created)
	require.NoError(t, s.CreateCapsule(t.Context(), c, host))
	return c
}

func requireCode(t *testing.T, code nestbox.Code, err error) {
	t.Helper()
	require.Error(t, err)
	require.Equal(t, code, nestbox.CodeOf(err), "%v", err)
}

func TestOpenAgainKeepsEverything(t *testing.T) {
	t.Parallel()
	forEachDB(t, func(t *testing.T, dsn string) {
		first := open(t, dsn)
		team := addTeam(t, first)
		c := addCapsule(t, first, team.ID, epoch)

		second := open(t, dsn) // beside the first
		got, err := second.Capsule(t.Context(), c.ID)
		require.NoError(t, err)
		require.Equal(t, c, got)
		_, err = second.Transition(t.Context(), c.ID, nestbox.TriggerStarted, epoch, "")
		require.NoError(t, err)
		got, err = first.Capsule(t.Context(), c.ID)
		require.NoError(t, err)
		require.Equal(t, nestbox.StateRunning, got.State)
	})
}

func TestOpenTogether(t *testing.T) {
	t.Parallel()
	test := func(t *testing.T, dsn string) {
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				s, err := store.Open(t.Context(), dsn, slog.New(slog.DiscardHandler))
				if err == nil {
					_, err = s.Teams(t.Context())
				}
				if err == nil {
					err = s.Close()
				}
				if err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
	}
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		test(t, "sqlite:"+filepath.Join(t.TempDir(), "nestbox.db"))
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		test(t, postgres.Database(t, "")) // an empty one
	})
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	for dsn, code := range map[string]nestbox.Code{
		"":                       nestbox.CodeInvalid,
		"mysql://x":              nestbox.CodeInvalid,
		"sqlite:":                nestbox.CodeInvalid,
		"sqlite:/nowhere/at/all": nestbox.CodeInternal,
		"postgres://u:hush@/x?host=/nowhere/at/all": nestbox.CodeUnavailable,
		"postgres://u:hush@/x?host=/tmp&port=many":  nestbox.CodeInternal,
		"postgres://u:hush@[/x":                     nestbox.CodeInternal,
	} {
		_, err := store.Open(t.Context(), dsn, slog.New(slog.DiscardHandler))
		requireCode(t, code, err)
		require.NotContains(t, err.Error(), "hush")
		t.Log(err)
	}
}

func TestSQLiteFileIsPrivate(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "odd ?#%20 name.db")
	require.NoError(t, os.WriteFile(path, nil, 0o644))
	s := open(t, "sqlite:"+path)
	addTeam(t, s)
	for _, suffix := range []string{"", "-wal", "-shm", ".lock"} {
		info, err := os.Stat(path + suffix)
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o600), info.Mode().Perm(), suffix)
	}
}

func TestCanceled(t *testing.T) {
	forEachStore(t, func(t *testing.T, s *store.Store) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := s.Teams(ctx)
		requireCode(t, nestbox.CodeCanceled, err)
		requireCode(t, nestbox.CodeCanceled, s.CreateTeam(ctx, nestbox.Team{ID: "team-x"}))
		teams, err := s.Teams(t.Context())
		require.NoError(t, err)
		require.Empty(t, teams)
	})
}

func TestTeamsAndKeys(t *testing.T) {
	forEachStore(t, func(t *testing.T, s *store.Store) {
		ctx := t.Context()
		team := addTeam(t, s)
		requireCode(t, nestbox.CodeConflict, s.CreateTeam(ctx, team))
		teams, err := s.Teams(ctx)
		require.NoError(t, err)
		require.Equal(t, []nestbox.Team{team}, teams)

		k := newKey(team.ID)
		require.NoError(t, s.CreateKey(ctx, k))
		requireCode(t, nestbox.CodeConflict, s.CreateKey(ctx, k))
		requireCode(t, nestbox.CodeNotFound, s.CreateKey(ctx, newKey("team-unknown")))
		got, err := s.KeyByHash(ctx, k.Hash)
		require.NoError(t, err)
		require.Equal(t, k, got)
		_, err = s.KeyByHash(ctx, "unknown")
		requireCode(t, nestbox.CodeNotFound, err)

		k.LastUsed = epoch.Add(time.Minute)
		require.NoError(t, s.SaveActivity(ctx, store.Activity{Keys: map[string]time.Time{k.ID: k.LastUsed, "key-unknown": epoch}}))
		require.NoError(t, s.SaveActivity(ctx, store.Activity{Keys: map[string]time.Time{k.ID: epoch}})) // never back
		keys, err := s.Keys(ctx, team.ID)
		require.NoError(t, err)
		require.Equal(t, []nestbox.APIKey{k}, keys)

		requireCode(t, nestbox.CodeNotFound, s.DeleteKey(ctx, "team-other", k.ID))
		require.NoError(t, s.DeleteKey(ctx, team.ID, k.ID))
		requireCode(t, nestbox.CodeNotFound, s.DeleteKey(ctx, team.ID, k.ID))
	})
}

func TestCreateFirstTeam(t *testing.T) {
	forEachStore(t, func(t *testing.T, s *store.Store) {
		var all sync.WaitGroup
		made := make(chan bool, 8)
		for range cap(made) {
			all.Go(func() {
				team := nestbox.Team{ID: nestbox.NewID(nestbox.PrefixTeam), Name: "first", CreatedAt: epoch}
				created, err := s.CreateFirstTeam(t.Context(), team, newKey(team.ID))
				if err != nil {
					t.Error(err)
				}
				made <- created
			})
		}
		all.Wait()
		close(made)
		n := 0
		for created := range made {
			if created {
				n++
			}
		}
		require.Equal(t, 1, n)
		teams, err := s.Teams(t.Context())
		require.NoError(t, err)
		require.Len(t, teams, 1)
		keys, err := s.Keys(t.Context(), teams[0].ID)
		require.NoError(t, err)
		require.Len(t, keys, 1)
	})
}

func TestSetting(t *testing.T) {
	forEachStore(t, func(t *testing.T, s *store.Store) {
		for _, fresh := range []string{"one", "two"} {
			got, err := s.Setting(t.Context(), "name", fresh)
			require.NoError(t, err)
			require.Equal(t, "one", got)
		}
	})
}

func TestHosts(t *testing.T) {
	forEachStore(t, func(t *testing.T, s *store.Store) {
		h := host
		for _, version := range []string{"1", "1", "2"} {
			h.Version = version
			require.NoError(t, s.SaveHost(t.Context(), h))
			hosts, err := s.Hosts(t.Context())
			require.NoError(t, err)
			require.Equal(t, []nestbox.HostInfo{h}, hosts)
		}
	})
}
