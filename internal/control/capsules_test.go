package control

import (
	"context"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/nestbox/nestbox"
)

func TestLife(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		want := nestbox.CapsuleSpec{
			Resources:  nestbox.Resources{VCPUs: 2, MemoryMB: 1024, DiskMB: 2048, PidsMax: 100},
			TimeoutSec: 60,
			Metadata:   map[string]string{"purpose": "test"},
		}
		c, err := w.Capsules.Create(ctx, w.me, want)
		require.NoError(t, err)
		require.Equal(t, nestbox.StateRunning, c.State)
		require.Equal(t, w.me.TeamID, c.TeamID)
		require.Equal(t, w.host.info.ID, c.HostID)
		require.Equal(t, nestbox.TemplateMinimal, c.Template)
		require.Equal(t, want.Resources, c.Resources)
		require.Equal(t, want.Metadata, c.Metadata)
		require.Equal(t, w.clock.Now(), c.StartedAt)
		got, err := w.Capsules.Get(ctx, w.me, c.ID)
		require.NoError(t, err)
		require.Equal(t, c, got)
		require.Equal(t, []string{c.ID}, w.host.has())

		_, err = w.Capsules.Guest(ctx, w.me, c.ID)
		require.NoError(t, err)
		require.NoError(t, w.Capsules.Destroy(ctx, w.me, c.ID))
		require.NoError(t, w.Capsules.Destroy(ctx, w.me, c.ID), "it may be repeated")
		require.Empty(t, w.host.has())
		require.Equal(t, nestbox.StateStopped, w.get(t, c.ID).State)

		requireCode(t, nestbox.CodeInvalidState, w.Capsules.Ping(ctx, w.me, c.ID))
		_, err = w.Capsules.Guest(ctx, w.me, c.ID)
		requireCode(t, nestbox.CodeInvalidState, err)
		require.EqualError(t, err, "capsule is stopped")
	})
}

func TestCreateRefuses(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	tooMany := map[string]string{}
	for i := range nestbox.MaxMetadata + 1 {
		tooMany[strconv.Itoa(i)] = ""
	}
	for name, c := range map[string]struct {
		req  nestbox.CapsuleSpec
		code nestbox.Code
	}{
		"template name":        {nestbox.CapsuleSpec{Template: "../etc"}, nestbox.CodeInvalid},
		"unknown template":     {nestbox.CapsuleSpec{Template: "windows"}, nestbox.CodeNotFound},
		"too many cpus":        {nestbox.CapsuleSpec{Resources: nestbox.Resources{VCPUs: 1000}}, nestbox.CodeInvalid},
		"too little memory":    {nestbox.CapsuleSpec{Resources: nestbox.Resources{MemoryMB: 1}}, nestbox.CodeInvalid},
		"negative timeout":     {nestbox.CapsuleSpec{TimeoutSec: -1}, nestbox.CodeInvalid},
		"huge timeout":         {nestbox.CapsuleSpec{TimeoutSec: nestbox.MaxTimeoutSec + 1}, nestbox.CodeInvalid},
		"too much metadata":    {nestbox.CapsuleSpec{Metadata: tooMany}, nestbox.CodeInvalid},
		"empty metadata key":   {nestbox.CapsuleSpec{Metadata: map[string]string{"": "v"}}, nestbox.CodeInvalid},
		"long metadata key":    {nestbox.CapsuleSpec{Metadata: map[string]string{strings.Repeat("k", 129): "v"}}, nestbox.CodeInvalid},
		"long metadata value":  {nestbox.CapsuleSpec{Metadata: map[string]string{"k": strings.Repeat("v", 4097)}}, nestbox.CodeInvalid},
		"metadata with NUL":    {nestbox.CapsuleSpec{Metadata: map[string]string{"k": "\x00"}}, nestbox.CodeInvalid},
		"metadata not in UTF8": {nestbox.CapsuleSpec{Metadata: map[string]string{"\xff": "v"}}, nestbox.CodeInvalid},
	} {
		_, err := w.Capsules.Create(t.Context(), w.me, c.req)
		require.Equal(t, c.code, nestbox.CodeOf(err), "%s: %v", name, err)
	}
	all, _, err := w.Capsules.List(t.Context(), w.me, ListCapsules{All: true})
	require.NoError(t, err)
	require.Empty(t, all, "a refused request leaves no row")
}

