// Package sandbox declares the seam to isolation technologies: a Driver starts
// sandboxes on this machine and finds them again.
//
// sandboxtest is the suite that every driver passes; drivers are in
// subpackages and never import each other. The package may import the root
// package and leaf packages only.
package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/image"
)

// Driver starts sandboxes. Everything a driver makes on the host has the
// sandbox's id in its name, so that a Driver in a new process finds all of it,
// however the old one ended. All methods are safe for concurrent use, for one
// id at a time. Errors are *nestbox.Error.
type Driver interface {
	Name() string

	// Capabilities are what this driver does beyond this interface's minimum.
	// What is not named here is never asked of it.
	Capabilities() []Capability

	// Create starts a sandbox with envd as its PID 1 and returns when the
	// sandbox runs (envd may not answer yet). On error nothing is left.
	// The sandbox does not end with ctx, with the Driver or with this process.
	Create(ctx context.Context, spec Spec) (Sandbox, error)

	// Open finds a running sandbox that an earlier process made. CodeNotFound:
	// there is none, or it is dead; the message says why, for people.
	Open(ctx context.Context, id string) (Sandbox, error)

	// Destroy ends a sandbox and removes every trace of it, also of one that
	// was half made or half destroyed, or that never was (no error then).
	Destroy(ctx context.Context, id string) error

	// List returns the ids of all sandboxes of which there is any trace.
	List(ctx context.Context) ([]string, error)

	// Close frees what the Driver holds in this process. Sandboxes go on.
	Close() error
}

// Capability is an optional ability of a driver.
type Capability string

// The capabilities.
const (
	// Isolates: what runs inside can harm neither the host nor other sandboxes.
	Isolates Capability = "isolates"
	// LimitsMemory, LimitsDisk, LimitsPids and LimitsCPU: the limits of
	// nestbox.Resources are kept.
	LimitsMemory Capability = "limits-memory"
	LimitsDisk   Capability = "limits-disk"
	LimitsPids   Capability = "limits-pids"
	LimitsCPU    Capability = "limits-cpu"
	// Egress: sandboxes reach what Spec.Network allows, and the driver is a Networker.
	// Without it they reach nothing.
	Egress Capability = "egress"
)

// Networker is a Driver that has Egress. It is for sandboxes that run: CodeNotFound.
type Networker interface {
	// SetNetwork replaces what a sandbox may reach. What it may not reach any more is
	// cut. CodeUnsupported: it was made without a way out.
	SetNetwork(ctx context.Context, id string, policy nestbox.NetworkPolicy) error

	// Network tells what a sandbox reaches.
	Network(ctx context.Context, id string) (nestbox.NetworkReport, error)
}

// Spec is what a sandbox is started from.
type Spec struct {
	ID        string // fixed length: nestbox.NewID(nestbox.PrefixCapsule)
	Hostname  string // "" = ID
	Root      image.Root
	Resources nestbox.Resources
	Network   nestbox.NetworkPolicy // for a driver that has Egress
	Env       map[string]string     // of envd
}

// Sandbox is a running sandbox.
type Sandbox interface {
	ID() string

	// Dial connects to a TCP port on the sandbox's own address.
	Dial(ctx context.Context, port uint16) (net.Conn, error)

	// Done is closed when the sandbox has ended by itself or by Destroy, within
	// a second of it. Reason then says why, for people.
	Done() <-chan struct{}
	Reason() string

	// GuardMemory calls free, again and again, while the sandbox uses more memory
	// than it may, so that what is inside decides what has to go. used is what the
	// sandbox uses, in bytes. If free does not help for long, the sandbox may
	// die of it. It returns when ctx ends or the sandbox has; a driver that does
	// not limit memory may do nothing. It is called once.
	GuardMemory(ctx context.Context, free func(ctx context.Context, used int64) error)

	// Close stops watching. The sandbox goes on.
	Close() error
}

// EnvdPort is the TCP port on which envd listens inside every sandbox.
const EnvdPort = 49983

// EnvToken names the environment variable that hands envd its access token.
const EnvToken = "NESTBOX_TOKEN"

// EnvUser and EnvCwd name the environment variables that tell envd the user and the
// working directory of processes that ask for none; "" = root, and the user's home.
const (
	EnvUser = "NESTBOX_USER"
	EnvCwd  = "NESTBOX_CWD"
)

// EnvPrefix begins the names of environment variables of envd that all processes of the
// sandbox get, without it.
const EnvPrefix = "NESTBOX_ENV_"

// Hosts is /etc/hosts of a sandbox with this host name.
func Hosts(hostname string) string {
	return fmt.Sprintf("127.0.0.1\tlocalhost %s\n::1\tlocalhost ip6-localhost ip6-loopback\n", hostname)
}

// ResolvConf is /etc/resolv.conf of a sandbox whose lookups go to a server; "" = to none.
func ResolvConf(nameserver string) string {
	if nameserver == "" {
		return "# There is no name server in reach.\n"
	}
	return "nameserver " + nameserver + "\n"
}

// DialError is what Sandbox.Dial fails with: CodeUnavailable, which tells what
// failed only as far as the caller can do something about it.
func DialError(port uint16, cause error) error {
	e := &nestbox.Error{Code: nestbox.CodeUnavailable, Message: fmt.Sprintf("port %d cannot be reached", port), Err: cause}
	if errors.Is(cause, syscall.ECONNREFUSED) {
		e.Message = fmt.Sprintf("nothing listens on port %d", port)
	}
	return e
}
