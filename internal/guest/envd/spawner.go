package envd

import (
	"context"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// withheld are the capabilities that no process gets: they would exempt it
// from RLIMIT_NPROC, so that a fork bomb could keep even envd from forking.
var withheld = [...]uintptr{unix.CAP_SYS_RESOURCE, unix.CAP_SYS_ADMIN}

// spawner forks. It does so on one thread of its own, whose capability bounding
// set children inherit. Nothing is lost by forking one at a time: the Go
// runtime does that in any case.
type spawner struct {
	requests chan spawnRequest
	done     chan struct{}
}

type spawnRequest struct {
	path   string
	argv   []string
	attr   *syscall.ProcAttr
	answer chan<- spawnAnswer
}

type spawnAnswer struct {
	pid int
	err error
}

func startSpawner() *spawner {
	s := &spawner{requests: make(chan spawnRequest), done: make(chan struct{})}
	go s.run()
	return s
}

func (s *spawner) run() {
	defer close(s.done)
	runtime.LockOSThread() // for good: the thread ends with the goroutine
	withholdCapabilities()
	for r := range s.requests {
		pid, err := syscall.ForkExec(r.path, r.argv, r.attr)
		r.answer <- spawnAnswer{pid, err}
	}
}

// spawn forks and executes path. Once it has begun it does not end early.
func (s *spawner) spawn(ctx context.Context, path string, argv []string, attr *syscall.ProcAttr) (int, error) {
	answer := make(chan spawnAnswer, 1)
	select {
	case s.requests <- spawnRequest{path, argv, attr, answer}:
		a := <-answer
		return a.pid, a.err
	case <-ctx.Done():
		return 0, contextError(ctx)
	}
}

// close ends the thread. There must be no spawn any more.
func (s *spawner) close() {
	close(s.requests)
	<-s.done
}

// withholdCapabilities removes what is withheld from the sets of this thread
// that a child's exec draws on. Failing means that envd has not the right to,
// and then it has no such capability to pass on either.
func withholdCapabilities() {
	for _, c := range withheld {
		_ = unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	if unix.Capget(&header, &sets[0]) != nil {
		return
	}
	for _, c := range withheld {
		sets[c/32].Inheritable &^= 1 << (c % 32)
	}
	_ = unix.Capset(&header, &sets[0])
}
