package store_test

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/fieldtest"
	"github.com/nestbox/nestbox/internal/store"
)

var states = []nestbox.CapsuleState{
	nestbox.StateStarting, nestbox.StateRunning, nestbox.StateStopping,
	nestbox.StateStopped, nestbox.StateMissing, nestbox.StateError,
}

// paths lead from the beginning to each state.
var paths = map[nestbox.CapsuleState][]nestbox.Trigger{
	nestbox.StateStarting: nil,
	nestbox.StateRunning:  {nestbox.TriggerStarted},
	nestbox.StateMissing:  {nestbox.TriggerStarted, nestbox.TriggerLost},
	nestbox.StateError:    {nestbox.TriggerFailed},
	nestbox.StateStopping: {nestbox.TriggerDestroy},
	nestbox.StateStopped:  {nestbox.TriggerDestroy, nestbox.TriggerDestroyed},
}

// addIn adds a capsule and brings it to a state.
func addIn(t *testing.T, s *store.Store, team string, state nestbox.CapsuleState, at time.Time) nestbox.Capsule {
	t.Helper()
	c := addCapsule(t, s, team, at)
	for _, trigger := range paths[state] {
		var err error
		c, err = s.Transition(t.Context(), c.ID, trigger, at, "")
		require.NoError(t, err)
	}
	require.Equal(t, state, c.State)
	return c
}

// TestEveryFieldOfACapsuleIsKept: a setting that is added to a capsule and
// forgotten in the store fails here.
func TestEveryFieldOfACapsuleIsKept(t *testing.T) {
	forEachStore(t, func(t *testing.T, s *store.Store) {
		c := newCapsule(addTeam(t, s).ID, epoch)
		c.CapsuleSpec = fieldtest.Fill[nestbox.CapsuleSpec](t)
		require.NoError(t, s.CreateCapsule(t.Context(), c, host))
		back, err := s.Capsule(t.Context(), c.ID)
		require.NoError(t, err)
		require.Equal(t, slices.Collect(maps.Keys(c.Env)), back.EnvNames)
		c.Env, c.Defaults = nil, nestbox.ImageDefaults{} // the host alone keeps the values
		require.Equal(t, c.CapsuleSpec, back.CapsuleSpec)
	})
}

func TestCreateCapsule(t *testing.T) {
	forEachStore(t, func(t *testing.T, s *store.Store) {
		team := addTeam(t, s)
		c := addCapsule(t, s, team.ID, epoch)
		got, err := s.Capsule(t.Context(), c.ID)
		require.NoError(t, err)
		require.Equal(t, c, got)
		hosts, err := s.Hosts(t.Context())
		require.NoError(t, err)
		require.Equal(t, []nestbox.HostInfo{host}, hosts)

		requireCode(t, nestbox.CodeConflict, s.CreateCapsule(t.Context(), c, host))
		requireCode(t, nestbox.CodeNotFound, s.CreateCapsule(t.Context(), newCapsule("team-unknown", epoch), host))
		_, err = s.Capsule(t.Context(), nestbox.NewID(nestbox.PrefixCapsule))
		requireCode(t, nestbox.CodeNotFound, err)

		c = newCapsule(team.ID, epoch)
		c.Metadata = nil
		require.NoError(t, s.CreateCapsule(t.Context(), c, host))
		got, err = s.Capsule(t.Context(), c.ID)
		require.NoError(t, err)
		require.Equal(t, c, got)
	})
}

// The store allows exactly what the table allows.
func TestTransitionFollowsTheTable(t *testing.T) {
	forEachStore(t, func(t *testing.T, s *store.Store) {
		team := addTeam(t, s)
		for _, from := range states {
			for _, tr := range nestbox.Transitions {
				before := addIn(t, s, team.ID, from, epoch)
				got, err := s.Transition(t.Context(), before.ID, tr.Trigger, epoch.Add(time.Hour), "")
				to, want := from.Next(tr.Trigger)
				require.Equal(t, nestbox.CodeOf(want), nestbox.CodeOf(err), "%s in %s", tr.Trigger, from)
				require.Equal(t, to, got.State)
				stored, err := s.Capsule(t.Context(), before.ID)
				require.NoError(t, err)
				require.Equal(t, got, stored)
				if want != nil {
					require.Equal(t, before, stored, "nothing changes")
				}
			}
		}
	})
}

