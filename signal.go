package nestbox

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// signals are the names of kill -l on Linux, without the real-time ones.
var signals = map[string]syscall.Signal{
	"SIGHUP": 1, "SIGINT": 2, "SIGQUIT": 3, "SIGILL": 4, "SIGTRAP": 5, "SIGABRT": 6, "SIGBUS": 7, "SIGFPE": 8,
	"SIGKILL": 9, "SIGUSR1": 10, "SIGSEGV": 11, "SIGUSR2": 12, "SIGPIPE": 13, "SIGALRM": 14, "SIGTERM": 15,
	"SIGSTKFLT": 16, "SIGCHLD": 17, "SIGCONT": 18, "SIGSTOP": 19, "SIGTSTP": 20, "SIGTTIN": 21, "SIGTTOU": 22,
	"SIGURG": 23, "SIGXCPU": 24, "SIGXFSZ": 25, "SIGVTALRM": 26, "SIGPROF": 27, "SIGWINCH": 28, "SIGIO": 29,
	"SIGPWR": 30, "SIGSYS": 31,
}

// ParseSignal reads a signal's name, with or without SIG, in upper or lower
// case, or its number. CodeInvalid lists the names.
func ParseSignal(s string) (syscall.Signal, error) {
	if n, err := strconv.Atoi(s); err == nil && SignalName(syscall.Signal(n)) != "" {
		return syscall.Signal(n), nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if n, ok := signals[name]; ok {
		return n, nil
	}
	return 0, Errorf(CodeInvalid, "unknown signal %.40q; known are %s", s, strings.Join(SignalNames(), ", "))
}

// SignalNames returns the names that ParseSignal knows, by number.
func SignalNames() []string {
	return slices.SortedFunc(maps.Keys(signals), func(a, b string) int { return int(signals[a]) - int(signals[b]) })
}

// SignalName returns the name of a signal, or "" if it has none here.
func SignalName(sig syscall.Signal) string {
	for name, n := range signals {
		if n == sig {
			return name
		}
	}
	return ""
}
