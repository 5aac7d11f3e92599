package e2e

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// capsuleName is in the name of everything that is made on the host for a
// capsule.
var capsuleName = regexp.MustCompile(`cl-[0-9a-z]{25}`)

// requireNoTrace looks for what a server of a state directory left on the
// machine after all its capsules were destroyed: processes, mounts, network
// namespaces, cgroups and files.
func requireNoTrace(t *testing.T, dir string) {
	t.Helper()
	ours := capsulesEver(t, dir)
	require.NotEmpty(t, ours, "the log names no capsule: this check would find nothing")
	var traces []string
	found := func(kind, text string) {
		for _, id := range capsuleName.FindAllString(text, -1) {
			if ours[id] {
				traces = append(traces, kind+": "+strings.ReplaceAll(text, "\x00", " "))
				return
			}
		}
	}
	eachFile(t, "/proc/[0-9]*/cmdline", func(_ string, data []byte) { found("process", string(data)) })
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	for line := range bytes.Lines(mounts) {
		found("mount", string(line))
	}
	for _, root := range []string{"/run/netns", "/var/run/netns", "/run/nestbox", "/sys/fs/cgroup", dir} {
		err := filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
			if err == nil {
				found("path", p)
			}
			return nil // what vanishes while we look is no trace
		})
		require.NoError(t, err)
	}
	require.Empty(t, traces)
}

// capsulesEver returns the ids that a server's log speaks of.
func capsulesEver(t *testing.T, dir string) map[string]bool {
	data, err := os.ReadFile(filepath.Join(dir, "server.log"))
	require.NoError(t, err)
	ids := map[string]bool{}
	for _, id := range capsuleName.FindAllString(string(data), -1) {
		ids[id] = true
	}
	return ids
}

func eachFile(t *testing.T, pattern string, f func(path string, data []byte)) {
	paths, err := filepath.Glob(pattern)
	require.NoError(t, err)
	for _, p := range paths {
		if data, err := os.ReadFile(p); err == nil {
			f(p, data)
		}
	}
}
