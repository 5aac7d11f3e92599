package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/config"
	"github.com/nestbox/nestbox/internal/control"
	"github.com/nestbox/nestbox/internal/doctor"
	"github.com/nestbox/nestbox/internal/durable"
	"github.com/nestbox/nestbox/internal/envdbin"
	"github.com/nestbox/nestbox/internal/hostagent"
	"github.com/nestbox/nestbox/internal/image"
	"github.com/nestbox/nestbox/internal/reserve"
	"github.com/nestbox/nestbox/internal/sandbox/gvisor"
	"github.com/nestbox/nestbox/internal/store"
)

// runUp is `nestbox up`: control plane and host agent in one process. It
// returns when ctx ends or something it needs fails. Capsules go on.
// ready is called once requests are answered.
func runUp(ctx context.Context, cfg config.Up, log *slog.Logger, ready func(addr net.Addr)) (err error) {
	var undo closers
	defer func() { err = errors.Join(err, undo.close()) }()

	if err := secureStateDir(cfg.Dir); err != nil {
		return err
	}
	if err := examineMachine(cfg, log); err != nil {
		return err
	}
	lock, err := lockDir(cfg.Dir)
	if err != nil {
		return err
	}
	undo.add(lock.Close)
	room := reserve.New(cfg.Dir)
	room.GiveIfFull() // to start, so that others can be ended

	front, err := newFront(cfg, log)
	if err != nil {
		return err
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", cfg.Listen)
	if err != nil {
		return err
	}
	undo.add(ignoreClosed(listener.Close))

	db, err := store.Open(ctx, databaseURL(cfg), log)
	if err != nil {
		return fmt.Errorf("open the database: %w", err)
	}
	undo.add(db.Close)
	owner, err := db.Own(ctx)
	if err != nil {
		return err
	}
	undo.add(owner.Close)

	host, err := openHost(ctx, cfg, log, &undo)
	if err != nil {
		return err
	}
	ctl := control.New(control.Config{Store: db, Host: host, Log: log, Version: nestbox.Version, Network: control.NetworkDefaults{
		Internet: cfg.Egress == config.EgressOpen, EgressMbps: cfg.EgressMbps,
	}, MakeRoom: func() {
		log.Error("the disk is full: a piece of the reserve is given to end capsules", "dir", cfg.Dir)
		room.Give()
	}})
	if err := writeFirstKey(ctx, ctl, cfg.Dir); err != nil {
		return err
	}

	if err := spareServer(); err != nil {
		log.Debug("the server is no safer from the host's running out of memory than others; capsules go first all the same", "error", err)
	}
	log.Info("memory", "limit_mb", limitMemory(cfg.MemoryLimitMB)>>20)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return owner.Keep(ctx) })
	group.Go(func() error { returnMemory(ctx); return nil })
	group.Go(func() error { keepReserve(ctx, room, log); return nil })
	group.Go(func() error { return endOfContext(ctl.Reconciler.Run(ctx)) })
	group.Go(func() error { return ctl.Keys.Watch(ctx) })
	group.Go(func() error { return front.serve(ctx, ctl, listener) })
	if err := lock.note(listener.Addr().String()); err != nil {
		log.Warn("nobody can look up on which address the server answers", "error", err)
	}
	ready(listener.Addr())
	return group.Wait()
}

// examineMachine does the checks of `nestbox doctor`, and refuses a machine on
// which capsules cannot work.
func examineMachine(cfg config.Up, log *slog.Logger) error {
	found := doctor.Examine(doctor.Config{Dir: cfg.Dir, Platform: cfg.Platform, Egress: cfg.Egress == config.EgressOpen})
	for _, f := range found {
		if f.Status == doctor.Warn {
			log.Warn("this machine: "+f.Check, "found", f.Detail, "fix", f.Fix)
		}
	}
	if err := doctor.Err(found); err != nil {
		return fmt.Errorf("this machine does not have what Nestbox needs (nestbox doctor shows all of it):\n%w", err)
	}
	return nil
}

