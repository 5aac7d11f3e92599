package envd

import (
	"sync"
	"sync/atomic"
)

// budget is what all output logs of an Envd share: the totals of memory and
// disk, and slabs to use again.
type budget struct {
	memory    atomic.Int64 // bytes of slabs in memory
	disk      atomic.Int64 // bytes of slabs on disk
	maxMemory int64
	maxDisk   int64
	dir       string // where spill files are made

	// reclaim frees disk by forgetting the output of a process that ended. It
	// reports whether it did; nil never does. It may be called with a log's
	// writing lock held.
	reclaim func() bool

	full sync.Pool // *[]byte of maxSlab bytes
}

func newBudget(limits Limits) *budget {
	return &budget{maxMemory: limits.TotalMemory, maxDisk: limits.TotalDisk, dir: limits.SpillDir}
}

func (b *budget) overMemory() bool { return b.memory.Load() > b.maxMemory }

// takeDisk reserves a slot of n bytes on disk.
func (b *budget) takeDisk(n int64) bool {
	for {
		if b.disk.Add(n) <= b.maxDisk {
			return true
		}
		b.disk.Add(-n)
		if b.reclaim == nil || !b.reclaim() {
			return false
		}
	}
}

// buffer returns an empty slice of the given capacity.
func (b *budget) buffer(size int) []byte {
	if size == maxSlab {
		if old, ok := b.full.Get().(*[]byte); ok {
			return (*old)[:0]
		}
	}
	return make([]byte, 0, size)
}

// recycle takes back a buffer that nobody looks at any more.
func (b *budget) recycle(buf []byte) {
	if cap(buf) == maxSlab {
		buf = buf[:0]
		b.full.Put(&buf)
	}
}
