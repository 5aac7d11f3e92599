package hostagent

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/guestrpc"
	"github.com/nestbox/nestbox/internal/image"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// Config is what a Manager is made of.
type Config struct {
	Dir     string // its state; survives reboots
	Info    nestbox.HostInfo
	Driver  sandbox.Driver
	Images  Images
	Env     map[string]string // of all processes in all capsules
	Log     *slog.Logger
	ReadyIn time.Duration // how long a new capsule's envd may take to answer; 0 = 30 s
}

// Images are what capsules start from: *image.Store. A capsule uses one from Acquire to
// Release, over restarts too.
type Images interface {
	Acquire(template string) (image.Root, error) // CodeNotFound
	Use(image string)
	Release(image string)
	Sweep()
	Names() []string
}

// Manager is the Host of this machine.
type Manager struct {
	cfg       Config
	startedAt time.Time
	records   records

	// ctx ends with Close; watchers of sandboxes live under it.
	ctx     context.Context
	stop    context.CancelFunc
	running sync.WaitGroup

	mu       sync.Mutex
	capsules map[string]*entry
	died     chan struct{} // closed and replaced at each death
}

var _ Host = (*Manager)(nil)

// entry is one capsule of the Manager. Its fields are guarded by Manager.mu,
// which is never held while something is waited for: a caller that changes a capsule
// claims it by setting busy.
type entry struct {
	rec    record
	busy   chan struct{}      // closed when the present owner is done; nil = nobody owns it
	cancel context.CancelFunc // ends a Create that is under way
	access *access            // nil unless it runs
}

// status is what others see of the entry. Needs Manager.mu.
func (c *entry) status() Status {
	s := c.rec.status()
	if c.access != nil {
		s.UnresponsiveSince = c.access.guest.FrozenSince()
	}
	return s
}

// access is a running sandbox and the way into it.
type access struct {
	sandbox sandbox.Sandbox
	closed  chan struct{}
	guest   *guestrpc.Client // a sandbox that ends sends no FIN: it is closed then
}

