package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// prepareSelf sets what concerns this OS process as a whole.
func prepareSelf() {
	limitMemory()
	keepThreads()
	withholdCapabilities()
}

// limitMemory keeps the heap small: capsules are many on a host, and what envd
// takes is missing inside. GOMEMLIMIT and GOGC win.
func limitMemory() {
	total := int64(1 << 30)
	var info unix.Sysinfo_t
	known := unix.Sysinfo(&info) == nil
	if known {
		total = int64(info.Totalram) * int64(info.Unit)
	}
	if os.Getenv("GOGC") == "" {
		collectAtLeast(uint64(min(smallHeap, total/32)))
	}
	if os.Getenv("GOMEMLIMIT") == "" && known {
		const most = 192 << 20
		debug.SetMemoryLimit(min(most, total/4))
	}
}

// A heap grows by half before it is collected, but at least to smallHeap, or where
// memory is short to a 32nd of it: of a heap of
// two megabytes, a collection for each that is used would take half of the time,
// since waking threads is slow inside a sandbox.
const (
	heapGrowth = 50       // percent
	smallHeap  = 12 << 20 // bytes
	mostGrowth = 400      // percent; the runtime collects at four megabytes times this at the latest
)

// collectAtLeast sets, after each collection, how far the heap may grow until the next.
func collectAtLeast(small uint64) {
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	percent := growthOf(4<<20, small)
	debug.SetGCPercent(percent)
	var watch func(struct{})
	watch = func(struct{}) {
		metrics.Read(live)
		next := growthOf(live[0].Value.Uint64(), small)
		if next*10 < percent*9 || next*9 > percent*10 { // it stops all threads to change it
			percent = next
			debug.SetGCPercent(percent)
		}
		runtime.AddCleanup(new([16]byte), watch, struct{}{}) // of what the next collection finds
	}
	watch(struct{}{})
}

// growthOf returns by how many percent a heap of live bytes may grow, to small at least.
func growthOf(live, small uint64) int {
	if live >= small {
		return heapGrowth
	}
	return int(min(mostGrowth, max(heapGrowth, 100*(small-live)/max(live, 1))))
}

// keepThreads has two threads at least run Go code. With one, on one virtual
// CPU, everybody waits for the runtime to notice that the thread is in a
// system call; that takes milliseconds.
func keepThreads() {
	if runtime.GOMAXPROCS(0) < 2 {
		runtime.GOMAXPROCS(2)
	}
}

// withheld are the capabilities that no process of the capsule gets: they
// would exempt it from RLIMIT_NPROC, so that a fork bomb could keep even envd
// from forking.
var withheld = [...]uintptr{unix.CAP_SYS_RESOURCE, unix.CAP_SYS_ADMIN}

// withholdCapabilities removes what is withheld from the sets of all threads
// that a child's exec draws on. envd itself keeps it. Failing means that envd
// has not the right to, and then it has no such capability to pass on either.
func withholdCapabilities() {
	for _, c := range withheld {
		_, _, _ = syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	if unix.Capget(&header, &sets[0]) != nil {
		return
	}
	for _, c := range withheld {
		sets[c/32].Inheritable &^= 1 << (c % 32)
	}
	_, _, _ = syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&sets)), 0)
	runtime.KeepAlive(&header)
	runtime.KeepAlive(&sets)
}
