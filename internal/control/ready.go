package control

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/nestbox/nestbox"
)

// Ready tells whether what every request needs answers.
type Ready struct {
	cfg Config

	mu   sync.Mutex // held while it is looked
	last error
	at   time.Time
}

const (
	readyIn  = 2 * time.Second // what does not answer by then is not ready
	readyFor = time.Second     // how long an answer is given again
)

// Look asks the store and the host, unless that was done in the last second: fresh
// tells. CodeUnavailable: one of them, which the message names, does not answer. It
// takes a few seconds at most.
func (r *Ready) Look(ctx context.Context) (fresh bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.at.IsZero() && r.cfg.Now().Sub(r.at) < readyFor {
		return false, r.last
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readyIn) // others get the answer too
	defer cancel()
	var store, host error
	var asked sync.WaitGroup
	asked.Go(func() { store = r.cfg.Store.Ping(ctx) })
	asked.Go(func() { _, host = r.cfg.Host.Info(ctx) })
	asked.Wait()
	r.at, r.last = r.cfg.Now(), nil
	switch {
	case store != nil && host != nil:
		r.last = notReady("neither the database nor the host answers", errors.Join(store, host))
	case store != nil:
		r.last = notReady("the database does not answer", store)
	case host != nil:
		r.last = notReady("the host does not answer", host)
	}
	return true, r.last
}

func notReady(what string, cause error) error {
	return &nestbox.Error{Code: nestbox.CodeUnavailable, Message: what, Err: cause}
}