// keepReserve has a reserve of disk space whenever there is room for it.
func keepReserve(ctx context.Context, room *reserve.Reserve, log *slog.Logger) {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		if err := room.Keep(); err != nil {
			log.Warn("keeping a reserve of disk space", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// openSandboxes prepares gVisor and the templates in a state directory.
func openSandboxes(dir string, cfg config.Up, out gvisor.Egress, log *slog.Logger, undo *closers) (*gvisor.Driver, *image.Store, error) {
	envd, err := envdbin.Find(filepath.Join(dir, "bin"))
	if err != nil {
		return nil, nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	ca, err := cfg.CapsuleCertificates()
	if err != nil {
		return nil, nil, err
	}
	images, err := image.NewStore(image.Config{Dir: filepath.Join(dir, "images"), CA: ca, Log: log})
	if err != nil {
		return nil, nil, fmt.Errorf("prepare the templates: %w", err)
	}
	driver, err := gvisor.New(gvisor.Config{
		StateDir: filepath.Join(dir, "sandboxes"),
		RunDir:   runDir(dir),
		Envd:     envd,
		Runsc:    []string{self},
		Egress:   out,
		Platform: cfg.Platform,
		Log:      log,
	})
	if err != nil {
		return nil, nil, fmt.Errorf("prepare gVisor: %w", err)
	}
	undo.add(driver.Close)
	return driver, images, nil
}

// openHost starts the host agent of this machine.
func openHost(ctx context.Context, cfg config.Up, log *slog.Logger, undo *closers) (hostagent.Host, error) {
	out, err := startEgress(ctx, cfg, log, undo)
	if err != nil {
		return nil, fmt.Errorf("start the egress: %w", err)
	}
	driver, images, err := openSandboxes(cfg.Dir, cfg, out, log, undo)
	if err != nil {
		return nil, err
	}
	if err := probe(ctx, driver, images, log); err != nil {
		return nil, fmt.Errorf("gVisor does not work on this machine with --platform %s: %w; nestbox doctor says more", cfg.Platform, err)
	}
	id, err := hostID(cfg.Dir)
	if err != nil {
		return nil, err
	}
	host, err := hostagent.Open(ctx, hostagent.Config{
		Dir: filepath.Join(cfg.Dir, "host"),
		Info: nestbox.HostInfo{
			ID: id, Version: nestbox.Version, CPUs: runtime.NumCPU(), MemoryMB: memoryMB(),
		},
		Driver: driver,
		Images: images,
		Env:    cfg.CapsuleEnv(image.CertificatesPath),
		Log:    log,
	})
	if err != nil {
		return nil, fmt.Errorf("find the capsules again: %w", err)
	}
	undo.add(host.Close)
	return host, nil
}

func databaseURL(cfg config.Up) string {
	if cfg.Database != "" {
		return cfg.Database
	}
	return "sqlite:" + filepath.Join(cfg.Dir, "nestbox.db")
}

// hostID returns this host's id, made at the first start.
func hostID(dir string) (string, error) {
	path := filepath.Join(dir, "host-id")
	data, err := os.ReadFile(path)
	if err == nil && nestbox.ValidID(nestbox.PrefixHost, string(data)) {
		return string(data), nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	id := nestbox.NewID(nestbox.PrefixHost)
	return id, durable.WriteFile(path, []byte(id), 0o600)
}

// writeFirstKey makes the first team and key of a new installation and puts
// the key where only the owner of the server can read it. If the file is gone,
// by hand or by a crash in between, a further key is made: the first one
// cannot be shown again.
func writeFirstKey(ctx context.Context, ctl *control.Control, dir string) error {
	path := filepath.Join(dir, "api-key")
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	secret, created, err := ctl.Keys.EnsureFirst(ctx)
	if err == nil && !created {
		secret, err = furtherKey(ctx, ctl.Keys)
	}
	if err != nil {
		return fmt.Errorf("make the first API key: %w", err)
	}
	return durable.WriteFile(path, []byte(secret+"\n"), 0o600)
}

func furtherKey(ctx context.Context, keys *control.Keys) (string, error) {
	teams, err := keys.Teams(ctx)
	if err != nil {
		return "", err
	}
	_, secret, err := keys.Create(ctx, teams[0].ID, "first, made again")
	return secret, err
}

// closers are undone in the reverse of the order in which they were added.
type closers []func() error

func (c *closers) add(f func() error) { *c = append(*c, f) }

func (c *closers) close() error {
	var errs []error
	for i := len(*c) - 1; i >= 0; i-- {
		errs = append(errs, (*c)[i]())
	}
	return errors.Join(errs...)
}

func ignoreClosed(f func() error) func() error {
	return func() error {
		if err := f(); !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	}
}

// endOfContext drops the error that only says that ctx ended.
func endOfContext(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// runDir is where what a reboot ends is kept, for a state directory: a short
// path, since sockets are in it.
func runDir(dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return filepath.Join("/run/nestbox", hex.EncodeToString(sum[:6]))
}
