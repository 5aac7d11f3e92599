package store

import (
	"context"
	"database/sql"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // registers the driver "pgx"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"
)

// Bounds of the connection pool of one control plane.
const (
	postgresConns    = 20
	postgresIdle     = 5
	postgresIdleTime = 5 * time.Minute
)

func (s *Store) openPostgres(ctx context.Context, dsn string) error {
	db, err := sql.Open("pgx", dsn)
	if err != nil {
		return fail("open", err)
	}
	db.SetMaxOpenConns(postgresConns)
	db.SetMaxIdleConns(postgresIdle)
	db.SetConnMaxIdleTime(postgresIdleTime)
	s.dialect, s.read, s.write = postgres, db, db
	if err := s.Ping(ctx); err != nil {
		return err
	}
	// An advisory lock keeps replicas that start together from migrating at the
	// same time: tried every second, for a minute.
	locker, err := lock.NewPostgresSessionLocker(lock.WithLockTimeout(1, 60))
	if err != nil {
		return fail("lock", err)
	}
	return s.migrate(ctx, goose.WithSessionLocker(locker))
}
