package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"net"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sys/unix"
	sqlitedriver "modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/nestbox/nestbox"
)

// fail gives an error of the database its code. what is the operation, for the
// log. Errors that have a code stay as they are.
func fail(what string, err error) error {
	var known *nestbox.Error
	switch {
	case err == nil || errors.As(err, &known):
		return err
	case errors.Is(err, context.Canceled):
		return &nestbox.Error{Code: nestbox.CodeCanceled, Message: "canceled", Err: err}
	case errors.Is(err, context.DeadlineExceeded):
		return &nestbox.Error{Code: nestbox.CodeTimeout, Message: "the database did not answer in time", Err: err}
	case isUnique(err):
		return &nestbox.Error{Code: nestbox.CodeConflict, Message: "it exists already", Err: err}
	case isForeignKey(err):
		return &nestbox.Error{Code: nestbox.CodeNotFound, Message: "what it belongs to does not exist", Err: err}
	case isFull(err):
		return &nestbox.Error{Code: nestbox.CodeExhausted, Message: "no space is left for the database", Err: errors.Join(unix.ENOSPC, err)}
	case isAway(err):
		return &nestbox.Error{Code: nestbox.CodeUnavailable, Message: "the database cannot be reached now", Err: err}
	}
	return nestbox.Errorf(nestbox.CodeInternal, "store: %s: %w", what, err)
}

// explain adds the cause to the message, for the operator who starts the program. pgx
// leaves passwords out of its errors.
func explain(err error) error {
	var e *nestbox.Error
	if !errors.As(err, &e) || e.Err == nil || strings.HasSuffix(e.Message, e.Err.Error()) {
		return err
	}
	return nestbox.Errorf(e.Code, "%s: %w", e.Message, e.Err)
}

// notFound is err, or CodeNotFound with a message if it is sql.ErrNoRows.
func notFound(err error, message string) error {
	if errors.Is(err, sql.ErrNoRows) {
		return nestbox.Errorf(nestbox.CodeNotFound, "%s", message)
	}
	return err
}

func sqliteCode(err error) int {
	var e *sqlitedriver.Error
	if errors.As(err, &e) {
		return e.Code()
	}
	return sqlite3.SQLITE_OK
}

// sqlState returns PostgreSQL's five-character error code, or "".
// https://www.postgresql.org/docs/current/errcodes-appendix.html
func sqlState(err error) string {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

func isUnique(err error) bool {
	code := sqliteCode(err)
	return code == sqlite3.SQLITE_CONSTRAINT_UNIQUE || code == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY || sqlState(err) == "23505"
}

func isForeignKey(err error) bool {
	return sqliteCode(err) == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY || sqlState(err) == "23503"
}

func isFull(err error) bool {
	code := sqliteCode(err)
	return code&0xff == sqlite3.SQLITE_FULL || code == sqlite3.SQLITE_IOERR_SHMSIZE || sqlState(err) == "53100"
}

// isAway reports failures that may be over at the next try: no connection, too
// many of them, a restart, or on SQLite somebody who holds the lock too long.
func isAway(err error) bool {
	var connect *pgconn.ConnectError
	var network *net.OpError
	state := sqlState(err)
	return sqliteCode(err)&0xff == sqlite3.SQLITE_BUSY ||
		strings.HasPrefix(state, "08") || strings.HasPrefix(state, "57P") || state == "53300" || state == "40001" || state == "40P01" ||
		errors.As(err, &connect) || errors.As(err, &network) || errors.Is(err, driver.ErrBadConn)
}
