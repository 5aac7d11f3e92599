package control

import (
	"context"
	"log/slog"
	"maps"
	"sync"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/store"
)

// How activity is kept.
const (
	activeStep   = 5 * time.Second // how exactly Capsule.LastActiveAt is kept, and how much of it a kill -9 loses
	lastUsedStep = time.Minute     // how exactly APIKey.LastUsed is kept
	saveIn       = 10 * time.Second
	saveLastIn   = 2 * time.Second // when the server stops
)

// activity is what has been in use lately and is not in the store yet. No
// request waits for a disk only to note that it came: it is noted here, and
// written for all of them together.
type activity struct {
	store *store.Store
	log   *slog.Logger

	mu      sync.Mutex
	pending store.Activity
	using   map[string]int // requests and streams in progress, by capsule; of those with a time limit only
	failing bool
}

func newActivity(cfg Config) *activity {
	return &activity{
		store: cfg.Store, log: cfg.Log,
		pending: store.Activity{Capsules: map[string]time.Time{}, Keys: map[string]time.Time{}},
		using:   map[string]int{},
	}
}

// capsule notes that a capsule is in use.
func (a *activity) capsule(c nestbox.Capsule, now time.Time) {
	if now.Sub(c.LastActiveAt) >= activeStep {
		a.mu.Lock()
		defer a.mu.Unlock()
		later(a.pending.Capsules, c.ID, now)
	}
}

// during notes that a capsule is in use until ctx, that of a request, ends.
func (a *activity) during(ctx context.Context, c nestbox.Capsule, now func() time.Time) {
	a.capsule(c, now())
	if c.TimeoutSec == 0 || ctx.Done() == nil {
		return
	}
	a.mu.Lock()
	a.using[c.ID]++
	a.mu.Unlock()
	context.AfterFunc(ctx, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.using[c.ID]--; a.using[c.ID] == 0 {
			delete(a.using, c.ID)
		}
		later(a.pending.Capsules, c.ID, now())
	})
}

// idleFor returns for how long nobody has used a capsule.
func (a *activity) idleFor(c nestbox.Capsule, now time.Time) time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.using[c.ID] > 0 {
		return 0
	}
	last := c.LastActiveAt
	if at := a.pending.Capsules[c.ID]; at.After(last) {
		last = at
	}
	return now.Sub(last)
}

// key notes that an API key is in use.
func (a *activity) key(k nestbox.APIKey, now time.Time) {
	if now.Sub(k.LastUsed) >= lastUsedStep {
		a.mu.Lock()
		defer a.mu.Unlock()
		later(a.pending.Keys, k.ID, now)
	}
}

func later(m map[string]time.Time, id string, at time.Time) {
	if at.After(m[id]) {
		m[id] = at
	}
}

// seen adds what is known here to capsules that were read from the store.
func (a *activity) seen(capsules ...nestbox.Capsule) []nestbox.Capsule {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i, c := range capsules {
		if at := a.pending.Capsules[c.ID]; at.After(c.LastActiveAt) {
			capsules[i].LastActiveAt = at.UTC().Truncate(time.Microsecond)
		}
	}
	return capsules
}

// keep writes what is noted every activeStep, and at last when ctx ends.
func (a *activity) keep(ctx context.Context) {
	tick := time.NewTicker(activeStep)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			a.save(ctx, saveIn)
		case <-ctx.Done():
			a.save(context.WithoutCancel(ctx), saveLastIn)
			return
		}
	}
}

// save writes what is noted. What cannot be written is kept for the next time.
func (a *activity) save(ctx context.Context, most time.Duration) {
	a.mu.Lock()
	saving := store.Activity{Capsules: maps.Clone(a.pending.Capsules), Keys: maps.Clone(a.pending.Keys)}
	a.mu.Unlock()
	if len(saving.Capsules)+len(saving.Keys) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	err := a.store.SaveActivity(ctx, saving)

	a.mu.Lock()
	defer a.mu.Unlock()
	if err == nil {
		written(a.pending.Capsules, saving.Capsules)
		written(a.pending.Keys, saving.Keys)
	} else if !a.failing {
		a.log.Warn("noting what is in use; will try again", keyError, err)
	}
	a.failing = err != nil
}

// written drops what is in the store now from what is pending.
func written(pending, saved map[string]time.Time) {
	for id, at := range saved {
		if pending[id].Equal(at) {
			delete(pending, id)
		}
	}
}
