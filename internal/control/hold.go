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

// holds are the requests and streams in progress, by the key that let them in.
type holds struct {
	mu    sync.Mutex
	byKey map[string]map[*hold]struct{}
}

type hold struct{ cancel context.CancelCauseFunc }

// Hold returns a context that ends, as CodeUnauthenticated, within a second of
// the removal of the caller's key. Watch must run. Release it after use.
func (k *Keys) Hold(ctx context.Context, by Caller) (_ context.Context, release func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	h := &hold{cancel}
	k.holds.mu.Lock()
	defer k.holds.mu.Unlock()
	if k.holds.byKey == nil {
		k.holds.byKey = map[string]map[*hold]struct{}{}
	}
	if k.holds.byKey[by.KeyID] == nil {
		k.holds.byKey[by.KeyID] = map[*hold]struct{}{}
	}
	k.holds.byKey[by.KeyID][h] = struct{}{}
	return ctx, func() {
		cancel(nil)
		k.holds.mu.Lock()
		defer k.holds.mu.Unlock()
		delete(k.holds.byKey[by.KeyID], h)
		if len(k.holds.byKey[by.KeyID]) == 0 {
			delete(k.holds.byKey, by.KeyID)
		}
	}
}

// end ends what a key let through.
func (h *holds) end(keyID string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for held := range h.byKey[keyID] {
		held.cancel(errKeyRemoved)
	}
}

func (h *holds) keys() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Collect(maps.Keys(h.byKey))
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
		ids := k.holds.keys()
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
				k.holds.end(id)
			}
		}
	}
}
