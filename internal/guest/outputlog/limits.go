package outputlog

import (
	"os"

	"golang.org/x/sys/unix"
)

// Limits bound what logs keep. All sizes are bytes; zero fields mean the
// defaults.
type Limits struct {
	Memory      int64  // newest output of one log, in memory; default 1 MiB
	Disk        int64  // older output of one log, on disk; default 64 MiB, negative = none
	TotalMemory int64  // output of all logs in memory; default 64 MiB, at most 1/8 of the machine's memory
	TotalDisk   int64  // output of all logs on disk; default 512 MiB, at most 1/4 of what is free at the start
	Dir         string // where output goes that is not in memory; default /var/tmp (made if missing), else the temporary directory
}

// The smallest slab and the largest, and so the unit of spilling.
const (
	minSlab = 4 << 10
	maxSlab = 256 << 10
)

func (l Limits) withDefaults() Limits {
	if l.Dir == "" {
		l.Dir = spillDir()
	}
	if l.Memory <= 0 {
		l.Memory = 1 << 20
	}
	if l.Disk == 0 {
		l.Disk = 64 << 20
	}
	if l.TotalMemory <= 0 {
		l.TotalMemory = min(64<<20, machineMemory()/8)
	}
	if l.TotalDisk == 0 {
		l.TotalDisk = min(512<<20, freeDisk(l.Dir)/4)
	}
	l.Memory = max(l.Memory, 4*minSlab)
	return l
}

// spillDir prefers /var/tmp: in a capsule /tmp is often memory itself.
func spillDir() string {
	const dir = "/var/tmp"
	if err := os.MkdirAll(dir, 0o1777); err != nil {
		return os.TempDir()
	}
	return dir
}

// machineMemory returns what the machine has, or 512 MiB if it does not say.
func machineMemory() int64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 512 << 20
	}
	return int64(info.Totalram) * int64(info.Unit)
}

func freeDisk(dir string) int64 {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return 0
	}
	return int64(fs.Bavail) * fs.Bsize
}
