package envd

import (
	"os"
	"slices"
	"strconv"
	"sync"
)

// look is one reading of /proc: what the processes were then.
type look struct {
	stats    []procStat // the newest first; without us and the living leaders of trees
	vanished []int      // PIDs that were listed, and gone when they were to be read
	err      error

	mu    sync.Mutex
	marks map[int]processMark
}

// processMark is what is known of a process's mark. It is unknown of who ends,
// and in the middle of an exec, when there is no environment to read.
type processMark struct {
	mark    string
	unknown bool
}

// look reads /proc. Leaders are left out because the table knows them, and
// there may be many.
func (t *table) look() *look {
	l := &look{marks: map[int]processMark{}}
	var pids []int
	pids, l.err = listPIDs()
	self := os.Getpid()
	for _, pid := range slices.Backward(pids) {
		if pid == self || t.leads(pid, nil) {
			continue
		}
		s, err := readStat(pid)
		if err != nil {
			l.vanished = append(l.vanished, pid)
			continue
		}
		l.stats = append(l.stats, s)
	}
	return l
}

// mark returns the mark of a process of the look. It is read when it is first
// asked for.
func (l *look) mark(pid int) processMark {
	l.mu.Lock()
	defer l.mu.Unlock()
	m, ok := l.marks[pid]
	if !ok {
		m = readMark(pid)
		l.marks[pid] = m
	}
	return m
}

// readMark reads a mark. In the middle of an exec both the environment and the
// command line are empty; the command line of no program is. None counts only if
// it is seen again and again: an exec may have ended in between, and Linux sets
// the command line a moment before the environment.
func readMark(pid int) processMark {
	for range 4 {
		if mark := markOf(pid); mark != "" {
			return processMark{mark: mark}
		}
		now, err := readStat(pid)
		if err != nil || now.dead() || now.session > 0 && noCommandLine(pid) { // threads of the kernel have session 0
			return processMark{unknown: true}
		}
	}
	return processMark{}
}

func noCommandLine(pid int) bool {
	var buf [1]byte
	text, err := readProc("/proc/"+strconv.Itoa(pid)+"/cmdline", buf[:])
	return err == nil && len(text) == 0
}

// looks shares a look among all who wait for one: a look takes time that grows
// with the number of processes, and so does the number of those that are
// killed at once. The zero value is ready.
type looks struct {
	reading sync.Mutex // held by the one who looks

	mu     sync.Mutex
	coming *comingLook // has not begun
}

type comingLook struct {
	done chan struct{}
	look *look
}

// next returns a look that began after next was called.
func (l *looks) next(read func() *look) *look {
	l.mu.Lock()
	if c := l.coming; c != nil {
		l.mu.Unlock()
		<-c.done
		return c.look
	}
	c := &comingLook{done: make(chan struct{})}
	l.coming = c
	l.mu.Unlock()

	l.reading.Lock()
	l.mu.Lock()
	l.coming = nil // who comes from here on needs a later one
	l.mu.Unlock()
	c.look = read()
	l.reading.Unlock()
	close(c.done)
	return c.look
}
