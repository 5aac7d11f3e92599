package envd

import (
	"bytes"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// procStat is what /proc/<pid>/stat says of a process. PID and start time
// together name it for good.
type procStat struct {
	pid     int
	name    string // of the program, at most 15 bytes
	state   byte   // as in ps: R, S, D, T, Z, …
	ppid    int
	session int
	threads int
	kernel  bool   // a thread of the kernel: no program, and none to come
	start   uint64 // clock ticks since boot
	memory  int64  // resident, in bytes
	cpu     uint64 // clock ticks, in its own code and in the kernel
}

// kernelThread is PF_KTHREAD of include/linux/sched.h, a flag of a thread of the
// kernel.
const kernelThread = 0x00200000

// dead reports whether the process has ended and only waits to be reaped.
func (s procStat) dead() bool {
	return s.state == 'X' || s.state == 'Z' && s.threads <= 1 // the first thread may end before the others
}

// readStat reads /proc/<pid>/stat; see proc_pid_stat(5).
func readStat(pid int) (procStat, error) {
	var buf [1024]byte // the name is at most 64 bytes, the 51 numbers at most 20
	data, err := readProc("/proc/"+strconv.Itoa(pid)+"/stat", buf[:])
	if err != nil {
		return procStat{}, err
	}
	// The name is in parentheses and may contain any byte.
	i := bytes.LastIndexByte(data, ')')
	if i < 0 || i+2 > len(data) {
		return procStat{}, fmt.Errorf("/proc/%d/stat is not understood", pid)
	}
	fields := bytes.Fields(data[i+2:]) // from field 3 on
	if len(fields) < 22 || len(fields[0]) != 1 {
		return procStat{}, fmt.Errorf("/proc/%d/stat is not understood", pid)
	}
	number := func(field int) int {
		n, _ := strconv.Atoi(string(fields[field-3]))
		return n
	}
	start, err := strconv.ParseUint(string(fields[22-3]), 10, 64)
	if err != nil {
		return procStat{}, fmt.Errorf("/proc/%d/stat is not understood: %w", pid, err)
	}
	return procStat{
		pid: pid, name: string(data[min(i, bytes.IndexByte(data, '(')+1):i]), state: fields[0][0],
		cpu:  uint64(max(0, number(14)) + max(0, number(15))),
		ppid: number(4), session: number(6), threads: number(20),
		kernel: number(9)&kernelThread != 0,
		start:  start, memory: int64(number(24)) * int64(os.Getpagesize()),
	}, nil
}

// readProc reads what one read gives of a file of /proc, at most len(buf) bytes:
// all of a file of one line. System calls are dear here.
func readProc(path string, buf []byte) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fd) }()
	n, err := readNow(fd, buf)
	return buf[:max(n, 0)], err
}

// markOf returns the value of markVariable in the environment that a process
// was started with, "" if it has none or cleared it, and whether it has any
// environment.
func markOf(pid int) (mark string, some bool) {
	env, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil {
		return "", false
	}
	for entry := range bytes.SplitSeq(env, []byte{0}) {
		if value, ok := bytes.CutPrefix(entry, []byte(markVariable+"=")); ok {
			return string(value), true
		}
	}
	return "", len(env) > 0
}

// listPIDs returns all processes.
func listPIDs() ([]int, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	names, err := dir.Readdirnames(-1)
	pids := make([]int, 0, len(names))
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, err
}
