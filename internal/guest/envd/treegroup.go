package envd

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// treeGroups makes a control group (cgroups(7), version 2) for each process
// tree. A tree cannot leave its group by forking, whatever it does to its
// session, its parents and its environment, so that it is found and killed
// whole. Where there is no cgroup v2 that we may write to, trees are found by
// those three alone.
type treeGroups struct {
	root string // "" = there are none

	mu       sync.Mutex
	occupied []*treeGroup // of ended trees of which somebody was left
}

// newTreeGroups uses the hierarchy that is mounted at dir, if it is one and is
// ours to use.
func newTreeGroups(dir string) *treeGroups {
	var mounted unix.Statfs_t
	if dir == "" || unix.Statfs(dir, &mounted) != nil || mounted.Type != unix.CGROUP2_SUPER_MAGIC {
		return &treeGroups{}
	}
	root := filepath.Join(dir, "nestbox")
	if err := os.Mkdir(root, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
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
	data, err := os.ReadFile(filepath.Join(g.dir, "cgroup.procs"))
	if err != nil {
		return nil
	}
	pids := map[int]struct{}{}
	for field := range strings.FieldsSeq(string(data)) {
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
