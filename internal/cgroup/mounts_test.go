package cgroup

import (
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
)

const (
	v1 = `30 20 0:25 / /sys/fs/cgroup rw - tmpfs tmpfs rw
31 30 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:5 - cgroup cgroup rw,cpu,cpuacct
32 30 0:27 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
33 30 0:28 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
34 30 0:29 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
`
	v2 = "35 30 0:30 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
)

func controllers(list string) func(string) ([]byte, error) {
	return func(path string) ([]byte, error) {
		if path != "/sys/fs/cgroup/cgroup.controllers" {
			return nil, fs.ErrNotExist
		}
		return []byte(list), nil
	}
}

func TestParseMounts(t *testing.T) {
	t.Parallel()
	m, err := parseMounts(v1+"36 30 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n", nil)
	require.NoError(t, err)
	require.False(t, m.unified, "hybrid")
	require.Equal(t, []string{"/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/pids"}, m.roots())
	require.Equal(t, "/sys/fs/cgroup/memory/a/b/tasks", m.Group("a/b").file("memory", "tasks"))

	m, err = parseMounts(v2, controllers("cpuset cpu io memory pids\n"))
	require.NoError(t, err)
	require.True(t, m.unified)
	require.Equal(t, []string{"/sys/fs/cgroup/a"}, m.Group("a").dirs())
	require.Equal(t, "/sys/fs/cgroup/a/memory.max", m.Group("a").file("memory", "memory.max"))

	_, err = parseMounts(v2, controllers("cpu pids"))
	require.ErrorContains(t, err, `"memory"`)
	_, err = parseMounts("", nil)
	require.ErrorContains(t, err, "no control groups")
}

// TestV2Files checks what is written where on version 2, on plain files: the
// machine that the tests run on may not have its controllers.
func TestV2Files(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	m := &Mount{unified: true, dirs: map[string]string{"": root}}
	g := m.Group("nestbox/i/c")
	require.NoError(t, os.MkdirAll(g.file("", ""), 0o755))
	files := map[string]string{
		"cgroup.subtree_control":           "+cpu +memory +pids",
		"nestbox/cgroup.subtree_control":   "+cpu +memory +pids",
		"nestbox/i/cgroup.subtree_control": "+cpu +memory +pids",
		"nestbox/i/c/memory.high":          "1000",
		"nestbox/i/c/memory.max":           strconv.Itoa(1000 + 2*margin),
		"nestbox/i/c/memory.oom.group":     "1",
		"nestbox/i/c/pids.max":             "7",
		"nestbox/i/c/cpu.max":              "200000 100000",
	}
	for name := range files {
		require.NoError(t, os.WriteFile(filepath.Join(root, name), nil, 0o644))
	}
	require.NoError(t, g.Create(Limits{MemoryBytes: 1000, Pids: 7}))
	require.NoError(t, g.SetCPUs(2))
	for name, want := range files {
		text, err := os.ReadFile(filepath.Join(root, name))
		require.NoError(t, err)
		require.Equal(t, want, string(text), name)
	}
	for name, text := range map[string]string{
		"cpu.stat": "usage_usec 1500000\nuser_usec 1\n", "memory.current": "4096\n", "pids.current": "3\n",
		"memory.events": "low 0\nhigh 0\nmax 9\noom 2\noom_kill 1\noom_group_kill 1\n",
	} {
		require.NoError(t, os.WriteFile(g.file("", name), []byte(text), 0o644))
	}
	usage, err := g.Usage()
	require.NoError(t, err)
	require.Equal(t, Usage{1_500_000_000, 4096, 3}, usage)
	ran, err := g.OutOfMemory()
	require.NoError(t, err)
	require.Equal(t, GroupRanOut, ran)
	require.NoError(t, os.WriteFile(g.file("", "memory.stat"), []byte("anon 10\nfile 3000\ninactive_file 1000\nactive_file 96\n"), 0o644))
	use, err := g.MemoryUse()
	require.NoError(t, err)
	require.Equal(t, MemoryUse{Total: 4096, Held: 3000}, use)
	require.NoError(t, g.SetMemory(1000, 24))
}
