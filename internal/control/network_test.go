package control

import (
	"strconv"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
)

func TestNetwork(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		ctx, other := t.Context(), w.newTeam(t)
		c, err := w.Capsules.Create(ctx, w.me, nestbox.CapsuleSpec{})
		require.NoError(t, err)
		require.Equal(t, nestbox.NetworkPolicy{}, c.NetworkPolicy(), "closed, as nobody says otherwise")

		policy := nestbox.NetworkPolicy{Allow: []string{"*.example.com", "203.0.113.0/24"}, EgressMbps: 10}
		now, err := w.Capsules.SetNetwork(ctx, w.me, c.ID, policy)
		require.NoError(t, err)
		require.Equal(t, policy, now)
		require.Equal(t, policy, w.get(t, c.ID).NetworkPolicy())
		report, err := w.Capsules.Network(ctx, w.me, c.ID)
		require.NoError(t, err)
		require.Equal(t, policy, report.Policy)

		_, err = w.Capsules.SetNetwork(ctx, w.me, c.ID, nestbox.NetworkPolicy{Allow: []string{"no name"}})
		requireCode(t, nestbox.CodeInvalid, err)
		_, err = w.Capsules.SetNetwork(ctx, other, c.ID, nestbox.NetworkPolicy{Internet: true})
		requireCode(t, nestbox.CodeNotFound, err)
		_, err = w.Capsules.Network(ctx, other, c.ID)
		requireCode(t, nestbox.CodeNotFound, err)
		w.host.fail["SetNetwork"] = nestbox.Errorf(nestbox.CodeUnavailable, "away")
		_, err = w.Capsules.SetNetwork(ctx, w.me, c.ID, nestbox.NetworkPolicy{Internet: true})
		requireCode(t, nestbox.CodeUnavailable, err)
		delete(w.host.fail, "SetNetwork")
		require.Equal(t, policy, w.get(t, c.ID).NetworkPolicy())

		// Of many changes at once the same one is the last here and there.
		var all sync.WaitGroup
		for i := range 20 {
			all.Go(func() {
				_, err := w.Capsules.SetNetwork(ctx, w.me, c.ID, nestbox.NetworkPolicy{Allow: []string{"host" + strconv.Itoa(i)}})
				if err != nil {
					t.Errorf("set: %v", err)
				}
			})
		}
		all.Wait()
		report, err = w.Capsules.Network(ctx, w.me, c.ID)
		require.NoError(t, err)
		require.Equal(t, w.get(t, c.ID).NetworkPolicy(), report.Policy)

		require.NoError(t, w.Capsules.Destroy(ctx, w.me, c.ID))
		_, err = w.Capsules.SetNetwork(ctx, w.me, c.ID, policy)
		requireCode(t, nestbox.CodeInvalidState, err)
		_, err = w.Capsules.Network(ctx, w.me, c.ID)
		requireCode(t, nestbox.CodeInvalidState, err)
	})
}

// TestNetworkOfTheOperator: what the operator says holds for all who say nothing, and
// bounds the others.
func TestNetworkOfTheOperator(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.Capsules.cfg.Network = NetworkDefaults{Internet: true, EgressMbps: 100}
	for what, ask := range map[string]struct{ asked, want *nestbox.NetworkPolicy }{
		"nothing said":  {nil, &nestbox.NetworkPolicy{Internet: true, EgressMbps: 100}},
		"no speed said": {&nestbox.NetworkPolicy{}, &nestbox.NetworkPolicy{EgressMbps: 100}},
		"slower":        {&nestbox.NetworkPolicy{EgressMbps: 7}, &nestbox.NetworkPolicy{EgressMbps: 7}},
	} {
		c, err := w.Capsules.Create(t.Context(), w.me, nestbox.CapsuleSpec{Network: ask.asked})
		require.NoError(t, err, what)
		require.Equal(t, ask.want, c.Network, what)
	}
	_, err := w.Capsules.Create(t.Context(), w.me, nestbox.CapsuleSpec{Network: &nestbox.NetworkPolicy{EgressMbps: 101}})
	requireCode(t, nestbox.CodeInvalid, err)

	w.host.info.Capabilities = nil
	c, err := w.Capsules.Create(t.Context(), w.me, nestbox.CapsuleSpec{})
	require.NoError(t, err)
	require.True(t, c.NetworkPolicy().DenyAll())
	_, err = w.Capsules.Create(t.Context(), w.me, nestbox.CapsuleSpec{Network: &nestbox.NetworkPolicy{Allow: []string{"example.com"}}})
	requireCode(t, nestbox.CodeUnsupported, err)
}
