package envd

import "github.com/nestbox/nestbox/internal/guest/outputlog"

// Limits bound what an Envd keeps; zero fields mean the defaults.
type Limits struct {
	Output outputlog.Limits
	Exited int // exit records that are kept; default 1,000
	Pids   int // processes and threads of all trees together; 0 = no limit. It needs a cgroup v2 of this OS process's own
}

func (l Limits) withDefaults() Limits {
	if l.Exited <= 0 {
		l.Exited = 1000
	}
	return l
}