func TestTriggersAreUnique(t *testing.T) {
	t.Parallel()
	seen := map[nestbox.Trigger]bool{}
	for _, tr := range nestbox.Transitions {
		require.False(t, seen[tr.Trigger], "the store finds a transition by its trigger")
		seen[tr.Trigger] = true
	}
}

func TestTransitionDetails(t *testing.T) {
	forEachStore(t, func(t *testing.T, s *store.Store) {
		team := addTeam(t, s)
		c := addCapsule(t, s, team.ID, epoch)
		at := epoch.Add(time.Second)
		step := func(trigger nestbox.Trigger, reason string) nestbox.Capsule {
			at = at.Add(time.Second)
			got, err := s.Transition(t.Context(), c.ID, trigger, at, reason)
			require.NoError(t, err)
			require.Equal(t, at, got.UpdatedAt)
			return got
		}
		got := step(nestbox.TriggerStarted, "")
		started := at
		require.Equal(t, started, got.StartedAt)
		require.Equal(t, started, got.LastActiveAt)
		require.Equal(t, "gone", step(nestbox.TriggerLost, "gone").Reason)
		got = step(nestbox.TriggerFound, "")
		require.Empty(t, got.Reason, "a capsule that runs has no reason")
		require.Equal(t, started, got.StartedAt)
		got = step(nestbox.TriggerCrashed, "a\x00b\xff"+strings.Repeat("é", 5000))
		require.True(t, strings.HasPrefix(got.Reason, "ab\uFFFDéé"), got.Reason[:10])
		require.True(t, utf8.ValidString(got.Reason))
		require.LessOrEqual(t, len(got.Reason), 1024)
		reason := got.Reason
		require.Equal(t, reason, step(nestbox.TriggerDestroy, "").Reason, "kept to the end")
		require.Equal(t, reason, step(nestbox.TriggerDestroyed, "").Reason)

		_, err := s.Transition(t.Context(), nestbox.NewID(nestbox.PrefixCapsule), nestbox.TriggerDestroy, at, "")
		requireCode(t, nestbox.CodeNotFound, err)
		_, err = s.Transition(t.Context(), c.ID, "dance", at, "")
		requireCode(t, nestbox.CodeInternal, err)
	})
}

func TestTransitionRace(t *testing.T) {
	forEachStore(t, func(t *testing.T, s *store.Store) {
		team := addTeam(t, s)
		c := addIn(t, s, team.ID, nestbox.StateRunning, epoch)
		var won atomic.Int32
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				got, err := s.Transition(t.Context(), c.ID, nestbox.TriggerLost, epoch, "")
				switch nestbox.CodeOf(err) {
				case "":
					won.Add(1)
				case nestbox.CodeInvalidState:
					if got.State != nestbox.StateMissing {
						t.Error(got.State)
					}
				default:
					t.Error(err)
				}
			})
		}
		all.Wait()
		require.EqualValues(t, 1, won.Load())
	})
}

