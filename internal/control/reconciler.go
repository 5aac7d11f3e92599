package control

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/hostagent"
)

// Reconciler brings the store and the host together: it ends what was left
// half done when a control plane died, marks what died or was lost, and frees
// what nobody owns. It decides from the two alone and every step is guarded by
// the state machine, so that several may run at the same time.
type Reconciler struct {
	cfg      Config
	activity *activity
	kick     chan struct{} // a pass is due now

	working sync.WaitGroup // jobs
	slots   chan struct{}  // of jobs that are not slow
	slow    time.Duration  // slowAfter, or less in tests
	begun   time.Time      // before then nobody could use a capsule

	mu         sync.Mutex
	atWork     map[string]struct{}  // capsules with a job, maybe of an earlier pass
	complained map[string]complaint // by capsule

	// What the pass before saw; only Run's goroutine uses it.
	hostID      string
	saved       nestbox.HostInfo // what the store has of the host
	silentSince time.Time        // since when the host has not answered; zero = it does
}

func newReconciler(cfg Config, activity *activity) *Reconciler {
	return &Reconciler{
		cfg: cfg, activity: activity, kick: make(chan struct{}, 1), slots: make(chan struct{}, actAtOnce), slow: slowAfter, begun: cfg.Now(),
		atWork: map[string]struct{}{}, complained: map[string]complaint{},
	}
}

// complaint is what was logged last of a capsule that cannot be reconciled.
type complaint struct {
	text string
	at   time.Time
}

// How the Reconciler works.
const (
	passEvery   = 10 * time.Second
	askIn       = 10 * time.Second       // how long the host may take to say what it has
	actIn       = time.Minute            // how long one capsule may take
	actAtOnce   = 8                      // capsules
	slowAfter   = 5 * time.Second        // a job that takes longer keeps nobody waiting
	sayAgain    = 10 * time.Minute       // what has been said of a capsule
	interrupted = 2 * time.Minute        // a create that is older is not in flight any more
	lostAfter   = 30 * time.Second       // of silence its capsules are missing
	keepEnded   = 7 * 24 * time.Hour     // how long ended capsules are remembered
	pruneAtOnce = 500                    // capsules in one pass
	firstPause  = 100 * time.Millisecond // before deaths are watched again
	lastPause   = 5 * time.Second        // … at most
)

// Reasons that capsules get here.
const (
	reasonLost        = "lost by its host"
	reasonInterrupted = "create was interrupted"
	reasonSilent      = "its host does not answer"
)

// Run reconciles until ctx ends: a pass at once and every passEvery, and beside
// it the host's deaths as they happen. It also writes down what is in use. What fails is logged and tried again.
// It returns nil.
func (r *Reconciler) Run(ctx context.Context) error {
	var beside sync.WaitGroup
	defer beside.Wait()
	defer r.working.Wait()
	beside.Go(func() { r.watch(ctx) })
	beside.Go(func() { r.activity.keep(ctx) })

	tick := time.NewTicker(passEvery)
	defer tick.Stop()
	for ctx.Err() == nil {
		if err := r.pass(ctx); err != nil && ctx.Err() == nil {
			r.cfg.Log.Warn("reconciling; will try again", keyError, err)
		}
		select {
		case <-tick.C:
		case <-r.kick:
		case <-ctx.Done():
		}
	}
	return nil
}

// watch marks deaths as the host tells them. A new watch tells all of them
// again, so that none is missed in between.
func (r *Reconciler) watch(ctx context.Context) {
	pauses := backoff.NewExponentialBackOff()
	pauses.InitialInterval, pauses.MaxInterval, pauses.Multiplier = firstPause, lastPause, 2
	for ctx.Err() == nil {
		begun := r.cfg.Now()
		err := r.cfg.Host.WatchDeaths(ctx, func(s hostagent.Status) { r.died(ctx, s) })
		if ctx.Err() != nil {
			return
		}
		r.cfg.Log.Warn("watching for deaths; will try again", keyError, err)
		if r.cfg.Now().Sub(begun) > lastPause {
			pauses.Reset()
		}
		select {
		case <-time.After(pauses.NextBackOff()):
		case <-ctx.Done():
		}
	}
}

