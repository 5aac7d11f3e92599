package control

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/hostagent"
	"github.com/nestbox/nestbox/internal/store"
)

func TestPassMarksWhatDied(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		well, dead, lost := w.create(t), w.create(t), w.create(t)
		w.host.crash(dead.ID)
		w.host.lose(lost.ID)
		w.pass(t)
		require.Equal(t, well, w.get(t, well.ID))
		require.Equal(t, nestbox.StateError, w.get(t, dead.ID).State)
		require.Equal(t, "segfault", w.get(t, dead.ID).Reason)
		require.Equal(t, nestbox.StateError, w.get(t, lost.ID).State)
		require.Equal(t, "lost by its host", w.get(t, lost.ID).Reason)
		require.Equal(t, []string{well.ID}, w.host.has(), "the dead one is freed")
		w.pass(t)
		require.Equal(t, well, w.get(t, well.ID))
		hosts, err := w.store.Hosts(t.Context())
		require.NoError(t, err)
		require.Equal(t, []nestbox.HostInfo{w.host.info.HostInfo}, hosts)
	})
}

// TestAside: a capsule that its host has set aside is missing, says why, is left
// as it is, and can be destroyed.
func TestAside(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		aside, well := w.create(t), w.create(t)
		w.host.put(hostagent.Status{ID: aside.ID, State: hostagent.StateAside, Reason: "its record cannot be read"})
		for range 2 {
			w.pass(t)
			require.Equal(t, nestbox.StateMissing, w.get(t, aside.ID).State)
			require.Equal(t, "its record cannot be read", w.get(t, aside.ID).Reason)
			require.ElementsMatch(t, []string{aside.ID, well.ID}, w.host.has())
		}
		require.Equal(t, well, w.get(t, well.ID))
		require.NoError(t, w.Capsules.Destroy(t.Context(), w.me, aside.ID))
		require.Equal(t, []string{well.ID}, w.host.has())

		// Nor is one freed that no row knows of.
		w.host.put(hostagent.Status{ID: nestbox.NewID(nestbox.PrefixCapsule), State: hostagent.StateAside})
		w.clock.advance(interrupted)
		w.pass(t)
		require.Len(t, w.host.has(), 2)
	})
}

// TestSlowCapsules: more capsules than are looked at at once cannot be removed
// for a long time, and the others do not wait for them.
func TestSlowCapsules(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.Reconciler.slow = 10 * time.Millisecond
	release := make(chan struct{})
	slow := map[string]bool{}
	for range 2 * actAtOnce {
		c := w.create(t)
		slow[c.ID] = true
		w.host.crash(c.ID)
	}
	w.host.step = func(s step) {
		if s.method == "Destroy" && s.when == "before" && slow[s.id] {
			<-release
		}
	}
	for range 3 {
		w.pass(t) // some of them are at work from now on
	}
	dead := w.create(t)
	w.host.crash(dead.ID)
	require.Eventually(t, func() bool {
		w.pass(t)
		return w.get(t, dead.ID).State == nestbox.StateError
	}, time.Minute, time.Millisecond)
	close(release)
	require.Eventually(t, func() bool {
		w.pass(t)
		return len(w.host.has()) == 0
	}, time.Minute, time.Millisecond)
	w.Reconciler.working.Wait()
}

// A capsule that comes between the question to the host and the look into the
// store is not lost.
func TestPassDuringCreate(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var c nestbox.Capsule
	var once sync.Once
	w.host.step = func(s step) {
		if s.method == "List" && s.when == "after" {
			once.Do(func() { c = w.create(t) })
		}
	}
	w.pass(t)
	require.Equal(t, nestbox.StateRunning, w.get(t, c.ID).State)

	// Nor is one that the host has not got yet.
	w.host.step = func(s step) {
		if s.method == "Create" && s.when == "before" {
			w.pass(t)
			require.Equal(t, nestbox.StateStarting, w.get(t, s.id).State)
		}
	}
	w.create(t)
	w.host.step = func(s step) {
		if s.method == "Create" && s.when == "after" {
			w.pass(t)
			require.Equal(t, nestbox.StateStarting, w.get(t, s.id).State)
			w.clock.advance(interrupted) // a very slow one: the Reconciler is first
			w.pass(t)
			require.Equal(t, nestbox.StateRunning, w.get(t, s.id).State)
		}
	}
	w.create(t)
}