func TestCapsulesOfTeamPages(t *testing.T) {
	forEachStore(t, func(t *testing.T, s *store.Store) {
		team, other := addTeam(t, s), addTeam(t, s)
		addCapsule(t, s, other.ID, epoch)
		var want []nestbox.Capsule
		for i := range 23 { // several of the same instant
			state := states[i%len(states)]
			want = append(want, addIn(t, s, team.ID, state, epoch.Add(time.Duration(i/5)*time.Microsecond)))
		}
		slices.SortFunc(want, func(a, b nestbox.Capsule) int {
			if c := b.CreatedAt.Compare(a.CreatedAt); c != 0 {
				return c
			}
			return strings.Compare(b.ID, a.ID)
		})
		collect := func(limit int, states []nestbox.CapsuleState) (got []nestbox.Capsule) {
			page := store.Page{States: states, Limit: limit}
			for {
				part, more, err := s.CapsulesOfTeam(t.Context(), team.ID, page)
				require.NoError(t, err)
				require.LessOrEqual(t, len(part), limit)
				got = append(got, part...)
				if !more {
					return got
				}
				last := part[len(part)-1]
				page.Before = store.Position{CreatedAt: last.CreatedAt, ID: last.ID}
			}
		}
		for _, limit := range []int{1, 4, 23, 1000} {
			require.Equal(t, want, collect(limit, states))
		}
		running := slices.DeleteFunc(slices.Clone(want), func(c nestbox.Capsule) bool { return c.State != nestbox.StateRunning })
		require.Equal(t, running, collect(2, []nestbox.CapsuleState{nestbox.StateRunning}))
	})
}

// TestEndedCapsulesCostNothing: neither a page, nor the live capsules of a host,
// nor those to forget are looked for among all that have ended.
func TestEndedCapsulesCostNothing(t *testing.T) {
	t.Parallel()
	s := open(t, "sqlite:"+filepath.Join(t.TempDir(), "nestbox.db"))
	page, err := s.PagePlan(t.Context(), "team-x", store.Page{States: states, Limit: 10})
	require.NoError(t, err)
	require.Len(t, page, len(states))
	for _, step := range page {
		require.Contains(t, step, "COVERING INDEX capsules_by_team_and_state (team_id=? AND state=? AND ")
	}
	live, err := s.LivePlan(t.Context(), "host-x")
	require.NoError(t, err)
	require.Equal(t, []string{"SEARCH capsules USING INDEX capsules_by_host (host_id=? AND state=?)"}, live)
	old, err := s.OldPlan(t.Context())
	require.NoError(t, err)
	require.Equal(t, []string{"SEARCH capsules USING INDEX capsules_by_age (state=? AND updated_at<?)"}, old)
}

// TestPagesAreBoundedInBytes: a page with much metadata is shorter, and nothing is
// left out.
func TestPagesAreBoundedInBytes(t *testing.T) {
	forEachStore(t, func(t *testing.T, s *store.Store) {
		team := addTeam(t, s)
		big := map[string]string{}
		for i := range nestbox.MaxMetadata {
			big[fmt.Sprint(i)] = strings.Repeat("m", nestbox.MaxMetadataValue)
		}
		for i := range 20 {
			c := newCapsule(team.ID, epoch.Add(time.Duration(i)*time.Second))
			c.Metadata = big
			require.NoError(t, s.CreateCapsule(t.Context(), c, host))
		}
		page, pages, seen := store.Page{States: states, Limit: 1000}, 0, 0
		for more := true; more; pages++ {
			part, m, err := s.CapsulesOfTeam(t.Context(), team.ID, page)
			require.NoError(t, err)
			require.NotEmpty(t, part)
			require.Less(t, len(part), 10)
			more, seen = m, seen+len(part)
			last := part[len(part)-1]
			page.Before = store.Position{CreatedAt: last.CreatedAt, ID: last.ID}
		}
		require.Equal(t, 20, seen)
		require.Greater(t, pages, 3)
	})
}

func TestLiveCapsules(t *testing.T) {
	forEachStore(t, func(t *testing.T, s *store.Store) {
		team := addTeam(t, s)
		want := map[string]bool{}
		for _, state := range states {
			if c := addIn(t, s, team.ID, state, epoch); state.Live() {
				want[c.ID] = true
			}
		}
		live, err := s.LiveCapsules(t.Context(), host.ID)
		require.NoError(t, err)
		require.Len(t, live, len(want))
		for _, c := range live {
			require.True(t, want[c.ID])
		}
		live, err = s.LiveCapsules(t.Context(), "host-other")
		require.NoError(t, err)
		require.Empty(t, live)
	})
}

