package gvisor

import (
	"context"
	"math"
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
	roomStep  = 64 << 20
	roomEvery = 2 * minLook
	maxRoom   = 512 << 20

	// settleTime is how long what a killed tree held may show no sign of coming back
	// before another one is chosen.
	settleTime = 500 * time.Millisecond

	// The programs stand still while something is being freed, but not for longer
	// than holdTime. New ones are looked for every stopEvery.
	holdTime  = 20 * time.Second
	stopEvery = 100 * time.Millisecond

	// What a killed tree made gVisor's own kernel take comes back late, when that
	// next collects its garbage, and is no reason to kill another one.
	calmTime  = 3 * time.Minute
	tolerated = overhead

	// guardPatience is how long nothing may help before the kernel may kill the
	// sandbox.
	guardPatience = 40 * time.Second

	// How long is waited after a free that failed, more each time, unless still
	// more memory is taken.
	firstPause = 200 * time.Millisecond
	lastPause  = 30 * time.Second
)

// GuardMemory implements sandbox.Sandbox.
func (b *running) GuardMemory(ctx context.Context, free func(ctx context.Context, used int64) error) {
	g := &memoryGuard{group: b.d.cgroup(b.id), limit: memoryLimit(b.rec.MemoryMB), free: free, programs: &programs{b.d.cgroup(b.id), b.rec.Sentry.PID, map[int]time.Duration{}}}
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
	g.programs.adopt() // that guard may have stopped some
	g.programs.goOn()
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
		case use.Held > g.allowed():
			g.relieve(ctx)
			pause = minLook
		case use.Total > g.limit: // with the file cache: only looking tells when that gives way
			pause = min(max(time.Duration(float64(g.allowed()-use.Held)/fastest*float64(time.Second)), minLook), maxLook)
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
	group    *cgroup.Group
	limit    int64
	calm     time.Time // until when a little more is tolerated
	room     int64     // beyond limit and margin
	lastRoom time.Time // when it was given
	programs *programs
	free     func(ctx context.Context, used int64) error
}

// allowed returns what the sandbox may hold now.
func (g *memoryGuard) allowed() int64 {
	if time.Now().Before(g.calm) {
		return g.limit + tolerated
	}
	return g.limit
}

// relieve has memory freed until the sandbox holds no more than it may, or
// has ended. The programs stand still while the daemon chooses one: it would
// otherwise wait for them, and they would go on taking memory.
func (g *memoryGuard) relieve(ctx context.Context) {
	began, pause := time.Now(), firstPause
	_ = g.group.LetKernelKill(false)
	for ctx.Err() == nil {
		use, err := g.group.MemoryUse()
		if err != nil || use.Held <= g.allowed() {
			break
		}
		if time.Since(began) > guardPatience {
			_ = g.group.LetKernelKill(true)
		}
		g.programs.stop()
		g.makeRoom()
		freed := make(chan error, 1)
		go func() { freed <- g.free(ctx, use.Held) }()
		err = g.hold(ctx, freed)
		g.programs.goOn()
		if err != nil {
			g.settle(ctx, pause)
			pause = min(2*pause, lastPause)
		} else {
			pause = firstPause
			g.calm = time.Now().Add(calmTime)
			g.settle(ctx, settleTime)
		}
	}
	if ctx.Err() == nil {
		_ = g.give(0) // if the kernel refuses, it is tried again when it is next looked at
	}
}

// hold keeps the programs from going on until freed has an answer, but not for
// long, and gives what the daemon needs.
func (g *memoryGuard) hold(ctx context.Context, freed <-chan error) error {
	began, lastStop := time.Now(), time.Now()
	ticker := time.NewTicker(minLook)
	defer ticker.Stop()
	for {
		if time.Since(lastStop) > stopEvery && time.Since(began) < holdTime {
			g.programs.stop()
			lastStop = time.Now()
		}
		if time.Since(began) > holdTime {
			g.programs.goOn()
		}
		g.makeRoom()
		select {
		case err := <-freed:
			return err
		case <-ticker.C:
		case <-ctx.Done():
			return <-freed
		}
	}
}

// settle waits until the sandbox holds no more than it may, or for what it
// holds to have stopped falling for so long, or to rise.
func (g *memoryGuard) settle(ctx context.Context, most time.Duration) {
	ticker := time.NewTicker(minLook)
	defer ticker.Stop()
	lowest, since := int64(math.MaxInt64), time.Now()
	for time.Since(since) < most {
		use, err := g.group.MemoryUse()
		if err != nil || use.Held <= g.allowed() {
			return
		}
		switch {
		case use.Held < lowest-(1<<20):
			lowest, since = use.Held, time.Now()
		case use.Held > lowest+roomStep:
			return // somebody else goes on taking
		}
		g.makeRoom()
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

// makeRoom lets the sandbox go a step further if it needs it.
func (g *memoryGuard) makeRoom() {
	use, err := g.group.MemoryUse()
	if err != nil || use.Held <= g.limit+g.room+roomStep || g.room >= maxRoom || time.Since(g.lastRoom) < roomEvery {
		return
	}
	g.lastRoom = time.Now()
	_ = g.give(g.room + roomStep)
}

// give lets the sandbox go that far beyond its limit and the margin.
func (g *memoryGuard) give(room int64) error {
	err := g.group.SetMemory(g.limit, room)
	if err == nil {
		g.room = room
	}
	return err
}
