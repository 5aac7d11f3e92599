package hosttest

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/nestbox/nestbox"
)

// Networks remembers what the capsules of a Host that is made up for a test may reach.
// Each has been refused a connection. The zero value is ready.
type Networks struct {
	mu       sync.Mutex
	policies map[string]nestbox.NetworkPolicy
}

// SetNetwork is that of hostagent.Host.
func (n *Networks) SetNetwork(_ context.Context, id string, policy nestbox.NetworkPolicy) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.policies == nil {
		n.policies = map[string]nestbox.NetworkPolicy{}
	}
	n.policies[id] = policy
	return nil
}

// Network is that of hostagent.Host.
func (n *Networks) Network(_ context.Context, id string) (nestbox.NetworkReport, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return nestbox.NetworkReport{Policy: n.policies[id], Refused: 1, Recent: []nestbox.NetworkFlow{{
		Destination: nestbox.Destination{Name: "refused.test", Addr: netip.MustParseAddr("203.0.113.1")},
		Protocol:    nestbox.NetworkTCP, Port: 443, Verdict: nestbox.Verdict{Rule: "*"}, At: time.Unix(1e9, 0).UTC(),
	}}}, nil
}