func TestSaveActivity(t *testing.T) {
	forEachStore(t, func(t *testing.T, s *store.Store) {
		c := addCapsule(t, s, addTeam(t, s).ID, epoch)
		c.LastActiveAt = epoch.Add(time.Second)
		save := func(at map[string]time.Time) {
			require.NoError(t, s.SaveActivity(t.Context(), store.Activity{Capsules: at}))
		}
		save(map[string]time.Time{c.ID: c.LastActiveAt, "cl-unknown": epoch})
		save(map[string]time.Time{c.ID: epoch}) // never back
		got, err := s.Capsule(t.Context(), c.ID)
		require.NoError(t, err)
		require.Equal(t, c, got)
	})
}

func TestPruneCapsules(t *testing.T) {
	forEachStore(t, func(t *testing.T, s *store.Store) {
		team := addTeam(t, s)
		old := map[nestbox.CapsuleState]nestbox.Capsule{}
		for i, state := range states {
			old[state] = addIn(t, s, team.ID, state, epoch.Add(time.Duration(i)*time.Second))
		}
		young := addIn(t, s, team.ID, nestbox.StateStopped, epoch.Add(time.Hour))

		prune := func() int {
			n, err := s.PruneCapsules(t.Context(), epoch.Add(time.Minute), 1)
			require.NoError(t, err)
			return n
		}
		gone := func(id string) bool {
			_, err := s.Capsule(t.Context(), id)
			if err != nil {
				requireCode(t, nestbox.CodeNotFound, err)
			}
			return err != nil
		}
		require.Equal(t, 1, prune())
		require.NotEqual(t, gone(old[nestbox.StateStopped].ID), gone(old[nestbox.StateError].ID), "no more than its limit")
		require.Equal(t, 1, prune())
		require.Zero(t, prune())
		for state, c := range old {
			require.Equal(t, !state.Live(), gone(c.ID), state)
		}
		require.False(t, gone(young.ID))
	})
}

// TestPortSettings: what is set at the same time of several ports is all kept, and what
// a capsule's end makes pointless is refused.
func TestPortSettings(t *testing.T) {
	forEachStore(t, func(t *testing.T, s *store.Store) {
		ctx := t.Context()
		team := addTeam(t, s).ID
		c := addIn(t, s, team, nestbox.StateRunning, epoch)
		settings := fieldtest.Fill[nestbox.PortSettings](t)
		var all errgroup.Group
		for port := range uint16(8) {
			all.Go(func() error { return s.SetPort(ctx, c.ID, port+1, settings) })
		}
		require.NoError(t, all.Wait())
		back, err := s.Capsule(ctx, c.ID)
		require.NoError(t, err)
		require.Len(t, back.Ports, 8)
		require.Equal(t, settings, back.Ports[8])

		require.NoError(t, s.SetPort(ctx, c.ID, 8, nestbox.PortSettings{}))
		back, err = s.Capsule(ctx, c.ID)
		require.NoError(t, err)
		require.Len(t, back.Ports, 7)
		for port := range uint16(nestbox.MaxPortSettings - 7) {
			require.NoError(t, s.SetPort(ctx, c.ID, 100+port, settings))
		}
		require.Equal(t, nestbox.CodeExhausted, nestbox.CodeOf(s.SetPort(ctx, c.ID, 99, settings)))
		require.NoError(t, s.SetPort(ctx, c.ID, 100, settings), "one that is there already")

		require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(s.SetPort(ctx, nestbox.NewID(nestbox.PrefixCapsule), 1, settings)))
		for _, state := range states {
			err := s.SetPort(ctx, addIn(t, s, team, state, epoch).ID, 1, settings)
			if state.Live() && state != nestbox.StateStopping {
				require.NoError(t, err, state)
			} else {
				require.Equal(t, nestbox.CodeInvalidState, nestbox.CodeOf(err), state)
			}
		}
	})
}