func TestCreateFails(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		host, seen nestbox.Code
		reason     string
	}{
		"host away":        {nestbox.CodeUnavailable, nestbox.CodeUnavailable, "capsule host is not reachable"},
		"host slow":        {nestbox.CodeTimeout, nestbox.CodeUnavailable, "capsule host is not reachable"},
		"host full":        {nestbox.CodeExhausted, nestbox.CodeExhausted, "from the host"},
		"guest is silent":  {nestbox.CodeGuest, nestbox.CodeGuest, "from the host"},
		"template is gone": {nestbox.CodeNotFound, nestbox.CodeNotFound, "from the host"},
		"host has a bug":   {nestbox.CodeInternal, nestbox.CodeInternal, "internal error"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.host.failing("Create", nestbox.Errorf(c.host, "from the host"))
			_, err := w.Capsules.Create(t.Context(), w.me, nestbox.CapsuleSpec{})
			requireCode(t, c.seen, err)
			all, _, err := w.Capsules.List(t.Context(), w.me, ListCapsules{All: true})
			require.NoError(t, err)
			require.Len(t, all, 1)
			require.Equal(t, nestbox.StateError, all[0].State)
			require.Equal(t, c.reason, all[0].Reason)

			require.NoError(t, w.Capsules.Destroy(t.Context(), w.me, all[0].ID), "also a failed one can be destroyed")
			require.Equal(t, nestbox.StateStopped, w.get(t, all[0].ID).State)
		})
	}
}

func TestCreateGoesOnWhenTheCallerLeaves(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx, leave := context.WithCancel(t.Context())
	w.host.step = func(s step) {
		if s.method == "Create" {
			leave()
		}
	}
	c, err := w.Capsules.Create(ctx, w.me, nestbox.CapsuleSpec{})
	require.NoError(t, err)
	require.Equal(t, nestbox.StateRunning, w.get(t, c.ID).State)
	w.host.step = func(step) {}

	ctx, leave = context.WithCancel(t.Context())
	w.host.step = func(step) { leave() }
	require.NoError(t, w.Capsules.Destroy(ctx, w.me, c.ID))
	require.Equal(t, nestbox.StateStopped, w.get(t, c.ID).State)
}

// Destroy may come while create is at work, before or after the host did it.
func TestDestroyDuringCreate(t *testing.T) {
	t.Parallel()
	for _, when := range []string{"before", "after"} {
		t.Run(when, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			var id string
			w.host.step = func(s step) {
				if s.method == "Create" && s.when == when {
					id = s.id
					require.NoError(t, w.Capsules.Destroy(t.Context(), w.me, s.id))
				}
			}
			_, err := w.Capsules.Create(t.Context(), w.me, nestbox.CapsuleSpec{})
			requireCode(t, nestbox.CodeInvalidState, err)
			require.Empty(t, w.host.has())
			require.Equal(t, nestbox.StateStopped, w.get(t, id).State)
		})
	}
}

func TestDeathBeforeCreateCouldAnswer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var id string
	w.host.step = func(s step) {
		if s.method == "Create" && s.when == "after" {
			id = s.id
			w.host.crash(id)
			dead, err := w.host.Get(t.Context(), id)
			require.NoError(t, err)
			w.Reconciler.died(t.Context(), dead)
		}
	}
	_, err := w.Capsules.Create(t.Context(), w.me, nestbox.CapsuleSpec{})
	requireCode(t, nestbox.CodeGuest, err)
	require.Empty(t, w.host.has())
	require.Equal(t, nestbox.StateError, w.get(t, id).State)
	require.Equal(t, "segfault", w.get(t, id).Reason)
}

func TestDestroyTogether(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := w.create(t)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if err := w.Capsules.Destroy(t.Context(), w.me, c.ID); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	require.Equal(t, nestbox.StateStopped, w.get(t, c.ID).State)
}

func TestDestroyWhileTheHostIsAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := w.create(t)
	w.host.setDown(true)
	requireCode(t, nestbox.CodeUnavailable, w.Capsules.Destroy(t.Context(), w.me, c.ID))
	requireCode(t, nestbox.CodeUnavailable, w.Capsules.Destroy(t.Context(), w.me, c.ID))
	require.Equal(t, nestbox.StateStopping, w.get(t, c.ID).State)
	listed, _, err := w.Capsules.List(t.Context(), w.me, ListCapsules{})
	require.NoError(t, err)
	require.Empty(t, listed)
	_, err = w.Capsules.Guest(t.Context(), w.me, c.ID)
	require.EqualError(t, err, "capsule is stopped", "as the API shows it")

	w.host.setDown(false)
	w.pass(t)
	require.Equal(t, nestbox.StateStopped, w.get(t, c.ID).State)
	require.Empty(t, w.host.has())
}

