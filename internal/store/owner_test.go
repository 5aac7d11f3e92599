package store_test

import (
	"context"
	"database/sql"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/store"
)

func TestOneOwner(t *testing.T) {
	t.Parallel()
	dsn := postgres.Database(t, template)
	first, second := open(t, dsn), open(t, dsn)
	own := func(s *store.Store) (*store.Ownership, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		return s.Own(ctx)
	}
	owner, err := own(first)
	require.NoError(t, err)
	ctx, stop := context.WithCancel(t.Context())
	kept := make(chan error, 1)
	go func() { kept <- owner.Keep(ctx) }()
	for _, s := range []*store.Store{second, first} {
		_, err = own(s)
		require.Equal(t, nestbox.CodeConflict, nestbox.CodeOf(err))
		require.ErrorContains(t, err, "another nestbox server")
	}
	addTeam(t, second) // who owns it not may use it all the same
	stop()
	require.NoError(t, <-kept)
	require.NoError(t, owner.Close())
	owner, err = own(second)
	require.NoError(t, err)
	require.NoError(t, owner.Close())
}

// TestOwnerLosesItsSession: the lock is taken again, unless another server was
// quicker.
func TestOwnerLosesItsSession(t *testing.T) {
	t.Parallel()
	dsn := postgres.Database(t, template)
	db, err := sql.Open("pgx", dsn)
	require.NoError(t, err)
	defer db.Close()
	cut := func() {
		var cut bool
		require.NoError(t, db.QueryRowContext(t.Context(), `SELECT bool_and(pg_terminate_backend(pid, 60000)) FROM pg_locks
			WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`).Scan(&cut))
		require.True(t, cut)
	}
	first, second := open(t, dsn), open(t, dsn)
	owner, err := first.Own(t.Context())
	require.NoError(t, err)
	require.NoError(t, owner.Look(t.Context()), "nothing has happened")
	cut()
	require.NoError(t, owner.Look(t.Context()))
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err = second.Own(ctx)
	require.Equal(t, nestbox.CodeConflict, nestbox.CodeOf(err))

	cut()
	other, err := second.Own(t.Context())
	require.NoError(t, err)
	require.Equal(t, nestbox.CodeConflict, nestbox.CodeOf(owner.Look(t.Context())))
	require.NoError(t, other.Close())
	require.Eventually(t, func() bool { return owner.Look(t.Context()) == nil }, time.Minute, time.Millisecond, "the other session takes a moment to end")
	require.NoError(t, owner.Close())
}
