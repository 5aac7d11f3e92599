package hostagent

import (
	"context"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// SetNetwork implements Host.
func (m *Manager) SetNetwork(ctx context.Context, id string, policy nestbox.NetworkPolicy) error {
	if err := policy.Validate(); err != nil {
		return err
	}
	return m.changeNetwork(ctx, id, func(rec *record) error {
		rec.Spec.Network = &policy
		// It comes first: what is in force is then put right by the caller, who repeats
		// a call that failed, or at the next start.
		if err := m.records.put(*rec); err != nil {
			return nestbox.Errorf(nestbox.CodeInternal, "write the record of capsule %s: %w", id, err)
		}
		return nil
	})
}

// renewNetwork puts the policy of the record into force after a start.
func (m *Manager) renewNetwork(id string) {
	err := m.changeNetwork(m.ctx, id, func(*record) error { return nil })
	if err != nil && nestbox.CodeOf(err) != nestbox.CodeUnsupported && m.ctx.Err() == nil {
		m.cfg.Log.Warn("what a capsule may reach is as it was before the start", keyCapsule, id, keyError, err)
	}
}

// changeNetwork changes the record of a running capsule and puts its policy into force.
func (m *Manager) changeNetwork(ctx context.Context, id string, change func(*record) error) error {
	net, err := m.networker()
	if err != nil {
		return err
	}
	if _, err := m.Guest(ctx, id); err != nil { // a Create under way is not disturbed
		return err
	}
	c, err := m.claim(ctx, id)
	if err != nil {
		return err
	}
	if c == nil {
		return unknown(id)
	}
	defer m.letGo(c)
	m.mu.Lock()
	rec, runs, status := c.rec, c.access != nil, c.status()
	m.mu.Unlock()
	if !runs {
		return status.NotRunning()
	}
	if err := change(&rec); err != nil {
		return err
	}
	m.mu.Lock()
	c.rec = rec
	m.mu.Unlock()
	return net.SetNetwork(ctx, id, rec.Spec.NetworkPolicy())
}

// letGo ends the ownership of a capsule that may have died meanwhile.
func (m *Manager) letGo(c *entry) {
	m.mu.Lock()
	b := c.access
	m.release(c)
	m.mu.Unlock()
	if b == nil {
		return
	}
	select {
	case <-b.sandbox.Done(): // its watcher left that to us
		m.bury(c, b)
	default:
	}
}

// Network implements Host.
func (m *Manager) Network(ctx context.Context, id string) (nestbox.NetworkReport, error) {
	net, err := m.networker()
	if err != nil {
		return nestbox.NetworkReport{}, err
	}
	if _, err := m.Guest(ctx, id); err != nil {
		return nestbox.NetworkReport{}, err
	}
	return net.Network(ctx, id)
}

func (m *Manager) networker() (sandbox.Networker, error) {
	net, ok := m.cfg.Driver.(sandbox.Networker)
	if !ok {
		return nil, nestbox.Errorf(nestbox.CodeUnsupported, "the capsules of this host have no way out")
	}
	return net, nil
}
