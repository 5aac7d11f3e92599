package store

import (
	"context"
	"database/sql"
	"errors"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
	_ "modernc.org/sqlite" // registers the driver "sqlite"

	"github.com/nestbox/nestbox"
)

// sqliteReaders bounds the connections that read beside the one that writes.
const sqliteReaders = 8

// openSQLite opens a database file, making it for its owner's eyes only if it
// is not there.
func (s *Store) openSQLite(ctx context.Context, path string) error {
	if path == "" {
		return nestbox.Errorf(nestbox.CodeInvalid, "sqlite: needs a path")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return fail("open", err)
	}
	if err := privateFile(path); err != nil {
		return fail("open", err)
	}
	s.dialect = sqlite
	// WAL with synchronous=FULL syncs the log at each commit: a state is on disk
	// before it is answered. Immediate transactions take the write lock at their
	// beginning, so that none fails halfway because another one wrote meanwhile.
	s.write, err = sql.Open("sqlite", sqliteDSN(path, "synchronous(FULL)"))
	if err != nil {
		return fail("open", err)
	}
	s.write.SetMaxOpenConns(1)
	unlock, err := lockFile(ctx, path+".lock")
	if err != nil {
		return fail("lock", err)
	}
	if err := errors.Join(s.migrate(ctx), unlock()); err != nil {
		return err
	}
	s.read, err = sql.Open("sqlite", sqliteDSN(path, "query_only(1)"))
	if err != nil {
		return fail("open", err)
	}
	s.read.SetMaxOpenConns(sqliteReaders)
	s.read.SetMaxIdleConns(sqliteReaders)
	return s.Ping(ctx)
}

func sqliteDSN(path string, pragmas ...string) string {
	q := url.Values{
		"_txlock": {"immediate"},
		"_pragma": append([]string{"busy_timeout(10000)", "journal_mode(WAL)", "foreign_keys(1)"}, pragmas...),
	}
	return (&url.URL{Scheme: "file", Path: path, RawQuery: q.Encode()}).String()
}

// privateFile makes sure that the file is there and that only its owner can
// read it; SQLite gives its companions the same mode. A file that is there is
// not opened, since closing it would drop the locks that SQLite has on it
// elsewhere in this process.
func privateFile(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err == nil {
		return f.Close()
	}
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	return os.Chmod(path, 0o600)
}

// lockFile keeps two processes from preparing one database at the same time.
// The lock ends with its process, however that ends.
func lockFile(ctx context.Context, path string) (unlock func() error, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	retry := time.NewTicker(20 * time.Millisecond)
	defer retry.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f.Close, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(err, f.Close())
		}
		select {
		case <-retry.C:
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), f.Close())
		}
	}
}
