package gvisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/cgroup"
	"github.com/nestbox/nestbox/internal/netns"
	"github.com/nestbox/nestbox/internal/pidfd"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// running is a running sandbox.
type running struct {
	d      *Driver
	id     string
	rec    handle
	ns     *netns.NS
	sentry *pidfd.File
	gofer  *pidfd.File
	reason string // set before done is closed
	done   chan struct{}
	ended  chan struct{} // closed when the watcher has returned
}

var _ sandbox.Sandbox = (*running)(nil)

// open returns the running sandbox and watches it. CodeNotFound: it has ended, for
// the reason in the message.
func (d *Driver) open(id string) (*running, error) {
	rec, err := d.readHandle(id)
	if err != nil {
		return nil, err
	}
	notFound := func(err error) error {
		return &nestbox.Error{Code: nestbox.CodeNotFound, Message: d.why(id, rec, 0, false), Err: err}
	}
	sentry, err := rec.Sentry.Open()
	if err != nil {
		return nil, notFound(err)
	}
	gofer, err := rec.Gofer.Open()
	if err != nil {
		return nil, errors.Join(notFound(err), sentry.Close())
	}
	ns, err := d.netns.Open(id)
	if err != nil {
		return nil, errors.Join(notFound(err), sentry.Close(), gofer.Close())
	}
	b := &running{d: d, id: id, rec: rec, ns: ns, sentry: sentry, gofer: gofer, done: make(chan struct{}), ended: make(chan struct{})}
	go b.watch()
	return b, nil
}

// ID implements sandbox.Sandbox.
func (b *running) ID() string { return b.id }

// Dial implements sandbox.Sandbox.
func (b *running) Dial(ctx context.Context, port uint16) (net.Conn, error) {
	conn, err := b.ns.Dial(ctx, port)
	if err != nil {
		return nil, sandbox.DialError(port, err)
	}
	return conn, nil
}

// Done implements sandbox.Sandbox.
func (b *running) Done() <-chan struct{} { return b.done }

// Reason implements sandbox.Sandbox. It is empty until Done is closed.
func (b *running) Reason() string {
	select {
	case <-b.done:
		return b.reason
	default:
		return ""
	}
}

// Close implements sandbox.Sandbox.
func (b *running) Close() error {
	err := b.sentry.Close() // the watcher's wait ends
	<-b.ended
	return errors.Join(err, b.gofer.Close(), b.ns.Close())
}

// goferTime is how long the gofer may outlive its sandbox. It ends by itself.
const goferTime = 5 * time.Second

// watch waits for the sandbox's process to end, or for Close.
func (b *running) watch() {
	defer close(b.ended)
	if err := b.sentry.Wait(0); err != nil {
		return // closed
	}
	status, reaped := pidfd.Reap(b.rec.Sentry.PID)
	b.reason = b.d.why(b.id, b.rec, status, reaped)
	close(b.done)

	if err := b.gofer.Wait(goferTime); errors.Is(err, os.ErrDeadlineExceeded) {
		_ = b.gofer.Signal(syscall.SIGKILL) // Destroy sees to it again
	}
	pidfd.Reap(b.rec.Gofer.PID)
}

// why says why a sandbox ended.
func (d *Driver) why(id string, rec handle, status syscall.WaitStatus, reaped bool) string {
	if d.destroyed(id) {
		return "destroyed"
	}
	switch ran, err := d.cgroup(id).OutOfMemory(); {
	case err != nil:
	case ran == cgroup.GroupRanOut:
		return fmt.Sprintf("out of memory: the capsule used more than its %d MiB", rec.MemoryMB)
	case ran == cgroup.HostRanOut:
		return "out of memory: the host had none left"
	}
	if log := d.keepCrashLog(id); log != "" {
		return "gVisor crashed, and left the log " + log
	}
	switch {
	case !reaped: // it was started by an earlier process
		return "the sandbox process ended"
	case status.Signaled():
		return fmt.Sprintf("the sandbox process was killed by signal %d (%s)", status.Signal(), status.Signal())
	default:
		return fmt.Sprintf("the capsule's daemon exited with status %d", status.ExitStatus())
	}
}
