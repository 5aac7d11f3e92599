package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"time"

	"github.com/nestbox/nestbox"
)

// Ownership is that of the one server that works on a database. Two would each
// answer for the other's capsules that it has none such. A SQLite database is in a
// state directory, whose lock keeps others out already.
type Ownership struct {
	s    *Store
	conn *sql.Conn // whose session holds the lock
}

const (
	// ownerKey names the advisory lock.
	ownerKey = 0x6e657374626f78 // "nestbox"

	// ownIn is how long it is tried: the session of a server that was killed may
	// last a moment longer. ownAgain is the time between two tries, and keepEvery
	// that between two looks whether the session lives.
	ownIn     = 10 * time.Second
	ownAgain  = 100 * time.Millisecond
	keepEvery = 5 * time.Second
)

var errOwned = nestbox.Errorf(nestbox.CodeConflict, "another nestbox server works on this database")

// Own makes this process the owner until Close. CodeConflict: another one is.
func (s *Store) Own(ctx context.Context) (*Ownership, error) {
	o := &Ownership{s: s}
	if s.dialect == sqlite {
		return o, nil
	}
	ctx, cancel := context.WithTimeout(ctx, ownIn)
	defer cancel()
	for last := error(nil); ; {
		err := o.take(ctx)
		switch {
		case err == nil:
			return o, nil
		case ctx.Err() != nil && last != nil:
			return nil, last
		case !errors.Is(err, errOwned):
			return nil, err
		}
		last = errOwned
		select {
		case <-time.After(ownAgain):
		case <-ctx.Done():
			return nil, errOwned
		}
	}
}

func (o *Ownership) take(ctx context.Context) error {
	conn, err := o.s.write.Conn(ctx)
	if err != nil {
		return fail("own the database", err)
	}
	// A machine that lost its power says no goodbye: its session must end soon.
	for _, setting := range []string{"tcp_keepalives_idle = 10", "tcp_keepalives_interval = 5", "tcp_keepalives_count = 3"} {
		if _, err = conn.ExecContext(ctx, "SET "+setting); err != nil {
			break
		}
	}
	var got bool
	if err == nil {
		err = conn.QueryRowContext(ctx, "SELECT pg_try_advisory_lock($1)", int64(ownerKey)).Scan(&got)
	}
	switch {
	case err != nil:
		return errors.Join(fail("own the database", err), conn.Close())
	case !got:
		return errors.Join(errOwned, conn.Close())
	}
	o.conn = conn
	return nil
}

// Keep returns nil when ctx ends, and CodeConflict if another server came to own
// the database when the connection to it was lost.
func (o *Ownership) Keep(ctx context.Context) error {
	if o.s.dialect == sqlite {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(keepEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		if err := o.look(ctx); errors.Is(err, errOwned) {
			return err
		}
	}
}

// look takes the lock again if its session is gone. A database that does not
// answer is looked at again later: nobody else can own it either.
func (o *Ownership) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, keepEvery)
	defer cancel()
	if o.conn != nil {
		if o.conn.PingContext(ctx) == nil {
			return nil
		}
		discard(o.conn)
		o.conn = nil
	}
	return o.take(ctx)
}

// Close lets another server have the database.
func (o *Ownership) Close() error {
	if o.conn != nil {
		discard(o.conn)
	}
	return nil
}

// discard ends a session for good: back in the pool it would go on holding the
// lock.
func discard(conn *sql.Conn) {
	_ = conn.Raw(func(any) error { return driver.ErrBadConn })
	_ = conn.Close()
}
