// Package envd is the daemon inside a capsule: it owns the processes that the
// API starts, their output logs and exit records, and the capsule's files. It
// implements guest.Guest on the machine that it runs on; nothing in it knows
// how requests reach it.
//
// It may import the root package, internal/guest and leaves only, and no generated
// code.
package envd

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// Config is what an Envd is made of.
type Config struct {
	Version string       // reported by Ping
	Log     *slog.Logger // nil = discard
	Limits  Limits       // zero fields mean their defaults
	Cgroups string       // directory of a cgroup v2 hierarchy in which trees get groups, if it is one; "" = none

	// Of all processes that do not say otherwise.
	Env  map[string]string
	User string // as nestbox.ProcessSpec.User
	Cwd  string // "" = the user's home
}

// Envd is a guest.Guest: the machine that it runs on. Use New.
type Envd struct {
	version   string
	startedAt time.Time
	table     *table
	files     *files
	closeOnce sync.Once
}

var _ guest.Guest = (*Envd)(nil)

// New starts an Envd. From then on this OS process adopts and reaps orphans:
// it becomes a child subreaper if it is not PID 1. Several Envds in one OS
// process do not disturb each other. Close ends it.
func New(cfg Config) (*Envd, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	table, err := newTable(cfg.Limits.withDefaults(), cfg.Cgroups, cfg.Log)
	if err != nil {
		return nil, err
	}
	table.env, table.accounts.user, table.accounts.cwd = cfg.Env, cfg.User, cfg.Cwd
	return &Envd{version: cfg.Version, startedAt: time.Now(), table: table, files: newFiles()}, nil
}

// Ping answers at once.
func (e *Envd) Ping(ctx context.Context) (guest.Info, error) {
	return guest.Info{Version: e.version, StartedAt: e.startedAt, Features: guest.Features()}, nil
}

// Processes returns the process table.
func (e *Envd) Processes() guest.Processes { return e.table }

// Files returns the files of the machine.
func (e *Envd) Files() guest.Files { return e.files }

// Dial connects to a TCP port on the loopback of the machine.
func (e *Envd) Dial(ctx context.Context, port uint16) (net.Conn, error) {
	return dialLoopback(ctx, port)
}

// Close ends all goroutines and waits for them. It kills no process, but
// nobody reads the output of those that live any more. Readers, watches and waiting
// calls fail with CodeUnavailable.
func (e *Envd) Close() error {
	e.closeOnce.Do(func() {
		e.files.watcher.Close()
		e.table.close()
	})
	return nil
}

// errClosed is what calls answer during and after Close.
func errClosed() error {
	return nestbox.Errorf(nestbox.CodeUnavailable, "the capsule's daemon is stopping")
}
