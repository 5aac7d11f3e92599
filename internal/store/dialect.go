package store

import (
	"strconv"
	"strings"
)

// dialect is how a database wants its SQL: the texts of this package are
// written for SQLite, with ? for arguments.
type dialect string

const (
	sqlite   dialect = "sqlite3"
	postgres dialect = "postgres"
)

// rebind numbers the arguments for PostgreSQL. No text of this package has a
// question mark of its own.
func (d dialect) rebind(query string) string {
	if d != postgres {
		return query
	}
	var b strings.Builder
	b.Grow(len(query) + 16)
	for n := 1; ; n++ {
		before, after, found := strings.Cut(query, "?")
		b.WriteString(before)
		if !found {
			return b.String()
		}
		b.WriteByte('$')
		b.WriteString(strconv.Itoa(n))
		query = after
	}
}

// marks returns n argument marks, for IN.
func marks(n int) string {
	return strings.TrimSuffix(strings.Repeat("?, ", n), ", ")
}
