package outputlog

import (
	"sync"
	"sync/atomic"
)

// Budget is what all logs of a daemon share: their limits, the totals of memory
// and disk, and slabs to use again.
type Budget struct {
	limits  Limits
	memory  atomic.Int64 // bytes of slabs in memory
	disk    atomic.Int64 // bytes of spill files
	readers atomic.Int64

	reclaim func() bool // nil never does

	full sync.Pool // *[]byte of maxSlab bytes
}

// NewBudget returns the Budget of no log yet. reclaim, if it is not nil, frees
// disk by forgetting the output of a process that ended, and reports whether it
// did; it may be called with a log's writing lock held.
func NewBudget(limits Limits, reclaim func() bool) *Budget {
	return &Budget{limits: limits.withDefaults(), reclaim: reclaim}
}

// Memory returns how many bytes of output are in memory.
func (b *Budget) Memory() int64 { return b.memory.Load() }

// Disk returns how many bytes of disk output uses.
func (b *Budget) Disk() int64 { return b.disk.Load() }

// OverMemory reports whether more is in memory than may be.
func (b *Budget) OverMemory() bool { return b.memory.Load() > b.limits.TotalMemory }

// takeDisk reserves n bytes on disk.
func (b *Budget) takeDisk(n int64) bool {
	for {
		if b.disk.Add(n) <= b.limits.TotalDisk {
			return true
		}
		b.disk.Add(-n)
		if b.reclaim == nil || !b.reclaim() {
			return false
		}
	}
}

// buffer returns an empty slice of the given capacity.
func (b *Budget) buffer(size int) []byte {
	if size == maxSlab {
		if old, ok := b.full.Get().(*[]byte); ok {
			return (*old)[:0]
		}
	}
	return make([]byte, 0, size)
}

// recycle takes back a buffer that nobody looks at any more.
func (b *Budget) recycle(buf []byte) {
	if cap(buf) == maxSlab {
		buf = buf[:0]
		b.full.Put(&buf)
	}
}