// died marks a dead capsule at once. Freeing it takes longer than other deaths
// may wait, so that is left to a pass.
func (r *Reconciler) died(ctx context.Context, s hostagent.Status) {
	row, err := r.move(ctx, s.ID, nestbox.TriggerCrashed, s.Reason)
	if nestbox.CodeOf(err) == nestbox.CodeInvalidState && row.State == nestbox.StateStarting {
		_, err = r.move(ctx, s.ID, nestbox.TriggerFailed, s.Reason) // before its create could say that it runs
	}
	switch nestbox.CodeOf(err) {
	case "", nestbox.CodeInvalidState, nestbox.CodeNotFound: // the latter two are leftovers
	default:
		r.cfg.Log.Warn("marking a dead capsule; the next pass will", keyCapsule, s.ID, keyError, err)
	}
	select {
	case r.kick <- struct{}{}:
	default: // one is due already
	}
}

// move is a transition that is logged.
func (r *Reconciler) move(ctx context.Context, id string, trigger nestbox.Trigger, reason string) (nestbox.Capsule, error) {
	row, err := r.cfg.Store.Transition(ctx, id, trigger, r.cfg.instant(), reason)
	if err == nil {
		r.cfg.Log.Info("reconciled a capsule", keyCapsule, id, "trigger", trigger, "state", row.State, keyReason, reason)
	}
	return row, err
}

// pass looks at everything once.
func (r *Reconciler) pass(ctx context.Context) error {
	// The host first: a row exists before its capsule does, so that what the
	// host has then and the store has not now is nobody's.
	info, onHost, err := r.ask(ctx)
	if err != nil {
		return errors.Join(err, r.silent(ctx))
	}
	r.hostID, r.silentSince = info.ID, time.Time{}
	if !reflect.DeepEqual(info.HostInfo, r.saved) { // a write is a sync: not every pass
		if err := r.cfg.Store.SaveHost(ctx, info.HostInfo); err != nil {
			return err
		}
		r.saved = info.HostInfo
	}
	rows, err := r.cfg.Store.LiveCapsules(ctx, info.ID)
	if err != nil {
		return err
	}
	var jobs sync.WaitGroup
	act := func(id string, f func(context.Context) error) { r.act(ctx, &jobs, id, f) }
	for _, row := range rows {
		status, found := onHost[row.ID]
		delete(onHost, row.ID)
		act(row.ID, func(ctx context.Context) error { return r.settle(ctx, info, row, status, found) })
	}
	for id, status := range onHost {
		act(id, func(ctx context.Context) error { return r.sweep(ctx, status) })
	}
	waitFor(ctx, &jobs, r.slow)
	pruned, err := r.cfg.Store.PruneCapsules(ctx, r.cfg.Now().Add(-keepEnded), pruneAtOnce)
	if pruned > 0 {
		r.cfg.Log.Info("forgot ended capsules", "count", pruned)
	}
	return err
}

// act does one capsule's job beside others, unless one of an earlier pass is
// still at work on it. What fails is logged, and tried again by the next pass.
func (r *Reconciler) act(ctx context.Context, jobs *sync.WaitGroup, id string, f func(context.Context) error) {
	r.mu.Lock()
	_, busy := r.atWork[id]
	r.atWork[id] = struct{}{}
	r.mu.Unlock()
	if busy {
		return
	}
	jobs.Add(1)
	r.working.Go(func() {
		defer jobs.Done()
		select {
		case r.slots <- struct{}{}:
		case <-ctx.Done():
			r.done(id, nil)
			return
		}
		leave := sync.OnceFunc(func() { <-r.slots })
		slow := time.AfterFunc(r.slow, leave)
		defer func() { slow.Stop(); leave() }()
		ctx, cancel := context.WithTimeout(ctx, actIn)
		defer cancel()
		var err error
		defer func() { r.done(id, err) }()
		err = f(ctx)
	})
}

