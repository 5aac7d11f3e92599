// Package gvisor is the driver that runs sandboxes with gVisor.
//
// Each sandbox has a range of user ids, two network namespaces, a control group
// and a directory of its own, all named by its id. runsc, gVisor's command, is
// run as a separate process with an empty environment, in the sandbox's control
// group and in a mount namespace of its own, which holds the sandbox's root file
// system and ends by itself: no mount of a root can leak.
//
// The package imports no part of gVisor; package runsc below it links it in. It
// may import the root package, internal/sandbox and leaf packages only.
package gvisor

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/cgroup"
	"github.com/nestbox/nestbox/internal/netns"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// Config is what a Driver is made of. Drivers with different StateDir and
// RunDir do not see each other's sandboxes.
type Config struct {
	Envd     string // a static envd
	StateDir string // on a disk: the writable layers of sandboxes, in files without a name

	// RunDir holds what is gone after a reboot. It has at most 60 characters and
	// all users can traverse it. "" = a directory below /run/nestbox, named
	// after StateDir.
	RunDir string

	// Runsc is the command that runs runsc: a path and the arguments before
	// runsc's own. argv[0] is always "runsc". Empty: this program, which must
	// call runsc.Maybe.
	Runsc []string

	// Egress is the way of sandboxes out; nil = there is none, and they reach nothing.
	Egress Egress

	Platform string // "" = systrap
	Log      *slog.Logger

	// Ranges of user ids are handed out from UIDBase (0 = 1879048192, the first
	// after those of systemd-nspawn) and recorded in UIDDir ("" =
	// /run/nestbox/uids), which all Drivers of a machine share.
	UIDBase uint32
	UIDDir  string

	CallTimeout time.Duration // of one call of runsc; 0 = 90 s
}

// Egress opens and closes the way out of a sandbox, whose outer network namespace is at
// a path: *egress.Client.
type Egress interface {
	Put(ctx context.Context, id, namespace string, policy nestbox.NetworkPolicy) error
	Remove(ctx context.Context, id string) error
	Look(ctx context.Context, id string) (nestbox.NetworkReport, error)
}

func (c *Config) setDefaults() error {
	if len(c.Runsc) == 0 {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		c.Runsc = []string{self}
	}
	if c.Platform == "" {
		c.Platform = "systrap"
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.UIDBase == 0 {
		c.UIDBase = firstUID
	}
	if c.CallTimeout == 0 {
		c.CallTimeout = 90 * time.Second
	}
	return c.setPaths()
}

func (c *Config) setPaths() error {
	if c.StateDir == "" || c.Envd == "" {
		return nestbox.Errorf(nestbox.CodeInvalid, "StateDir and Envd must be set")
	}
	for _, path := range []*string{&c.StateDir, &c.Envd} {
		abs, err := filepath.Abs(*path)
		if err != nil {
			return err
		}
		*path = abs
	}
	if c.UIDDir == "" {
		c.UIDDir = filepath.Join(runBase, "uids")
	}
	if c.RunDir == "" {
		sum := sha256.Sum256([]byte(c.StateDir))
		c.RunDir = filepath.Join(runBase, hex.EncodeToString(sum[:6]))
	}
	for _, dir := range []string{c.RunDir, c.UIDDir} {
		if !filepath.IsAbs(dir) {
			return nestbox.Errorf(nestbox.CodeInvalid, "%s is not an absolute path", dir)
		}
	}
	return nil
}

// runBase is where the volatile directories of all Drivers are by default.
const runBase = "/run/nestbox"

// Driver implements sandbox.Driver.
type Driver struct {
	cfg     Config
	cgroups *cgroup.Mount
	netns   netns.Dir
	uids    uidRanges
	empty   *os.File      // a network namespace with nothing in it, for gofers
	boots   chan struct{} // one element for each sandbox that is starting
	warn    sync.Once     // about file systems whose owners cannot be mapped

	mu       sync.Mutex
	creating map[string]*creation
}

// creation is a Create under way.
type creation struct {
	cancel context.CancelFunc
	done   chan struct{}
}

var _ sandbox.Driver = (*Driver)(nil)

// New returns a Driver over the given directories, which it makes if need be.
// It makes this process the parent of orphaned descendants, so that dead
// sandboxes do not stay behind as zombies where nobody else reaps them.
func New(cfg Config) (*Driver, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	if cfg.UIDBase > math.MaxUint32-uidRangeN*uidsEach {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "no room for %d ranges of user ids above %d", uidRangeN, cfg.UIDBase)
	}
	if os.Geteuid() != 0 {
		return nil, nestbox.Errorf(nestbox.CodeUnsupported, "gVisor sandboxes need root")
	}
	cgroups, err := cgroup.Detect()
	if err != nil {
		return nil, nestbox.Errorf(nestbox.CodeUnsupported, "limits of sandboxes: %w", err)
	}
	d := &Driver{
		cfg:      cfg,
		cgroups:  cgroups,
		netns:    netns.Dir(filepath.Join(cfg.RunDir, "netns")),
		uids:     uidRanges{dir: cfg.UIDDir, base: cfg.UIDBase},
		boots:    make(chan struct{}, 2*runtime.NumCPU()), // more at once is slower for all
		creating: map[string]*creation{},
	}
	if err := d.makeDirs(); err != nil {
		return nil, err
	}
	d.dropCrashLogs()
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("become the parent of orphans: %w", err)
	}
	if d.empty, err = netns.NewEmpty(); err != nil {
		return nil, fmt.Errorf("make an empty network namespace: %w", err)
	}
	return d, nil
}

