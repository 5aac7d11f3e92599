package envd

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

const (
	// perProcess and perThread are what they cost that no process maps, in the
	// kernels below.
	perProcess = 512 << 10
	perThread  = 128 << 10

	// kernelMemory is what the kernel of an idle capsule takes.
	kernelMemory = 32 << 20

	// weighTime is how long weighing may take, but for a first look at each tree,
	// and maxWeighed how many of one tree are looked at.
	weighTime  = 300 * time.Millisecond
	maxWeighed = 64

	// maxFilesSeen bounds how many open files one search for hidden memory looks
	// at, of all processes together.
	maxFilesSeen = 1 << 14
)

// KillBiggest implements guest.Processes.
func (t *table) KillBiggest(_ context.Context, used int64) (guest.Victim, error) {
	if !t.group.enter() {
		return guest.Victim{}, errClosed()
	}
	defer t.group.leave()
	t.biggestKill.Lock()
	defer t.biggestKill.Unlock()
	dying := t.victims.Load() > 0
	trees, err := t.weigh(used, !dying)
	if err != nil {
		return guest.Victim{}, err
	}
	if len(trees) == 0 {
		return guest.Victim{}, nestbox.Errorf(nestbox.CodeNotFound, "there is no process to kill")
	}
	biggest := slices.MaxFunc(trees, func(a, b *heavyTree) int { return int(a.memory - b.memory) })
	if dying && biggest.memory < used/8 {
		return guest.Victim{}, nestbox.Errorf(nestbox.CodeUnavailable, "what was killed before is not gone yet, and may hold the memory")
	}
	victim := guest.Victim{Memory: biggest.memory}
	kill := func() error { return t.killUnknown(t.ctx, biggest) }
	if p := t.byMark(biggest.mark); p != nil {
		if !p.ended() {
			p.intend(nestbox.ReasonOOM)
		}
		p.group.kill() // at once; the rest goes on without the caller
		kill = func() error { return t.killTree(t.ctx, p, guest.Kill{Signal: unix.SIGKILL}) }
		victim.Process = p.record()
	}
	t.victims.Add(1)
	t.group.run(func() {
		defer t.victims.Add(-1)
		err := kill()
		t.slog.Warn("killed a process tree because the capsule is out of memory", "pid", victim.Process.PID, "tag", victim.Process.Tag, "bytes", victim.Memory, "error", err)
	})
	return victim, nil
}

// heavyTree is the memory of one tree, or of a process that is of no tree.
type heavyTree struct {
	mark   string // "" = of no tree
	pids   []int
	memory int64 // bytes, roughly
}

// weigh returns what each tree holds. It may be asked for in a capsule that is so
// busy that each system call takes a tenth of a second, so it takes few members
// of a large tree for all of them, and as long as there is time. What is used,
// and mapped by no process, is looked for in open files, if it is much and hidden
// says so.
func (t *table) weigh(used int64, hidden bool) ([]*heavyTree, error) {
	trees, err := t.heavyTrees()
	if err != nil {
		return nil, err
	}
	slices.SortFunc(trees, func(a, b *heavyTree) int { return len(b.pids) - len(a.pids) })
	mapped, most := int64(kernelMemory), int64(0)
	if self, err := readStat(os.Getpid()); err == nil {
		mapped += self.memory
	}
	deadline := time.Now().Add(weighTime)
	for _, tree := range trees {
		var memory int64
		seen := 0
		for _, pid := range tree.pids {
			if seen == maxWeighed || seen > 0 && time.Now().After(deadline) {
				break
			}
			if s, err := readStat(pid); err == nil && !s.dead() {
				memory += s.memory + perProcess + int64(s.threads)*perThread
				seen++
			}
		}
		if seen > 0 {
			tree.memory = memory / int64(seen) * int64(len(tree.pids))
		}
		mapped += tree.memory
		most = max(most, tree.memory)
	}
	if rest := used - mapped; hidden && rest > most && time.Now().Before(deadline) {
		weighFiles(trees, rest)
	}
	return trees, nil
}