// What nobody has a record of is freed, but not in a hurry.
func TestPassSweeps(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	id := nestbox.NewID(nestbox.PrefixCapsule)
	w.host.put(hostagent.Status{ID: id, State: hostagent.StateRunning, CreatedAt: w.clock.Now()})
	w.pass(t)
	require.Equal(t, []string{id}, w.host.has())
	w.clock.advance(interrupted)
	w.pass(t)
	require.Empty(t, w.host.has())

	// What is recorded as ended goes at once, and what is another host's never.
	c := w.create(t)
	require.NoError(t, w.Capsules.Destroy(t.Context(), w.me, c.ID))
	w.host.put(hostagent.Status{ID: c.ID, State: hostagent.StateRunning, CreatedAt: w.clock.Now()})
	w.pass(t)
	require.Empty(t, w.host.has())

	c = w.create(t)
	w.host.change(func() { w.host.info.ID = nestbox.NewID(nestbox.PrefixHost) })
	w.clock.advance(time.Hour)
	w.pass(t)
	require.Equal(t, []string{c.ID}, w.host.has())
	require.Equal(t, c, w.get(t, c.ID))
}

func TestPassPrunes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	old, live := w.create(t), w.create(t)
	require.NoError(t, w.Capsules.Destroy(t.Context(), w.me, old.ID))
	w.clock.advance(7 * 24 * time.Hour)
	w.pass(t)
	w.get(t, old.ID)
	w.clock.advance(time.Second)
	w.pass(t)
	_, err := w.Capsules.Get(t.Context(), w.me, old.ID)
	requireCode(t, nestbox.CodeNotFound, err)
	w.get(t, live.ID)
}

// One capsule that cannot be freed does not keep the others from it.
func TestPassGoesOnAfterAFailure(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	dead, lost := w.create(t), w.create(t)
	w.host.crash(dead.ID)
	w.host.lose(lost.ID)
	w.host.failing("Destroy", nestbox.Errorf(nestbox.CodeInternal, "busy"))
	w.pass(t)
	require.Equal(t, nestbox.StateError, w.get(t, dead.ID).State)
	require.Equal(t, nestbox.StateError, w.get(t, lost.ID).State)
	require.Equal(t, []string{dead.ID}, w.host.has())
	w.host.failing("Destroy", nil)
	w.pass(t)
	require.Empty(t, w.host.has())
}

func TestSilentHost(t *testing.T) {
	t.Parallel()
	for _, restarted := range []bool{false, true} {
		w := newWorld(t)
		c := w.create(t)
		w.pass(t)
		if restarted { // never saw the host
			w.restart()
		}
		w.host.setDown(true)
		fail := func() { requireCode(t, nestbox.CodeUnavailable, w.Reconciler.pass(t.Context())) }
		fail()
		w.clock.advance(lostAfter - time.Second)
		fail()
		require.Equal(t, nestbox.StateRunning, w.get(t, c.ID).State)
		w.clock.advance(time.Second)
		fail()
		require.Equal(t, nestbox.StateMissing, w.get(t, c.ID).State)
		require.Equal(t, "its host does not answer", w.get(t, c.ID).Reason)
		requireCode(t, nestbox.CodeInvalidState, w.Capsules.Ping(t.Context(), w.me, c.ID))
		fail()

		w.host.setDown(false)
		w.pass(t)
		require.Equal(t, nestbox.StateRunning, w.get(t, c.ID).State)
		require.Empty(t, w.get(t, c.ID).Reason)
		w.host.setDown(true)
		fail()
		require.Equal(t, nestbox.StateRunning, w.get(t, c.ID).State, "the silence is counted anew")
	}
}