// Every use case treats another team's capsule as one that is not there.
func TestForeignTeam(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := w.create(t)
	foreign := w.newTeam(t)
	for name, use := range map[string]func(by Caller, id string) error{
		"get":     func(by Caller, id string) error { _, err := w.Capsules.Get(t.Context(), by, id); return err },
		"destroy": func(by Caller, id string) error { return w.Capsules.Destroy(t.Context(), by, id) },
		"ping":    func(by Caller, id string) error { return w.Capsules.Ping(t.Context(), by, id) },
		"guest":   func(by Caller, id string) error { _, err := w.Capsules.Guest(t.Context(), by, id); return err },
		"exec": func(by Caller, id string) error {
			_, err := w.Processes.Exec(t.Context(), by, id, nestbox.ProcessSpec{Cmd: "true"}, nil, io.Discard, io.Discard)
			return err
		},
		"sign": func(by Caller, id string) error {
			_, err := w.Ports.Sign(t.Context(), by, id, openPort, 0)
			return err
		},
	} {
		err := use(foreign, c.ID)
		unknown := use(w.me, nestbox.NewID(nestbox.PrefixCapsule))
		require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err), name)
		require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(unknown), name)
		require.Equal(t, unknown.Error(), err.Error(), name)
		requireCode(t, nestbox.CodeInvalid, use(w.me, "cl-x"))
		requireCode(t, nestbox.CodeNotFound, use(w.me, nestbox.NewID(nestbox.PrefixKey)))
	}
	listed, _, err := w.Capsules.List(t.Context(), foreign, ListCapsules{All: true})
	require.NoError(t, err)
	require.Empty(t, listed)
	require.Equal(t, c, w.get(t, c.ID), "nothing of it has changed")
}

func TestListPages(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for i := range 7 {
		c := w.create(t)
		if i%3 == 0 {
			require.NoError(t, w.Capsules.Destroy(t.Context(), w.me, c.ID))
		}
		if i%2 == 0 {
			w.clock.advance(time.Second)
		}
	}
	collect := func(req ListCapsules) (got []nestbox.Capsule) {
		for {
			part, next, err := w.Capsules.List(t.Context(), w.me, req)
			require.NoError(t, err)
			got = append(got, part...)
			if next == "" {
				return got
			}
			require.Len(t, part, req.Limit)
			req.Cursor = next
		}
	}
	for _, limit := range []int{1, 2, 4, 7} {
		all := collect(ListCapsules{All: true, Limit: limit})
		require.Len(t, all, 7)
		require.True(t, slices.IsSortedFunc(all, func(a, b nestbox.Capsule) int { return b.CreatedAt.Compare(a.CreatedAt) }))
		require.Len(t, collect(ListCapsules{Limit: limit}), 4)
	}
	require.Len(t, collect(ListCapsules{}), 4)
	for _, bad := range []ListCapsules{{Limit: -1}, {Limit: MaxListCapsules + 1}, {Cursor: "?"}, {Cursor: "YWJj"}, {Cursor: "MTIzOmNsLXg"}} {
		_, _, err := w.Capsules.List(t.Context(), w.me, bad)
		requireCode(t, nestbox.CodeInvalid, err)
	}
}

func TestTouch(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := w.create(t)
	begun := w.clock.Now()
	for _, c2 := range []struct {
		after time.Duration
		want  time.Time
	}{
		{4 * time.Second, begun},
		{time.Second, begun.Add(5 * time.Second)},
		{4 * time.Second, begun.Add(5 * time.Second)},
		{time.Minute, begun.Add(69 * time.Second)},
	} {
		w.clock.advance(c2.after)
		require.NoError(t, w.Capsules.Ping(t.Context(), w.me, c.ID))
		got, err := w.Capsules.Get(t.Context(), w.me, c.ID)
		require.NoError(t, err)
		require.Equal(t, c2.want, got.LastActiveAt)
	}
	w.clock.advance(time.Minute)
	_, err := w.Capsules.Guest(t.Context(), w.me, c.ID)
	require.NoError(t, err)
	got, err := w.Capsules.Get(t.Context(), w.me, c.ID)
	require.NoError(t, err)
	require.Equal(t, w.clock.Now(), got.LastActiveAt)
}

