package gvisor

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox/internal/cgroup"
	"github.com/nestbox/nestbox/internal/pidfd"
)

// gVisor (platform systrap) runs the programs of a sandbox in processes of the
// host, for each program one that it forks from a first one, and others that
// that one forks, which execute the program's code. What a program asks of the
// kernel is done in the sentry. prioritize makes the processes of programs
// known by their priority.

// prioritize has the sandbox's kernel and its daemon go before the programs
// inside, however many of those want the sandbox's share of CPU time: nice(2)
// counts among the processes of one control group. gVisor runs the programs in
// processes that it forks from a first one, so that they get its priority; the
// daemon's was forked before. If the host runs out of memory, sandboxes go
// before anything else there, the one that holds the most first.
func (b *running) prioritize() error {
	pids, err := b.d.cgroup(b.id).Procs()
	if err != nil {
		return err
	}
	var first pidfd.Process
	for _, pid := range pids {
		path := filepath.Join("/proc", strconv.Itoa(pid), "oom_score_adj")
		if err := os.WriteFile(path, []byte(firstToGo), 0); err != nil {
			return err
		}
		if pid == b.rec.Sentry.PID || pid == b.rec.Gofer.PID {
			continue
		}
		p, err := pidfd.Lookup(pid)
		if err == nil && (first.PID == 0 || p.Start < first.Start || p.Start == first.Start && p.PID < first.PID) {
			first = p
		}
	}
	if first.PID == 0 {
		return nil // a platform without such processes
	}
	return syscall.Setpriority(syscall.PRIO_PROCESS, first.PID, lowestPriority)
}

const (
	lowestPriority = 19    // of nice(2)
	firstToGo      = "900" // of 1000; proc_pid_oom_score_adj(5)
)

// programs are the processes that execute the code of a sandbox's programs, but
// for its daemon's. It is used by one goroutine.
type programs struct {
	group   *cgroup.Group
	kernel  int                   // PID of the sentry
	stopped map[int]time.Duration // by PID, when they started
}

// settled is how old a process must be to be stopped: the sentry traces new ones
// while it prepares them, and any signal to those upsets it.
const settled = 200 * time.Millisecond

// stop has the programs stand still, as SIGSTOP does: what they ask of the
// kernel is still done. New ones come as long as not all are stopped.
func (p *programs) stop() {
	var now unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) != nil {
		return
	}
	p.each(func(pid int, s stub) {
		if s.stopped || time.Duration(now.Nano())-s.started < settled || traced(pid) {
			return
		}
		if syscall.Kill(pid, syscall.SIGSTOP) == nil {
			p.stopped[pid] = s.started
		}
	})
}

// goOn ends stop.
func (p *programs) goOn() {
	for pid, started := range p.stopped { // also those that have not noticed yet
		if s, err := readStub(pid); err == nil && s.started == started {
			_ = syscall.Kill(pid, syscall.SIGCONT)
		}
	}
	clear(p.stopped)
}

// adopt takes over what an earlier process of ours stopped.
func (p *programs) adopt() {
	p.each(func(pid int, s stub) {
		if s.stopped {
			p.stopped[pid] = s.started
		}
	})
}

func (p *programs) each(do func(pid int, s stub)) {
	pids, err := p.group.Procs()
	if err != nil {
		return
	}
	for _, pid := range pids {
		if s, err := readStub(pid); err == nil && s.nice == lowestPriority && s.parent != p.kernel {
			do(pid, s)
		}
	}
}

// stub is what is to be known of a process of a sandbox.
type stub struct {
	parent  int
	nice    int
	stopped bool
	started time.Duration // after the machine
}

// readStub reads /proc/<pid>/stat; see proc_pid_stat(5).
func readStub(pid int) (stub, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return stub{}, err
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:])) // from field 3 on
	if len(fields) < 20 {
		return stub{}, fmt.Errorf("/proc/%d/stat is not understood", pid)
	}
	parent, err := strconv.Atoi(fields[4-3])
	nice, err2 := strconv.Atoi(fields[19-3])
	ticks, err3 := strconv.ParseInt(fields[22-3], 10, 64)
	const tick = time.Second / 100 // USER_HZ
	return stub{parent, nice, fields[0] == "T", time.Duration(ticks) * tick}, errors.Join(err, err2, err3)
}

// traced reports whether a process is traced, or cannot be looked at.
func traced(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	return err != nil || !bytes.Contains(text, []byte("\nTracerPid:\t0\n"))
}
