package store

import (
	"context"
	"time"
)

// Activity is when capsules and API keys were last in use, by id.
type Activity struct{ Capsules, Keys map[string]time.Time }

// SaveActivity notes all of it in one transaction. An older time than the stored
// one, and what is gone, are passed over.
func (s *Store) SaveActivity(ctx context.Context, a Activity) error {
	return s.change(ctx, "note what is in use", func(tx tx) error {
		for id, at := range a.Capsules {
			_, err := tx.exec(ctx, `UPDATE capsules SET last_active_at = ? WHERE id = ? AND last_active_at < ?`, micros(at), id, micros(at))
			if err != nil {
				return err
			}
		}
		for id, at := range a.Keys {
			_, err := tx.exec(ctx, `UPDATE api_keys SET last_used_at = ? WHERE id = ? AND last_used_at < ?`, micros(at), id, micros(at))
			if err != nil {
				return err
			}
		}
		return nil
	})
}
