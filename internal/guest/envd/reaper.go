package envd

import (
	"errors"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// reaper waits for the children of this OS process: those that were started
// through it, and orphans that the kernel gave us as PID 1 or as child
// subreaper. It has no timer: SIGCHLD wakes it.
//
// As long as a child is registered its PID cannot be used again, because
// nobody else waits for it: that makes signal safe.
type reaper struct {
	mu       sync.Mutex
	children map[int]*child
	forks    map[uint64]struct{} // forks that are going on
	nextFork uint64
	heldPID  int    // a dead child that is not registered (yet?) …
	heldFork uint64 // … and is none of the forks from here on

	watchers map[int][]chan struct{} // by PID: who wants to know when it is reaped

	signals inheritedSignals
	uncatch func()

	wake chan os.Signal
	done chan struct{}
}

// child is a process that was started through the reaper.
type child struct {
	pid    int
	exited func(unix.WaitStatus) // called once, from the reaper's goroutine; must not block
}

// reapers holds the one reaper of this OS process as long as an Envd uses it.
// It is the only state of the package outside an Envd, because the thing it
// stands for, the process's children and what wait(2) says of them, exists
// once per OS process too.
var reapers struct {
	mu     sync.Mutex
	users  int
	reaper *reaper
}

// acquireReaper starts the reaper if it does not run yet. Every call needs a
// releaseReaper.
func acquireReaper() (*reaper, error) {
	reapers.mu.Lock()
	defer reapers.mu.Unlock()
	if reapers.users == 0 {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil && os.Getpid() != 1 {
			return nil, os.NewSyscallError("prctl(PR_SET_CHILD_SUBREAPER)", err)
		}
		r := &reaper{
			children: map[int]*child{},
			forks:    map[uint64]struct{}{},
			watchers: map[int][]chan struct{}{},
			wake:     make(chan os.Signal, 1),
			done:     make(chan struct{}),
			signals:  readInheritedSignals(),
		}
		r.uncatch = r.signals.catch()
		signal.Notify(r.wake, unix.SIGCHLD)
		r.kick() // for what died before Notify
		go r.run()
		reapers.reaper = r
	}
	reapers.users++
	return reapers.reaper, nil
}

// releaseReaper stops the reaper when nobody uses it any more.
func releaseReaper() {
	reapers.mu.Lock()
	defer reapers.mu.Unlock()
	reapers.users--
	if reapers.users > 0 {
		return
	}
	r := reapers.reaper
	reapers.reaper = nil
	r.uncatch()
	signal.Stop(r.wake)
	close(r.wake)
	<-r.done
}

func (r *reaper) run() {
	defer close(r.done)
	for range r.wake {
		for r.reapNext() {
		}
	}
}

// kick makes the reaper look, as SIGCHLD does.
func (r *reaper) kick() {
	select {
	case r.wake <- unix.SIGCHLD:
	default:
	}
}

// start runs fork, which returns the PID of a new child of ours, and
// registers it. A child that dies before it is registered is not reaped until
// then, so that no exit is missed.
func (r *reaper) start(fork func() (int, error), exited func(unix.WaitStatus)) (*child, error) {
	r.mu.Lock()
	id := r.nextFork
	r.nextFork++
	r.forks[id] = struct{}{}
	r.mu.Unlock()

	pid, err := r.signals.unblocked(fork)

	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.forks, id)
	held := r.heldPID != 0
	if held {
		defer r.kick()
	}
	if err != nil {
		r.heldPID = 0 // may have been the fork that failed, reaped by the caller that forked
		return nil, err
	}
	c := &child{pid: pid, exited: exited}
	r.children[pid] = c
	return c, nil
}

// reapNext reaps one dead child, if there is one that is ours to reap.
func (r *reaper) reapNext() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid := peek(unix.P_ALL, 0)
	switch {
	case pid == 0:
		return false
	case r.children[pid] != nil || r.isOrphan(pid):
		return r.reap(pid)
	}
	// Somebody else's child stands in the way. That is never so in a capsule,
	// where we are PID 1 and the only one who forks.
	for pid := range r.children {
		if peek(unix.P_PID, pid) != 0 {
			r.reap(pid)
		}
	}
	return false
}

