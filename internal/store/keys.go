package store

import (
	"context"
	"slices"

	"github.com/nestbox/nestbox"
)

const keyColumns = `id, team_id, name, prefix, hash, created_at, last_used_at`

// CreateKey adds a key. CodeNotFound: its team does not exist.
func (s *Store) CreateKey(ctx context.Context, k nestbox.APIKey) error {
	return s.change(ctx, "create an API key", func(tx tx) error { return createKey(ctx, tx, k) })
}

func createKey(ctx context.Context, tx tx, k nestbox.APIKey) error {
	_, err := tx.exec(ctx, `INSERT INTO api_keys (`+keyColumns+`) VALUES (`+marks(7)+`)`,
		k.ID, k.TeamID, k.Name, k.Prefix, k.Hash, micros(k.CreatedAt), micros(k.LastUsed))
	return err
}

// KeyByHash finds a key by what is stored of its secret. CodeNotFound.
func (s *Store) KeyByHash(ctx context.Context, hash string) (nestbox.APIKey, error) {
	k, err := scanKey(s.queryRow(ctx, `SELECT `+keyColumns+` FROM api_keys WHERE hash = ?`, hash))
	return k, fail("find an API key", notFound(err, "no such API key"))
}

// Keys returns the keys of a team, oldest first.
func (s *Store) Keys(ctx context.Context, teamID string) ([]nestbox.APIKey, error) {
	return list(ctx, s, "list API keys", scanKey,
		`SELECT `+keyColumns+` FROM api_keys WHERE team_id = ? ORDER BY created_at, id`, teamID)
}

// DeleteKey removes a key of a team. CodeNotFound.
func (s *Store) DeleteKey(ctx context.Context, teamID, id string) error {
	return s.change(ctx, "delete an API key", func(tx tx) error {
		n, err := tx.exec(ctx, `DELETE FROM api_keys WHERE id = ? AND team_id = ?`, id, teamID)
		if err == nil && n == 0 {
			err = nestbox.Errorf(nestbox.CodeNotFound, "no such API key")
		}
		return err
	})
}

func scanKey(r row) (k nestbox.APIKey, err error) {
	var created, used int64
	err = r.Scan(&k.ID, &k.TeamID, &k.Name, &k.Prefix, &k.Hash, &created, &used)
	k.CreatedAt, k.LastUsed = fromMicros(created), fromMicros(used)
	return k, err
}

// Key returns a key by its id. CodeNotFound.
func (s *Store) Key(ctx context.Context, id string) (nestbox.APIKey, error) {
	k, err := scanKey(s.queryRow(ctx, `SELECT `+keyColumns+` FROM api_keys WHERE id = ?`, id))
	return k, fail("read a key", notFound(err, "API key not found"))
}

// KeysAmong returns those of the ids that are of keys.
func (s *Store) KeysAmong(ctx context.Context, ids []string) (map[string]bool, error) {
	found := map[string]bool{}
	for chunk := range slices.Chunk(ids, 500) {
		there, err := list(ctx, s, "look for keys", func(r row) (id string, err error) { return id, r.Scan(&id) },
			`SELECT id FROM api_keys WHERE id IN (`+marks(len(chunk))+`)`, anys(chunk)...)
		if err != nil {
			return nil, err
		}
		for _, id := range there {
			found[id] = true
		}
	}
	return found, nil
}