// Open returns the Manager of a state directory, after it has found again all
// capsules that run, marked those that died meanwhile, and removed what an
// interrupted Create or Destroy left. The directory must not be in use by
// another Manager.
func Open(ctx context.Context, cfg Config) (*Manager, error) {
	if cfg.ReadyIn == 0 {
		cfg.ReadyIn = 30 * time.Second
	}
	recs, err := openRecords(filepath.Join(cfg.Dir, "capsules"))
	if err != nil {
		return nil, err
	}
	m := &Manager{
		cfg:       cfg,
		startedAt: time.Now(),
		records:   recs,
		capsules:  map[string]*entry{},
		died:      make(chan struct{}),
	}
	m.ctx, m.stop = context.WithCancel(context.WithoutCancel(ctx))
	if err := m.recover(ctx); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

// Close stops watching. Capsules go on.
func (m *Manager) Close() error {
	m.stop()
	m.running.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	for _, c := range m.capsules {
		if c.access != nil {
			errs = append(errs, c.access.close(errStopping))
			c.access = nil
		}
	}
	return errors.Join(errs...)
}

// recoverAtOnce bounds how many capsules are looked at at the same time.
const recoverAtOnce = 16

// recover brings memory, disk and sandboxes together after a start. A capsule
// with which something is wrong keeps nobody waiting: it is set aside, or
// removed in the background.
func (m *Manager) recover(ctx context.Context) error {
	recs, unread, err := m.records.all()
	if err != nil {
		return err
	}
	known := map[string]bool{}
	for id, err := range unread {
		known[id] = true
		if !nestbox.ValidID(nestbox.PrefixCapsule, id) {
			m.cfg.Log.Error("a file among the records of capsules is none of ours", "file", id, keyError, err)
			continue
		}
		m.cfg.Images.Use("") // which it uses is in the record
		m.setAside(record{ID: id}, "its record cannot be read", err)
	}
	var group errgroup.Group
	group.SetLimit(recoverAtOnce)
	for _, rec := range recs {
		known[rec.ID] = true
		m.cfg.Images.Use(rec.Image)
		group.Go(func() error { m.recoverOne(ctx, rec); return nil })
	}
	_ = group.Wait()
	traces, err := m.cfg.Driver.List(ctx)
	if err != nil {
		m.cfg.Log.Error("looking for sandboxes that nobody remembers", keyError, err)
	}
	for _, id := range traces {
		if !known[id] {
			m.cfg.Log.Warn("removing a sandbox that nobody remembers", keyCapsule, id)
			m.removeLater(record{ID: id})
		}
	}
	m.cfg.Images.Sweep()
	return nil
}

func (m *Manager) recoverOne(ctx context.Context, rec record) {
	switch rec.State {
	case StateStarting: // its Create never answered
		m.cfg.Log.Warn("removing a capsule whose start was interrupted", keyCapsule, rec.ID)
		m.removeLater(rec)
		return
	case StateDead:
		m.add(&entry{rec: rec})
		return
	}
	sb, err := m.cfg.Driver.Open(ctx, rec.ID)
	if nestbox.CodeOf(err) == nestbox.CodeNotFound {
		rec.State, rec.Reason = StateDead, "while the host agent was away: "+nestbox.MessageOf(err)
		m.cfg.Log.Warn("capsule died while the host agent was away", keyCapsule, rec.ID)
		m.add(&entry{rec: rec})
		if err := m.records.put(rec); err != nil { // the next start finds the same
			m.cfg.Log.Error("writing the record of a dead capsule", keyCapsule, rec.ID, keyError, err)
		}
		return
	}
	if err != nil {
		m.setAside(rec, "its sandbox cannot be opened", err)
		return
	}
	m.cfg.Log.Info("found a running capsule", keyCapsule, rec.ID)
	c := &entry{rec: rec, access: m.newAccess(sb, rec.Token)}
	m.add(c)
	m.watch(c, c.access)
	m.running.Go(func() { m.renewNetwork(rec.ID) })
}

// setAside keeps a capsule that cannot be used, with the reason. What is on disk of
// it stays as it is.
func (m *Manager) setAside(rec record, what string, err error) {
	m.cfg.Log.Error("a capsule is set aside: "+what, keyCapsule, rec.ID, keyError, err)
	rec.State, rec.Reason = StateAside, what
	m.add(&entry{rec: rec})
}

// removeLater removes what there is of a capsule in the background. If that
// fails it stays, dead.
func (m *Manager) removeLater(rec record) {
	rec.State, rec.Reason = StateDead, "it is being removed"
	c := &entry{rec: rec, busy: make(chan struct{})}
	m.add(c)
	m.running.Go(func() { _ = m.forget(m.ctx, c) }) // which logs what fails
}

func (m *Manager) add(c *entry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.capsules[c.rec.ID] = c
}

// newAccess connects to a sandbox.
func (m *Manager) newAccess(sb sandbox.Sandbox, token string) *access {
	client := guestrpc.NewClient(guestrpc.ClientConfig{
		Dial:   func(ctx context.Context) (net.Conn, error) { return sb.Dial(ctx, sandbox.EnvdPort) },
		Header: http.Header{guestrpc.TokenHeader: {token}},
	})
	return &access{sandbox: sb, closed: make(chan struct{}), guest: client}
}

// close is called once, by who takes the access out of its entry. What is in
// progress inside fails with cause.
func (b *access) close(cause *nestbox.Error) error {
	close(b.closed)
	b.guest.CloseBecause(cause)
	return b.sandbox.Close()
}

// How often the daemon of a capsule is asked whether it lives, unless it has
// shown that lately: seldom, since that costs an idle capsule a wake-up, and
// often once it did not answer.
const (
	lookEvery      = 30 * time.Second
	lookAgainEvery = 5 * time.Second
)

// watch marks c dead when its sandbox ends by itself, sees whether its daemon
// answers, and guards its memory.
func (m *Manager) watch(c *entry, b *access) {
	ctx, stop := context.WithCancel(m.ctx)
	m.running.Go(func() {
		b.sandbox.GuardMemory(ctx, func(ctx context.Context, used int64) error { return m.killBiggest(ctx, c.rec.ID, b, used) })
	})
	m.running.Go(func() {
		defer stop()
		look := time.NewTimer(rand.N(lookEvery))
		defer look.Stop()
		frozen := false
		for {
			select {
			case <-m.ctx.Done():
				return
			case <-b.closed:
				return
			case <-b.sandbox.Done():
				m.bury(c, b)
				return
			case <-look.C:
			}
			since := b.guest.Look(m.ctx)
			if now := !since.IsZero(); now != frozen {
				frozen = now
				m.cfg.Log.Warn("a capsule's daemon", keyCapsule, c.rec.ID, "answers", !frozen)
			}
			if frozen {
				look.Reset(lookAgainEvery)
			} else {
				look.Reset(lookEvery)
			}
		}
	})
}

// killBiggest has a capsule that is out of memory kill the tree that holds the
// most.
func (m *Manager) killBiggest(ctx context.Context, id string, b *access, used int64) error {
	victim, err := b.guest.Processes().KillBiggest(ctx, used)
	if err != nil {
		m.cfg.Log.Warn("a capsule is out of memory, and nothing was killed", keyCapsule, id, "used", used, keyError, err)
		return err
	}
	m.cfg.Log.Info("a capsule was out of memory, and a process tree was killed", keyCapsule, id, "used", used, "pid", victim.Process.PID, "tag", victim.Process.Tag, "held", victim.Memory)
	return nil
}

// bury marks a capsule dead, unless somebody is destroying it: then its end is
// no news.
func (m *Manager) bury(c *entry, b *access) {
	m.mu.Lock()
	if c.access != b || c.busy != nil {
		m.mu.Unlock()
		return
	}
	c.rec.State, c.rec.Reason = StateDead, b.sandbox.Reason()
	c.access = nil
	c.busy = make(chan struct{}) // else the record could come back after a destroy
	rec := c.rec
	close(m.died)
	m.died = make(chan struct{})
	m.mu.Unlock()

	m.cfg.Log.Warn("capsule died", keyCapsule, rec.ID, "reason", rec.Reason)
	if err := b.close(rec.status().NotRunning()); err != nil {
		m.cfg.Log.Warn("closing a dead sandbox", keyCapsule, rec.ID, keyError, err)
	}
	// If this fails the record still says running, and the next start of the
	// host agent finds the sandbox gone: the same end with a poorer reason.
	if err := m.records.put(rec); err != nil {
		m.cfg.Log.Error("writing the record of a dead capsule", keyCapsule, rec.ID, keyError, err)
	}
	m.mu.Lock()
	m.release(c)
	m.mu.Unlock()
}

// Info implements Host.
func (m *Manager) Info(context.Context) (Info, error) {
	info := m.cfg.Info
	info.Templates = m.cfg.Images.Names()
	info.Driver = m.cfg.Driver.Name()
	return Info{HostInfo: info, StartedAt: m.startedAt, Capabilities: m.cfg.Driver.Capabilities()}, nil
}

// Get implements Host.
func (m *Manager) Get(_ context.Context, id string) (Status, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c, ok := m.capsules[id]
	if !ok {
		return Status{}, unknown(id)
	}
	return c.status(), nil
}

// List implements Host.
func (m *Manager) List(context.Context) ([]Status, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]Status, 0, len(m.capsules))
	for _, c := range m.capsules {
		out = append(out, c.status())
	}
	slices.SortFunc(out, func(a, b Status) int { return strings.Compare(a.ID, b.ID) })
	return out, nil
}

