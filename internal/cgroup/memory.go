package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// This file is for groups whose memory somebody watches: instead of having the
// kernel kill a process of its choice when the limit is reached, the group may
// go beyond it by a margin, for as long as it takes to see that and to choose.

// margin is how much more than it may a group can hold, in bytes, before its
// processes must wait.
const margin = 512 << 20

// MemoryUse is what a group holds, in bytes.
type MemoryUse struct {
	Total int64 // with what the kernel caches of files
	Held  int64 // what cannot be had back as long as the processes live
}

// SetMemory sets how much memory the group may use, and how far beyond that and
// the margin it is let. There, version 1 has its processes wait until they are
// given more, or killed; calls of theirs that need memory in the kernel fail.
// Version 2 slows them down earlier, and kills them all a margin later. Swap is
// never allowed.
func (g *Group) SetMemory(limit, beyond int64) error {
	var err error
	if g.m.unified {
		err = g.setMemoryV2(limit, beyond)
	} else {
		err = g.setMemoryV1(limit, beyond)
	}
	if err != nil {
		return fmt.Errorf("limit the memory of control group %s: %w", g.path, err)
	}
	return nil
}

func (g *Group) setMemoryV1(limit, beyond int64) error {
	value := strconv.FormatInt(limit+margin+beyond, 10)
	// The limit of memory alone must never be above that of memory and swap
	// together, which does not exist if the kernel counts no swap.
	memory, both := g.file("memory", "memory.limit_in_bytes"), g.file("memory", "memory.memsw.limit_in_bytes")
	_ = write(both, value) // fails if it would be the lower one for now
	if err := write(memory, value); err != nil {
		return err
	}
	if err := write(both, value); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (g *Group) setMemoryV2(limit, beyond int64) error {
	return errors.Join(
		write(g.file("", "memory.max"), strconv.FormatInt(limit+2*margin+beyond, 10)),
		write(g.file("", "memory.high"), strconv.FormatInt(limit+beyond, 10)),
	)
}

// LetKernelKill says whether the kernel may kill processes of the group when
// they can have no more memory. On version 2 it always may.
func (g *Group) LetKernelKill(yes bool) error {
	if g.m.unified {
		return nil
	}
	value := "1" // disabled
	if yes {
		value = "0"
	}
	return write(g.file("memory", "memory.oom_control"), value)
}

// RanOut says whose memory ran out when the kernel killed processes for want of
// it.
type RanOut int

// Whose memory ran out.
const (
	NobodyRanOut RanOut = iota // no process of the group was killed
	GroupRanOut
	HostRanOut // or a group above this one
)

// OutOfMemory reports whether processes of the group were killed for want of
// memory.
func (g *Group) OutOfMemory() (RanOut, error) {
	file := g.file("memory", "memory.oom_control")
	if g.m.unified {
		file = g.file("", "memory.events")
	}
	kills, err := readField(file, "oom_kill")
	if kills == 0 || err != nil {
		return NobodyRanOut, err
	}
	var own bool
	if g.m.unified {
		reached, readErr := readField(file, "oom")
		own, err = reached > 0, readErr
	} else {
		disabled, readErr := readField(file, "oom_kill_disable")
		own, err = disabled == 0, readErr
	}
	if own {
		return GroupRanOut, err
	}
	return HostRanOut, err
}

// MemoryUse reads what the group holds.
func (g *Group) MemoryUse() (MemoryUse, error) {
	name := "memory.usage_in_bytes"
	if g.m.unified {
		name = "memory.current"
	}
	total, err := readInt(g.file("memory", name))
	if err != nil {
		return MemoryUse{}, err
	}
	text, err := os.ReadFile(g.file("memory", "memory.stat"))
	if err != nil {
		return MemoryUse{}, err
	}
	use := MemoryUse{Total: total, Held: total}
	for line := range strings.Lines(string(text)) {
		if name, value, _ := strings.Cut(strings.TrimSpace(line), " "); name == "inactive_file" || name == "active_file" {
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				return MemoryUse{}, fmt.Errorf("memory.stat of %s: %w", g.path, err)
			}
			use.Held -= n
		}
	}
	return use, nil
}

// MemoryWatch tells when a group comes to use more memory than it may. It is
// used by one goroutine, but for Close.
type MemoryWatch struct {
	wait  func(most time.Duration) error
	close func() error
}

// Wait returns when the watch tells something, or after at most so long (0 =
// no limit), or with an error when it is closed.
func (w *MemoryWatch) Wait(most time.Duration) error { return w.wait(most) }

// Close ends the watch.
func (w *MemoryWatch) Close() error { return w.close() }

// WatchMemory watches the group's memory. limit is that of SetMemory; the watch
// looks at what the group uses with the file cache, so that it may tell too often.
func (g *Group) WatchMemory(limit int64) (*MemoryWatch, error) {
	var w *MemoryWatch
	var err error
	if g.m.unified {
		w, err = g.watchV2()
	} else {
		w, err = g.watchV1(limit)
	}
	if err != nil {
		return nil, fmt.Errorf("watch the memory of control group %s: %w", g.path, err)
	}
	return w, nil
}

// watchV1 reads an event descriptor that the kernel counts up when the limit is
// crossed, and when processes must wait
// (Documentation/admin-guide/cgroup-v1/memory.rst).
func (g *Group) watchV1(limit int64) (*MemoryWatch, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, err
	}
	events := os.NewFile(uintptr(fd), "memory of "+filepath.Base(g.path))
	for name, argument := range map[string]string{"memory.usage_in_bytes": strconv.FormatInt(limit, 10), "memory.oom_control": ""} {
		file, err := os.Open(g.file("memory", name))
		if err == nil {
			err = write(g.file("memory", "cgroup.event_control"), fmt.Sprintf("%d %d %s", fd, file.Fd(), argument))
			_ = file.Close()
		}
		if err != nil {
			return nil, errors.Join(err, events.Close())
		}
	}
	wait := func(most time.Duration) error {
		var deadline time.Time
		if most > 0 {
			deadline = time.Now().Add(most)
		}
		if err := events.SetReadDeadline(deadline); err != nil {
			return err
		}
		var count [8]byte
		_, err := events.Read(count[:])
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		return err
	}
	return &MemoryWatch{wait: wait, close: events.Close}, nil
}

// watchV2 waits for changes of memory.events
// (Documentation/admin-guide/cgroup-v2.rst).
func (g *Group) watchV2() (*MemoryWatch, error) {
	id, changed, err := g.m.events.add(g.file("", "memory.events"))
	if err != nil {
		return nil, err
	}
	closed := make(chan struct{})
	wait := func(most time.Duration) error {
		var late <-chan time.Time
		if most > 0 {
			timer := time.NewTimer(most)
			defer timer.Stop()
			late = timer.C
		}
		select {
		case _, ok := <-changed:
			if ok {
				return nil
			}
		case <-late:
			return nil
		case <-closed:
		}
		return os.ErrClosed
	}
	return &MemoryWatch{wait: wait, close: sync.OnceValue(func() error {
		close(closed)
		g.m.events.remove(id)
		return nil
	})}, nil
}
