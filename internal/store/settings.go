package store

import "context"

// Setting returns the value of a setting that an installation makes up once:
// the stored one, or fresh, which is then the stored one. Of several that try
// at the same time all get the same.
func (s *Store) Setting(ctx context.Context, name, fresh string) (value string, err error) {
	err = s.change(ctx, "read a setting", func(tx tx) error {
		// The update that changes nothing is what makes RETURNING speak.
		return tx.queryRow(ctx, `INSERT INTO settings (name, value) VALUES (?, ?)
			ON CONFLICT (name) DO UPDATE SET value = settings.value RETURNING value`, name, fresh).Scan(&value)
	})
	return value, err
}
