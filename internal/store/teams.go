package store

import (
	"context"

	"github.com/nestbox/nestbox"
)

const insertTeam = `INSERT INTO teams (id, name, created_at) VALUES (?, ?, ?)`

// CreateTeam adds a team.
func (s *Store) CreateTeam(ctx context.Context, t nestbox.Team) error {
	return s.change(ctx, "create a team", func(tx tx) error {
		_, err := tx.exec(ctx, insertTeam, t.ID, t.Name, micros(t.CreatedAt))
		return err
	})
}

// CreateFirstTeam adds a team with a key, if there is no team at all; otherwise
// it changes nothing and returns false. Of several that try at the same time
// one succeeds.
func (s *Store) CreateFirstTeam(ctx context.Context, t nestbox.Team, k nestbox.APIKey) (created bool, err error) {
	err = s.change(ctx, "create the first team", func(tx tx) error {
		// On PostgreSQL this row makes the others wait for our commit.
		_, err := tx.exec(ctx, `INSERT INTO settings (name, value) VALUES ('first-team', ?)
			ON CONFLICT (name) DO UPDATE SET value = settings.value`, t.ID)
		if err != nil {
			return err
		}
		var teams int
		if err := tx.queryRow(ctx, `SELECT count(*) FROM teams`).Scan(&teams); err != nil || teams > 0 {
			return err
		}
		if _, err := tx.exec(ctx, insertTeam, t.ID, t.Name, micros(t.CreatedAt)); err != nil {
			return err
		}
		created = true
		return createKey(ctx, tx, k)
	})
	return created && err == nil, err
}

// Teams returns all teams, oldest first.
func (s *Store) Teams(ctx context.Context) ([]nestbox.Team, error) {
	return list(ctx, s, "list teams", scanTeam, `SELECT id, name, created_at FROM teams ORDER BY created_at, id`)
}

func scanTeam(r row) (t nestbox.Team, err error) {
	var created int64
	err = r.Scan(&t.ID, &t.Name, &created)
	t.CreatedAt = fromMicros(created)
	return t, err
}
