package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// controllersV1 are those of the kernel. A sandbox gets a group in each that is
// mounted, so that it is accounted for alone everywhere.
var controllersV1 = []string{
	"blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb",
	"memory", "net_cls", "net_prio", "perf_event", "pids", "rdma", "misc",
}

// cpuPeriod is the kernel's default, in microseconds.
const cpuPeriod = 100_000

func (g *Group) createV1(l Limits) error {
	for _, dir := range g.dirs() {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := g.fillCpuset(); err != nil {
		return err
	}
	for _, set := range []struct {
		controller, name, value string
		optional                bool
	}{
		{"cpu", "cpu.cfs_period_us", strconv.Itoa(cpuPeriod), false},
		{"pids", "pids.max", strconv.Itoa(l.Pids), false},
	} {
		err := write(g.file(set.controller, set.name), set.value)
		if err != nil && !(set.optional && errors.Is(err, fs.ErrNotExist)) {
			return err
		}
	}
	return g.SetMemory(l.MemoryBytes, 0)
}

// fillCpuset gives the group, and those above it, the CPUs and memory nodes of
// their parents: a new group of version 1 has none and takes no process.
func (g *Group) fillCpuset() error {
	root, ok := g.m.dirs["cpuset"]
	if !ok {
		return nil
	}
	dir := root
	for part := range strings.SplitSeq(g.path, "/") {
		parent := dir
		dir = filepath.Join(dir, part)
		for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
			have, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				return err
			}
			if strings.TrimSpace(string(have)) != "" {
				continue
			}
			above, err := os.ReadFile(filepath.Join(parent, name))
			if err != nil {
				return err
			}
			if err := write(filepath.Join(dir, name), string(above)); err != nil {
				return err
			}
		}
	}
	return nil
}

// joinThread moves the calling thread, and so the processes that it starts,
// into the group.
func (g *Group) joinThread() error {
	for _, dir := range g.dirs() {
		if err := write(filepath.Join(dir, "tasks"), "0"); err != nil {
			return fmt.Errorf("join control group %s: %w", g.path, err)
		}
	}
	return nil
}

func (g *Group) usageV1() (Usage, error) {
	cpu, err := readInt(g.file("cpuacct", "cpuacct.usage"))
	if _, mounted := g.m.dirs["cpuacct"]; !mounted {
		err = nil
	}
	memory, err2 := readInt(g.file("memory", "memory.usage_in_bytes"))
	pids, err3 := readInt(g.file("pids", "pids.current"))
	return Usage{time.Duration(cpu), memory, int(pids)}, errors.Join(err, err2, err3)
}