// TestUseIsNotedBesideRequests: what a request only notes is written after it, for
// all together, and is answered meanwhile; what cannot be written waits.
func TestUseIsNotedBesideRequests(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := w.create(t)
	key, secret, err := w.Keys.Create(t.Context(), w.me.TeamID, "")
	require.NoError(t, err)
	begun := w.clock.Now()
	w.clock.advance(time.Minute)
	_, err = w.Keys.Authenticate(t.Context(), secret)
	require.NoError(t, err)
	_, err = w.Capsules.Guest(t.Context(), w.me, c.ID)
	require.NoError(t, err)
	list, _, err := w.Capsules.List(t.Context(), w.me, ListCapsules{})
	require.NoError(t, err)
	require.Equal(t, w.clock.Now(), list[0].LastActiveAt)
	stored := func() (capsule, used time.Time) {
		k, err := w.store.Key(t.Context(), key.ID)
		require.NoError(t, err)
		return w.get(t, c.ID).LastActiveAt, k.LastUsed
	}
	active, used := stored()
	require.Equal(t, begun, active)
	require.Zero(t, used)

	over, cancel := context.WithCancel(t.Context())
	cancel()
	w.Keys.activity.save(over, saveIn)
	active, _ = stored()
	require.Equal(t, begun, active, "it could not be written")
	w.Keys.activity.keep(over) // the last time, when the server stops
	active, used = stored()
	require.Equal(t, w.clock.Now(), active)
	require.Equal(t, w.clock.Now(), used)
	require.Empty(t, w.Keys.activity.pending.Capsules)
	require.Empty(t, w.Keys.activity.pending.Keys)
}

func TestGuestOfADeadCapsule(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := w.create(t)
	w.host.crash(c.ID) // nobody has told the store yet
	_, err := w.Capsules.Guest(t.Context(), w.me, c.ID)
	requireCode(t, nestbox.CodeInvalidState, err)
	w.host.lose(c.ID)
	_, err = w.Capsules.Guest(t.Context(), w.me, c.ID)
	requireCode(t, nestbox.CodeInvalidState, err)
	w.host.setDown(true)
	_, err = w.Capsules.Guest(t.Context(), w.me, c.ID)
	requireCode(t, nestbox.CodeUnavailable, err)
}

// TestNames: a name is one live capsule's of its team, and stands for its id in all that
// takes one.
func TestNames(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		create := func(by Caller, name string) (nestbox.Capsule, error) {
			return w.Capsules.Create(ctx, by, nestbox.CapsuleSpec{Name: name, Env: map[string]string{"B": "secret", "A": ""}})
		}
		named := func(t *testing.T) nestbox.Capsule {
			c, err := w.Capsules.Get(ctx, w.me, "web")
			require.NoError(t, err)
			return c
		}
		first, err := create(w.me, "web")
		require.NoError(t, err)
		require.Equal(t, []string{"A", "B"}, first.EnvNames)
		_, err = create(w.me, "web")
		requireCode(t, nestbox.CodeConflict, err)
		require.EqualError(t, err, "the name web is that of capsule "+first.ID)
		require.Equal(t, []string{first.ID}, w.host.has(), "nothing was made")
		other := w.newTeam(t)
		theirs, err := create(other, "web")
		require.NoError(t, err, "another team")
		for _, bad := range []string{"Web", "-web", "web-", "we b", "cl-web", strings.Repeat("a", 64), "a/b", "ü"} {
			_, err := create(w.me, bad)
			requireCode(t, nestbox.CodeInvalid, err)
		}

		require.Equal(t, first.ID, named(t).ID)
		back, err := w.Capsules.Get(ctx, other, "web")
		require.NoError(t, err)
		require.Equal(t, theirs.ID, back.ID)
		_, err = w.Capsules.Get(ctx, w.me, "nobody")
		requireCode(t, nestbox.CodeNotFound, err)
		require.NoError(t, w.Capsules.Ping(ctx, w.me, "web"))
		signed, err := w.Ports.Sign(ctx, w.me, "web", openPort, 0)
		require.NoError(t, err)
		require.Equal(t, first.ID, signed.Capsule)
		_, err = w.Ports.Authorize(ctx, first.ID, openPort, PortCredential{Tokens: []string{signed.Token}})
		require.NoError(t, err)
		require.NoError(t, w.Ports.Set(ctx, w.me, "web", openPort, nestbox.PortSettings{Public: true}))
		require.True(t, w.get(t, first.ID).Ports[openPort].Public)
		_, err = w.Capsules.SetNetwork(ctx, w.me, "web", nestbox.NetworkPolicy{Internet: true})
		require.NoError(t, err)
		require.True(t, w.get(t, first.ID).NetworkPolicy().Internet)
		_, err = w.Capsules.Network(ctx, w.me, "web")
		require.NoError(t, err)

		require.NoError(t, w.Capsules.Destroy(ctx, w.me, "web"))
		require.Equal(t, nestbox.StateStopped, named(t).State, "the newest of that name")
		w.clock.advance(time.Second)
		second, err := create(w.me, "web")
		require.NoError(t, err, "the name is free again")
		require.Equal(t, second.ID, named(t).ID)
		require.Contains(t, w.host.has(), theirs.ID, "other teams' are left alone")
	})
}

