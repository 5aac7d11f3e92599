// Package pidfd names processes for good and waits for the end of processes
// that are not children. It is a leaf: it may import the standard library only.
package pidfd

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process names one process as long as the machine runs: its pid alone is used
// again after its end.
type Process struct {
	PID   int
	Start uint64 // in clock ticks since the machine started
}

// Lookup returns the process that has this pid now. One that has ended and was
// not waited for, a zombie, does not count.
func Lookup(pid int) (Process, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Process{}, err
	}
	// proc_pid_stat(5): the second field, the name, is in parentheses and may
	// hold anything; the state is the third and the start time the 22nd.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 20 {
		return Process{}, fmt.Errorf("cannot read /proc/%d/stat", pid)
	}
	if fields[0] == "Z" || fields[0] == "X" {
		return Process{}, fmt.Errorf("process %d has ended", pid)
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	return Process{pid, start}, err
}

// Open returns a handle of the process if it still runs.
func (p Process) Open() (*File, error) {
	// Non-blocking, so that the runtime's poller takes it: no thread is held.
	fd, err := unix.PidfdOpen(p.PID, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", p.PID, err)
	}
	f := &File{os.NewFile(uintptr(fd), fmt.Sprintf("pidfd of %d", p.PID))}
	now, err := Lookup(p.PID)
	if err == nil && now != p {
		err = fmt.Errorf("process %d is another one now", p.PID)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// File is a handle of a process.
type File struct{ f *os.File }

// Close ends the use of the handle and any Wait on it.
func (f *File) Close() error { return f.f.Close() }

// Wait returns nil when the process has ended. It ends early with an error when
// the handle is closed, or, as os.ErrDeadlineExceeded, after timeout if that is
// not 0.
func (f *File) Wait(timeout time.Duration) error {
	var deadline time.Time
	if timeout > 0 {
		deadline = time.Now().Add(timeout)
	}
	if err := f.f.SetReadDeadline(deadline); err != nil {
		return err
	}
	conn, err := f.f.SyscallConn()
	if err != nil {
		return err
	}
	return conn.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n > 0 && err == nil
	})
}

// Signal sends sig to the process, and never to another one.
func (f *File) Signal(sig syscall.Signal) error {
	conn, err := f.f.SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	err = conn.Control(func(fd uintptr) { sendErr = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
	return errors.Join(err, sendErr)
}

// Reap takes the exit status of a process that has ended, if it is a child of
// this one and nobody took it before.
func Reap(pid int) (syscall.WaitStatus, bool) {
	var status syscall.WaitStatus
	for {
		got, err := syscall.Wait4(pid, &status, syscall.WNOHANG, nil)
		if !errors.Is(err, syscall.EINTR) {
			return status, err == nil && got == pid
		}
	}
}
