package control

import (
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox/internal/store"
)

// BenchmarkRequest is what control adds to a request into a capsule: whose key
// is it, whose capsule, does it run.
func BenchmarkRequest(b *testing.B) {
	for name, dsn := range map[string]string{
		"sqlite":   "sqlite:" + filepath.Join(b.TempDir(), "nestbox.db"),
		"postgres": postgres.Database(b, ""),
	} {
		b.Run(name, func(b *testing.B) {
			s, err := store.Open(b.Context(), dsn, slog.New(slog.DiscardHandler))
			require.NoError(b, err)
			w := &world{store: s, host: newFakeHost(time.Now)}
			w.Control = New(Config{Store: s, Host: w.host, Log: slog.New(slog.DiscardHandler)})
			w.me = w.newTeam(b)
			c := w.create(b)
			_, secret, err := w.Keys.Create(b.Context(), w.me.TeamID, "")
			require.NoError(b, err)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					by, err := w.Keys.Authenticate(b.Context(), secret)
					if err == nil {
						_, err = w.Capsules.Guest(b.Context(), by, c.ID)
					}
					if err != nil {
						b.Error(err)
					}
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "requests/s")
			require.NoError(b, s.Close())
		})
	}
}