// done ends a capsule's job and logs what failed, if that has not been said
// lately.
func (r *Reconciler) done(id string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.atWork, id)
	if err == nil {
		delete(r.complained, id)
		return
	}
	if last := r.complained[id]; last.text != err.Error() || r.cfg.Now().Sub(last.at) > sayAgain {
		r.complained[id] = complaint{err.Error(), r.cfg.Now()}
		r.cfg.Log.Warn("reconciling a capsule; will try again", keyCapsule, id, keyError, err)
	}
}

// waitFor waits until all jobs are done, but not for slow ones.
func waitFor(ctx context.Context, jobs *sync.WaitGroup, most time.Duration) {
	done := make(chan struct{})
	go func() { jobs.Wait(); close(done) }()
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	case <-ctx.Done():
		<-done // their context has ended too
	}
}

// ask returns what the host has, by id.
func (r *Reconciler) ask(ctx context.Context) (hostagent.Info, map[string]hostagent.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, askIn)
	defer cancel()
	info, err := r.cfg.Host.Info(ctx)
	if err != nil {
		return info, nil, err
	}
	list, err := r.cfg.Host.List(ctx)
	onHost := make(map[string]hostagent.Status, len(list))
	for _, s := range list {
		onHost[s.ID] = s
	}
	return info, onHost, err
}

// silent marks the capsules of a host that has not answered for too long.
func (r *Reconciler) silent(ctx context.Context) error {
	now := r.cfg.Now()
	if r.silentSince.IsZero() {
		r.silentSince = now
	}
	if now.Sub(r.silentSince) < lostAfter || ctx.Err() != nil {
		return nil
	}
	hosts := []string{r.hostID}
	if r.hostID == "" { // it has not answered since we started: there is one host
		known, err := r.cfg.Store.Hosts(ctx)
		if err != nil {
			return err
		}
		hosts = nil
		for _, h := range known {
			hosts = append(hosts, h.ID)
		}
	}
	var errs []error
	for _, host := range hosts {
		rows, err := r.cfg.Store.LiveCapsules(ctx, host)
		errs = append(errs, err)
		for _, row := range rows {
			if row.State == nestbox.StateRunning {
				_, err := r.move(ctx, row.ID, nestbox.TriggerLost, reasonSilent)
				errs = append(errs, unlessOvertaken(err))
			}
		}
	}
	return errors.Join(errs...)
}

// settle brings a live row and what the host has of it together.
func (r *Reconciler) settle(ctx context.Context, host hostagent.Info, row nestbox.Capsule, status hostagent.Status, found bool) error {
	if row.State == nestbox.StateStopping {
		err := r.cfg.finishDestroy(ctx, row.ID)
		if err == nil {
			r.cfg.Log.Info("finished the destruction of a capsule", keyCapsule, row.ID)
		}
		return err
	}
	if !found { // it may have come since the host was asked
		var err error
		status, err = r.cfg.Host.Get(ctx, row.ID)
		if err != nil && nestbox.CodeOf(err) != nestbox.CodeNotFound {
			return err
		}
		found = err == nil
	}
	if status.State == hostagent.StateRunning && r.isOverdue(row) {
		return r.expire(ctx, row.ID)
	}
	inFlight := !row.CreatedAt.Before(host.StartedAt) && r.cfg.Now().Sub(row.CreatedAt).Abs() < interrupted
	trigger, reason := judge(row.State, status, found, inFlight)
	if trigger == "" {
		return nil
	}
	after, err := r.move(ctx, row.ID, trigger, reason)
	if err != nil {
		return unlessOvertaken(err)
	}
	if found && !after.State.Live() && status.State != hostagent.StateAside {
		return r.free(ctx, row.ID, reason)
	}
	return nil
}

