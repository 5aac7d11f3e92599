package store

import (
	"context"
	"embed"
	"io/fs"

	"github.com/pressly/goose/v3"
)

//go:embed migrations/*.sql
var migrations embed.FS

// migrate brings the tables up to date.
func (s *Store) migrate(ctx context.Context, opts ...goose.ProviderOption) error {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return fail("migrate", err)
	}
	opts = append(opts, goose.WithDisableGlobalRegistry(true), goose.WithLogger(goose.NopLogger()))
	provider, err := goose.NewProvider(goose.Dialect(s.dialect), s.write, files, opts...)
	if err != nil {
		return fail("migrate", err)
	}
	// Not closed: that would close the pool.
	done, err := provider.Up(ctx)
	if err != nil {
		return fail("migrate", err)
	}
	for _, m := range done {
		s.log.Info("migrated the database", "migration", m.Source.Path, "took", m.Duration)
	}
	return nil
}
