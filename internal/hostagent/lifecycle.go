package hostagent

import (
	"cmp"
	"context"
	"errors"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/image"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// Create implements Host. What is undone on failure is undone in the reverse
// order of what was done: sandbox, record, entry.
func (m *Manager) Create(ctx context.Context, id string, spec nestbox.CapsuleSpec) (Status, error) {
	if !nestbox.ValidID(nestbox.PrefixCapsule, id) {
		return Status{}, nestbox.Errorf(nestbox.CodeInvalid, "invalid capsule ID")
	}
	if err := spec.Validate(); err != nil {
		return Status{}, err
	}
	root, err := m.cfg.Images.Acquire(cmp.Or(spec.Image, spec.Template))
	if err != nil {
		return Status{}, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c, err := m.claimNew(id, spec, root.Image, cancel)
	if err != nil {
		m.cfg.Images.Release(root.Image)
		return Status{}, err
	}
	b, err := m.start(ctx, c.rec, root)
	if err != nil {
		err = errors.Join(err, m.forget(context.WithoutCancel(ctx), c))
		if errors.Is(err, syscall.ENOSPC) {
			err = &nestbox.Error{Code: nestbox.CodeExhausted, Message: "no space is left on the disk of the capsule's host", Err: err}
		}
		return Status{}, err
	}

	m.mu.Lock()
	c.rec.State, c.access, c.cancel = StateRunning, b, nil
	status := c.rec.status()
	m.release(c)
	m.mu.Unlock()
	m.watch(c, b)
	return status, nil
}

// claimNew enters a new capsule, owned by the caller.
func (m *Manager) claimNew(id string, spec nestbox.CapsuleSpec, img string, cancel context.CancelFunc) (*entry, error) {
	c := &entry{
		rec: record{
			Version: recordVersion, ID: id, Spec: spec, Image: img,
			Token: nestbox.RandomHex(32), State: StateStarting, CreatedAt: time.Now().UTC(),
		},
		busy:   make(chan struct{}),
		cancel: cancel,
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.capsules[id]; ok {
		return nil, nestbox.Errorf(nestbox.CodeConflict, "capsule %s exists already", id)
	}
	m.capsules[id] = c
	return c, nil
}

// start does the work of Create: record, sandbox, answering envd, record.
func (m *Manager) start(ctx context.Context, rec record, root image.Root) (*access, error) {
	if err := m.records.put(rec); err != nil {
		return nil, nestbox.Errorf(nestbox.CodeInternal, "write the record of capsule %s: %w", rec.ID, err)
	}
	sb, err := m.cfg.Driver.Create(ctx, sandbox.Spec{
		ID:        rec.ID,
		Root:      root,
		Resources: rec.Spec.Resources,
		Network:   rec.Spec.NetworkPolicy(),
		Hostname:  rec.Spec.Hostname,
		Env:       m.envdEnv(rec),
	})
	if err != nil {
		return nil, err
	}
	b := m.newAccess(sb, rec.Token)
	if err := m.awaitEnvd(ctx, b); err != nil {
		return nil, errors.Join(err, b.close(rec.status().NotRunning()))
	}
	rec.State = StateRunning
	if err := m.records.put(rec); err != nil {
		return nil, errors.Join(nestbox.Errorf(nestbox.CodeInternal, "write the record of capsule %s: %w", rec.ID, err), b.close(errStopping))
	}
	return b, nil
}

// envdEnv is the environment of a capsule's envd.
func (m *Manager) envdEnv(rec record) map[string]string {
	image := rec.Spec.Defaults
	env := map[string]string{sandbox.EnvToken: rec.Token, sandbox.EnvUser: image.User, sandbox.EnvCwd: image.Cwd}
	for _, all := range []map[string]string{m.cfg.Env, image.Env, rec.Spec.Env} {
		for name, value := range all {
			env[sandbox.EnvPrefix+name] = value
		}
	}
	return env
}

// How often a starting envd is asked: often at first, since it takes a few
// milliseconds, and rarely in the end, when the machine is busy.
const (
	firstPing = 2 * time.Millisecond
	lastPing  = 100 * time.Millisecond

	// firstAnswer is how long the first answer may take, and twice as long after each that
	// did not come: the first packet to a network that just starts may be lost, and TCP
	// sends it again after a second only.
	firstAnswer = 50 * time.Millisecond
)

// awaitEnvd returns when envd answers, the sandbox ends, or the time is up.
func (m *Manager) awaitEnvd(ctx context.Context, b *access) error {
	ctx, cancel := context.WithTimeout(ctx, m.cfg.ReadyIn)
	defer cancel()
	pauses := backoff.NewExponentialBackOff()
	pauses.InitialInterval, pauses.MaxInterval, pauses.Multiplier = firstPing, lastPing, 1.2
	for answer := firstAnswer; ; {
		pinging, done := context.WithTimeout(ctx, answer)
		_, err := b.guest.Ping(pinging)
		if err == nil {
			done()
			return nil
		}
		if pinging.Err() != nil {
			answer = min(2*answer, m.cfg.ReadyIn)
		}
		done()
		select {
		case <-b.sandbox.Done():
			return nestbox.Errorf(nestbox.CodeGuest, "the capsule ended while it started: %s", b.sandbox.Reason())
		case <-ctx.Done():
			return nestbox.Errorf(nestbox.CodeGuest, "the capsule's daemon did not answer within %v: %w", m.cfg.ReadyIn, err)
		case <-time.After(pauses.NextBackOff()):
		}
	}
}

// Destroy implements Host.
func (m *Manager) Destroy(ctx context.Context, id string) error {
	if !nestbox.ValidID(nestbox.PrefixCapsule, id) {
		return nestbox.Errorf(nestbox.CodeInvalid, "invalid capsule ID")
	}
	c, err := m.claim(ctx, id)
	if c == nil || err != nil {
		return err
	}
	// From here on the capsule is ours: half destroyed is no state to leave it
	// in because somebody hung up.
	return m.forget(context.WithoutCancel(ctx), c)
}

// claim makes the caller the owner of a capsule, after the present owner is
// done. A Create under way is told to end. It returns nil for an unknown id.
func (m *Manager) claim(ctx context.Context, id string) (*entry, error) {
	for {
		m.mu.Lock()
		c, ok := m.capsules[id]
		if !ok {
			m.mu.Unlock()
			return nil, nil
		}
		if c.busy == nil {
			c.busy = make(chan struct{})
			m.mu.Unlock()
			return c, nil
		}
		if c.cancel != nil {
			c.cancel()
		}
		busy := c.busy
		m.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, nestbox.Errorf(nestbox.CodeTimeout, "capsule %s is busy: %w", id, ctx.Err())
		}
	}
}

// release ends an ownership. The caller holds m.mu.
func (m *Manager) release(c *entry) {
	close(c.busy)
	c.busy = nil
}

// forgetIn bounds how long the removal of one sandbox may take.
const forgetIn = time.Minute

// forget removes everything of a capsule that the caller owns. If that fails
// the capsule stays, dead, so that Destroy can be repeated.
func (m *Manager) forget(ctx context.Context, c *entry) error {
	ctx, cancel := context.WithTimeout(ctx, forgetIn)
	defer cancel()
	m.mu.Lock()
	b, id := c.access, c.rec.ID
	c.access = nil
	m.mu.Unlock()
	if b != nil {
		if err := b.close(nestbox.StateStopping.NotRunning("")); err != nil {
			m.cfg.Log.Warn("closing a sandbox", keyCapsule, id, keyError, err)
		}
	}
	err := m.cfg.Driver.Destroy(ctx, id)
	if err == nil {
		err = m.records.remove(id)
	}

	m.mu.Lock()
	defer m.mu.Unlock()
	if err == nil {
		delete(m.capsules, id)
		m.cfg.Images.Release(c.rec.Image)
	} else {
		m.cfg.Log.Error("removing a capsule", keyCapsule, id, keyError, err)
		c.rec.State, c.rec.Reason, c.cancel = StateDead, "could not be removed whole", nil
	}
	m.release(c)
	return err
}
