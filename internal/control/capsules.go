package control

import (
	"context"
	"errors"
	"slices"
	"syscall"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// Capsules are the use cases of a capsule's life. To a caller a capsule of
// another team is like one that does not exist: CodeNotFound. A malformed id
// is CodeInvalid.
type Capsules struct {
	cfg      Config
	activity *activity
	network  locks // of changes of a capsule's network
	secret   func(context.Context) ([]byte, error)
}

// Bounds of the work that goes on after a caller has left.
const (
	createIn  = time.Minute
	destroyIn = time.Minute
	cleanUpIn = 30 * time.Second // after a failed create
	lookIn    = 2 * time.Second  // at what the host knows
)

// Create starts a capsule and returns when it runs. A caller that leaves does
// not leave a half-made capsule: the work goes on to its end, at most createIn.
//
// Zero or negative resources mean the defaults. CodeInvalid: spec cannot be
// meant. CodeNotFound: no such template. CodeConflict: another capsule of the team has
// the name.
// CodeUnsupported: the host's capsules have no way out, and spec wants one.
// CodeUnavailable: the host does not answer. The capsule of a failed create is
// in StateError with the reason, unless it never got as far.
func (c *Capsules) Create(ctx context.Context, by Caller, spec nestbox.CapsuleSpec) (nestbox.Capsule, error) {
	return c.create(ctx, by, spec, nestbox.CapsuleRequest{})
}

func (c *Capsules) create(ctx context.Context, by Caller, spec nestbox.CapsuleSpec, request nestbox.CapsuleRequest) (nestbox.Capsule, error) {
	spec = spec.WithDefaults()
	if spec.Network != nil {
		policy, err := c.limitSpeed(*spec.Network)
		if err != nil {
			return nestbox.Capsule{}, err
		}
		spec.Network = &policy
	}
	if err := spec.Validate(); err != nil {
		return nestbox.Capsule{}, err
	}
	ctx = context.WithoutCancel(ctx)
	work, cancel := context.WithTimeout(ctx, createIn)
	defer cancel()
	host, err := c.cfg.Host.Info(work)
	if err != nil {
		return nestbox.Capsule{}, hostError(err)
	}
	if !slices.Contains(host.Templates, spec.Template) {
		return nestbox.Capsule{}, nestbox.Errorf(nestbox.CodeNotFound, "template not found")
	}
	if spec.Network, err = c.networkOf(spec, host); err != nil {
		return nestbox.Capsule{}, err
	}
	now := c.cfg.instant()
	capsule := nestbox.Capsule{
		ID: nestbox.NewID(nestbox.PrefixCapsule), TeamID: by.TeamID, HostID: host.ID,
		CapsuleSpec: spec, State: nestbox.StateStarting, Request: request,
		CreatedAt: now, LastActiveAt: now, UpdatedAt: now,
	}
	// The row comes first: whatever is then left half done, the Reconciler finds.
	if err := c.cfg.Store.CreateCapsule(work, capsule, host.HostInfo); err != nil {
		return nestbox.Capsule{}, c.nameTaken(work, by, spec.Name, err)
	}
	_, err = c.cfg.Host.Create(work, capsule.ID, spec)
	if err != nil {
		return nestbox.Capsule{}, c.abandon(ctx, capsule.ID, hostError(err))
	}
	return c.started(ctx, work, capsule.ID)
}

// nameTaken is the error of a capsule that could not be entered, which says whose the name
// is if that is why.
func (c *Capsules) nameTaken(ctx context.Context, by Caller, name string, err error) error {
	if nestbox.CodeOf(err) != nestbox.CodeConflict || name == "" {
		return err
	}
	other, lookErr := c.cfg.Store.CapsuleByName(ctx, by.TeamID, name)
	if lookErr != nil {
		return err
	}
	return &nestbox.Error{Code: nestbox.CodeConflict, Message: "the name " + name + " is that of capsule " + other.ID, Err: err}
}

// started records that a capsule runs.
func (c *Capsules) started(ctx, work context.Context, id string) (nestbox.Capsule, error) {
	capsule, err := c.cfg.Store.Transition(work, id, nestbox.TriggerStarted, c.cfg.instant(), "")
	switch {
	case err == nil:
		c.cfg.Log.Info("capsule created", keyCapsule, id)
		return capsule, nil
	case nestbox.CodeOf(err) != nestbox.CodeInvalidState:
		return nestbox.Capsule{}, c.abandon(ctx, id, err)
	case capsule.State == nestbox.StateRunning: // the Reconciler saw it first
		return capsule, nil
	}
	err = nestbox.Errorf(nestbox.CodeInvalidState, "capsule was destroyed while it started")
	if capsule.State == nestbox.StateError {
		err = nestbox.Errorf(nestbox.CodeGuest, "capsule failed as soon as it had started: %s", capsule.Reason)
	}
	return nestbox.Capsule{}, c.abandon(ctx, id, err)
}

// abandon ends a create that failed with cause, and returns cause. What it
// cannot do now the Reconciler does later.
func (c *Capsules) abandon(ctx context.Context, id string, cause error) error {
	ctx, cancel := context.WithTimeout(ctx, cleanUpIn)
	defer cancel()
	reason := nestbox.MessageOf(cause)
	c.cfg.Log.Warn("creating a capsule failed", keyCapsule, id, keyError, cause)
	_, err := c.cfg.Store.Transition(ctx, id, nestbox.TriggerFailed, c.cfg.instant(), reason)
	if nestbox.CodeOf(err) == nestbox.CodeInvalidState { // it was destroyed, or marked, already
		err = nil
	}
	if err := errors.Join(err, c.cfg.Host.Destroy(ctx, id)); err != nil {
		c.cfg.Log.Warn("cleaning up after a failed create; the reconciler will", keyCapsule, id, keyError, err)
	}
	return cause
}

// Look is Get, with what its host knows of it now.
func (c *Capsules) Look(ctx context.Context, by Caller, id string) (nestbox.Capsule, error) {
	capsule, err := c.Get(ctx, by, id)
	if err != nil || capsule.State != nestbox.StateRunning {
		return capsule, err
	}
	ctx, cancel := context.WithTimeout(ctx, lookIn)
	defer cancel()
	status, err := c.cfg.Host.Get(ctx, capsule.ID)
	if err != nil {
		return capsule, nil // what is stored is an answer too
	}
	capsule.UnresponsiveSince = status.UnresponsiveSince
	return capsule, nil
}

// Get returns a capsule, also one that has come to its end. id may be a name: then it is
// the live capsule of that name, or else the newest, and so it is in all that takes the
// id of a capsule and a caller.
func (c *Capsules) Get(ctx context.Context, by Caller, id string) (nestbox.Capsule, error) {
	if nestbox.ValidCapsuleName(id) {
		capsule, err := c.cfg.Store.CapsuleByName(ctx, by.TeamID, id)
		if err != nil {
			return nestbox.Capsule{}, err
		}
		return c.activity.seen(capsule)[0], nil
	}
	capsule, err := c.read(ctx, id)
	if err == nil && capsule.TeamID != by.TeamID {
		err = nestbox.Errorf(nestbox.CodeNotFound, "capsule not found")
	}
	if err != nil {
		return nestbox.Capsule{}, err
	}
	return capsule, nil
}

// read returns a capsule of any team.
func (c *Capsules) read(ctx context.Context, id string) (nestbox.Capsule, error) {
	if !nestbox.ValidID(nestbox.PrefixCapsule, id) {
		return nestbox.Capsule{}, nestbox.Errorf(nestbox.CodeInvalid, "invalid capsule ID")
	}
	capsule, err := c.cfg.Store.Capsule(ctx, id)
	return c.activity.seen(capsule)[0], err
}

// Destroy ends a capsule and returns when everything it used is freed. It
// works from every state and may be repeated. A caller that leaves does not
// stop it. CodeUnavailable: the host did not do it; the capsule is
// StateStopping and the Reconciler goes on trying.
func (c *Capsules) Destroy(ctx context.Context, by Caller, id string) error {
	capsule, err := c.Get(ctx, by, id)
	if err != nil || capsule.State == nestbox.StateStopped {
		return err
	}
	id = capsule.ID
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), destroyIn)
	defer cancel()
	capsule, err = c.cfg.end(ctx, id, nestbox.TriggerDestroy)
	if errors.Is(err, syscall.ENOSPC) { // it may be this capsule that has it
		if err := c.cfg.Host.Destroy(ctx, id); err != nil {
			c.cfg.Log.Warn("destroying a capsule to make room", keyCapsule, id, keyError, err)
		}
		capsule, err = c.cfg.end(ctx, id, nestbox.TriggerDestroy)
	}
	if err != nil {
		return unlessStopped(capsule, err)
	}
	if err := c.cfg.finishDestroy(ctx, id); err != nil {
		c.cfg.Log.Warn("destroying a capsule; the reconciler will try again", keyCapsule, id, keyError, err)
		return err
	}
	c.cfg.Log.Info("capsule destroyed", keyCapsule, id)
	return nil
}

