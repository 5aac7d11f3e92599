package envd

import (
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

const (
	// killPatience is how long a tree may survive SIGKILL, in uninterruptible
	// sleep for example, before Kill gives up.
	killPatience = 30 * time.Second

	// While a kill goes on, processes that are not our children are looked at
	// again after these times; of our own children the reaper tells.
	minRescan = 2 * time.Millisecond
	maxRescan = 100 * time.Millisecond

	// maxLooks bounds how often it is looked for members that hide among
	// processes which come and go.
	maxLooks = 200

	// forgetStrangers is how long a process that is no member is not looked
	// at again: less than it can take to use up all PIDs.
	forgetStrangers = time.Second
)

// treeKill is one kill of one tree.
type treeKill struct {
	table *table
	tree  *process
	self  int // our PID
	own   int // our session
	// seen are the members that were found so far, by PID with their start
	// time: what was a member stays one when its parent dies.
	seen map[int]uint64
	// strangers are the PIDs of processes that were looked at and are no
	// members. They cannot become members, so they are not looked at again,
	// until their numbers might be used again.
	strangers      map[int]struct{}
	strangersSince time.Time
	// grouped are the members of the tree's control group, as of this look.
	grouped map[int]struct{}
	// freezing stops members as soon as they are found.
	freezing bool
}

// killTree ends p's tree and returns when none of it is left. CodeTimeout: it
// did not die; CodeUnavailable: ctx ended.
func (t *table) killTree(ctx context.Context, p *process, how guest.Kill) error {
	k := &treeKill{table: t, tree: p, self: os.Getpid(), own: ownSession(), seen: map[int]uint64{}, strangers: map[int]struct{}{}}
	if how.Signal != 0 && how.Signal != unix.SIGKILL {
		grace := how.Grace
		if grace == 0 {
			grace = guest.DefaultGrace
		}
		if err := k.terminate(ctx, how.Signal, grace); err == nil {
			return k.leader(ctx)
		}
	}
	if err := k.destroy(ctx); err != nil {
		return err
	}
	return k.leader(ctx)
}

// leader waits until the leader's end is recorded.
func (k *treeKill) leader(ctx context.Context) error {
	select {
	case <-k.tree.done:
		return nil
	case <-ctx.Done():
		return errClosed()
	}
}

// terminate asks the tree to end, and waits for that for a while.
func (k *treeKill) terminate(ctx context.Context, sig syscall.Signal, grace time.Duration) error {
	members, _, err := k.members()
	if err != nil {
		return err
	}
	for _, m := range members {
		k.signal(m, sig)
		if m.state == 'T' {
			k.signal(m, unix.SIGCONT) // a stopped process cannot heed a signal
		}
	}
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	return k.waitGone(ctx)
}

// destroy kills the tree's control group. Then it freezes who is not in it, so
// that they cannot fork away, and kills them, again and again until none is
// left.
func (k *treeKill) destroy(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, killPatience)
	defer cancel()
	for {
		k.tree.group.kill()
		members, err := k.freeze(limited)
		for _, m := range members {
			k.signal(m, unix.SIGKILL)
		}
		if err != nil {
			return err
		}
		if k.waitSeen(limited) == nil {
			gone, err := k.gone()
			if err != nil || gone {
				return err
			}
		}
		if ctx.Err() != nil {
			return errClosed()
		}
		if limited.Err() != nil {
			return nestbox.Errorf(nestbox.CodeTimeout, "processes %v do not die; they may be waiting for a device", slices.Sorted(maps.Keys(k.seen)))
		}
	}
}

// freeze stops all members of the tree, and looks again until there are no
// new ones. It returns all that it found, also with an error.
func (k *treeKill) freeze(ctx context.Context) ([]procStat, error) {
	k.freezing = true
	defer func() { k.freezing = false }()
	for {
		before := len(k.seen)
		members, _, err := k.members()
		if err != nil || len(k.seen) == before || ctx.Err() != nil {
			return members, err
		}
	}
}

