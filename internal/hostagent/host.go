// Package hostagent owns the capsules of one host: it starts and ends their
// sandboxes through a driver, remembers them on disk, finds them again after it
// was killed itself, sees their death, and lends their guests.
//
// Host is the contract, Manager the implementation, hostrpc its twin over
// Connect, and hosttest the suite for both. The package never imports a
// concrete driver, the store or internal/control.
package hostagent

import (
	"context"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// Host is one machine that runs capsules. All methods are safe for concurrent
// use. Errors are *nestbox.Error.
type Host interface {
	Info(ctx context.Context) (Info, error)

	// Create starts a capsule and returns when its guest answers. What is on
	// disk before the sandbox exists lets any later Host of the same state
	// directory find it or clean up after it. A failed Create leaves nothing.
	// CodeConflict: the id is taken. CodeNotFound: no such template.
	Create(ctx context.Context, id string, spec nestbox.CapsuleSpec) (Status, error)

	// Destroy ends a capsule and frees everything it used, from any state, and
	// forgets it. An unknown id is no error.
	Destroy(ctx context.Context, id string) error

	// Get returns CodeNotFound for an unknown id.
	Get(ctx context.Context, id string) (Status, error)
	List(ctx context.Context) ([]Status, error)

	// Guest lends the inside of a running capsule. CodeNotFound: unknown id.
	// CodeInvalidState: not running. When the capsule comes to its end, what is in
	// progress inside fails with that too.
	Guest(ctx context.Context, id string) (guest.Guest, error)

	// SetNetwork replaces what a running capsule may reach outside. CodeNotFound: unknown
	// id. CodeInvalidState: not running. CodeUnsupported: the capsule, or this host, has
	// no way out.
	SetNetwork(ctx context.Context, id string, policy nestbox.NetworkPolicy) error

	// Network tells what a running capsule reaches outside. Its errors are those of
	// SetNetwork.
	Network(ctx context.Context, id string) (nestbox.NetworkReport, error)

	// WatchDeaths calls died for every capsule that is dead now and then for
	// each one that dies, within a second, until ctx ends or the host cannot
	// be reached. A dead capsule is remembered, and told again to each new
	// watcher, until Destroy.
	WatchDeaths(ctx context.Context, died func(Status)) error
}

// Info describes a host.
type Info struct {
	nestbox.HostInfo
	StartedAt    time.Time // of the agent: what it has not got from before then, it lost
	Capabilities []sandbox.Capability
}

// Status is a capsule as its host sees it.
type Status struct {
	ID        string
	State     State
	Reason    string // of StateDead and StateAside
	CreatedAt time.Time
	// UnresponsiveSince is since when the capsule's daemon has not answered;
	// zero = it does.
	UnresponsiveSince time.Time
}

// NotRunning returns the CodeInvalidState of what needs a running capsule.
func (s Status) NotRunning() *nestbox.Error {
	state, reason := nestbox.CapsuleState(s.State), s.Reason
	switch s.State {
	case StateDead:
		state = nestbox.StateError
	case StateAside:
		state = nestbox.StateMissing
	case StateRunning: // it is being destroyed
		state = nestbox.StateStopping
	}
	return state.NotRunning(reason)
}

// State is where a capsule is on its host.
type State string

// The states.
const (
	StateStarting State = "starting"
	StateRunning  State = "running"
	StateDead     State = "dead" // its sandbox ended by itself, or could not be removed whole
	// StateAside: it cannot be used, and is left as it is until somebody destroys
	// it or the reason is gone when the host agent starts again.
	StateAside State = "aside"
)