// die runs an operation as a process that is killed at its n-th step, and
// reports whether it lived that long.
func (w *world) die(n int, operation func()) (died bool) {
	var steps atomic.Int32
	w.host.step = func(step) {
		if int(steps.Add(1)) > n {
			runtime.Goexit()
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		operation()
	}()
	<-done
	w.host.step = func(step) {}
	return int(steps.Load()) > n
}

// Wherever a process dies, what comes after it finds its way to a state that
// is legal and in which store and host agree.
func TestKilledAtEveryStep(t *testing.T) {
	t.Parallel()
	broken := nestbox.Errorf(nestbox.CodeInternal, "broken")
	for name, c := range map[string]struct {
		prepare func(w *world)
		operate func(t *testing.T, w *world, id string)
		end     map[nestbox.CapsuleState]bool
	}{
		"create": {
			operate: func(t *testing.T, w *world, _ string) {
				_, _ = w.Capsules.Create(t.Context(), w.me, nestbox.CapsuleSpec{})
			},
			end: map[nestbox.CapsuleState]bool{nestbox.StateRunning: true, nestbox.StateError: true},
		},
		"failing create": {
			prepare: func(w *world) { w.host.failing("Create", broken) },
			operate: func(t *testing.T, w *world, _ string) {
				_, _ = w.Capsules.Create(t.Context(), w.me, nestbox.CapsuleSpec{})
			},
			end: map[nestbox.CapsuleState]bool{nestbox.StateRunning: true, nestbox.StateError: true},
		},
		"destroy": {
			operate: func(t *testing.T, w *world, id string) { _ = w.Capsules.Destroy(t.Context(), w.me, id) },
			end:     map[nestbox.CapsuleState]bool{nestbox.StateRunning: true, nestbox.StateStopped: true},
		},
		"reconciling a death": {
			prepare: func(w *world) { w.host.crash(w.host.has()[0]) },
			operate: func(t *testing.T, w *world, id string) { _ = w.Reconciler.pass(t.Context()) },
			end:     map[nestbox.CapsuleState]bool{nestbox.StateError: true},
		},
	} {
		for _, hostToo := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, host too: %t", name, hostToo), func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				for n, died := 0, true; died; n++ {
					id := w.create(t).ID
					if c.prepare != nil {
						c.prepare(w)
					}
					died = w.die(n, func() { c.operate(t, w, id) })
					w.host.failing("Create", nil)
					w.clock.advance(time.Second)
					w.restart()
					if hostToo {
						w.host.restart()
					} else {
						w.clock.advance(interrupted)
					}
					w.pass(t)
					w.requireAgreement(t)
					all, _, err := w.Capsules.List(t.Context(), w.me, ListCapsules{All: true})
					require.NoError(t, err)
					for _, row := range all {
						if row.ID != id || name == "destroy" || name == "reconciling a death" {
							require.True(t, c.end[row.State], "killed at step %d: %s (%s)", n, row.State, row.Reason)
						}
						require.NoError(t, w.Capsules.Destroy(t.Context(), w.me, row.ID))
					}
					require.Empty(t, w.host.has())
					_, err = w.store.PruneCapsules(t.Context(), w.clock.Now().Add(time.Hour), 100)
					require.NoError(t, err)
				}
			})
		}
	}
}

// requireAgreement is that nothing is under way, and that the host has exactly
// what runs.
func (w *world) requireAgreement(t require.TestingT) {
	all, _, err := w.Capsules.List(context.Background(), w.me, ListCapsules{All: true})
	require.NoError(t, err)
	running := map[string]bool{}
	for _, c := range all {
		require.Contains(t, []nestbox.CapsuleState{nestbox.StateRunning, nestbox.StateStopped, nestbox.StateError}, c.State)
		if c.State == nestbox.StateRunning {
			running[c.ID] = true
		}
	}
	onHost := w.host.has()
	require.Len(t, onHost, len(running))
	for _, id := range onHost {
		require.True(t, running[id])
	}
}

// inBubble runs a test with a Reconciler that runs, in a time that passes as
// soon as everybody waits.
func inBubble(t *testing.T, test func(t *testing.T, w *world)) {
	path := filepath.Join(t.TempDir(), "nestbox.db")
	synctest.Test(t, func(t *testing.T) {
		s, err := store.Open(t.Context(), "sqlite:"+path, slog.New(slog.DiscardHandler))
		require.NoError(t, err)
		w := &world{store: s, host: newFakeHost(time.Now)}
		w.Control = New(Config{Store: s, Host: w.host, Log: slog.New(slog.DiscardHandler)})
		w.me = w.newTeam(t)
		test(t, w)
		require.NoError(t, s.Close())
	})
}

// run starts the Reconciler and returns what stops it.
func (w *world) run(t *testing.T) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- w.Reconciler.Run(ctx) }()
	return func() {
		cancel()
		require.NoError(t, <-ended)
	}
}

func TestRunMarksDeathsWithinASecond(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, w *world) {
		before := w.create(t)
		w.host.crash(before.ID)
		stop := w.run(t)
		c := w.create(t)
		time.Sleep(passEvery / 2) // far from a pass
		require.Equal(t, nestbox.StateError, w.get(t, before.ID).State)
		w.host.crash(c.ID)
		time.Sleep(time.Second)
		require.Equal(t, nestbox.StateError, w.get(t, c.ID).State)
		require.Equal(t, "segfault", w.get(t, c.ID).Reason)
		require.Empty(t, w.host.has(), "and freed")
		stop()
	})
}

