package control

import (
	"context"
	"hash/maphash"
	"slices"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/hostagent"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// NetworkDefaults are what the operator says about the network of capsules.
type NetworkDefaults struct {
	Internet   bool // of a capsule of which nobody says what it may reach
	EgressMbps int  // the most of any capsule; 0 = no limit
}

// DefaultNetwork is the policy of capsules of which nobody says what they may reach.
func (c *Capsules) DefaultNetwork() nestbox.NetworkPolicy {
	return nestbox.NetworkPolicy{Internet: c.cfg.Network.Internet, EgressMbps: c.cfg.Network.EgressMbps}
}

// networkOf returns the policy of a new capsule.
func (c *Capsules) networkOf(spec nestbox.CapsuleSpec, host hostagent.Info) (*nestbox.NetworkPolicy, error) {
	if slices.Contains(host.Capabilities, sandbox.Egress) {
		if spec.Network == nil {
			return new(c.DefaultNetwork()), nil
		}
		return spec.Network, nil
	}
	if spec.Network != nil && !spec.Network.DenyAll() {
		return nil, nestbox.Errorf(nestbox.CodeUnsupported, "capsules of this host reach nothing outside: its kernel lacks what that needs (nestbox doctor)")
	}
	return &nestbox.NetworkPolicy{}, nil
}

// limitSpeed returns a policy within the operator's limit. CodeInvalid: more was asked
// for.
func (c *Capsules) limitSpeed(p nestbox.NetworkPolicy) (nestbox.NetworkPolicy, error) {
	most := c.cfg.Network.EgressMbps
	if most > 0 && p.EgressMbps > most {
		return p, nestbox.Errorf(nestbox.CodeInvalid, "network.egress_mbps is at most %d here, not %d", most, p.EgressMbps)
	}
	if p.EgressMbps == 0 {
		p.EgressMbps = most
	}
	return p, nil
}

// setNetworkIn bounds a change of a policy.
const setNetworkIn = 30 * time.Second

// SetNetwork replaces what a running capsule may reach, and returns the policy that is
// then in force. Connections that it does not allow are cut, others go on. A caller that
// leaves does not stop it. CodeInvalid: policy cannot be meant. CodeInvalidState: the
// capsule does not run. CodeUnsupported: it has no way out.
func (c *Capsules) SetNetwork(ctx context.Context, by Caller, id string, policy nestbox.NetworkPolicy) (nestbox.NetworkPolicy, error) {
	policy, err := c.limitSpeed(policy)
	if err != nil {
		return nestbox.NetworkPolicy{}, err
	}
	if err := policy.Validate(); err != nil {
		return nestbox.NetworkPolicy{}, err
	}
	capsule, err := c.Get(ctx, by, id)
	if err == nil {
		err = running(capsule)
	}
	if err != nil {
		return nestbox.NetworkPolicy{}, err
	}
	id = capsule.ID
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), setNetworkIn)
	defer cancel()
	unlock, err := c.network.lock(ctx, id) // host and row have the same one last
	if err != nil {
		return nestbox.NetworkPolicy{}, err
	}
	defer unlock()
	if err := c.cfg.Host.SetNetwork(ctx, id, policy); err != nil {
		return nestbox.NetworkPolicy{}, c.ended(ctx, id, err)
	}
	capsule, err = c.cfg.Store.SetNetwork(ctx, id, policy, c.cfg.instant())
	if err != nil {
		return nestbox.NetworkPolicy{}, err
	}
	c.activity.capsule(capsule, c.cfg.Now())
	return policy, nil
}

// Network tells what a running capsule reaches and was refused. CodeInvalidState: it
// does not run. CodeUnsupported: it has no way out.
func (c *Capsules) Network(ctx context.Context, by Caller, id string) (nestbox.NetworkReport, error) {
	capsule, err := c.Get(ctx, by, id)
	if err == nil {
		err = running(capsule)
	}
	if err != nil {
		return nestbox.NetworkReport{}, err
	}
	report, err := c.cfg.Host.Network(ctx, capsule.ID)
	if err != nil {
		return nestbox.NetworkReport{}, c.ended(ctx, capsule.ID, err)
	}
	return report, nil
}

// locks are locks by name. Names may share one.
type locks [64]chan struct{}

var lockSeed = maphash.MakeSeed()

func newLocks() (l locks) {
	for i := range l {
		l[i] = make(chan struct{}, 1)
	}
	return l
}

// lock waits for a lock until ctx ends: CodeTimeout.
func (l *locks) lock(ctx context.Context, name string) (unlock func(), err error) {
	held := l[maphash.String(lockSeed, name)%uint64(len(l))]
	select {
	case held <- struct{}{}:
		return func() { <-held }, nil
	case <-ctx.Done():
		return nil, nestbox.Errorf(nestbox.CodeTimeout, "the capsule is busy: %w", ctx.Err())
	}
}
