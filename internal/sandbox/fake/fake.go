// Package fake is a driver for tests: it isolates NOTHING. A "sandbox" is the
// real envd run as a child process of the host, on the host's file system and
// loopback. It passes sandboxtest and can be told to fail.
//
// It may import the root package, internal/sandbox and leaf packages only.
package fake

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/durable"
	"github.com/nestbox/nestbox/internal/pidfd"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// Driver implements sandbox.Driver, without any isolation.
type Driver struct {
	dir, envd string

	mu       sync.Mutex
	failNext error
	block    <-chan struct{}
	creating map[string]*creation
}

// creation is a Create under way.
type creation struct {
	cancel context.CancelFunc
	done   chan struct{}
}

var _ sandbox.Driver = (*Driver)(nil)

// New returns a Driver whose sandboxes are recorded in dir and run the envd at
// that path. It makes this process the parent of orphaned descendants.
func New(dir, envd string) (*Driver, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, err
	}
	return &Driver{dir: dir, envd: envd, creating: map[string]*creation{}}, nil
}

// FailNextCreate lets the next Create fail with err after it has started its
// process.
func (d *Driver) FailNextCreate(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.failNext = err
}

// BlockCreate lets every Create from now on wait, after it has made its
// directory, until c is closed or the Create is cancelled. A nil c ends this.
func (d *Driver) BlockCreate(c <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.block = c
}

// Crash ends a sandbox and everything in it, as if it had died by itself.
func (d *Driver) Crash(id string) error {
	rec, err := d.readHandle(id)
	if err != nil {
		return err
	}
	return killTree(context.Background(), rec.Envd)
}

// Capabilities implements sandbox.Driver: it has none.
func (d *Driver) Capabilities() []sandbox.Capability { return nil }

// Name implements sandbox.Driver.
func (d *Driver) Name() string { return "fake" }

// Close implements sandbox.Driver.
func (d *Driver) Close() error { return nil }

func (d *Driver) path(id string, name ...string) string {
	return filepath.Join(append([]string{d.dir, id}, name...)...)
}

// handle is what a later Driver needs to take up a sandbox.
type handle struct {
	Envd pidfd.Process
}

const (
	handleFile  = "record.json"
	portFile    = "port"
	destroyFile = "destroy"
)

// Create implements sandbox.Driver. It waits until envd listens.
func (d *Driver) Create(ctx context.Context, spec sandbox.Spec) (sandbox.Sandbox, error) {
	if !nestbox.ValidID(nestbox.PrefixCapsule, spec.ID) {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "invalid capsule ID")
	}
	if err := spec.Resources.Validate(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	d.mu.Lock()
	if d.creating[spec.ID] != nil {
		d.mu.Unlock()
		return nil, nestbox.Errorf(nestbox.CodeConflict, "sandbox %s is being started already", spec.ID)
	}
	c := &creation{cancel: cancel, done: make(chan struct{})}
	d.creating[spec.ID] = c
	fail, block := d.failNext, d.block
	d.failNext = nil
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.creating, spec.ID)
		close(c.done)
	}()

	if err := os.Mkdir(d.path(spec.ID), 0o700); errors.Is(err, fs.ErrExist) {
		return nil, nestbox.Errorf(nestbox.CodeConflict, "sandbox %s exists already", spec.ID)
	} else if err != nil {
		return nil, nestbox.Errorf(nestbox.CodeInternal, "start sandbox %s: %w", spec.ID, err)
	}
	b, err := d.start(ctx, spec, block)
	if err == nil && fail != nil {
		b, err = nil, errors.Join(fail, b.Close())
	}
	if err != nil {
		return nil, errors.Join(err, d.remove(context.WithoutCancel(ctx), spec.ID))
	}
	return b, nil
}

func (d *Driver) start(ctx context.Context, spec sandbox.Spec, block <-chan struct{}) (*running, error) {
	if block != nil {
		select {
		case <-block:
		case <-ctx.Done():
			return nil, nestbox.Errorf(nestbox.CodeCanceled, "start sandbox %s: %w", spec.ID, ctx.Err())
		}
	}
	cmd := exec.Command(d.envd, "--listen", "127.0.0.1:0", "--port-file", d.path(spec.ID, portFile))
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + d.path(spec.ID)}
	for name, value := range spec.Env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // outlives this process and its terminal
	if err := cmd.Start(); err != nil {
		return nil, nestbox.Errorf(nestbox.CodeInternal, "start sandbox %s: %w", spec.ID, err)
	}
	pid := cmd.Process.Pid
	if err := cmd.Process.Release(); err != nil { // the watcher reaps it
		return nil, nestbox.Errorf(nestbox.CodeInternal, "start sandbox %s: %w", spec.ID, err)
	}
	envd, err := pidfd.Lookup(pid)
	if err == nil {
		err = d.writeHandle(spec.ID, handle{envd})
	}
	if err != nil {
		return nil, nestbox.Errorf(nestbox.CodeInternal, "record sandbox %s: %w", spec.ID, err)
	}
	b, err := d.open(spec.ID)
	if err != nil {
		return nil, err
	}
	if err := b.awaitPort(ctx); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

// Open implements sandbox.Driver.
func (d *Driver) Open(_ context.Context, id string) (sandbox.Sandbox, error) {
	if !nestbox.ValidID(nestbox.PrefixCapsule, id) {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "invalid capsule ID")
	}
	b, err := d.open(id)
	if err != nil {
		return nil, err
	}
	if _, err := b.port(); err != nil {
		return nil, errors.Join(nestbox.Errorf(nestbox.CodeNotFound, "sandbox %s never ran", id), b.Close())
	}
	return b, nil
}

