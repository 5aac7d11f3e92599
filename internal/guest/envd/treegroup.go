package envd

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// treeGroups makes a control group (cgroups(7), version 2) for each process
// tree. A tree cannot leave its group by forking, whatever it does to its
// session, its parents and its environment, so that it is found and killed
// whole. Where there is no cgroup v2 that we may write to, trees are found by
// those three alone.
//
// All trees together may be limited in their number of processes and threads.
// What root starts through us may go beyond that, so that an exhausted capsule can
// be looked into: it is forked in a group aside, and moved to where it belongs,
// where it cannot fork.
type treeGroups struct {
	root    string // "" = there are none
	maxPids int    // 0 = no limit
	beyond  string // the group aside; "" = none

	mu       sync.Mutex
	occupied []*treeGroup // of ended trees of which somebody was left
}

// reservedPids is how many processes and threads there may be beyond the limit.
const reservedPids = 16

// newTreeGroups uses the hierarchy that is mounted at dir, if it is one and is
// ours to use. With a limit it has to be.
func newTreeGroups(dir string, maxPids int) (*treeGroups, error) {
	g := findTreeGroups(dir)
	if maxPids == 0 {
		return g, nil
	}
	if g.root == "" {
		return nil, fmt.Errorf("%s is no cgroup v2, which limiting the number of processes needs", dir)
	}
	g.maxPids, g.beyond = maxPids, filepath.Join(dir, "beyond")
	own := filepath.Join(dir, "envd")
	// A group that hands controllers down can have no processes itself.
	for _, step := range []func() error{
		func() error { return makeGroup(own) },
		func() error { return handDown(dir, own) },
		func() error { return setGroup(g.root, "pids.max", maxPids) },
		func() error { return makeGroup(g.beyond) },
		func() error { return setGroup(g.beyond, "pids.max", reservedPids) },
	} {
		if err := step(); err != nil {
			return nil, fmt.Errorf("limit the number of processes: %w", err)
		}
	}
	return g, nil
}

// handDown moves all processes of a group to one below it, and has it hand down
// the controller pids. Somebody may come while it does: who looks into the
// sandbox from outside.
func handDown(dir, below string) error {
	for try := 0; ; try++ {
		(&treeGroup{dir: below}).takeFrom(&treeGroup{dir: dir})
		err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+pids"), 0)
		if err == nil || !errors.Is(err, unix.EBUSY) || try == maxTries {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

// maxTries bounds how often what others may disturb for a moment is tried.
const maxTries = 1000

func makeGroup(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

func setGroup(dir, name string, value int) error {
	return os.WriteFile(filepath.Join(dir, name), []byte(strconv.Itoa(value)), 0)
}

func findTreeGroups(dir string) *treeGroups {
	var mounted unix.Statfs_t
	if dir == "" || unix.Statfs(dir, &mounted) != nil || mounted.Type != unix.CGROUP2_SUPER_MAGIC {
		return &treeGroups{}
	}
	root := filepath.Join(dir, "nestbox")
	if makeGroup(root) != nil {
		return &treeGroups{}
	}
	if _, err := os.Stat(filepath.Join(root, "cgroup.kill")); err != nil {
		return &treeGroups{} // Linux before 5.14
	}
	return &treeGroups{root: root}
}

// create makes the group of a tree that is about to start. It returns nil,
// which is a group that knows nothing, if there can be none.
func (g *treeGroups) create(mark string) *treeGroup {
	if g.root == "" {
		return nil
	}
	dir := filepath.Join(g.root, mark)
	if os.Mkdir(dir, 0o755) != nil {
		return nil
	}
	return &treeGroup{dir: dir}
}

// start forks a process of a tree in its group, if it has one: fork is given a
// descriptor of the group that it has to fork in, or -1. With reserve it may go
// beyond the limit.
func (g *treeGroups) start(group *treeGroup, reserve bool, fork func(fd int) (int, error)) (pid int, err error) {
	fd, ok := group.open()
	if !ok {
		return fork(-1)
	}
	pid, err = fork(fd)
	_ = unix.Close(fd)
	if !errors.Is(err, unix.EAGAIN) || !reserve || g.beyond == "" || g.pids() >= g.maxPids+reservedPids {
		return pid, err
	}
	aside := &treeGroup{dir: filepath.Join(g.beyond, filepath.Base(group.dir))}
	if makeGroup(aside.dir) != nil {
		return 0, err
	}
	defer aside.remove()
	if fd, ok = aside.open(); !ok {
		return 0, err
	}
	defer func() { _ = unix.Close(fd) }()
	if pid, err = fork(fd); err == nil {
		group.takeFrom(aside)
	}
	return pid, err
}

// pids returns how many processes and threads all trees have.
func (g *treeGroups) pids() int {
	text, err := os.ReadFile(filepath.Join(g.root, "pids.current"))
	n, parseErr := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || parseErr != nil {
		return math.MaxInt
	}
	return n
}

// takeFrom moves all processes of another group here: those that it has by now.
func (g *treeGroup) takeFrom(other *treeGroup) {
	for range maxTries {
		pids := other.pids()
		if len(pids) == 0 {
			return
		}
		for pid := range pids {
			_ = setGroup(g.dir, "cgroup.procs", pid) // fails if it has ended
		}
	}
}

// maxRemovals bounds how many groups one discard tries to remove.
const maxRemovals = 8

// discard removes the group of a tree whose leader has ended, as soon as nobody
// is left in it: if that is not so yet, when another one is discarded.
func (g *treeGroups) discard(group *treeGroup) {
	if group == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.occupied = append(g.occupied, group)
	for range min(len(g.occupied), maxRemovals) {
		last := len(g.occupied) - 1
		candidate := g.occupied[last]
		g.occupied = g.occupied[:last]
		if !candidate.remove() {
			g.occupied = slices.Insert(g.occupied, 0, candidate)
		}
	}
}

// treeGroup is the control group of one tree. A nil one holds nobody.
type treeGroup struct {
	dir     string
	removed atomic.Bool
}

// open returns a descriptor for starting a process in the group, if there is
// one. The caller closes it.
func (g *treeGroup) open() (fd int, ok bool) {
	if g == nil {
		return 0, false
	}
	fd, err := unix.Open(g.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	return fd, err == nil
}

// pids returns the living members.
func (g *treeGroup) pids() map[int]struct{} {
	if g == nil || g.removed.Load() {
		return nil
	}
	file, err := os.Open(filepath.Join(g.dir, "cgroup.procs"))
	if err != nil {
		return nil
	}
	defer file.Close()
	var data bytes.Buffer
	data.Grow(4096) // of most groups all is read at once
	if _, err := data.ReadFrom(file); err != nil {
		return nil
	}
	pids := map[int]struct{}{}
	for field := range strings.FieldsSeq(data.String()) {
		if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
			pids[pid] = struct{}{}
		}
	}
	return pids
}

// kill sends SIGKILL to all members at once, so that none can fork away.
func (g *treeGroup) kill() {
	if g != nil && !g.removed.Load() {
		_ = os.WriteFile(filepath.Join(g.dir, "cgroup.kill"), []byte("1"), 0)
	}
}

// remove removes the group, and reports whether it is gone: it stays if
// somebody is in it.
func (g *treeGroup) remove() bool {
	if err := unix.Rmdir(g.dir); err == nil || errors.Is(err, unix.ENOENT) {
		g.removed.Store(true)
	}
	return g.removed.Load()
}
