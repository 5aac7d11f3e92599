package store

import (
	"context"
	"strings"
	"time"
)

// Look is what Keep does every few seconds.
func (o *Ownership) Look(ctx context.Context) error { return o.look(ctx) }

// PagePlan is how SQLite finds a page of capsules, LivePlan the live ones of a
// host, OldPlan those to forget (https://sqlite.org/eqp.html).
func (s *Store) PagePlan(ctx context.Context, teamID string, p Page) ([]string, error) {
	query, args := pageQuery(teamID, p)
	return s.plan(ctx, query, args)
}

func (s *Store) LivePlan(ctx context.Context, hostID string) ([]string, error) {
	query, args := liveQuery(hostID)
	return s.plan(ctx, query, args)
}

func (s *Store) OldPlan(ctx context.Context) ([]string, error) {
	query, args := oldQuery(time.Now(), 1)
	return s.plan(ctx, query, args)
}

// plan returns the steps that read capsules.
func (s *Store) plan(ctx context.Context, query string, args []any) (steps []string, err error) {
	all, err := list(ctx, s, "explain", func(r row) (step string, err error) {
		var id, parent, unused int
		return step, r.Scan(&id, &parent, &unused, &step)
	}, `EXPLAIN QUERY PLAN `+query, args...)
	for _, step := range all {
		if strings.Contains(step, "capsules") {
			steps = append(steps, step)
		}
	}
	return steps, err
}
