// Package store keeps what the control plane knows: teams, API keys, hosts and
// capsules. It is concrete: one SQL text runs on SQLite and on PostgreSQL, and
// every test runs on both.
//
// It may import the root package only. Errors are *nestbox.Error.
package store

import (
	"context"
	"database/sql"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/nestbox/nestbox"
)

// Store is a database. All methods are safe for concurrent use, also by
// several processes. What a method wrote is on disk when it returns nil.
type Store struct {
	read    *sql.DB
	write   *sql.DB // the same pool as read on PostgreSQL, one connection on SQLite
	dialect dialect
	log     *slog.Logger

	prepared sync.Map // from the text of a query to its *sql.Stmt
}

// Open opens the database that dsn names, sqlite:<path> or postgres://…, and
// brings its tables up to date. CodeUnavailable: it cannot be reached. Errors
// never show the dsn's password.
func Open(ctx context.Context, dsn string, log *slog.Logger) (*Store, error) {
	s := &Store{log: log}
	var err error
	switch path, isSQLite := strings.CutPrefix(dsn, "sqlite:"); {
	case isSQLite:
		err = s.openSQLite(ctx, path)
	case strings.HasPrefix(dsn, "postgres://"), strings.HasPrefix(dsn, "postgresql://"):
		err = s.openPostgres(ctx, dsn)
	default:
		err = nestbox.Errorf(nestbox.CodeInvalid, "the database is neither sqlite:<path> nor postgres://…")
	}
	if err != nil {
		return nil, errors.Join(explain(err), s.Close())
	}
	return s, nil
}

// Close closes all connections. The Store must not be used after.
func (s *Store) Close() error {
	var errs []error
	if s.read != nil {
		errs = append(errs, s.read.Close())
	}
	if s.write != nil && s.write != s.read {
		errs = append(errs, s.write.Close())
	}
	return errors.Join(errs...)
}

// Ping reports, as CodeUnavailable, a database that does not answer.
func (s *Store) Ping(ctx context.Context) error {
	var one int
	return fail("ping", s.read.QueryRowContext(ctx, "SELECT 1").Scan(&one))
}

// tx is a transaction that speaks the dialect of its database.
type tx struct {
	*sql.Tx
	dialect dialect
}

func (t tx) exec(ctx context.Context, query string, args ...any) (rows int64, err error) {
	res, err := t.ExecContext(ctx, t.dialect.rebind(query), args...)
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

func (t tx) queryRow(ctx context.Context, query string, args ...any) *sql.Row {
	return t.QueryRowContext(ctx, t.dialect.rebind(query), args...)
}

// change runs f in a transaction that is committed if f returns nil. Every
// write goes through here, also a single statement: only Commit tells whether
// it is on disk.
func (s *Store) change(ctx context.Context, what string, f func(tx) error) error {
	begun, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return fail(what, err)
	}
	defer func() { _ = begun.Rollback() }() // after Commit it does nothing
	if err := f(tx{begun, s.dialect}); err != nil {
		return fail(what, err)
	}
	return fail(what, begun.Commit())
}

// queryRow runs a query whose text is one of a few. It is prepared once for each
// connection: every request runs two of them, and SQLite takes longer to parse
// them than to answer.
func (s *Store) queryRow(ctx context.Context, query string, args ...any) *sql.Row {
	if stmt, ok := s.prepared.Load(query); ok {
		return stmt.(*sql.Stmt).QueryRowContext(ctx, args...)
	}
	text := s.dialect.rebind(query)
	stmt, err := s.read.PrepareContext(ctx, text)
	if err != nil {
		return s.read.QueryRowContext(ctx, text, args...) // which says why, too
	}
	if other, had := s.prepared.LoadOrStore(query, stmt); had {
		_ = stmt.Close() // another request was faster
		stmt = other.(*sql.Stmt)
	}
	return stmt.QueryRowContext(ctx, args...)
}

// row is *sql.Row or *sql.Rows.
type row interface{ Scan(dest ...any) error }

// errEnough ends a list early: what was read until then is returned with it.
var errEnough = errors.New("enough was read")

// list runs a query and scans each row of its answer.
func list[T any](ctx context.Context, s *Store, what string, scan func(row) (T, error), query string, args ...any) ([]T, error) {
	rows, err := s.read.QueryContext(ctx, s.dialect.rebind(query), args...)
	if err != nil {
		return nil, fail(what, err)
	}
	defer func() { _ = rows.Close() }() // what went wrong is in rows.Err
	var out []T
	for rows.Next() {
		v, err := scan(rows)
		if errors.Is(err, errEnough) {
			return out, err
		}
		if err != nil {
			return nil, fail(what, err)
		}
		out = append(out, v)
	}
	return out, fail(what, rows.Err())
}

// micros is how a time is stored; the zero time is 0.
func micros(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}

func fromMicros(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.UnixMicro(n).UTC()
}
