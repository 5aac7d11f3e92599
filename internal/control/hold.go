package control

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/nestbox/nestbox"
)

// checkKeysEvery is how long what a key lets through may go on after the key was
// removed by another process.
const checkKeysEvery = 500 * time.Millisecond

// errKeyRemoved is why what a key let through has ended.
var errKeyRemoved = nestbox.Errorf(nestbox.CodeUnauthenticated, "the API key was removed")

// holds are the requests and streams in progress, by the name of what let them in: the
// id of a key, or a public port.
type holds struct {
	mu     sync.Mutex
	byName map[string]map[*hold]struct{}
}

type hold struct{ cancel context.CancelCauseFunc }

// Hold returns a context that ends, as CodeUnauthenticated, within a second of
// the removal of the caller's key. Watch must run. Release it after use.
func (k *Keys) Hold(ctx context.Context, by Caller) (_ context.Context, release func()) {
	return k.holds.hold(ctx, by.KeyID)
}

// hold returns a context that ends when end is called with its name.
func (h *holds) hold(ctx context.Context, name string) (_ context.Context, release func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	held := &hold{cancel}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.byName == nil {
		h.byName = map[string]map[*hold]struct{}{}
	}
	if h.byName[name] == nil {
		h.byName[name] = map[*hold]struct{}{}
	}
	h.byName[name][held] = struct{}{}
	return ctx, func() {
		cancel(nil)
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.byName[name], held)
		if len(h.byName[name]) == 0 {
			delete(h.byName, name)
		}
	}
}

// end ends what was let through under a name.
func (h *holds) end(name string, why error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for held := range h.byName[name] {
		held.cancel(why)
	}
}

func (h *holds) names() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Collect(maps.Keys(h.byName))
}

// Watch ends what removed keys let through, until ctx ends. The store is asked
// only while something is in progress. It returns nil.
func (k *Keys) Watch(ctx context.Context) error {
	tick := time.NewTicker(checkKeysEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		ids := k.holds.names()
		if len(ids) == 0 {
			continue
		}
		there, err := k.cfg.Store.KeysAmong(ctx, ids)
		if err != nil {
			if ctx.Err() == nil {
				k.cfg.Log.Warn("looking for removed API keys; will try again", keyError, err)
			}
			continue
		}
		for _, id := range ids {
			if !there[id] {
				k.holds.end(id, errKeyRemoved)
			}
		}
	}
}
