package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestDefaultMemoryLimit(t *testing.T) {
	t.Parallel()
	const machine, mib = 8 << 30, 1 << 20
	for name, c := range map[string]struct {
		files map[string]string
		want  int64
	}{
		"no control groups":  {nil, machine / 2},
		"v2":                 {map[string]string{"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/memory.max": "524288000\n"}, 400 * mib},
		"v2, no limit":       {map[string]string{"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"}, machine / 2},
		"v1":                 {map[string]string{"proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/y\n", "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "1048576000\n"}, 800 * mib},
		"v1, no limit":       {map[string]string{"proc/self/cgroup": "5:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, machine / 2},
		"more than there is": {map[string]string{"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "99999999999999\n"}, machine / 2},
		"garbage":            {map[string]string{"proc/self/cgroup": "x\n::\n0::/../../a\n", "sys/fs/cgroup/a/memory.max": "-1\n"}, machine / 2},
	} {
		root := t.TempDir()
		for path, text := range c.files {
			path = filepath.Join(root, path)
			require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
			require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		}
		require.Equal(t, c.want, defaultMemoryLimit(root, machine), name)
	}
}

func TestCanShrink(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	for name, c := range map[string]struct {
		now, before, ours heapUse
		want              bool
	}{
		"little":                              {heapUse{60 * mib, 5 * mib, 3}, heapUse{60 * mib, 5 * mib, 3}, heapUse{}, false},
		"garbage":                             {heapUse{200 * mib, 5 * mib, 3}, heapUse{10 * mib, 5 * mib, 2}, heapUse{}, true},
		"in use":                              {heapUse{200 * mib, 190 * mib, 3}, heapUse{150 * mib, 100 * mib, 2}, heapUse{}, false},
		"quiet since a collection in a burst": {heapUse{200 * mib, 190 * mib, 3}, heapUse{200 * mib, 190 * mib, 3}, heapUse{10 * mib, 5 * mib, 1}, true},
		"quiet since a collection of ours":    {heapUse{200 * mib, 190 * mib, 3}, heapUse{200 * mib, 190 * mib, 3}, heapUse{195 * mib, 190 * mib, 3}, false},
	} {
		require.Equal(t, c.want, c.now.canShrink(c.before, c.ours), name)
	}
}
