package envd

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// Bounds of a tree.
const (
	maxTreeCmd = 1 << 10 // of one process, in bytes
	maxTreeFDs = 50_000  // descriptors that are looked at, of all processes together
	clockTicks = 100     // a second, of proc_pid_stat(5); USER_HZ is that on every Linux
)

// Tree implements guest.Processes. It reads /proc when it is asked, one caller after
// another: a process costs some 100 microseconds inside of gVisor, and a descriptor ten.
func (t *table) Tree(ctx context.Context) ([]nestbox.SystemProcess, error) {
	select {
	case t.treeTurn <- struct{}{}:
		defer func() { <-t.treeTurn }()
	case <-ctx.Done():
		return nil, guest.ContextError(ctx)
	}
	pids, err := listPIDs()
	if err != nil {
		return nil, resourceError("list the processes", err)
	}
	slices.Sort(pids)
	owners := t.treeOwners()
	names := t.accounts.owners()
	self := os.Getpid()
	var tree []nestbox.SystemProcess
	for _, pid := range pids {
		if pid == self {
			continue
		}
		if ctx.Err() != nil {
			return nil, guest.ContextError(ctx)
		}
		if p, ok := readSystemProcess(pid, names); ok {
			p.Process = owners.of(t, pid, p.PPID)
			tree = append(tree, p)
		}
		if len(tree) == nestbox.MaxTree {
			return nil, nestbox.Errorf(nestbox.CodeTooLarge, "more than %d processes", nestbox.MaxTree)
		}
	}
	addPorts(tree)
	return tree, nil
}

// readSystemProcess reads what the kernel says of a process; false if it is gone, or a
// thread of the kernel.
func readSystemProcess(pid int, names ownerNames) (nestbox.SystemProcess, bool) {
	stat, err := readStat(pid)
	if err != nil || stat.kernel {
		return nestbox.SystemProcess{}, false
	}
	dir := "/proc/" + strconv.Itoa(pid)
	p := nestbox.SystemProcess{
		PID: pid, PPID: stat.ppid, State: string(stat.state), Memory: stat.memory,
		CPU: time.Duration(stat.cpu) * time.Second / clockTicks,
		Cmd: "[" + stat.name + "]",
	}
	var info unix.Stat_t
	if unix.Stat(dir, &info) == nil {
		p.User = names.user(info.Uid)
	}
	var buf [maxTreeCmd]byte
	if text, err := readProc(dir+"/cmdline", buf[:]); err == nil {
		if words := bytes.ReplaceAll(bytes.TrimRight(text, "\x00"), []byte{0}, []byte{' '}); len(words) > 0 {
			p.Cmd = string(words)
		}
	}
	p.Cmd = strings.ToValidUTF8(p.Cmd, "\uFFFD")
	return p, true
}

// treeOwners finds which process of ours one of the system belongs to.
type treeOwners struct {
	byMark map[string]nestbox.ProcessID
	byPID  map[int]nestbox.ProcessID // of leaders, of members of control groups, and of those that were asked for
}

func (t *table) treeOwners() treeOwners {
	o := treeOwners{byMark: map[string]nestbox.ProcessID{}, byPID: map[int]nestbox.ProcessID{}}
	t.mu.Lock()
	for _, p := range t.byID {
		o.byMark[p.mark] = p.id
	}
	for _, p := range t.live {
		o.byPID[p.pid] = p.id
	}
	t.mu.Unlock()
	for _, mark := range t.groupMarks() {
		for pid := range (&treeGroup{dir: filepath.Join(t.groups.root, mark)}).pids() {
			o.byPID[pid] = o.byMark[mark]
		}
	}
	return o
}

// of returns the owner of a process: by its control group, by the mark that it has
// inherited, or else that of its parent.
func (o treeOwners) of(t *table, pid, ppid int) nestbox.ProcessID {
	id, known := o.byPID[pid]
	if known {
		return id
	}
	if mark, _ := markOf(pid); t.isMark(mark) {
		id = o.byMark[mark]
	}
	if id == 0 {
		id = o.byPID[ppid] // it has a lower number, mostly, and so was asked for before
	}
	o.byPID[pid] = id
	return id
}

// addPorts adds the TCP ports that processes listen on. A socket that several have is
// each one's.
func addPorts(tree []nestbox.SystemProcess) {
	sockets := map[string]nestbox.ListeningPort{}
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		readListeners(file, sockets)
	}
	left := maxTreeFDs
	for i := 0; i < len(tree) && len(sockets) > 0 && left > 0; i++ {
		dir := "/proc/" + strconv.Itoa(tree[i].PID) + "/fd"
		for _, fd := range readNames(dir) {
			if left--; left < 0 {
				break
			}
			target, err := os.Readlink(dir + "/" + fd)
			if err != nil {
				continue
			}
			if port, ok := sockets[target]; ok && !slices.Contains(tree[i].Ports, port) {
				tree[i].Ports = append(tree[i].Ports, port)
			}
		}
		slices.SortFunc(tree[i].Ports, func(a, b nestbox.ListeningPort) int {
			return cmp.Or(cmp.Compare(a.Port, b.Port), a.Address.Compare(b.Address))
		})
	}
}

// listening is the state of a listening socket in /proc/net/tcp; see proc_net(5).
const listening = "0A"

// maxSockets bounds how many listening sockets are told of.
const maxSockets = 4096

// readListeners adds the listening sockets of a file of /proc/net, by the names that
// descriptors of them have.
func readListeners(file string, sockets map[string]nestbox.ListeningPort) {
	text, err := os.ReadFile(file)
	if err != nil {
		return
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 10 || fields[3] != listening || len(sockets) == maxSockets {
			continue
		}
		if addr, err := parseSocket(fields[1]); err == nil {
			sockets["socket:["+fields[9]+"]"] = nestbox.ListeningPort{Port: addr.Port(), Address: addr.Addr()}
		}
	}
}

// parseSocket reads an address as the kernel writes it: words of four bytes in the order
// of the machine, in hexadecimal.
func parseSocket(text string) (netip.AddrPort, error) {
	host, port, _ := strings.Cut(text, ":")
	raw, err := hex.DecodeString(host)
	if err != nil || len(raw)%4 != 0 {
		return netip.AddrPort{}, fmt.Errorf("%q is no address", text)
	}
	for word := range slices.Chunk(raw, 4) {
		slices.Reverse(word) // little-endian, as all machines are that we run on
	}
	addr, ok := netip.AddrFromSlice(raw)
	n, err := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is no address", text)
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(n)), nil
}