// finishDestroy brings a capsule that is stopping to its end.
func (cfg Config) finishDestroy(ctx context.Context, id string) error {
	if err := cfg.Host.Destroy(ctx, id); err != nil {
		return &nestbox.Error{Code: nestbox.CodeUnavailable, Message: "capsule host could not destroy it now; it will try again", Err: err}
	}
	capsule, err := cfg.end(ctx, id, nestbox.TriggerDestroyed)
	return unlessStopped(capsule, err)
}

// end is a transition towards the end of a capsule, for which room is made on a
// full disk.
func (cfg Config) end(ctx context.Context, id string, trigger nestbox.Trigger) (nestbox.Capsule, error) {
	capsule, err := cfg.Store.Transition(ctx, id, trigger, cfg.instant(), "")
	if errors.Is(err, syscall.ENOSPC) && cfg.MakeRoom != nil {
		cfg.MakeRoom()
		return cfg.Store.Transition(ctx, id, trigger, cfg.instant(), "")
	}
	return capsule, err
}

// unlessStopped drops the error of a transition to where somebody else has
// brought the capsule already.
func unlessStopped(capsule nestbox.Capsule, err error) error {
	if nestbox.CodeOf(err) == nestbox.CodeInvalidState && capsule.State == nestbox.StateStopped {
		return nil
	}
	return err
}