// TestListByMetadata: a list of those that have some metadata goes on through pages on
// which none has.
func TestListByMetadata(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		var want []string
		for i := range 12 {
			spec := nestbox.CapsuleSpec{Metadata: map[string]string{"env": "test", "n": strconv.Itoa(i)}}
			if i%4 == 0 {
				spec.Metadata["env"] = "prod"
			}
			c, err := w.Capsules.Create(t.Context(), w.me, spec)
			require.NoError(t, err)
			if i%4 == 0 {
				want = append([]string{c.ID}, want...)
			}
			w.clock.advance(time.Second)
		}
		list := func(limit int, metadata map[string]string) (got []string) {
			req := ListCapsules{Limit: limit, Metadata: metadata}
			for {
				page, next, err := w.Capsules.List(t.Context(), w.me, req)
				require.NoError(t, err)
				require.LessOrEqual(t, len(page), limit)
				for _, c := range page {
					got = append(got, c.ID)
				}
				if next == "" {
					return got
				}
				req.Cursor = next
			}
		}
		for limit := range 5 {
			require.Equal(t, want, list(limit+1, map[string]string{"env": "prod"}), limit+1)
		}
		require.Equal(t, want[:1], list(1, map[string]string{"env": "prod", "n": "8"}))
		require.Empty(t, list(1, map[string]string{"env": "prod", "n": "7"}))
		require.Empty(t, list(1, map[string]string{"none": ""}))
		require.Len(t, list(5, nil), 12)
	})
}

// TestCreateOnce: of all that ask for a capsule with one key one makes it, also when they
// ask at the same time, after a restart, and when it has ended.
func TestCreateOnce(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		spec := nestbox.CapsuleSpec{Metadata: map[string]string{"a": "b"}, Env: map[string]string{"TOKEN": "one"}}
		var all errgroup.Group
		ids, made := make([]string, 8), make([]bool, 8)
		for i := range ids {
			all.Go(func() error {
				c, again, err := w.Capsules.CreateOnce(ctx, w.me, "key", spec)
				ids[i], made[i] = c.ID, !again
				return err
			})
		}
		require.NoError(t, all.Wait())
		require.Len(t, slices.Compact(slices.Sorted(slices.Values(ids))), 1)
		require.Len(t, slices.DeleteFunc(made, func(made bool) bool { return !made }), 1)
		require.Equal(t, []string{ids[0]}, w.host.has())
		w.restart()
		c, again, err := w.Capsules.CreateOnce(ctx, w.me, "key", spec)
		require.NoError(t, err)
		require.True(t, again)
		require.Equal(t, ids[0], c.ID)

		other := spec
		other.Env = map[string]string{"TOKEN": "two"}
		_, _, err = w.Capsules.CreateOnce(ctx, w.me, "key", other)
		requireCode(t, nestbox.CodeConflict, err)
		_, again, err = w.Capsules.CreateOnce(ctx, w.newTeam(t), "key", other)
		require.NoError(t, err, "another team")
		require.False(t, again)
		_, _, err = w.Capsules.CreateOnce(ctx, w.me, "\n", spec)
		requireCode(t, nestbox.CodeInvalid, err)

		require.NoError(t, w.Capsules.Destroy(ctx, w.me, c.ID))
		c, again, err = w.Capsules.CreateOnce(ctx, w.me, "key", spec)
		require.NoError(t, err)
		require.True(t, again)
		require.Equal(t, nestbox.StateStopped, c.State, "it is not made again")

		w.host.failing("Create", nestbox.Errorf(nestbox.CodeExhausted, "no room"))
		_, _, err = w.Capsules.CreateOnce(ctx, w.me, "failing", spec)
		requireCode(t, nestbox.CodeExhausted, err)
		w.host.failing("Create", nil)
		c, again, err = w.Capsules.CreateOnce(ctx, w.me, "failing", spec)
		require.NoError(t, err, "what failed leaves its key free")
		require.False(t, again)
		require.Equal(t, nestbox.StateRunning, c.State)
	})
}
