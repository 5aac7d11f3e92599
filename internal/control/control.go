// Package control holds the use cases of the control plane: who may do what to
// which capsule, and what follows from it. It keeps no capsule state in
// memory but when each was last in use, for seconds: the store and the hosts have
// it all, so that any replica can answer any request.
//
// It never imports internal/api or generated code.
package control

import (
	"log/slog"
	"time"

	"github.com/nestbox/nestbox/internal/hostagent"
	"github.com/nestbox/nestbox/internal/store"
)

// Config is what a control plane is made of.
type Config struct {
	Store   *store.Store
	Host    hostagent.Host // nil where only Keys is used
	Log     *slog.Logger
	Now     func() time.Time // nil = time.Now
	Version string
	Network NetworkDefaults

	// MakeRoom is called when the database has no space left to end a capsule;
	// nil = nothing can be done about it.
	MakeRoom func()
}

// Control is the control plane.
type Control struct {
	Keys       *Keys
	Capsules   *Capsules
	Processes  *Processes
	Ports      *Ports
	Reconciler *Reconciler
	Ready      *Ready
}

// New returns a control plane. It does no I/O.
func New(cfg Config) *Control {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	activity := newActivity(cfg)
	keys := &Keys{cfg: cfg, activity: activity}
	capsules := &Capsules{cfg: cfg, activity: activity, network: newLocks()}
	ports := &Ports{cfg: cfg, keys: keys, capsules: capsules}
	capsules.secret = ports.signingSecret
	return &Control{
		Keys:       keys,
		Capsules:   capsules,
		Processes:  &Processes{cfg: cfg, capsules: capsules, ports: ports},
		Ports:      ports,
		Reconciler: newReconciler(cfg, activity),
		Ready:      &Ready{cfg: cfg},
	}
}

// Caller is who asks: the team that an API key belongs to.
type Caller struct {
	TeamID string
	KeyID  string
}

// instant is the present as the store keeps it.
func (cfg Config) instant() time.Time { return cfg.Now().UTC().Truncate(time.Microsecond) }

// Keys of log records.
const (
	keyCapsule = "capsule"
	keyReason  = "reason"
	keyKey     = "key"
	keyError   = "error"
)