// isOverdue reports whether nobody has used a running capsule for longer than it was made
// for. While no server ran nobody could.
func (r *Reconciler) isOverdue(row nestbox.Capsule) bool {
	limit := time.Duration(row.TimeoutSec) * time.Second
	return row.State == nestbox.StateRunning && limit > 0 &&
		min(r.activity.idleFor(row, r.cfg.Now()), r.cfg.Now().Sub(r.begun)) >= limit
}

// expire ends a capsule that nobody uses. What was noted of its use when it was last read
// may have gone into the store since, so that it is read again.
func (r *Reconciler) expire(ctx context.Context, id string) error {
	row, err := r.cfg.Store.Capsule(ctx, id)
	if err != nil || !r.isOverdue(row) {
		return err
	}
	reason := fmt.Sprintf("nobody used it for %v", time.Duration(row.TimeoutSec)*time.Second)
	if _, err := r.move(ctx, row.ID, nestbox.TriggerDestroy, reason); err != nil {
		return unlessOvertaken(err)
	}
	return r.cfg.finishDestroy(ctx, row.ID)
}

// judge decides what follows for a row in a state from what the host has of
// it, if it has. inFlight is whether a create may still be at work on it. It
// returns "" if nothing follows.
func judge(state nestbox.CapsuleState, status hostagent.Status, found, inFlight bool) (trigger nestbox.Trigger, reason string) {
	starting := state == nestbox.StateStarting
	switch {
	case found && status.State == hostagent.StateDead && starting:
		return nestbox.TriggerFailed, status.Reason
	case found && status.State == hostagent.StateDead:
		return nestbox.TriggerCrashed, status.Reason
	case found && status.State == hostagent.StateAside && starting && !inFlight:
		return nestbox.TriggerFailed, status.Reason
	case found && status.State == hostagent.StateAside && state == nestbox.StateRunning:
		return nestbox.TriggerLost, status.Reason
	case found && status.State == hostagent.StateRunning && state == nestbox.StateMissing:
		return nestbox.TriggerFound, ""
	case found && status.State == hostagent.StateRunning && starting && !inFlight:
		return nestbox.TriggerStarted, ""
	case !found && starting && !inFlight:
		return nestbox.TriggerFailed, reasonInterrupted
	case !found && !starting:
		return nestbox.TriggerCrashed, reasonLost
	}
	return "", ""
}

// sweep frees a capsule of the host that had no live row when it was looked
// for.
func (r *Reconciler) sweep(ctx context.Context, status hostagent.Status) error {
	row, err := r.cfg.Store.Capsule(ctx, status.ID)
	switch {
	case status.State == hostagent.StateAside:
		return nil // it is left as it is until somebody destroys it
	case nestbox.CodeOf(err) == nestbox.CodeNotFound:
		if r.cfg.Now().Sub(status.CreatedAt) < interrupted {
			return nil // never hasty with what we know nothing of
		}
	case err != nil:
		return err
	case row.State.Live():
		r.cfg.Log.Warn("the host has a capsule that belongs to another host; it is left alone", keyCapsule, row.ID, "owner", row.HostID)
		return nil
	}
	if _, err := r.cfg.Host.Get(ctx, status.ID); nestbox.CodeOf(err) == nestbox.CodeNotFound {
		return nil // somebody else has freed it since
	}
	return r.free(ctx, status.ID, "it has no live record")
}

func (r *Reconciler) free(ctx context.Context, id, reason string) error {
	err := r.cfg.Host.Destroy(ctx, id)
	if err == nil {
		r.cfg.Log.Info("freed a capsule on its host", keyCapsule, id, keyReason, reason)
	}
	return err
}

// unlessOvertaken drops the error of a transition that came too late: somebody
// else moved the capsule, or it is forgotten.
func unlessOvertaken(err error) error {
	switch nestbox.CodeOf(err) {
	case nestbox.CodeInvalidState, nestbox.CodeNotFound:
		return nil
	}
	return err
}
