package guesttest

import (
	"context"
	"maps"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// TreeCopy is what a reader of events believes is in a tree.
type TreeCopy struct {
	Entries map[string]bool // by path; whether it is a directory
	Missed  int             // overflows: what was told since is not exact
}

// Follow takes over what a watch tells until the copy is the tree as look shows
// it, in which nothing else happens meanwhile. mark makes a file there and returns its path.
func (c *TreeCopy) Follow(t *testing.T, watch guest.FileWatch, mark func(name string) string, look func() map[string]bool) {
	t.Helper()
	lost := false
	for again := true; again; {
		missed, path := c.Missed, mark("mark-"+nestbox.RandomHex(8))
		for !c.has(path) && c.Missed == missed {
			c.next(t, watch)
		}
		if again = c.Missed > missed; again { // what is told up to another mark may be older than a look
			lost, c.Entries = true, map[string]bool{}
		}
	}
	want := look()
	if lost {
		c.Entries = maps.Clone(want)
	}
	for !maps.Equal(want, c.Entries) { // what was found late is told late
		c.next(t, watch)
	}
}

func (c *TreeCopy) has(path string) bool {
	_, ok := c.Entries[path]
	return ok
}

func (c *TreeCopy) next(t *testing.T, watch guest.FileWatch) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	events, err := watch.Next(ctx)
	require.NoError(t, err)
	c.Apply(events...)
}

// Apply takes over what events tell.
func (c *TreeCopy) Apply(events ...nestbox.FileEvent) {
	for _, e := range events {
		switch e.Type {
		case nestbox.FileCreate:
			c.Entries[e.Path] = e.Directory
		case nestbox.FileRemove:
			c.move(e.Path, "")
		case nestbox.FileRename:
			if e.To != "" {
				c.move(e.To, "")
			}
			c.move(e.Path, e.To)
		case nestbox.FileOverflow:
			c.Missed++
		}
	}
}

// move takes an entry and what is below it to another path; "" = away.
func (c *TreeCopy) move(path, to string) {
	moved := map[string]bool{}
	for p, directory := range c.Entries {
		if p == path || strings.HasPrefix(p, path+"/") {
			delete(c.Entries, p)
			if to != "" {
				moved[to+p[len(path):]] = directory
			}
		}
	}
	for p, directory := range moved {
		c.Entries[p] = directory
	}
}