// Ping notes that a capsule is in use, until ctx ends. CodeInvalidState: it does not run.
func (c *Capsules) Ping(ctx context.Context, by Caller, id string) error {
	capsule, err := c.Get(ctx, by, id)
	if err == nil {
		err = running(capsule)
	}
	if err == nil {
		c.activity.during(ctx, capsule, c.cfg.Now)
	}
	return err
}

// Guest lends the inside of a running capsule, and notes that it is in use until ctx
// ends.
// CodeInvalidState: it does not run.
func (c *Capsules) Guest(ctx context.Context, by Caller, id string) (guest.Guest, error) {
	_, g, err := c.use(ctx, by, id)
	return g, err
}

// use is Guest, with the capsule whose it is.
func (c *Capsules) use(ctx context.Context, by Caller, id string) (nestbox.Capsule, guest.Guest, error) {
	capsule, err := c.Get(ctx, by, id)
	if err != nil {
		return nestbox.Capsule{}, nil, err
	}
	g, err := c.enter(ctx, capsule)
	if err != nil {
		return nestbox.Capsule{}, nil, err
	}
	c.activity.during(ctx, capsule, c.cfg.Now)
	return capsule, g, nil
}

// enter lends the inside of a capsule, if it runs.
func (c *Capsules) enter(ctx context.Context, capsule nestbox.Capsule) (guest.Guest, error) {
	if err := running(capsule); err != nil {
		return nil, err
	}
	g, err := c.cfg.Host.Guest(ctx, capsule.ID)
	if err != nil {
		return nil, c.ended(ctx, capsule.ID, err)
	}
	return g, nil
}

// ended is the error of a host about a capsule that ran: one that the host does not know
// came to its end since, and the store knows why, or the Reconciler is about to find out.
func (c *Capsules) ended(ctx context.Context, id string, err error) error {
	if nestbox.CodeOf(err) != nestbox.CodeNotFound {
		return hostError(err)
	}
	now, err := c.cfg.Store.Capsule(ctx, id)
	if err != nil {
		return err
	}
	if now.State == nestbox.StateRunning {
		return nestbox.StateError.NotRunning(reasonLost)
	}
	return running(now)
}

func running(capsule nestbox.Capsule) error {
	if capsule.State == nestbox.StateRunning {
		return nil
	}
	return capsule.State.NotRunning(capsule.Reason)
}

// hostError is what a caller gets to see of a host's error.
func hostError(err error) error {
	switch nestbox.CodeOf(err) {
	case nestbox.CodeUnavailable, nestbox.CodeTimeout, nestbox.CodeCanceled:
		return &nestbox.Error{Code: nestbox.CodeUnavailable, Message: "capsule host is not reachable", Err: err}
	case nestbox.CodeInternal:
		if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
			return &nestbox.Error{Code: nestbox.CodeUnavailable, Message: "capsule host is not reachable", Err: err}
		}
	}
	return err
}
