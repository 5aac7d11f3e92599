package control

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/nestbox/nestbox"
)

// Whatever happens, in the end nothing is left half done, nothing is leaked,
// what was destroyed is gone, and what nobody touched still runs.
func TestAnySequenceEndsWell(t *testing.T) {
	t.Parallel()
	base := newWorld(t)
	rapid.Check(t, func(t *rapid.T) {
		w := &world{store: base.store, clock: newClock()}
		w.host = newFakeHost(w.clock.Now)
		w.restart()
		w.me = w.newTeam(t)
		h := history{world: w, fate: map[string]fate{}}
		t.Repeat(map[string]func(*rapid.T){
			"create":           h.create,
			"destroy":          h.destroy,
			"crash":            h.crash,
			"lose":             h.lose,
			"reconcile":        h.reconcile,
			"restart control":  func(*rapid.T) { w.restart() },
			"restart host":     func(*rapid.T) { w.host.restart() },
			"host goes":        func(*rapid.T) { w.host.setDown(true) },
			"host comes":       func(*rapid.T) { w.host.setDown(false) },
			"create breaks":    func(*rapid.T) { w.host.failing("Create", nestbox.Errorf(nestbox.CodeGuest, "broken")) },
			"create is mended": func(*rapid.T) { w.host.failing("Create", nil) },
			"time passes": func(t *rapid.T) {
				w.clock.advance(time.Duration(rapid.IntRange(1, 150).Draw(t, "seconds")) * time.Second)
			},
		})
		h.requireHappyEnd(t)
	})
}

// fate is what must become of a capsule.
type fate string

const (
	lives   fate = "lives"   // Create said that it runs, and nothing happened to it
	doomed  fate = "doomed"  // its capsule died
	unclear fate = "unclear" // a process died while it worked on it
	gone    fate = "gone"    // Destroy said that it is done, or took it upon itself
)

type history struct {
	*world
	fate map[string]fate
}

// deadline is a step at which the process dies; most of the time it does not.
func deadline(t *rapid.T) int {
	return rapid.OneOf(rapid.Just(1000), rapid.IntRange(0, 8)).Draw(t, "dies at step")
}

func (h *history) create(t *rapid.T) {
	h.die(deadline(t), func() {
		c, err := h.Capsules.Create(context.Background(), h.me, nestbox.CapsuleSpec{})
		if err == nil {
			h.fate[c.ID] = lives
		}
	})
}

func (h *history) destroy(t *rapid.T) {
	id := h.draw(t)
	if h.fate[id] != gone {
		h.fate[id] = unclear
	}
	h.die(deadline(t), func() {
		err := h.Capsules.Destroy(context.Background(), h.me, id)
		if err != nil {
			require.Equal(t, nestbox.CodeUnavailable, nestbox.CodeOf(err), "%v", err)
		}
		h.fate[id] = gone
	})
}

func (h *history) crash(t *rapid.T) { h.doom(t, h.host.crash) }
func (h *history) lose(t *rapid.T)  { h.doom(t, h.host.lose) }

func (h *history) doom(t *rapid.T, how func(id string)) {
	id := h.draw(t)
	how(id)
	if h.fate[id] == lives {
		h.fate[id] = doomed
	}
}

func (h *history) reconcile(t *rapid.T) {
	h.die(deadline(t), func() {
		if err := h.Reconciler.pass(context.Background()); err != nil {
			require.Equal(t, nestbox.CodeUnavailable, nestbox.CodeOf(err), "%v", err)
		}
	})
}

// draw returns one of the capsules there are, in any state.
func (h *history) draw(t *rapid.T) string {
	all, _, err := h.Capsules.List(context.Background(), h.me, ListCapsules{All: true})
	require.NoError(t, err)
	if len(all) == 0 {
		t.Skip("no capsule yet")
	}
	return all[rapid.IntRange(0, len(all)-1).Draw(t, "capsule")].ID
}

func (h *history) requireHappyEnd(t *rapid.T) {
	h.host.setDown(false)
	h.host.failing("Create", nil)
	h.clock.advance(interrupted)
	h.pass(t) // marks and finishes
	h.pass(t) // frees what the first found out to be nobody's
	h.requireAgreement(t)
	for id, fate := range h.fate {
		state := h.get(t, id).State
		switch fate {
		case lives:
			require.Equal(t, nestbox.StateRunning, state)
		case doomed:
			require.Equal(t, nestbox.StateError, state)
		case gone:
			require.Equal(t, nestbox.StateStopped, state)
		case unclear:
			require.NotEqual(t, nestbox.StateStarting, state)
		}
	}
}