func (d *Driver) makeDirs() error {
	if len(d.cfg.RunDir) > maxRunDir {
		return nestbox.Errorf(nestbox.CodeInvalid, "%s is longer than %d characters, which is all that leaves room for the name of a socket", d.cfg.RunDir, maxRunDir)
	}
	for _, dir := range []struct {
		path string
		mode fs.FileMode
	}{
		{runBase, 0o711}, {rootDir, 0o711}, {rootEmpty, 0o711}, {rootLayer, 0o711}, {d.cfg.UIDDir, 0o700},
		{d.cfg.StateDir, 0o700}, {d.layers(), 0o700}, {d.crashes(), 0o700},
		{d.cfg.RunDir, 0o711}, {d.rootfs(), 0o711}, {d.bundles(), 0o700}, {d.runscRoot(), 0o700}, {string(d.netns), 0o700},
	} {
		if err := os.MkdirAll(dir.path, dir.mode); err != nil {
			return err
		}
		if err := os.Chmod(dir.path, dir.mode); err != nil { // whatever the umask
			return err
		}
	}
	for _, path := range []string{rootImage, rootUpper, rootEnvd} {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o600)
		if err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	// A sandbox's users must be able to get to its root file system.
	for dir := d.rootfs(); dir != "/"; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil {
			return err
		}
		if info.Mode().Perm()&0o001 == 0 {
			return nestbox.Errorf(nestbox.CodeInvalid, "the directory %s must be open to traversal by all users (chmod o+x)", dir)
		}
	}
	return nil
}

// maxRunDir leaves 47 of the 107 characters of a Unix socket's path for
// "/runsc/runsc-<id>.sock".
const maxRunDir = 60

func (d *Driver) layers() string          { return filepath.Join(d.cfg.StateDir, "layers") }
func (d *Driver) layer(id string) string  { return filepath.Join(d.layers(), id) }
func (d *Driver) crashes() string         { return filepath.Join(d.cfg.StateDir, "crashes") }
func (d *Driver) bundles() string         { return filepath.Join(d.cfg.RunDir, "capsules") }
func (d *Driver) bundle(id string) string { return filepath.Join(d.bundles(), id) }
func (d *Driver) runscRoot() string       { return filepath.Join(d.cfg.RunDir, "runsc") }

// rootfs is where a sandbox's root is mounted in its own mount namespace, and
// an empty directory in all others.
func (d *Driver) rootfs() string { return filepath.Join(d.cfg.RunDir, "rootfs") }

// Capabilities implements sandbox.Driver.
func (d *Driver) Capabilities() []sandbox.Capability {
	can := []sandbox.Capability{sandbox.Isolates, sandbox.LimitsMemory, sandbox.LimitsDisk, sandbox.LimitsPids, sandbox.LimitsCPU}
	if d.cfg.Egress != nil {
		can = append(can, sandbox.Egress)
	}
	return can
}

// Name implements sandbox.Driver.
func (d *Driver) Name() string { return "gvisor" }

// Close implements sandbox.Driver. Where there is no sandbox, nothing is left
// outside StateDir.
func (d *Driver) Close() error {
	d.instance().RemoveEmpty()
	for _, dir := range []string{d.rootfs(), d.bundles(), d.runscRoot(), string(d.netns), d.cfg.RunDir} {
		_ = os.Remove(dir) // fails if there is anything in it
	}
	return d.empty.Close()
}

