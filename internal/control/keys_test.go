package control

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
)

func TestKeys(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := t.Context()
	key, secret, err := w.Keys.Create(ctx, w.me.TeamID, "  mine ")
	require.NoError(t, err)
	require.Equal(t, "mine", key.Name)
	require.Regexp(t, `^wrn_[0-9a-f]{32}$`, secret)
	require.Equal(t, secret[:10], key.Prefix)

	for _, form := range []string{secret, "e2b_" + strings.TrimPrefix(secret, "wrn_")} {
		by, err := w.Keys.Authenticate(ctx, form)
		require.NoError(t, err)
		require.Equal(t, Caller{TeamID: w.me.TeamID, KeyID: key.ID}, by)
	}
	for _, bad := range []string{"", "wrn_", nestbox.NewAPIKey(), strings.ToUpper(secret), secret + " ", strings.Repeat("x", 1<<20), key.Hash} {
		_, err := w.Keys.Authenticate(ctx, bad)
		requireCode(t, nestbox.CodeUnauthenticated, err)
		require.EqualError(t, err, "invalid API key")
	}

	foreign := w.newTeam(t)
	requireCode(t, nestbox.CodeNotFound, w.Keys.Delete(ctx, foreign.TeamID, key.ID))
	requireCode(t, nestbox.CodeInvalid, w.Keys.Delete(ctx, w.me.TeamID, "key-x"))
	list, err := w.Keys.List(ctx, w.me.TeamID)
	require.NoError(t, err)
	require.Len(t, list, 2)
	require.NoError(t, w.Keys.Delete(ctx, w.me.TeamID, key.ID))
	_, err = w.Keys.Authenticate(ctx, secret)
	requireCode(t, nestbox.CodeUnauthenticated, err)

	_, _, err = w.Keys.Create(ctx, nestbox.NewID(nestbox.PrefixTeam), "")
	requireCode(t, nestbox.CodeNotFound, err)
	for _, bad := range []string{" ", "a\nb", "\xff", strings.Repeat("x", 101)} {
		_, _, err = w.Keys.Create(ctx, w.me.TeamID, bad)
		requireCode(t, nestbox.CodeInvalid, err)
		_, err = w.Keys.CreateTeam(ctx, bad)
		requireCode(t, nestbox.CodeInvalid, err)
	}
	_, err = w.Keys.CreateTeam(ctx, "")
	requireCode(t, nestbox.CodeInvalid, err)
}

func TestLastUsedIsKeptToTheMinute(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	team, err := w.Keys.CreateTeam(t.Context(), "ours")
	require.NoError(t, err)
	key, secret, err := w.Keys.Create(t.Context(), team.ID, "")
	require.NoError(t, err)
	require.Equal(t, "Unnamed API Key", key.Name)
	used := func() time.Time {
		_, err := w.Keys.Authenticate(t.Context(), secret)
		require.NoError(t, err)
		w.Keys.activity.save(t.Context(), saveIn)
		keys, err := w.Keys.List(t.Context(), team.ID)
		require.NoError(t, err)
		require.Len(t, keys, 1)
		return keys[0].LastUsed
	}
	w.clock.advance(time.Second)
	first := w.clock.Now()
	require.Equal(t, first, used())
	w.clock.advance(59 * time.Second)
	require.Equal(t, first, used())
	w.clock.advance(time.Second)
	require.Equal(t, w.clock.Now(), used())
}

func TestEnsureFirst(t *testing.T) {
	t.Parallel()
	w := newWorld(t) // has a team
	secret, created, err := w.Keys.EnsureFirst(t.Context())
	require.NoError(t, err)
	require.False(t, created)
	require.Empty(t, secret)

	empty := newEmptyControl(t)
	secret, created, err = empty.Keys.EnsureFirst(t.Context())
	require.NoError(t, err)
	require.True(t, created)
	by, err := empty.Keys.Authenticate(t.Context(), secret)
	require.NoError(t, err)
	teams, err := empty.Keys.Teams(t.Context())
	require.NoError(t, err)
	require.Len(t, teams, 1)
	require.Equal(t, "default", teams[0].Name)
	require.Equal(t, teams[0].ID, by.TeamID)
	_, created, err = empty.Keys.EnsureFirst(t.Context())
	require.NoError(t, err)
	require.False(t, created)
}

// TestRemovedKeyEndsWhatItLetIn: at once where it is removed, and soon in every
// other server; URLs that it signed are of no use any more.
func TestRemovedKeyEndsWhatItLetIn(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		c := w.create(t)
		key, _, err := w.Keys.Create(t.Context(), w.me.TeamID, "")
		require.NoError(t, err)
		by := Caller{TeamID: w.me.TeamID, KeyID: key.ID}
		signed, err := w.Ports.Sign(t.Context(), by, c.ID, openPort, 0)
		require.NoError(t, err)
		here := w.Keys
		w.restart() // another server beside it
		watching, stop := context.WithCancel(t.Context())
		watched := make(chan error, 1)
		go func() { watched <- w.Keys.Watch(watching) }()

		atOnce, release := here.Hold(t.Context(), by)
		defer release()
		soon, release := w.Keys.Hold(t.Context(), by)
		defer release()
		other, release := w.Keys.Hold(t.Context(), w.me)
		defer release()
		over, release := w.Keys.Hold(t.Context(), by)
		release()
		require.ErrorIs(t, context.Cause(over), context.Canceled)

		require.NoError(t, here.Delete(t.Context(), w.me.TeamID, key.ID))
		require.Equal(t, nestbox.CodeUnauthenticated, nestbox.CodeOf(context.Cause(atOnce)))
		<-soon.Done()
		require.Equal(t, nestbox.CodeUnauthenticated, nestbox.CodeOf(context.Cause(soon)))
		require.NoError(t, other.Err())
		_, err = w.Ports.Authorize(t.Context(), c.ID, openPort, PortCredential{Tokens: []string{signed.Token}})
		requireCode(t, nestbox.CodeUnauthenticated, err)
		stop()
		require.NoError(t, <-watched)
	})
}
