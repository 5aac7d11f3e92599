package main

import (
	"context"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// spareServer has the kernel end others first when the host runs out of memory:
// with the server, nobody would see to what is left.
func spareServer() error {
	return os.WriteFile("/proc/self/oom_score_adj", []byte("-900"), 0) // of -1000; proc_pid_oom_score_adj(5)
}

// limitMemory makes the garbage collector keep the process below what it may
// have: what was asked for in MiB, or GOMEMLIMIT, or four fifths of the limit of
// its control group, or half of the machine's memory.
func limitMemory(askedMB int) (bytes int64) {
	switch {
	case askedMB > 0:
		bytes = int64(askedMB) << 20
	case os.Getenv("GOMEMLIMIT") != "":
		return debug.SetMemoryLimit(-1) // the runtime has read it
	default:
		bytes = defaultMemoryLimit("/", int64(memoryMB())<<20)
	}
	debug.SetMemoryLimit(bytes)
	return bytes
}

// defaultMemoryLimit finds the limit of the process's control group in the file
// system at root.
func defaultMemoryLimit(root string, machine int64) int64 {
	if limit := cgroupMemoryLimit(root); limit > 0 && limit < machine {
		return limit / 5 * 4
	}
	return machine / 2
}

// cgroupMemoryLimit returns the lowest limit of the process's control group and
// those around it (cgroups(7)), 0 = none.
func cgroupMemoryLimit(root string) int64 {
	text, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return 0
	}
	lowest := int64(math.MaxInt64)
	for line := range strings.Lines(string(text)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		mount, file := "sys/fs/cgroup", "memory.max"
		switch {
		case parts[1] == "memory":
			mount, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
		case parts[1] != "":
			continue
		}
		for dir := filepath.Clean("/" + parts[2]); ; dir = filepath.Dir(dir) {
			value, err := os.ReadFile(filepath.Join(root, mount, dir, file))
			if n, parseErr := strconv.ParseInt(strings.TrimSpace(string(value)), 10, 64); err == nil && parseErr == nil && n > 0 {
				lowest = min(lowest, n)
			}
			if dir == "/" {
				break
			}
		}
	}
	if lowest > 1<<50 { // what version 1 says for none
		return 0
	}
	return lowest
}

// Memory that is not used any more goes back to the system after a burst.
const (
	lookAtMemoryEvery = 10 * time.Second
	idleMemory        = 64 << 20 // bytes that may stay
)

// returnMemory gives unused memory back, until ctx ends. The runtime does that by
// itself only down to what it last needed, and looks for garbage only every two
// minutes while nothing is allocated.
func returnMemory(ctx context.Context) {
	tick := time.NewTicker(lookAtMemoryEvery)
	defer tick.Stop()
	var before, ours heapUse // at the last look, and after the last collection of ours
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		now := readHeapUse()
		if now.canShrink(before, ours) {
			debug.FreeOSMemory()
			debug.FreeOSMemory() // what was pooled lives through one
			now = readHeapUse()
			ours = now
		}
		before = now
	}
}

// heapUse is what the heap takes. live is what the last collection found in
// use, in bytes; cycles counts the collections.
type heapUse struct{ held, live, cycles uint64 }

func readHeapUse() heapUse {
	sample := []metrics.Sample{
		{Name: "/memory/classes/heap/free:bytes"},
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/gc/heap/live:bytes"},
		{Name: "/gc/cycles/total:gc-cycles"},
	}
	metrics.Read(sample)
	return heapUse{sample[0].Value.Uint64() + sample[1].Value.Uint64(), sample[2].Value.Uint64(), sample[3].Value.Uint64()}
}

// canShrink reports whether a collection may free much: what is held is more
// than what was live, or it is not known what is live now, because the last
// collection was one in the middle of a burst.
func (now heapUse) canShrink(before, ours heapUse) bool {
	quiet := now.cycles == before.cycles
	return now.held > now.live+idleMemory || quiet && now.cycles != ours.cycles && now.held > idleMemory
}

// memoryMB returns the machine's memory in MiB.
func memoryMB() int {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0
	}
	return int(int64(info.Totalram) * int64(info.Unit) >> 20)
}