// heavyTrees returns the trees that there are, and who is in none. It leaves out
// this process.
func (t *table) heavyTrees() ([]*heavyTree, error) {
	pids, err := listPIDs()
	if err != nil {
		return nil, nestbox.Errorf(nestbox.CodeGuest, "list processes: %w", err)
	}
	var trees []*heavyTree
	byMark := map[string]*heavyTree{}
	grouped := map[int]bool{os.Getpid(): true}
	for _, mark := range t.groupMarks() {
		tree := &heavyTree{mark: mark}
		for pid := range (&treeGroup{dir: filepath.Join(t.groups.root, mark)}).pids() {
			grouped[pid] = true
			tree.pids = append(tree.pids, pid)
		}
		byMark[mark] = tree
		trees = append(trees, tree)
	}
	for _, pid := range pids {
		if grouped[pid] {
			continue
		}
		mark, _ := markOf(pid)
		switch {
		case t.isMark(mark) && byMark[mark] == nil:
			byMark[mark] = &heavyTree{mark: mark, pids: []int{pid}}
			trees = append(trees, byMark[mark])
		case t.isMark(mark):
			byMark[mark].pids = append(byMark[mark].pids, pid)
		case os.Getpid() == 1: // else this is no capsule, and others live here too
			trees = append(trees, &heavyTree{pids: []int{pid}})
		}
	}
	return slices.DeleteFunc(trees, func(tree *heavyTree) bool { return len(tree.pids) == 0 }), nil
}

// weighFiles adds what trees hold in open files: files in memory, each counted
// for the first tree that has it open, and of the rest of what is hidden, which is in
// pipes and sockets, a share by the number of files.
func weighFiles(trees []*heavyTree, hidden int64) {
	type file struct{ dev, ino uint64 }
	seen := map[file]bool{}
	files, looked := map[*heavyTree]int64{}, 0
	var total int64
	for _, tree := range trees {
		for _, pid := range tree.pids {
			dir := "/proc/" + strconv.Itoa(pid) + "/fd"
			names := readNames(dir)
			files[tree] += int64(len(names))
			total += int64(len(names))
			for _, name := range names {
				if looked++; looked > maxFilesSeen {
					break
				}
				var info unix.Stat_t
				if unix.Stat(filepath.Join(dir, name), &info) != nil || info.Mode&unix.S_IFMT != unix.S_IFREG || !inMemory(filepath.Join(dir, name)) {
					continue
				}
				if f := (file{uint64(info.Dev), info.Ino}); !seen[f] {
					seen[f] = true
					tree.memory += info.Blocks * 512
					hidden -= info.Blocks * 512
				}
			}
		}
	}
	for _, tree := range trees {
		if hidden > 0 && total > 0 {
			tree.memory += int64(float64(hidden) * float64(files[tree]) / float64(total))
		}
	}
}

func readNames(dir string) []string {
	f, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer f.Close()
	names, _ := f.Readdirnames(-1)
	return names
}

func inMemory(path string) bool {
	var fs unix.Statfs_t
	return unix.Statfs(path, &fs) == nil && fs.Type == unix.TMPFS_MAGIC
}

// byMark returns the process whose tree has a mark, nil if none is remembered.
func (t *table) byMark(mark string) *process {
	if mark == "" {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range t.byID {
		if p.mark == mark {
			return p
		}
	}
	return nil
}

// killUnknown kills what is of no tree that is remembered.
func (t *table) killUnknown(ctx context.Context, tree *heavyTree) error {
	ctx, cancel := context.WithTimeout(ctx, killPatience)
	defer cancel()
	if tree.mark != "" && t.groups.root != "" {
		(&treeGroup{dir: filepath.Join(t.groups.root, tree.mark)}).kill()
	}
	var members []procStat
	for _, pid := range tree.pids {
		if s, err := readStat(pid); err == nil {
			members = append(members, s)
			t.reaper.signalSeen(s, unix.SIGKILL)
		}
	}
	for slices.ContainsFunc(members, func(member procStat) bool {
		now, err := readStat(member.pid)
		return err == nil && now.start == member.start && !now.dead()
	}) {
		select {
		case <-time.After(minRescan):
		case <-ctx.Done():
			return nestbox.Errorf(nestbox.CodeTimeout, "processes do not die; they may be waiting for a device")
		}
	}
	return nil
}
