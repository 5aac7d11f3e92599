package cgroup_test

import (
	"context"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nestbox/nestbox/internal/cgroup"
	"github.com/nestbox/nestbox/internal/netns"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const mib = 1 << 20

// parent returns a group of the test's own on this machine's real hierarchies.
// All below it is gone after the test.
func parent(t *testing.T) (*cgroup.Mount, string) {
	t.Helper()
	m, err := cgroup.Detect()
	require.NoError(t, err)
	path := "nestbox-test-" + t.Name()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		children, err := m.Group(path).Children()
		require.NoError(t, err)
		for _, name := range children {
			child := m.Group(path + "/" + name)
			_, err := child.Kill(ctx)
			require.NoError(t, err)
			require.NoError(t, child.Remove(ctx))
		}
		require.NoError(t, m.Group(path).Remove(ctx))
	})
	return m, path
}

// start starts a program in the group.
func start(t *testing.T, g *cgroup.Group, script string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("bash", "-c", script)
	// The thread ends with this: it is not ours to use afterwards.
	require.NoError(t, netns.OnThread(func() error { return g.Start(cmd) }))
	return cmd
}

func TestLife(t *testing.T) {
	t.Parallel()
	m, path := parent(t)
	g := m.Group(path + "/one")
	pids, err := g.Procs()
	require.NoError(t, err)
	require.Empty(t, pids, "it does not exist")
	require.NoError(t, g.Create(cgroup.Limits{MemoryBytes: 64 * mib, Pids: 50}))
	require.NoError(t, g.SetCPUs(1))
	children, err := m.Group(path).Children()
	require.NoError(t, err)
	require.Equal(t, []string{"one"}, children)

	cmd := start(t, g, "sleep 1000 & sleep 1000 & wait")
	require.Eventually(t, func() bool {
		// This process has a thread there for a moment.
		pids, err := g.Procs()
		return err == nil && len(pids) == 3 && !slices.Contains(pids, os.Getpid())
	}, time.Minute, time.Millisecond)
	usage, err := g.Usage()
	require.NoError(t, err)
	require.GreaterOrEqual(t, usage.Pids, 3)
	require.Positive(t, usage.MemoryBytes)
	ran, err := g.OutOfMemory()
	require.NoError(t, err)
	require.Equal(t, cgroup.NobodyRanOut, ran)
	m.Group(path).RemoveEmpty() // it is not

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	killed, err := g.Kill(ctx)
	require.NoError(t, err)
	require.Len(t, killed, 3)
	require.Contains(t, killed, cmd.Process.Pid)
	require.Error(t, cmd.Wait())
	require.NoError(t, g.Remove(ctx))
	require.NoError(t, g.Remove(ctx), "again")
	killed, err = g.Kill(ctx)
	require.NoError(t, err)
	require.Empty(t, killed)
}

func TestRemoveWaits(t *testing.T) {
	t.Parallel()
	m, path := parent(t)
	g := m.Group(path + "/busy")
	require.NoError(t, g.Create(cgroup.Limits{MemoryBytes: 64 * mib, Pids: 50}))
	cmd := start(t, g, "sleep 1000")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, g.Remove(ctx), context.DeadlineExceeded)
	_, err := g.Kill(t.Context())
	require.NoError(t, err)
	require.Error(t, cmd.Wait())
	require.NoError(t, g.Remove(t.Context()))
}

func TestLimits(t *testing.T) {
	t.Parallel()
	m, path := parent(t)
	g := m.Group(path + "/small")
	require.NoError(t, g.Create(cgroup.Limits{MemoryBytes: 32 * mib, Pids: 20}))
	require.Error(t, start(t, g, "dd if=/dev/zero of=/dev/null bs=1200M count=1").Wait(), "more than the limit and its margins")
	ran, err := g.OutOfMemory()
	require.NoError(t, err)
	require.Equal(t, cgroup.GroupRanOut, ran)
	usage, err := g.Usage()
	require.NoError(t, err)
	require.Positive(t, usage.CPU)

	// Not bash, which tries again for many seconds.
	require.Error(t, start(t, g, "exec sh -c 'for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21; do sleep 1000 & done' 2>/dev/null").Wait(), "more processes than allowed")
	text, err := os.ReadFile("/proc/self/cgroup")
	require.NoError(t, err)
	require.NotContains(t, string(text), path, "this process is where it was")
}

// TestMemory watches a group that first caches files and then holds memory.
func TestMemory(t *testing.T) {
	t.Parallel()
	m, path := parent(t)
	g := m.Group(path + "/watched")
	const limit = 32 * mib
	require.NoError(t, g.Create(cgroup.Limits{MemoryBytes: limit, Pids: 50}))
	require.NoError(t, g.LetKernelKill(false))
	watch, err := g.WatchMemory(limit)
	require.NoError(t, err)
	defer watch.Close()
	require.NoError(t, watch.Wait(time.Millisecond), "nothing has happened")

	cmd := exec.Command("bash", "-c", `head -c 100M /dev/zero >"$0"; read; x=$(head -c 80M /dev/zero | tr '\0' x); read; exit 0`, t.TempDir()+"/file")
	input, err := cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, netns.OnThread(func() error { return g.Start(cmd) }))
	require.NoError(t, watch.Wait(time.Minute))
	use, err := g.MemoryUse()
	require.NoError(t, err)
	require.Less(t, use.Held, int64(limit), "a file is no reason to kill anything")

	_, err = input.Write([]byte("go on\n"))
	require.NoError(t, err)
	holds := func(more int64) func() bool {
		return func() bool {
			use, err := g.MemoryUse()
			require.NoError(t, err)
			return use.Held > more && use.Total >= use.Held
		}
	}
	require.Eventually(t, holds(limit), time.Minute, time.Millisecond)
	require.NoError(t, g.SetMemory(limit, 512*mib)) // version 2 slows it down until then
	require.Eventually(t, holds(80*mib), time.Minute, time.Millisecond)
	for _, beyond := range []int64{64 * mib, 0} {
		require.NoError(t, g.SetMemory(limit, beyond))
	}
	require.NoError(t, input.Close())
	require.NoError(t, cmd.Wait(), "nothing has killed it")
	require.NoError(t, watch.Close())
	require.Error(t, watch.Wait(0))
}

// TestHostRunsOut has a group killed that is within its own limit.
func TestHostRunsOut(t *testing.T) {
	t.Parallel()
	m, path := parent(t)
	g := m.Group(path + "/big")
	require.NoError(t, m.Group(path).Create(cgroup.Limits{MemoryBytes: 32 * mib, Pids: 50}))
	require.NoError(t, g.Create(cgroup.Limits{MemoryBytes: 4096 * mib, Pids: 50}))
	require.NoError(t, g.LetKernelKill(false))
	require.Error(t, start(t, g, "dd if=/dev/zero of=/dev/null bs=1200M count=1").Wait())
	ran, err := g.OutOfMemory()
	require.NoError(t, err)
	require.Equal(t, cgroup.HostRanOut, ran)
}
