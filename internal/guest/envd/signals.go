package envd

import (
	"bufio"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// inheritedSignals are what this process was started with: signals that it
// ignores or blocks would be ignored and blocked in every program that it starts,
// as under nohup(1). Programs expect the defaults.
type inheritedSignals struct {
	ignored []os.Signal
	blocked bool
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
			for sig := syscall.Signal(1); sig <= 31; sig++ {
				if mask>>(sig-1)&1 != 0 {
					s.ignored = append(s.ignored, sig)
				}
			}
		}
	}
	return s
}

// catch has the ignored signals caught and dropped: what is caught has its default
// in a program that is started, and this process ignores it still.
func (s inheritedSignals) catch() (stop func()) {
	if len(s.ignored) == 0 {
		return func() {}
	}
	dropped := make(chan os.Signal, 1) // nothing receives, and the runtime does not wait
	signal.Notify(dropped, s.ignored...)
	return func() {
		signal.Stop(dropped)
		signal.Ignore(s.ignored...)
	}
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
