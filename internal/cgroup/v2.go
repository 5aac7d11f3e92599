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

func (g *Group) createV2(l Limits) error {
	if err := g.enableControllers(); err != nil {
		return err
	}
	if err := os.MkdirAll(g.file("", ""), 0o755); err != nil {
		return err
	}
	for _, set := range []struct {
		name, value string
		optional    bool
	}{
		{"memory.swap.max", "0", true}, // no file if the kernel counts no swap
		// All of a sandbox or nothing: half of one is of no use.
		{"memory.oom.group", "1", false},
		{"pids.max", strconv.Itoa(l.Pids), false},
	} {
		err := write(g.file("", set.name), set.value)
		if err != nil && !(set.optional && errors.Is(err, fs.ErrNotExist)) {
			return err
		}
	}
	return g.SetMemory(l.MemoryBytes, 0)
}

// enableControllers lets the groups above this one hand their controllers
// down. The kernel refuses it (EBUSY) for a group that has processes itself,
// other than the root.
func (g *Group) enableControllers() error {
	dir := g.m.dirs[""]
	for part := range strings.SplitSeq(g.path, "/") {
		if err := write(filepath.Join(dir, "cgroup.subtree_control"), "+"+strings.Join(required, " +")); err != nil {
			return fmt.Errorf("enable the controllers %v below %s: %w", required, dir, err)
		}
		dir = filepath.Join(dir, part)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

func (g *Group) usageV2() (Usage, error) {
	cpu, err := readField(g.file("", "cpu.stat"), "usage_usec")
	memory, err2 := readInt(g.file("", "memory.current"))
	pids, err3 := readInt(g.file("", "pids.current"))
	return Usage{time.Duration(cpu) * time.Microsecond, memory, int(pids)}, errors.Join(err, err2, err3)
}
