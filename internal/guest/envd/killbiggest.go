package envd

import (
	"context"
	"maps"
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
	// perThread is what a thread costs that no process maps: stacks and page
	// tables in the kernel below.
	perThread = 256 << 10

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
	trees, err := t.weigh(used)
	if err != nil {
		return guest.Victim{}, err
	}
	if len(trees) == 0 {
		return guest.Victim{}, nestbox.Errorf(nestbox.CodeNotFound, "there is no process to kill")
	}
	biggest := slices.MaxFunc(trees, func(a, b *heavyTree) int { return int(a.memory - b.memory) })
	victim := guest.Victim{Memory: biggest.memory}
	if p := t.byMark(biggest.mark); p != nil {
		if !p.ended() {
			p.intend(nestbox.ReasonOOM)
		}
		err = t.killTree(t.ctx, p, guest.Kill{Signal: unix.SIGKILL})
		victim.Process = p.record()
	} else {
		err = t.killUnknown(t.ctx, biggest)
	}
	t.slog.Warn("killed a process tree because the capsule is out of memory", "pid", victim.Process.PID, "tag", victim.Process.Tag, "bytes", victim.Memory, "error", err)
	return victim, err
}

// heavyTree is the memory of one tree, or of a process that is of no tree.
type heavyTree struct {
	mark    string // "" = of no tree
	members []procStat
	memory  int64
}

// weigh returns what each tree holds. What is used, and mapped by no process, is
// looked for in open files, if it is much.
func (t *table) weigh(used int64) ([]*heavyTree, error) {
	pids, err := listPIDs()
	if err != nil {
		return nil, nestbox.Errorf(nestbox.CodeGuest, "list processes: %w", err)
	}
	trees := map[string]*heavyTree{}
	var mapped, most int64
	for _, pid := range pids {
		s, err := readStat(pid)
		if err != nil || s.dead() || s.session == 0 && s.memory == 0 { // threads of the kernel
			continue
		}
		mapped += s.memory
		if pid == os.Getpid() {
			continue
		}
		mark := t.markIn(pid)
		key := mark
		if mark == "" {
			if os.Getpid() != 1 {
				continue // not a capsule: others live here too
			}
			key = strconv.Itoa(pid)
		}
		tree := trees[key]
		if tree == nil {
			tree = &heavyTree{mark: mark}
			trees[key] = tree
		}
		tree.members = append(tree.members, s)
		tree.memory += s.memory + int64(s.threads)*perThread
		most = max(most, tree.memory)
	}
	all := slices.Collect(maps.Values(trees))
	if hidden := used - mapped; hidden > most {
		weighFiles(all, hidden)
	}
	return all, nil
}

// markIn returns the mark of the tree that a process is in: by its control
// group, where trees have some, because that cannot be left by accident.
func (t *table) markIn(pid int) string {
	if t.groups.root != "" {
		if mark := t.markByGroup(pid); mark != "" {
			return mark
		}
	}
	if mark := markOf(pid); t.isMark(mark) {
		return mark
	}
	return ""
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
		for _, member := range tree.members {
			dir := "/proc/" + strconv.Itoa(member.pid) + "/fd"
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
	for _, member := range tree.members {
		t.reaper.signalSeen(member, unix.SIGKILL)
	}
	for slices.ContainsFunc(tree.members, func(member procStat) bool {
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
