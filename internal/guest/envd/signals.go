package envd

import (
	"bufio"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// inheritedSignals are what this process was started with: signals that it
// ignores or blocks would be ignored and blocked in every program that it starts,
// as under nohup(1). Programs expect the defaults.
type inheritedSignals struct {
	ignored []os.Signal
	// internal are those of the ignored that the Go runtime leaves alone because
	// C libraries use them. posix_spawn(3) of glibc, and so make(1), ignores 32.
	internal []int
	blocked  bool
}

// readInheritedSignals asks the kernel (proc_pid_status(5)).
func readInheritedSignals() (s inheritedSignals) {
	f, err := os.Open("/proc/thread-self/status")
	if err != nil {
		return s
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), ":")
		mask, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		if err != nil {
			continue
		}
		switch name {
		case "SigBlk":
			s.blocked = mask != 0
		case "SigIgn":
			for sig := 1; sig <= 64; sig++ {
				switch {
				case mask>>(sig-1)&1 == 0:
				case 32 <= sig && sig <= 34:
					s.internal = append(s.internal, sig)
				default:
					s.ignored = append(s.ignored, syscall.Signal(sig))
				}
			}
		}
	}
	return s
}

// catch has the ignored signals caught and dropped: what is caught has its default
// in a program that is started, and this process ignores it still.
func (s inheritedSignals) catch() (stop func()) {
	for _, sig := range s.internal {
		setDisposition(sig, sigDefault)
	}
	dropped := make(chan os.Signal, 1) // nothing receives, and the runtime does not wait
	if len(s.ignored) > 0 {            // without signals, Notify is for all
		signal.Notify(dropped, s.ignored...)
	}
	return func() {
		for _, sig := range s.internal {
			setDisposition(sig, sigIgnore)
		}
		if len(s.ignored) > 0 { // without signals, Ignore is for all
			signal.Stop(dropped)
			signal.Ignore(s.ignored...)
		}
	}
}

// SIG_DFL and SIG_IGN of signal(2).
const (
	sigDefault = 0
	sigIgnore  = 1
)

// setDisposition sets what a signal does that the Go runtime has nothing to do
// with (rt_sigaction(2)).
func setDisposition(sig int, handler uintptr) {
	action := [4]uintptr{handler} // then flags, restorer and mask
	_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&action)), 0, unsafe.Sizeof(action[3]), 0, 0)
}

// unblocked calls start on a thread that blocks no signal.
func (s inheritedSignals) unblocked(start func() (int, error)) (int, error) {
	if s.blocked {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		_ = unix.PthreadSigmask(unix.SIG_SETMASK, &unix.Sigset_t{}, nil) // it fails for a bad argument only
	}
	return start()
}