func TestRunOutlastsItsHost(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, w *world) {
		c := w.create(t)
		stop := w.run(t)
		time.Sleep(time.Second)
		w.host.setDown(true)
		time.Sleep(passEvery)
		require.Equal(t, nestbox.StateRunning, w.get(t, c.ID).State)
		time.Sleep(time.Minute)
		require.Equal(t, nestbox.StateMissing, w.get(t, c.ID).State)
		w.host.mu.Lock()
		require.Less(t, w.host.watches, 30, "with pauses in between")
		require.Greater(t, w.host.watches, 10)
		w.host.mu.Unlock()
		w.host.setDown(false)
		time.Sleep(passEvery)
		require.Equal(t, nestbox.StateRunning, w.get(t, c.ID).State)
		w.host.crash(c.ID)
		time.Sleep(time.Second)
		require.Equal(t, nestbox.StateError, w.get(t, c.ID).State, "deaths are watched again")
		stop()
	})
}

// TestNobodyUsesIt: a capsule with a time limit is ended when nobody has used it for so
// long, and not while a request goes on, or before anybody could after a restart.
func TestNobodyUsesIt(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		const limit = time.Minute
		create := func() nestbox.Capsule {
			c, err := w.Capsules.Create(t.Context(), w.me, nestbox.CapsuleSpec{TimeoutSec: int(limit / time.Second)})
			require.NoError(t, err)
			return c
		}
		forever := w.create(t)
		lives := func(c nestbox.Capsule, want bool, why string) {
			t.Helper()
			w.pass(t)
			now := w.get(t, c.ID)
			require.Equal(t, want, now.State == nestbox.StateRunning, why)
			if !want {
				require.Equal(t, nestbox.StateStopped, now.State)
				require.Equal(t, "nobody used it for 1m0s", now.Reason)
				_, err := w.Capsules.Guest(t.Context(), w.me, c.ID)
				require.EqualError(t, err, "capsule is stopped: nobody used it for 1m0s")
			}
		}
		c := create()
		w.clock.advance(limit - time.Second)
		lives(c, true, "a second is left")
		require.NoError(t, w.Capsules.Ping(context.WithoutCancel(t.Context()), w.me, c.ID))
		w.clock.advance(limit - time.Second)
		lives(c, true, "it was in use since")

		request, end := context.WithCancel(t.Context())
		_, err := w.Capsules.Guest(request, w.me, c.ID)
		require.NoError(t, err)
		w.clock.advance(time.Hour)
		lives(c, true, "a request goes on")
		end()
		require.Eventually(t, func() bool {
			return w.Reconciler.activity.idleFor(c, w.clock.Now()) == 0 && len(w.Reconciler.activity.users()) == 0
		}, time.Minute, time.Millisecond)
		w.clock.advance(limit - time.Second)
		lives(c, true, "it has ended since")
		w.clock.advance(time.Second)
		lives(c, false, "")

		c = create()
		w.clock.advance(time.Hour)
		w.restart()
		lives(c, true, "nobody could use it while no server ran")
		request, end = context.WithCancel(t.Context())
		token, err := w.Ports.Sign(t.Context(), w.me, c.ID, openPort, time.Hour)
		require.NoError(t, err)
		_, err = w.Ports.Authorize(request, c.ID, openPort, PortCredential{Tokens: []string{token.Token}})
		require.NoError(t, err)
		w.clock.advance(limit)
		lives(c, true, "a port is in use")
		end()
		require.Eventually(t, func() bool { return len(w.Reconciler.activity.users()) == 0 }, time.Minute, time.Millisecond)
		w.clock.advance(limit)
		lives(c, false, "")
		lives(forever, true, "it has no limit")
	})
}

// TestUseThatWasJustWritten: a pass that has read a capsule before its use went from memory
// into the store does not end it.
func TestUseThatWasJustWritten(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		ctx := context.WithoutCancel(t.Context())
		c, err := w.Capsules.Create(ctx, w.me, nestbox.CapsuleSpec{TimeoutSec: 60})
		require.NoError(t, err)
		w.clock.advance(50 * time.Second)
		require.NoError(t, w.Capsules.Ping(ctx, w.me, c.ID))
		w.clock.advance(20 * time.Second)
		read := w.get(t, c.ID) // 70 s old
		w.Reconciler.activity.save(ctx, time.Minute)
		info, onHost, err := w.Reconciler.ask(ctx)
		require.NoError(t, err)
		require.NoError(t, w.Reconciler.settle(ctx, info, read, onHost[c.ID], true))
		require.Equal(t, nestbox.StateRunning, w.get(t, c.ID).State)
	})
}

// users are the capsules that are in use now.
func (a *activity) users() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Collect(maps.Keys(a.using))
}
