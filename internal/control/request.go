package control

import (
	"context"
	"encoding/base64"
	"strconv"
	"strings"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/store"
)

// ListCapsules says which capsules to list.
type ListCapsules struct {
	All      bool              // also those that are stopping, stopped or failed
	Metadata map[string]string // only those that have all of it
	Limit    int               // 1 to MaxListCapsules; 0 = MaxListCapsules
	Cursor   string            // "" = from the newest; else the next of the page before
}

// MaxListCapsules is how many capsules one page has at most.
const MaxListCapsules = 1000

// What a list shows. A capsule that is stopping is shown as stopped, so it is
// where the stopped ones are.
var (
	presentStates = []nestbox.CapsuleState{nestbox.StateStarting, nestbox.StateRunning, nestbox.StateMissing}
	allStates     = []nestbox.CapsuleState{
		nestbox.StateStarting, nestbox.StateRunning, nestbox.StateMissing,
		nestbox.StateStopping, nestbox.StateStopped, nestbox.StateError,
	}
)

// mostLookedAt bounds how many capsules are read for one page of those that have some
// metadata.
const mostLookedAt = 5000

// matching returns a page of those capsules that have all of metadata.
func (c *Capsules) matching(ctx context.Context, by Caller, page store.Page, metadata map[string]string) (matching []nestbox.Capsule, next string, err error) {
	want := page.Limit
	for looked := 0; ; {
		capsules, more, err := c.cfg.Store.CapsulesOfTeam(ctx, by.TeamID, page)
		if err != nil {
			return nil, "", err
		}
		for i, capsule := range capsules {
			if !has(capsule.Metadata, metadata) {
				continue
			}
			matching = append(matching, capsule)
			if len(matching) == want && (more || i < len(capsules)-1) {
				return matching, cursorAfter(capsule), nil
			}
		}
		looked += len(capsules)
		if !more {
			return matching, "", nil
		}
		last := capsules[len(capsules)-1]
		// Without a filter a page that is short has its reasons, such as its size.
		if len(metadata) == 0 || looked >= mostLookedAt {
			return matching, cursorAfter(last), nil
		}
		page.Before = store.Position{CreatedAt: last.CreatedAt, ID: last.ID}
	}
}

func has(all, some map[string]string) bool {
	for k, v := range some {
		if got, ok := all[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// List returns a page of the caller's capsules, newest first, and the cursor
// of the page after it, "" if there is none. A page with much metadata is shorter
// than its limit. CodeInvalid: bad limit or cursor.
func (c *Capsules) List(ctx context.Context, by Caller, req ListCapsules) (capsules []nestbox.Capsule, next string, err error) {
	page := store.Page{States: presentStates, Limit: req.Limit}
	if req.All {
		page.States = allStates
	}
	switch {
	case req.Limit == 0:
		page.Limit = MaxListCapsules
	case req.Limit < 0 || req.Limit > MaxListCapsules:
		return nil, "", nestbox.Errorf(nestbox.CodeInvalid, "limit must be between 1 and %d, not %d", MaxListCapsules, req.Limit)
	}
	if req.Cursor != "" {
		if page.Before, err = parseCursor(req.Cursor); err != nil {
			return nil, "", err
		}
	}
	capsules, next, err = c.matching(ctx, by, page, req.Metadata)
	return c.activity.seen(capsules...), next, err
}

// A cursor is the creation time in microseconds and the id of the last capsule
// of a page.
func cursorAfter(c nestbox.Capsule) string {
	return base64.RawURLEncoding.EncodeToString([]byte(strconv.FormatInt(c.CreatedAt.UnixMicro(), 10) + ":" + c.ID))
}

func parseCursor(s string) (store.Position, error) {
	raw, err := base64.RawURLEncoding.DecodeString(s)
	micros, id, _ := strings.Cut(string(raw), ":")
	n, numErr := strconv.ParseInt(micros, 10, 64)
	if err != nil || numErr != nil || n <= 0 || !nestbox.ValidID(nestbox.PrefixCapsule, id) {
		return store.Position{}, nestbox.Errorf(nestbox.CodeInvalid, "cursor %.80q is not one that a list returned", s)
	}
	return store.Position{CreatedAt: time.UnixMicro(n), ID: id}, nil
}
