package store_test

import (
	"context"
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
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
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