// Guest implements Host.
func (m *Manager) Guest(_ context.Context, id string) (guest.Guest, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c, ok := m.capsules[id]
	if !ok {
		return nil, unknown(id)
	}
	if c.rec.State != StateRunning || c.access == nil {
		return nil, c.status().NotRunning()
	}
	return lent{Client: c.access.guest, sandbox: c.access.sandbox}, nil
}

// WatchDeaths implements Host.
func (m *Manager) WatchDeaths(ctx context.Context, died func(Status)) error {
	told := map[string]bool{}
	for {
		m.mu.Lock()
		next := m.died
		var dead []Status
		for id, c := range m.capsules {
			if c.rec.State == StateDead && !told[id] {
				dead = append(dead, c.status())
			}
		}
		for id := range told { // ids never come back, so what is gone need not be remembered
			if _, ok := m.capsules[id]; !ok {
				delete(told, id)
			}
		}
		m.mu.Unlock()
		for _, s := range dead {
			told[s.ID] = true
			died(s)
		}
		select {
		case <-next:
		case <-ctx.Done():
			return ctx.Err()
		case <-m.ctx.Done():
			return errStopping
		}
	}
}

var errStopping = nestbox.Errorf(nestbox.CodeUnavailable, "the host agent is stopping")

func unknown(id string) error {
	return nestbox.Errorf(nestbox.CodeNotFound, "this host has no capsule %.60q", id)
}

// Keys of log records.
const (
	keyCapsule = "capsule"
	keyError   = "error"
)
