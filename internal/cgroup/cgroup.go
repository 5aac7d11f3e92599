// Package cgroup gives sandboxes control groups of their own, on version 1 of
// the interface, alone or beside version 2 ("hybrid"), and on version 2. It is
// a leaf: it may import the standard library and golang.org/x/sys only.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Mount is where the kernel's control groups are on this machine. It is not to
// be copied.
type Mount struct {
	unified bool
	dirs    map[string]string // controller → root of its hierarchy; v2: "" → root
	events  notifier          // of version 2
}

// Limits are what a group may use. Its share of CPU time is not limited before
// SetCPUs.
type Limits struct {
	MemoryBytes int64 // see SetMemory
	Pids        int   // processes and threads of the host
}

// Usage is what a group has used.
type Usage struct {
	CPU         time.Duration
	MemoryBytes int64
	Pids        int
}

// required are the controllers without which limits cannot be set.
var required = []string{"cpu", "memory", "pids"}

// Detect finds the control groups of this machine. It fails if a controller
// that limits need is missing.
func Detect() (*Mount, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseMounts(string(text), os.ReadFile)
}

// parseMounts reads mountinfo (proc_pid_mountinfo(5)).
func parseMounts(mountinfo string, readFile func(string) ([]byte, error)) (*Mount, error) {
	v1 := map[string]string{}
	v2 := ""
	for line := range strings.Lines(mountinfo) {
		before, after, ok := strings.Cut(line, " - ")
		fields, kind := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || len(kind) < 3 {
			continue
		}
		switch dir := fields[4]; kind[0] {
		case "cgroup2":
			if v2 == "" {
				v2 = dir
			}
		case "cgroup":
			for _, option := range strings.Split(kind[2], ",") {
				if _, twice := v1[option]; !twice && slices.Contains(controllersV1, option) {
					v1[option] = dir
				}
			}
		}
	}
	m := &Mount{dirs: v1}
	has := slices.Collect(maps.Keys(v1))
	if len(v1) == 0 {
		if v2 == "" {
			return nil, errors.New("no control groups are mounted on this machine")
		}
		text, err := readFile(filepath.Join(v2, "cgroup.controllers"))
		if err != nil {
			return nil, err
		}
		m = &Mount{unified: true, dirs: map[string]string{"": v2}}
		has = strings.Fields(string(text))
	}
	for _, c := range required {
		if !slices.Contains(has, c) {
			return nil, fmt.Errorf("the control group controller %q is not available on this machine", c)
		}
	}
	return m, nil
}

// Group is one control group, named by a path below the root. It need not
// exist.
type Group struct {
	m    *Mount
	path string
}

// Group names a group: "nestbox/1f3a/cl-…".
func (m *Mount) Group(path string) *Group { return &Group{m: m, path: path} }

// roots returns the distinct hierarchies, in a fixed order.
func (m *Mount) roots() []string {
	return slices.Compact(slices.Sorted(maps.Values(m.dirs)))
}

// dirs returns the directories of the group, one in each hierarchy.
func (g *Group) dirs() []string {
	dirs := g.m.roots()
	for i := range dirs {
		dirs[i] = filepath.Join(dirs[i], g.path)
	}
	return dirs
}

// file returns the path of a file of the group. Version 2 has no hierarchy
// for each controller.
func (g *Group) file(controller, name string) string {
	if g.m.unified {
		controller = ""
	}
	return filepath.Join(g.m.dirs[controller], g.path, name)
}

// Create makes the group and sets its limits. What it leaves behind when it
// fails, Remove removes.
func (g *Group) Create(l Limits) error {
	var err error
	if g.m.unified {
		err = g.createV2(l)
	} else {
		err = g.createV1(l)
	}
	if err != nil {
		return fmt.Errorf("make control group %s: %w", g.path, err)
	}
	return nil
}

// Start starts cmd in the group: it is there from its first instruction on. The
// caller runs on a thread that is of no use afterwards: version 1 has no other
// way than to move the thread there first.
func (g *Group) Start(cmd *exec.Cmd) error {
	if !g.m.unified {
		if err := g.joinThread(); err != nil {
			return err
		}
		return cmd.Start()
	}
	dir, err := os.Open(g.file("", ""))
	if err != nil {
		return err
	}
	defer dir.Close()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.UseCgroupFD = true
	cmd.SysProcAttr.CgroupFD = int(dir.Fd())
	return cmd.Start()
}