// waitGone waits until no member of the tree is left.
func (k *treeKill) waitGone(ctx context.Context) error {
	for {
		if err := k.waitSeen(ctx); err != nil {
			return err
		}
		gone, err := k.gone()
		if err != nil || gone {
			return err
		}
	}
}

// gone reports whether no member is left. A member can hide from one look: it
// goes on as its own child all the time, and is gone before it was looked at.
// A look during which nothing has vanished has seen everybody, because /proc
// lists processes in the order of their PIDs. Where there is no such look,
// because others come and go too, many looks must do.
func (k *treeKill) gone() (bool, error) {
	for range maxLooks {
		left, churn, err := k.members()
		if err != nil || len(left) > 0 {
			return false, err
		}
		if !churn {
			break
		}
	}
	return true, nil
}

// waitSeen waits until all members that were seen are gone.
func (k *treeKill) waitSeen(ctx context.Context) error {
	pause := minRescan
	timer := time.NewTimer(pause)
	defer timer.Stop()
	reaped, stop := k.table.reaper.watch(slices.Collect(maps.Keys(k.seen)))
	defer stop()
	for {
		if !k.anySeen() {
			return nil
		}
		timer.Reset(pause)
		select {
		case <-reaped:
		case <-timer.C:
			pause = min(2*pause, maxRescan)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// anySeen reports whether a member that was seen still lives, and forgets
// those that do not. As long as the leader lives, that takes no look at it.
func (k *treeKill) anySeen() bool {
	if _, ok := k.seen[k.tree.pid]; ok && k.table.reaper.alive(k.tree.child) {
		return true
	}
	for pid, start := range k.seen {
		stat, err := readStat(pid)
		if err == nil && stat.start == start && k.lives(stat) {
			return true
		}
		delete(k.seen, pid)
	}
	return false
}

// lives reports whether a member is still there. It reaps orphans itself, so
// that no zombie is left when Kill answers. The zombie of a parent that lives
// counts too: the parent is a member, and with its end the zombie comes to us.
func (k *treeKill) lives(s procStat) bool {
	return !s.dead() || s.ppid != k.self || !k.table.reaper.reapOrphan(s)
}

// members returns the living processes of the tree as they are now: the
// leader; who is in the tree's control group; whose parent is a member; who is
// in the session of a member; who has the mark; and who was seen as a member
// before. With churn, there were
// processes that may have been members: they have vanished, or were in the
// middle of an exec.
func (k *treeKill) members() (living []procStat, churn bool, err error) {
	k.grouped = k.tree.group.pids()
	seen := k.table.looks.next(k.table.look)
	if seen.err != nil {
		return nil, false, nestbox.Errorf(nestbox.CodeGuest, "list processes: %w", seen.err)
	}
	others, churn := k.candidates(seen)
	member := map[int]bool{}
	sessions := map[int]bool{}
	add := func(s procStat) {
		member[s.pid] = true
		delete(k.strangers, s.pid)
		if s.session != k.own && s.session > 0 {
			sessions[s.session] = true
		}
		if !k.lives(s) {
			churn = true
			return
		}
		if k.freezing && k.seen[s.pid] != s.start {
			k.signal(s, unix.SIGSTOP)
		}
		k.seen[s.pid] = s.start
		living = append(living, s)
	}
	// closeOver adds everybody who belongs, or belongs to a member, until
	// nobody is left who does.
	closeOver := func(belongs func(procStat) bool) {
		for more := true; more; {
			more = false
			others = slices.DeleteFunc(others, func(s procStat) bool {
				yes := belongs(s) || member[s.ppid] || sessions[s.session]
				if yes {
					add(s)
					more = true
				}
				return yes
			})
		}
	}
	closeOver(k.known)
	closeOver(func(s procStat) bool {
		if _, ok := k.strangers[s.pid]; ok {
			return false
		}
		yes, unknown := k.marked(seen, s)
		churn = churn || unknown
		if !yes && (!unknown || s.dead()) {
			k.strangers[s.pid] = struct{}{}
		}
		return yes
	})
	return living, churn, nil
}

// candidates returns the processes that may belong to the tree: not those that
// were found strangers, and not the leaders of other trees.
func (k *treeKill) candidates(seen *look) (stats []procStat, churn bool) {
	if now := time.Now(); now.Sub(k.strangersSince) > forgetStrangers {
		clear(k.strangers)
		k.strangersSince = now
	}
	missing := map[int]struct{}{}
	maps.Copy(missing, k.grouped)
	for pid := range k.seen { // who has gone to another group since
		missing[pid] = struct{}{}
	}
	for _, s := range seen.stats {
		_, stranger := k.strangers[s.pid]
		_, grouped := k.grouped[s.pid]
		if grouped || !stranger {
			stats = append(stats, s)
		}
		delete(missing, s.pid)
	}
	for _, pid := range seen.vanished {
		_, stranger := k.strangers[pid]
		_, grouped := k.grouped[pid]
		// Who hides from one look after the other cannot have left our control
		// group too, if we have one.
		churn = churn || grouped || !stranger && k.tree.group == nil
		delete(missing, pid)
	}
	// The look leaves out leaders, and who is in the control group of a tree. Only
	// ours are of interest.
	if k.table.reaper.alive(k.tree.child) {
		missing[k.tree.pid] = struct{}{}
	}
	for pid := range missing {
		s, err := readStat(pid)
		if err != nil {
			churn = true
			continue
		}
		stats = append(stats, s)
	}
	return stats, churn
}

// leads reports whether pid is the living leader of another tree than p's.
func (t *table) leads(pid int, p *process) bool {
	t.mu.Lock()
	other := t.byPID[pid]
	t.mu.Unlock()
	return other != nil && other != p && t.reaper.alive(other.child)
}

// known reports what needs no look at the environment.
func (k *treeKill) known(s procStat) bool {
	if start, ok := k.seen[s.pid]; ok && start == s.start {
		return true
	}
	if _, ok := k.grouped[s.pid]; ok {
		return true
	}
	return s.pid == k.tree.pid && k.table.reaper.alive(k.tree.child)
}

// marked reports whether a process was started with the tree's mark, or is in
// the session of its leader. While the leader is not reaped its number is its
// own, and so is its session; afterwards a session of that number is the
// tree's only if no new process has the number, and its members no other
// mark.
func (k *treeKill) marked(seen *look, s procStat) (yes, unknown bool) {
	if s.dead() {
		return false, true // no environment left
	}
	leaderAlive := k.table.reaper.alive(k.tree.child)
	if leaderAlive && s.session == k.tree.pid {
		return true, false
	}
	m := seen.mark(s.pid)
	switch {
	case m.mark != "" && m.mark != k.tree.mark:
		return false, false
	case s.session > 0 && k.table.leads(s.session, k.tree):
		return false, false // a session cannot be joined: this is of another tree
	case m.mark != "":
		return true, false
	case !leaderAlive && s.session == k.tree.pid && !k.table.numberReused(k.tree):
		return true, false
	}
	return false, m.unknown && k.table.opaque.mayExec(s)
}

// numberReused reports whether another process has, or had, the number of
// p's leader.
func (t *table) numberReused(p *process) bool {
	t.mu.Lock()
	newest := t.byPID[p.pid]
	t.mu.Unlock()
	if newest != p {
		return true
	}
	_, err := readStat(p.pid)
	return err == nil
}

// signal sends sig to exactly the process that was seen, if it still is there.
func (k *treeKill) signal(s procStat, sig syscall.Signal) {
	fd, err := unix.PidfdOpen(s.pid, 0)
	switch {
	case err == nil:
		defer func() { _ = unix.Close(fd) }()
		if now, err := readStat(s.pid); err == nil && now.start == s.start {
			_ = unix.PidfdSendSignal(fd, sig, nil, 0)
		}
	case errors.Is(err, unix.ESRCH):
	default: // no pidfds here, or no descriptor left
		k.table.reaper.signalSeen(s, sig)
	}
}
