package nestbox

import (
	"net/netip"
	"time"
)

// SystemProcess is a process as the kernel of a capsule has it, whoever started it.
type SystemProcess struct {
	PID, PPID int
	Process   ProcessID // whose tree it is in; 0 = in none
	User      string    // name, or number if it has none
	State     string    // as in ps: R, S, D, T, Z, …
	Cmd       string    // with its arguments, cut; [name] if it has none
	CPU       time.Duration
	Memory    int64 // resident, in bytes
	Ports     []ListeningPort
}

// ListeningPort is a TCP port that a process listens on.
type ListeningPort struct {
	Port    uint16
	Address netip.Addr // unspecified = any
}

// MaxTree is how many processes a tree shows.
const MaxTree = 20_000