// reap takes the exit status of a dead child. Needs mu.
func (r *reaper) reap(pid int) bool {
	var status unix.WaitStatus
	got, err := unix.Wait4(pid, &status, unix.WNOHANG, nil)
	for errors.Is(err, unix.EINTR) {
		got, err = unix.Wait4(pid, &status, unix.WNOHANG, nil)
	}
	if r.heldPID == pid {
		r.heldPID = 0
	}
	if err != nil || got != pid {
		return false
	}
	if c := r.children[pid]; c != nil {
		delete(r.children, pid)
		c.exited(status)
	}
	for _, c := range r.watchers[pid] {
		select {
		case c <- struct{}{}:
		default: // it has not looked since it was told last
		}
	}
	return true
}

// isOrphan reports whether a dead child that is not registered was adopted,
// rather than being about to be registered or started by other code of this
// program. Needs mu.
func (r *reaper) isOrphan(pid int) bool {
	if r.heldPID != pid {
		r.heldPID, r.heldFork = pid, r.nextFork
	}
	for id := range r.forks {
		if id < r.heldFork {
			return false
		}
	}
	if os.Getpid() == 1 {
		return true
	}
	// All that we start gets a session of its own; what other code starts
	// with os/exec stays in ours.
	stat, err := readStat(pid)
	return err == nil && stat.session != ownSession()
}

// reapOrphan reaps a dead child that was seen and is known to be an orphan, or
// a leader, which the reaper will see to. It reports whether that is settled.
func (r *reaper) reapOrphan(seen procStat) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.children[seen.pid] != nil {
		return true
	}
	if now, err := readStat(seen.pid); err != nil || now.start != seen.start {
		return true // it was reaped
	}
	return r.reap(seen.pid)
}

// alive reports whether c was not reaped yet.
func (r *reaper) alive(c *child) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.children[c.pid] == c
}

// signalGroup sends sig to c and its process group. ESRCH if c was reaped.
func (r *reaper) signalGroup(c *child, sig syscall.Signal) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.children[c.pid] != c {
		return unix.ESRCH
	}
	return unix.Kill(-c.pid, sig) // the leader of a session is always in its own group
}

// watch returns a channel that tells when one of pids was reaped, until stop is
// called. Each watches its own, so that a thousand who wait do not wake each
// other.
func (r *reaper) watch(pids []int) (reaped <-chan struct{}, stop func()) {
	c := make(chan struct{}, 1)
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, pid := range pids {
		r.watchers[pid] = append(r.watchers[pid], c)
	}
	return c, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, pid := range pids {
			r.watchers[pid] = slices.DeleteFunc(r.watchers[pid], func(w chan struct{}) bool { return w == c })
			if len(r.watchers[pid]) == 0 {
				delete(r.watchers, pid)
			}
		}
	}
}

// peek returns the PID of a dead child and leaves it as it is; 0 if there is
// none.
func peek(idType, id int) int {
	var info unix.Siginfo
	for {
		err := unix.Waitid(idType, id, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0
		}
		// x/sys does not name si_pid. On 64-bit machines it is the fifth int
		// of siginfo_t: after si_signo, si_errno, si_code and padding.
		return int((*[5]int32)(unsafe.Pointer(&info))[4])
	}
}

// ownSession returns the session of this OS process.
func ownSession() int {
	sid, err := unix.Getsid(0)
	if err != nil {
		return -1
	}
	return sid
}

// signalSeen sends sig to a process that was seen, where there are no pidfds.
// Nothing that is our child can be reaped, and its PID used again, between the
// look and the signal; for others that would take all PIDs to be used up
// within microseconds.
func (r *reaper) signalSeen(seen procStat, sig syscall.Signal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now, err := readStat(seen.pid); err == nil && now.start == seen.start {
		_ = unix.Kill(seen.pid, sig)
	}
}
