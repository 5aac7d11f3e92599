package envd

import (
	"bytes"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// look is one reading of /proc: what the processes were then, but for us, the
// living leaders of trees, and those that are in the control group of a tree.
// The latter are many, and each tree asks its own group.
type look struct {
	stats    []procStat // the newest first
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

// look reads /proc.
func (t *table) look() *look {
	l := &look{marks: map[int]processMark{}}
	var pids []int
	pids, l.err = listPIDs()
	self := os.Getpid()
	pids = slices.DeleteFunc(pids, func(pid int) bool { return pid == self || t.leads(pid, nil) })
	grouped := t.groupedOf(pids)
	for _, pid := range slices.Backward(pids) {
		if grouped[pid] {
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

// groupedOf returns which processes are in control groups of trees. It asks the
// groups or the processes, whichever are fewer.
func (t *table) groupedOf(pids []int) map[int]bool {
	grouped := map[int]bool{}
	if t.groups.root == "" || len(pids) == 0 {
		return grouped
	}
	marks := t.groupMarks()
	if len(pids) <= len(marks) {
		for _, pid := range pids {
			grouped[pid] = t.markByGroup(pid) != ""
		}
		return grouped
	}
	for _, mark := range marks {
		for pid := range (&treeGroup{dir: filepath.Join(t.groups.root, mark)}).pids() {
			grouped[pid] = true
		}
	}
	return grouped
}

// groupMarks returns the marks of the trees that have control groups.
func (t *table) groupMarks() []string {
	if t.groups.root == "" {
		return nil
	}
	return slices.DeleteFunc(readNames(t.groups.root), func(name string) bool { return !t.isMark(name) })
}

// markByGroup returns the mark of the tree whose control group a process is in,
// "" = of none.
func (t *table) markByGroup(pid int) string {
	var buf [256]byte
	text, err := readProc("/proc/"+strconv.Itoa(pid)+"/cgroup", buf[:])
	if name := path.Base(string(bytes.TrimSpace(text))); err == nil && t.isMark(name) {
		return name
	}
	return ""
}

// isMark reports whether a string is a mark of this table, so that it can be
// used as the name of a file.
func (t *table) isMark(s string) bool {
	number, ok := strings.CutPrefix(s, t.marks+"-")
	_, err := strconv.ParseUint(number, 10, 64)
	return ok && err == nil
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

// readMark reads a mark. A process without any environment may be in the middle of
// an exec, even if it shows one or a command line a moment later.
func readMark(pid int) processMark {
	mark, some := markOf(pid)
	if some {
		return processMark{mark: mark}
	}
	now, err := readStat(pid)
	return processMark{unknown: err != nil || now.dead() || !now.kernel}
}

// opaque are processes that show no environment: they were started without one, or
// never show it, as those in which gVisor runs programs. Each is taken to be in
// the middle of an exec for a while, once. The zero value is ready.
type opaque struct {
	mu    sync.Mutex
	since map[procID]time.Time
}

// procID names a process for good.
type procID struct {
	pid   int
	start uint64
}

const (
	longestExec = 250 * time.Millisecond
	maxOpaque   = 1 << 12
)

// mayExec reports whether a process that shows no environment may be in the middle
// of an exec.
func (o *opaque) mayExec(s procStat) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.since) > maxOpaque || o.since == nil {
		o.since = map[procID]time.Time{}
	}
	first, ok := o.since[procID{s.pid, s.start}]
	if !ok {
		o.since[procID{s.pid, s.start}] = time.Now()
		return true
	}
	return time.Since(first) < longestExec
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
