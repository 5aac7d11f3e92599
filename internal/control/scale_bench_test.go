package control

import (
	"context"
	"database/sql"
	"fmt"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/store"
)

// BenchmarkScale is what a store of 70,000 ended and 1,000 live capsules costs: a
// pass of the Reconciler, and a page of a list.
func BenchmarkScale(b *testing.B) {
	const ended, live = 70_000, 1_000
	path := filepath.Join(b.TempDir(), "nestbox.db")
	s, err := store.Open(b.Context(), "sqlite:"+path, slog.New(slog.DiscardHandler))
	require.NoError(b, err)
	w := &world{store: s, host: newFakeHost(time.Now)}
	w.Control = New(Config{Store: s, Host: w.host, Log: slog.New(slog.DiscardHandler)})
	w.me = w.newTeam(b)
	for range live {
		w.create(b)
	}
	require.NoError(b, fill(b.Context(), path, w.me.TeamID, ended))

	run := func(name string, f func() error) {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				require.NoError(b, f())
			}
		})
	}
	page := func(req ListCapsules) func() error {
		return func() error {
			list, _, err := w.Capsules.List(b.Context(), w.me, req)
			if err == nil && len(list) == 0 {
				err = fmt.Errorf("the page is empty")
			}
			return err
		}
	}
	run("pass", func() error { return w.Reconciler.pass(b.Context()) })
	run("page of those that run", page(ListCapsules{}))
	run("page of all", page(ListCapsules{All: true}))
	run("short page of all", page(ListCapsules{All: true, Limit: 50}))
	require.NoError(b, s.Close())
}

// fill adds capsules that have ended, half of them before the live ones.
func fill(ctx context.Context, path, team string, n int) error {
	db, err := sql.Open("sqlite", path)
	if err != nil {
		return err
	}
	defer db.Close()
	now := time.Now().UnixMicro()
	for _, state := range []nestbox.CapsuleState{nestbox.StateStopped, nestbox.StateError} {
		_, err := db.ExecContext(ctx, `WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
			INSERT INTO capsules (id, team_id, host_id, template, state, reason, vcpus, memory_mb, disk_mb, pids_max,
				timeout_sec, metadata, created_at, started_at, last_active_at, updated_at)
			SELECT 'cl-' || ? || '-' || i, ?, (SELECT id FROM hosts LIMIT 1), 'minimal', ?, '', 1, 512, 1024, 100,
				0, '{"task":"' || i || '"}', ? + (i % 2) * 1000000000 - 500000000 + i, 0, 0, ?
			FROM n`, n/2, state, team, state, now, now)
		if err != nil {
			return err
		}
	}
	return nil
}
