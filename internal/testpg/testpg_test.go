package testpg_test

import (
	"database/sql"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nestbox/nestbox/internal/testpg"
)

func TestServer(t *testing.T) {
	before := goleak.IgnoreCurrent()
	server, err := testpg.Start(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { // runs after the databases are dropped
		require.NoError(t, server.Stop())
		goleak.VerifyNone(t, before)
	})

	template, err := server.Template(t.Context(), func(dsn string) error {
		return exec(t, dsn, `CREATE TABLE things (name TEXT)`)
	})
	require.NoError(t, err)
	t.Run("each test has its own copy", func(t *testing.T) {
		for range 2 {
			dsn := server.Database(t, template)
			require.NoError(t, exec(t, dsn, `INSERT INTO things VALUES ('a')`))
			require.Equal(t, 1, count(t, dsn, `SELECT count(*) FROM things`))
		}
	})
	require.Zero(t, count(t, server.Database(t, ""), `SELECT count(*) FROM pg_tables WHERE tablename = 'things'`))
}

func exec(t *testing.T, dsn, query string) error {
	db, err := sql.Open("pgx", dsn)
	require.NoError(t, err)
	_, err = db.ExecContext(t.Context(), query)
	require.NoError(t, db.Close())
	return err
}

func count(t *testing.T, dsn, query string) (n int) {
	db, err := sql.Open("pgx", dsn)
	require.NoError(t, err)
	require.NoError(t, db.QueryRowContext(t.Context(), query).Scan(&n))
	require.NoError(t, db.Close())
	return n
}
