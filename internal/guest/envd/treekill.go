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

	// maxHunt bounds how often it is looked for members that hide among
	// processes which come and go.
	maxHunt = 200
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
}

// killTree ends p's tree and returns when none of it is left. CodeTimeout: it
// did not die; CodeUnavailable: ctx ended.
func (t *table) killTree(ctx context.Context, p *process, how guest.Kill) error {
	k := &treeKill{table: t, tree: p, self: os.Getpid(), own: ownSession(), seen: map[int]uint64{}}
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

// destroy freezes the tree, so that it cannot fork away, and kills it, again
// and again until none is left.
func (k *treeKill) destroy(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, killPatience)
	defer cancel()
	for {
		members, err := k.freeze(limited)
		for _, m := range members {
			k.signal(m, unix.SIGKILL)
		}
		if err != nil {
			return err
		}
		if k.waitSeen(limited) == nil {
			gone, err := k.gone(unix.SIGSTOP)
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
	frozen := map[int]uint64{}
	for {
		members, _, err := k.members()
		if err != nil {
			return members, err
		}
		fresh := 0
		for _, m := range members {
			if frozen[m.pid] != m.start {
				frozen[m.pid] = m.start
				fresh++
				k.signal(m, unix.SIGSTOP)
			}
		}
		if fresh == 0 || ctx.Err() != nil {
			return members, nil
		}
	}
}

// waitGone waits until no member of the tree is left.
func (k *treeKill) waitGone(ctx context.Context) error {
	for {
		if err := k.waitSeen(ctx); err != nil {
			return err
		}
		gone, err := k.gone(0)
		if err != nil || gone {
			return err
		}
	}
}

// gone reports whether no member is left. Members that it finds by hunting get
// sig, if it is not 0.
func (k *treeKill) gone(sig syscall.Signal) (bool, error) {
	left, churn, err := k.members()
	if err != nil || len(left) > 0 {
		return false, err
	}
	return !churn || !k.hunt(sig), nil
}

// hunt looks for members among processes that come and go, in which a member
// can hide from members: it goes on as its own child all the time, and is gone
// before it was looked at. Each pass therefore looks only at what was not
// there before, newest first. A pass in which nothing has vanished has seen
// everybody, because /proc is listed in the order of PIDs. Where there is no
// such pass, because others come and go too, many passes must do.
func (k *treeKill) hunt(sig syscall.Signal) bool {
	strangers := map[int]bool{k.self: true}
	for range maxHunt {
		pids, err := listPIDs()
		if err != nil {
			return false
		}
		churn := false
		for _, pid := range slices.Backward(pids) {
			if strangers[pid] || k.table.leads(pid, k.tree) {
				continue
			}
			mark := markOf(pid)
			s, err := readStat(pid)
			if err == nil && mark == k.tree.mark {
				k.seen[s.pid] = s.start
				if sig != 0 {
					k.signal(s, sig)
				}
				return true
			}
			churn = churn || err != nil || s.dead()
			strangers[pid] = err == nil
		}
		if !churn {
			return false
		}
	}
	return false
}

// waitSeen waits until all members that were seen are gone.
func (k *treeKill) waitSeen(ctx context.Context) error {
	pause := minRescan
	timer := time.NewTimer(pause)
	defer timer.Stop()
	for {
		reaped := k.table.reaper.nextReap()
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
// those that do not.
func (k *treeKill) anySeen() bool {
	for pid, start := range k.seen {
		stat, err := readStat(pid)
		if err == nil && stat.start == start && k.lives(stat) {
			return true
		}
		delete(k.seen, pid)
	}
	return false
}

// lives reports whether a member is more than a zombie. It reaps orphans, so
// that none is left when Kill answers; the zombie of another parent goes with
// that parent.
func (k *treeKill) lives(stat procStat) bool {
	if !stat.dead() {
		return true
	}
	if stat.ppid == k.self {
		k.table.reaper.reapOrphan(stat.pid)
	}
	return false
}

// members returns the living processes of the tree as they are now: the
// leader; whose parent is a member; who is in the session of a member; who
// bears the mark; and who was seen as a member before. With churn, processes
// have vanished meanwhile that may have been members.
func (k *treeKill) members() (living []procStat, churn bool, err error) {
	others, churn, err := k.candidates()
	if err != nil {
		return nil, false, err
	}
	var found []procStat
	member := map[int]bool{}
	sessions := map[int]bool{}
	add := func(s procStat) {
		found = append(found, s)
		member[s.pid] = true
		if s.session != k.own && s.session > 0 {
			sessions[s.session] = true
		}
	}
	// closeOver adds everybody who belongs to a member, until nobody is left who does.
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
	strangers := map[int]bool{} // whose environment was read already
	closeOver(func(s procStat) bool {
		if strangers[s.pid] {
			return false
		}
		strangers[s.pid] = true
		yes, vanished := k.marked(s)
		churn = churn || vanished
		return yes
	})
	living = slices.DeleteFunc(found, func(s procStat) bool { return !k.lives(s) })
	for _, s := range living {
		k.seen[s.pid] = s.start
	}
	return living, churn || len(living) < len(found), nil
}

// candidates reads all processes that may belong to the tree: not us, and not
// the leaders of other trees, of which there may be many.
func (k *treeKill) candidates() (stats []procStat, churn bool, err error) {
	pids, err := listPIDs()
	if err != nil {
		return nil, false, nestbox.Errorf(nestbox.CodeGuest, "list processes: %w", err)
	}
	stats = make([]procStat, 0, len(pids))
	for _, pid := range pids {
		if pid == k.self || k.table.leads(pid, k.tree) {
			continue
		}
		s, err := readStat(pid)
		if err != nil {
			churn = true
			continue
		}
		stats = append(stats, s)
	}
	return stats, churn, nil
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
	return s.pid == k.tree.pid && k.table.reaper.alive(k.tree.child)
}

// marked reports whether a process was started with the tree's mark, or is in
// the session of its leader. While the leader is not reaped its number is its
// own, and so is its session; afterwards a session of that number is the
// tree's only if no new process bears the number, and its members no other
// mark.
func (k *treeKill) marked(s procStat) (yes, vanished bool) {
	if s.dead() {
		return false, true // no environment left
	}
	leaderAlive := k.table.reaper.alive(k.tree.child)
	if leaderAlive && s.session == k.tree.pid {
		return true, false
	}
	if s.session > 0 && k.table.leads(s.session, k.tree) {
		return false, false // a session cannot be joined: this is of another tree
	}
	switch markOf(s.pid) {
	case k.tree.mark:
		return true, false
	case "":
		if now, err := readStat(s.pid); err != nil || now.dead() {
			return false, true
		}
		return !leaderAlive && s.session == k.tree.pid && !k.table.numberReused(k.tree), false
	}
	return false, false
}

// numberReused reports whether another process bears, or bore, the number of
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