// Destroy implements sandbox.Driver. It ends a Create of this Driver that is
// under way.
func (d *Driver) Destroy(ctx context.Context, id string) error {
	if !nestbox.ValidID(nestbox.PrefixCapsule, id) {
		return nestbox.Errorf(nestbox.CodeInvalid, "invalid capsule ID")
	}
	d.mu.Lock()
	c := d.creating[id]
	d.mu.Unlock()
	if c != nil {
		c.cancel()
		select {
		case <-c.done:
		case <-ctx.Done():
			return nestbox.Errorf(nestbox.CodeTimeout, "destroy sandbox %s: %w", id, ctx.Err())
		}
	}
	return d.remove(ctx, id)
}

func (d *Driver) remove(ctx context.Context, id string) error {
	err := durable.WriteFile(d.path(id, destroyFile), nil, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return nestbox.Errorf(nestbox.CodeInternal, "remove sandbox %s: %w", id, err)
	}
	processes, err := d.processes(id)
	if err == nil {
		err = killTree(ctx, processes...)
	}
	if err == nil {
		_ = os.Remove(d.path(id, handleFile)) // before the mark of Destroy: see destroyed
		err = os.RemoveAll(d.path(id))
	}
	if err != nil {
		return nestbox.Errorf(nestbox.CodeInternal, "remove sandbox %s: %w", id, err)
	}
	return nil
}

// destroyed reports that Destroy has at least begun.
func (d *Driver) destroyed(id string) bool {
	_, err := os.Stat(d.path(id, destroyFile))
	if err != nil { // it may have gone again with the rest
		_, err = os.Stat(d.path(id, handleFile))
		return err != nil
	}
	return true
}

// List implements sandbox.Driver.
func (d *Driver) List(context.Context) ([]string, error) {
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return nil, nestbox.Errorf(nestbox.CodeInternal, "list sandboxes: %w", err)
	}
	ids := make([]string, 0, len(entries))
	for _, e := range entries {
		if nestbox.ValidID(nestbox.PrefixCapsule, e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

func (d *Driver) writeHandle(id string, rec handle) error {
	text, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	path := d.path(id, handleFile)
	return durable.WriteFile(path, text, 0o600)
}

func (d *Driver) readHandle(id string) (handle, error) {
	var rec handle
	text, err := os.ReadFile(d.path(id, handleFile))
	if err == nil {
		err = json.Unmarshal(text, &rec)
	}
	if err != nil {
		return rec, &nestbox.Error{Code: nestbox.CodeNotFound, Message: "there is no trace of the sandbox", Err: err}
	}
	return rec, nil
}

// running is a running "sandbox".
type running struct {
	d      *Driver
	id     string
	rec    handle
	envd   *pidfd.File
	reason string // set before done is closed
	done   chan struct{}
	ended  chan struct{} // closed when the watcher has returned
}

func (d *Driver) open(id string) (*running, error) {
	rec, err := d.readHandle(id)
	if err != nil {
		return nil, err
	}
	envd, err := rec.Envd.Open()
	if err != nil {
		return nil, &nestbox.Error{Code: nestbox.CodeNotFound, Message: "the sandbox process ended", Err: err}
	}
	b := &running{d: d, id: id, rec: rec, envd: envd, done: make(chan struct{}), ended: make(chan struct{})}
	go b.watch()
	return b, nil
}

func (b *running) watch() {
	defer close(b.ended)
	if err := b.envd.Wait(0); err != nil {
		return // closed
	}
	status, reaped := pidfd.Reap(b.rec.Envd.PID)
	switch {
	case b.d.destroyed(b.id):
		b.reason = "destroyed"
	case reaped && status.Exited():
		b.reason = fmt.Sprintf("the capsule's daemon exited with status %d", status.ExitStatus())
	default:
		b.reason = "the sandbox process was killed"
	}
	close(b.done)
}

// ID implements sandbox.Sandbox.
func (b *running) ID() string { return b.id }

// Dial implements sandbox.Sandbox. The port is one of the host's loopback, but
// for envd's own.
func (b *running) Dial(ctx context.Context, port uint16) (net.Conn, error) {
	actual := strconv.Itoa(int(port))
	if port == sandbox.EnvdPort {
		var err error
		if actual, err = b.port(); err != nil {
			return nil, sandbox.DialError(port, err)
		}
	}
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "tcp4", net.JoinHostPort("127.0.0.1", actual))
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

// GuardMemory implements sandbox.Sandbox. There is no limit.
func (b *running) GuardMemory(context.Context, func(context.Context, int64) error) {}

// Close implements sandbox.Sandbox.
func (b *running) Close() error {
	err := b.envd.Close()
	<-b.ended
	return err
}

func (b *running) port() (string, error) {
	text, err := os.ReadFile(b.d.path(b.id, portFile))
	port := strings.TrimSpace(string(text))
	if err == nil && port == "" {
		err = errors.New("envd has not written its port yet")
	}
	return port, err
}

// awaitPort waits until envd has written its port.
func (b *running) awaitPort(ctx context.Context) error {
	const every = time.Millisecond
	for {
		if _, err := b.port(); err == nil {
			return nil
		}
		select {
		case <-b.done:
			return nestbox.Errorf(nestbox.CodeInternal, "start sandbox %s: %s", b.id, b.reason)
		case <-ctx.Done():
			return nestbox.Errorf(nestbox.CodeCanceled, "start sandbox %s: %w", b.id, ctx.Err())
		case <-time.After(every):
		}
	}
}