// Create implements sandbox.Driver.
func (d *Driver) Create(ctx context.Context, spec sandbox.Spec) (sandbox.Sandbox, error) {
	if !nestbox.ValidID(nestbox.PrefixCapsule, spec.ID) {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "invalid capsule ID")
	}
	if err := spec.Resources.Validate(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done, err := d.enter(spec.ID, cancel)
	if err != nil {
		return nil, err
	}
	defer done()
	select {
	case d.boots <- struct{}{}:
		defer func() { <-d.boots }()
	case <-ctx.Done():
		return nil, ended(ctx, "waiting for other sandboxes to start")
	}
	// The directory comes first and goes last: whatever else there is of a
	// sandbox, the directory says so.
	if err := os.Mkdir(d.bundle(spec.ID), 0o700); errors.Is(err, fs.ErrExist) {
		return nil, nestbox.Errorf(nestbox.CodeConflict, "sandbox %s exists already", spec.ID)
	} else if err != nil {
		return nil, nestbox.Errorf(nestbox.CodeInternal, "make the directory of sandbox %s: %w", spec.ID, err)
	}
	b, err := d.start(ctx, spec)
	if err != nil {
		return nil, errors.Join(err, d.remove(context.WithoutCancel(ctx), spec.ID))
	}
	return b, nil
}

// enter registers a Create, so that Destroy can end it.
func (d *Driver) enter(id string, cancel context.CancelFunc) (leave func(), err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.creating[id] != nil {
		return nil, nestbox.Errorf(nestbox.CodeConflict, "sandbox %s is being started already", id)
	}
	c := &creation{cancel: cancel, done: make(chan struct{})}
	d.creating[id] = c
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.creating, id)
		close(c.done)
	}, nil
}

// start does the work of Create. The caller undoes it all with remove.
func (d *Driver) start(ctx context.Context, spec sandbox.Spec) (*running, error) {
	firstUID, err := d.uids.claim(spec.ID, d.bundle(spec.ID))
	if err != nil {
		return nil, err
	}
	ids := make(chan userns, 1)
	var g errgroup.Group // three things that wait for the kernel, each a few milliseconds
	g.Go(func() error {
		u, err := openUserns(firstUID)
		ids <- u
		return err
	})
	g.Go(func() error { return d.makeNetwork(ctx, spec) })
	g.Go(func() error { return d.cgroup(spec.ID).Create(limits(spec.Resources)) })
	err = errors.Join(d.writeBundle(spec, firstUID), os.Mkdir(d.layer(spec.ID), 0o700), g.Wait())
	u := <-ids
	defer u.Close()
	if err != nil {
		return nil, nestbox.Errorf(nestbox.CodeInternal, "prepare sandbox %s: %w", spec.ID, err)
	}
	if err := d.run(ctx, spec, u); err != nil {
		return nil, err
	}
	// Only now: gVisor's own start uses more than one CPU, and what it saves in
	// time it would otherwise spend being throttled.
	if err := d.cgroup(spec.ID).SetCPUs(spec.Resources.VCPUs); err != nil {
		return nil, nestbox.Errorf(nestbox.CodeInternal, "%w", err)
	}
	if err := d.writeHandle(spec); err != nil {
		return nil, nestbox.Errorf(nestbox.CodeInternal, "record sandbox %s: %w", spec.ID, err)
	}
	b, err := d.open(spec.ID)
	if err != nil {
		return nil, err
	}
	if err := b.prioritize(); err != nil {
		return nil, errors.Join(nestbox.Errorf(nestbox.CodeInternal, "set priorities in sandbox %s: %w", spec.ID, err), b.Close())
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
			return ended(ctx, "waiting for the start of sandbox "+id+" to end")
		}
	}
	return d.remove(ctx, id)
}

// List implements sandbox.Driver.
func (d *Driver) List(context.Context) ([]string, error) {
	seen := map[string]bool{}
	for _, find := range []func() ([]string, error){d.listBundles, d.listLayers, d.netns.List, d.instance().Children, d.listRunsc} {
		ids, err := find()
		if err != nil {
			return nil, nestbox.Errorf(nestbox.CodeInternal, "list sandboxes: %w", err)
		}
		for _, id := range ids {
			if nestbox.ValidID(nestbox.PrefixCapsule, id) {
				seen[id] = true
			}
		}
	}
	ids := make([]string, 0, len(seen))
	for id := range seen {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids, nil
}

func ended(ctx context.Context, doing string) error {
	code := nestbox.CodeCanceled
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		code = nestbox.CodeTimeout
	}
	return nestbox.Errorf(code, "%s: %w", doing, ctx.Err())
}