// SetCPUs limits the group's CPU time to that of n CPUs.
func (g *Group) SetCPUs(n int) error {
	var err error
	if quota := n * cpuPeriod; g.m.unified {
		err = write(g.file("", "cpu.max"), fmt.Sprintf("%d %d", quota, cpuPeriod))
	} else {
		err = write(g.file("cpu", "cpu.cfs_quota_us"), strconv.Itoa(quota))
	}
	if err != nil {
		return fmt.Errorf("limit the CPU time of control group %s: %w", g.path, err)
	}
	return nil
}

// Children returns the names of the groups right below this one, in any
// hierarchy.
func (g *Group) Children() ([]string, error) {
	seen := map[string]bool{}
	for _, dir := range g.dirs() {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			if e.IsDir() {
				seen[e.Name()] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(seen)), nil
}

// Procs returns the processes of the group, in any hierarchy. There are none
// in a group that does not exist.
func (g *Group) Procs() ([]int, error) {
	seen := map[int]bool{}
	for _, dir := range g.dirs() {
		text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if gone(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, field := range strings.Fields(string(text)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return nil, fmt.Errorf("cgroup.procs of %s: %w", g.path, err)
			}
			seen[pid] = true
		}
	}
	return slices.Sorted(maps.Keys(seen)), nil
}

// pollEvery is how often Kill and Remove look again: the kernel tells version
// 1 of neither event.
const pollEvery = 2 * time.Millisecond

// Kill kills all processes of the group and returns them when none is left,
// or when ctx ends. This process is spared.
func (g *Group) Kill(ctx context.Context) (killed []int, err error) {
	seen := map[int]bool{}
	defer func() { killed = slices.Sorted(maps.Keys(seen)) }()
	for {
		pids, err := g.Procs()
		if err != nil {
			return nil, err
		}
		pids = slices.DeleteFunc(pids, func(pid int) bool { return pid == os.Getpid() })
		if len(pids) == 0 {
			return nil, nil
		}
		for _, pid := range pids {
			seen[pid] = true
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return nil, fmt.Errorf("kill process %d of control group %s: %w", pid, g.path, err)
			}
		}
		if err := wait(ctx); err != nil {
			return nil, fmt.Errorf("processes %v of control group %s do not end: %w", pids, g.path, err)
		}
	}
}

// Remove removes the group, which must have no processes, from all
// hierarchies. A process that is just ending may hold it for a moment.
func (g *Group) Remove(ctx context.Context) error {
	for _, dir := range g.dirs() {
		for {
			err := syscall.Rmdir(dir)
			if err == nil || gone(err) {
				break
			}
			if !errors.Is(err, syscall.EBUSY) {
				return &fs.PathError{Op: "rmdir", Path: dir, Err: err}
			}
			if ctxErr := wait(ctx); ctxErr != nil {
				return &fs.PathError{Op: "rmdir", Path: dir, Err: errors.Join(err, ctxErr)}
			}
		}
	}
	return nil
}

// RemoveEmpty removes the group where nothing is in it or below it.
func (g *Group) RemoveEmpty() {
	for _, dir := range g.dirs() {
		_ = syscall.Rmdir(dir) // the kernel refuses if there is something
	}
}

// Usage reads what the group has used so far. It works, and is most useful,
// when all its processes are dead.
func (g *Group) Usage() (Usage, error) {
	if g.m.unified {
		return g.usageV2()
	}
	return g.usageV1()
}

func wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(pollEvery):
		return nil
	}
}

// gone reports that a file, or the group it is in, does not exist.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV)
}

func write(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

func readInt(path string) (int64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return 0, &fs.PathError{Op: "parse", Path: path, Err: err}
	}
	return n, nil
}

// readField returns the number after key in a file of "key number" lines, 0 if
// there is no such key.
func readField(path, key string) (int64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) == 2 && fields[0] == key {
			return strconv.ParseInt(fields[1], 10, 64)
		}
	}
	return 0, nil
}
