package gvisor_test

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/image"
	"github.com/nestbox/nestbox/internal/sandbox"
	"github.com/nestbox/nestbox/internal/sandbox/gvisor"
	"github.com/nestbox/nestbox/internal/sandbox/gvisor/runsc"
	"github.com/nestbox/nestbox/internal/sandbox/sandboxtest"
	"github.com/nestbox/nestbox/internal/testbin"
)

func TestMain(m *testing.M) {
	runsc.Maybe()
	sandboxtest.MaybeHelper(open)
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if err := os.RemoveAll(images()); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(code)
	}))
}

// A test's directory holds state/, run/, and envd, a link.
func open(dir string) (sandbox.Driver, error) {
	envd, err := os.Readlink(filepath.Join(dir, "envd"))
	if err != nil {
		return nil, err
	}
	return gvisor.New(gvisor.Config{
		StateDir: filepath.Join(dir, "state"),
		RunDir:   filepath.Join(dir, "run"),
		Envd:     envd,
	})
}

// newDir makes a directory with a short path that all users can traverse.
func newDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nestbox")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o711))
	require.NoError(t, os.Symlink(testbin.Envd(t), filepath.Join(dir, "envd")))
	return dir
}

// images is where the tests of this process share a template.
func images() string {
	return filepath.Join(os.TempDir(), fmt.Sprintf("nestbox-images-%d", os.Getpid()))
}

var openImages = sync.OnceValues(func() (*image.Store, error) {
	return image.NewStore(image.Config{Dir: images()})
})

var minimal = sync.OnceValues(func() (image.Root, error) {
	store, err := openImages()
	if err != nil {
		return image.Root{}, err
	}
	return store.Acquire(nestbox.TemplateMinimal)
})

func minimalRoot(t *testing.T) image.Root {
	t.Helper()
	root, err := minimal()
	require.NoError(t, err)
	return root
}

func TestSuite(t *testing.T) {
	t.Parallel()
	runSuite(t, minimalRoot(t))
}

func runSuite(t *testing.T, root image.Root) {
	t.Helper()
	sandboxtest.Run(t, sandboxtest.Suite{
		Dir:  newDir,
		Open: open,
		Root: root,
		Crash: func(t *testing.T, dir, id string) {
			require.NoError(t, syscall.Kill(sentryPID(t, dir, id), syscall.SIGKILL))
		},
		Traces: traces,
	})
}

// sentryPID finds the process that is the sandbox as anybody can see it.
func sentryPID(t *testing.T, dir, id string) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, "run", "capsules", id, "pid"))
	require.NoError(t, err)
	pid, err := strconv.Atoi(string(text))
	require.NoError(t, err)
	return pid
}

// traces finds what there is of the sandboxes of a directory.
func traces(t *testing.T, dir string) []string {
	t.Helper()
	var found []string
	for _, pattern := range []string{"run/capsules/*", "run/netns/*", "run/runsc/*", "run/rootfs/*", "state/layers/*"} {
		paths, err := filepath.Glob(filepath.Join(dir, pattern))
		require.NoError(t, err)
		found = append(found, paths...)
	}
	for _, p := range sandboxtest.ProcessesWith(t, dir+"/run") {
		if !strings.Contains(p, os.Args[0]) { // the helper itself, just dying
			found = append(found, p)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, dir) {
			found = append(found, "mount "+line)
		}
	}
	links, err := filepath.Glob("/run/nestbox/uids/*")
	require.NoError(t, err)
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && strings.HasPrefix(target, dir) {
			found = append(found, link)
		}
	}
	return append(found, cgroups(t, dir)...)
}

// cgroups finds the control groups of the capsules of a directory.
func cgroups(t *testing.T, dir string) []string {
	t.Helper()
	var found []string
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		paths, err := filepath.Glob(filepath.Join(root, "nestbox", escaped(dir), "cl-*"))
		require.NoError(t, err)
		found = append(found, paths...)
	}
	return found
}

// escaped is the name of the group above those of a driver's capsules.
func escaped(dir string) string { return url.PathEscape(filepath.Join(dir, "run")) }

// A start that was killed, or a reboot, may leave a layer and nothing else.
func TestLeftoverLayer(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	d, err := open(dir)
	require.NoError(t, err)
	defer d.Close()
	id := nestbox.NewID(nestbox.PrefixCapsule)
	layer := filepath.Join(dir, "state", "layers", id)
	require.NoError(t, os.MkdirAll(layer, 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(layer, "runsc-filestore-1"), nil, 0o600))
	ids, err := d.List(t.Context())
	require.NoError(t, err)
	require.Equal(t, []string{id}, ids)
	require.NoError(t, d.Destroy(t.Context(), id))
	require.Empty(t, traces(t, dir))
}

// TestCrashLog: what gVisor says when it crashes is kept when the rest of the
// sandbox is removed, and the reason says where.
func TestCrashLog(t *testing.T) {
	t.Parallel()
	c := oneCapsule(t)
	// gVisor's own kernel gets no more memory, which its Go runtime does not survive.
	none := unix.Rlimit{}
	require.NoError(t, unix.Prlimit(sentryPID(t, c.dir, c.ID()), unix.RLIMIT_AS, &none, nil))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		for ctx.Err() == nil {
			_, _ = c.d.Exec(ctx, c.ID(), "/bin/bash", "-c", "for i in {1..100}; do /bin/true & done; wait")
		}
	}()
	reason := sandboxtest.Ended(t, c)
	path, found := strings.CutPrefix(reason, "gVisor crashed, and left the log ")
	require.True(t, found, reason)
	_, err := c.d.Open(t.Context(), c.ID())
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
	require.EqualError(t, err, reason, "also for a driver that comes later")
	require.NoError(t, c.d.Destroy(t.Context(), c.ID()))
	text, err := os.ReadFile(filepath.Join(c.dir, path))
	require.NoError(t, err)
	require.Contains(t, string(text), "goroutine")
}
