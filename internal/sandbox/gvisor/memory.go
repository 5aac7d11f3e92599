package gvisor

import (
	"context"
	"time"

	"github.com/nestbox/nestbox/internal/cgroup"
)

// How the guard of a sandbox's memory goes on.
const (
	// fastest is how fast memory can be taken, in bytes a second, roughly: with
	// what is left divided by it, it is too early to look again.
	fastest = 2 << 30
	// While memory is beyond its limit, or may be soon, it is looked at that often.
	minLook = 10 * time.Millisecond
	maxLook = time.Second

	// As long as something is being done about it a sandbox is given more, in
	// steps, so that the daemon inside can go on.
	roomStep  = 16 << 20
	roomEvery = 2 * minLook
	maxRoom   = 512 << 20

	// settleTime is how long what a killed tree held may show no sign of coming back
	// before another one is chosen.
	settleTime = 500 * time.Millisecond

	// guardPatience is how long nothing may help before the kernel may kill the
	// sandbox.
	guardPatience = 15 * time.Second
	freePause     = 200 * time.Millisecond // after a free that failed
)

// GuardMemory implements sandbox.Sandbox.
func (b *running) GuardMemory(ctx context.Context, free func(ctx context.Context, used int64) error) {
	g := &memoryGuard{group: b.d.cgroup(b.id), limit: memoryLimit(b.rec.MemoryMB), free: free}
	watch, err := g.group.WatchMemory(g.limit)
	if err == nil {
		// From here on it is ours to see to it. A sandbox without a guard lets its
		// processes wait: the next guard finds them.
		err = g.group.LetKernelKill(false)
	}
	if err == nil && g.give(0) != nil { // it holds more: an earlier guard was killed while it freed some
		err = g.give(maxRoom)
	}
	if err != nil {
		b.d.cfg.Log.Error("the memory of a capsule is not guarded: it dies when that runs out", "capsule", b.id, "error", err)
		return
	}
	_ = g.group.OneCPU(false) // as that guard may have left it
	stop := context.AfterFunc(ctx, func() { _ = watch.Close() })
	defer func() {
		if stop() {
			_ = watch.Close()
		}
	}()
	for {
		use, err := g.group.MemoryUse()
		if err != nil {
			return // the sandbox is gone
		}
		pause := time.Duration(0)
		switch {
		case use.Held > g.limit:
			g.relieve(ctx)
			pause = minLook
		case use.Total > g.limit: // with the file cache: only looking tells when that gives way
			pause = min(max(time.Duration(float64(g.limit-use.Held)/fastest*float64(time.Second)), minLook), maxLook)
		case g.room > 0: // the kernel refused to take it back
			_ = g.give(0)
			pause = maxLook
		}
		if watch.Wait(pause) != nil {
			return
		}
	}
}

// memoryGuard guards the memory of one sandbox.
type memoryGuard struct {
	group *cgroup.Group
	limit int64
	room  int64 // beyond limit and margin
	free  func(ctx context.Context, used int64) error
}

// relieve has memory freed until the sandbox holds no more than it may, or
// has ended.
func (g *memoryGuard) relieve(ctx context.Context) {
	began, lastRoom := time.Now(), time.Now()
	freed := make(chan error, 1)
	freeing := false
	var lowest int64 // that was held since the last free
	var nextFree time.Time
	// The daemon goes before the programs (prioritize), but they would go on
	// beside it on other CPUs.
	_ = g.group.OneCPU(true)
	ticker := time.NewTicker(minLook)
	defer ticker.Stop()
	for ctx.Err() == nil {
		use, err := g.group.MemoryUse()
		if err != nil || use.Held <= g.limit {
			break
		}
		now := time.Now()
		if use.Held < lowest-(1<<20) {
			lowest, nextFree = use.Held, now.Add(settleTime)
		}
		if !freeing && now.After(nextFree) {
			freeing = true
			go func() { freed <- g.free(ctx, use.Held) }()
		}
		if now.Sub(lastRoom) >= roomEvery && use.Held > g.limit+g.room+roomStep && g.room < maxRoom {
			lastRoom = now
			_ = g.give(g.room + roomStep)
		}
		if now.Sub(began) > guardPatience {
			_ = g.group.LetKernelKill(true)
		}
		select {
		case err := <-freed:
			freeing = false
			lowest, nextFree = use.Held, time.Now().Add(settleTime)
			if err != nil {
				nextFree = time.Now().Add(freePause)
			}
		case <-ticker.C:
		case <-ctx.Done():
		}
	}
	if freeing {
		<-freed
	}
	_ = g.group.OneCPU(false)
	if ctx.Err() == nil {
		_ = g.group.LetKernelKill(false)
		_ = g.give(0) // if the kernel refuses, it is tried again when it is next looked at
	}
}

// give lets the sandbox go that far beyond its limit and the margin.
func (g *memoryGuard) give(room int64) error {
	err := g.group.SetMemory(g.limit, room)
	if err == nil {
		g.room = room
	}
	return err
}
