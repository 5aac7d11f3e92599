package envd

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// request is a start that its caller has given a key, so that asking again does not start
// another process.
type request struct {
	sum  [sha256.Size]byte // of what was asked
	done chan struct{}     // closed when it is known what came of it
	p    *process          // nil until then, and if nothing was started: then the key is free again
}

// startOnce is Start of a spec with a RequestKey: of those that ask with the same key, at
// the same time or later, one starts the process and all get it, for as long as it is
// remembered.
func (t *table) startOnce(ctx context.Context, spec nestbox.ProcessSpec, attach *guest.Attach) (nestbox.Process, guest.OutputReader, error) {
	text, err := json.Marshal(spec)
	if err != nil {
		return nestbox.Process{}, nil, nestbox.Errorf(nestbox.CodeInternal, "%w", err)
	}
	mine := &request{sum: sha256.Sum256(text), done: make(chan struct{})}
	for {
		t.mu.Lock()
		r := t.requests[spec.RequestKey]
		if r == nil {
			t.requests[spec.RequestKey] = mine
		}
		t.mu.Unlock()
		if r == nil {
			return t.startFirst(ctx, mine, spec, attach)
		}
		if r.sum != mine.sum {
			return nestbox.Process{}, nil, nestbox.Errorf(nestbox.CodeConflict, "the idempotency key was used for another command")
		}
		select {
		case <-r.done:
		case <-ctx.Done():
			return nestbox.Process{}, nil, nestbox.Errorf(nestbox.CodeTimeout, "the start with this idempotency key is not done: %w", ctx.Err())
		}
		if r.p != nil {
			return existing(r.p, attach)
		}
	}
}

// startFirst starts the process of a request.
func (t *table) startFirst(ctx context.Context, r *request, spec nestbox.ProcessSpec, attach *guest.Attach) (nestbox.Process, guest.OutputReader, error) {
	p, record, reader, err := t.startTagged(ctx, spec, attach)
	t.mu.Lock()
	if err != nil {
		delete(t.requests, spec.RequestKey)
	} else {
		r.p = p
		p.requestKeys = append(p.requestKeys, spec.RequestKey)
	}
	t.mu.Unlock()
	close(r.done)
	return record, reader, err
}

// existing is the answer of a start that finds the process there.
func existing(p *process, attach *guest.Attach) (nestbox.Process, guest.OutputReader, error) {
	if attach == nil {
		return p.record(), nil, nil
	}
	reader, err := p.log.Attach(*attach)
	if err != nil {
		return nestbox.Process{}, nil, err
	}
	return p.record(), reader, nil
}

// replaceIn bounds how long the process that has a tag may take to end.
const replaceIn = time.Minute

// takeTag reserves a tag as reserveTag does, and where a live process has it does what the
// spec says: it returns that process, or ends it first.
func (t *table) takeTag(ctx context.Context, spec nestbox.ProcessSpec) (tag string, there *process, err error) {
	if spec.OnConflict == nestbox.ConflictReplace {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, replaceIn)
		defer cancel()
	}
	for {
		tag, err := t.reserveTag(spec.Tag)
		if err == nil || spec.OnConflict == "" || nestbox.CodeOf(err) != nestbox.CodeConflict {
			return tag, nil, err
		}
		t.mu.Lock()
		p, starting := t.byTag[spec.Tag], t.starting[spec.Tag]
		t.mu.Unlock()
		switch {
		case starting != nil: // by another, whose process is then there
			select {
			case <-starting:
			case <-ctx.Done():
				return "", nil, nestbox.Errorf(nestbox.CodeTimeout, "another process is being started with the tag %s: %w", spec.Tag, ctx.Err())
			}
		case p == nil || p.ended():
		case spec.OnConflict == nestbox.ConflictReturn:
			return "", p, nil
		default:
			if _, err := t.Kill(ctx, nestbox.Selector{ID: p.id}, guest.Kill{Signal: unix.SIGTERM}); err != nil {
				return "", nil, err
			}
			select {
			case <-p.done: // which follows at once
			case <-ctx.Done():
				return "", nil, nestbox.Errorf(nestbox.CodeTimeout, "the process with the tag %s has not ended: %w", spec.Tag, ctx.Err())
			}
		}
	}
}
