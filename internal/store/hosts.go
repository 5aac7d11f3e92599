package store

import (
	"context"
	"encoding/json"

	"github.com/nestbox/nestbox"
)

const hostColumns = `id, driver, version, cpus, memory_mb, templates`

// SaveHost adds a host, or changes what is known of it.
func (s *Store) SaveHost(ctx context.Context, h nestbox.HostInfo) error {
	return s.change(ctx, "save a host", func(tx tx) error { return saveHost(ctx, tx, h) })
}

// saveHost leaves a row that needs no change alone, so that nothing is written.
func saveHost(ctx context.Context, tx tx, h nestbox.HostInfo) error {
	templates, err := json.Marshal(h.Templates)
	if err != nil {
		return err
	}
	_, err = tx.exec(ctx, `INSERT INTO hosts (`+hostColumns+`) VALUES (`+marks(6)+`)
		ON CONFLICT (id) DO UPDATE SET driver = excluded.driver, version = excluded.version,
			cpus = excluded.cpus, memory_mb = excluded.memory_mb, templates = excluded.templates
		WHERE (hosts.driver, hosts.version, hosts.cpus, hosts.memory_mb, hosts.templates)
			<> (excluded.driver, excluded.version, excluded.cpus, excluded.memory_mb, excluded.templates)`,
		h.ID, h.Driver, h.Version, h.CPUs, h.MemoryMB, string(templates))
	return err
}

// Hosts returns all hosts.
func (s *Store) Hosts(ctx context.Context) ([]nestbox.HostInfo, error) {
	return list(ctx, s, "list hosts", scanHost, `SELECT `+hostColumns+` FROM hosts ORDER BY id`)
}

func scanHost(r row) (h nestbox.HostInfo, err error) {
	var templates string
	if err := r.Scan(&h.ID, &h.Driver, &h.Version, &h.CPUs, &h.MemoryMB, &templates); err != nil {
		return h, err
	}
	return h, json.Unmarshal([]byte(templates), &h.Templates)
}
