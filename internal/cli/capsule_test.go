package cli_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestCapsuleLife(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := strings.TrimSpace(s.ok("capsule", "create", "--vcpus", "2", "--memory", "256", "--disk", "100", "--timeout", "90s", "--metadata", "who=me,why=test"))
	require.Regexp(t, `^cl-[0-9a-z]{25}$`, id)

	type view struct {
		ID, Status, Template string
		VCPUs                int               `json:"vcpus"`
		MemoryMB             int               `json:"memory_mb"`
		DiskMB               int               `json:"disk_mb"`
		TimeoutSec           int               `json:"timeout_sec"`
		Metadata             map[string]string `json:"metadata"`
	}
	got := decode[view](t, s.ok("capsule", "get", "--json", id))
	require.Equal(t, view{id, "running", "minimal", 2, 256, 100, 90, map[string]string{"who": "me", "why": "test"}}, got)

	second := s.capsule()
	list := decode[[]view](t, s.ok("--json=false", "capsule", "ls", "--json"))
	require.Len(t, list, 2)
	require.Equal(t, second, list[0].ID, "newest first")
	require.Equal(t, second+"\n"+id+"\n", s.ok("capsule", "rm", second, id))
	require.Equal(t, "[]\n", s.ok("capsule", "ls", "--json"))
	require.Len(t, decode[[]view](t, s.ok("capsule", "ls", "--json", "--all")), 2)
	require.Equal(t, "stopped", decode[view](t, s.ok("capsule", "get", "--json", id)).Status)
}

var (
	idPattern   = regexp.MustCompile(`cl-[0-9a-z]{25}`)
	timePattern = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`)
)

// anonymous replaces what differs from run to run by something as long.
func anonymous(s string) string {
	s = idPattern.ReplaceAllString(s, "cl-0123456789abcdefghijklmno")
	return timePattern.ReplaceAllString(s, "2026-01-02T03:04:05Z")
}

func TestTables(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	require.Equal(t, "CAPSULE  NAME  STATUS  TEMPLATE  VCPUS  MEMORY  CREATED\n", s.ok("capsule", "ls"))
	id := strings.TrimSpace(s.ok("capsule", "create", "--metadata", "a=\x1b[2J"))
	require.Equal(t, `CAPSULE                       NAME  STATUS   TEMPLATE  VCPUS  MEMORY   CREATED
cl-0123456789abcdefghijklmno  -     running  minimal   1      512 MiB  2026-01-02T03:04:05Z
`, anonymous(s.ok("capsule", "ls")))
	require.Equal(t, `id           cl-0123456789abcdefghijklmno
status       running
template     minimal
vcpus        1
memory       512 MiB
disk         5120 MiB
pids         4096
timeout      never
network      none
created      2026-01-02T03:04:05Z
started      2026-01-02T03:04:05Z
last active  2026-01-02T03:04:05Z
metadata     a=`+"\uFFFD"+`[2J
`, anonymous(s.ok("capsule", "get", id)))
	require.Equal(t, "ID  PID  TAG  STATE  STARTED  FOR  OUTPUT  COMMAND\n", s.ok("ps", id))
}

func TestPrefix(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	require.Contains(t, s.ok("capsule", "get", id[:12]), id)
	require.Contains(t, s.ok("capsule", "get", strings.TrimPrefix(id, "cl-")[:12]), id)
	s.capsule()
	require.Contains(t, s.fails(1, "capsule", "get", "cl-"), "more than one")
	require.Contains(t, s.fails(1, "capsule", "get", "Cl-UPPER"), "neither the name nor the id of a capsule")
	require.Contains(t, s.fails(1, "capsule", "get", id+"0"), "neither the name nor the id of a capsule")
	require.Contains(t, s.fails(1, "capsule", "get", ""), "neither the name nor the id of a capsule")
	require.Contains(t, s.fails(1, "capsule", "rm", "zzzzzzzzzzzzzzzz"), "no capsule has the name")
	web := strings.TrimSpace(s.ok("capsule", "create", "--name", "web", "--hostname", "box", "-e", "A=secret", "-e", "B=", "--metadata", "env=prod"))
	require.Contains(t, s.ok("capsule", "get", "web"), web)
	require.NotContains(t, s.ok("capsule", "get", "web", "--json"), "secret")
	require.Regexp(t, `(?m)^name +web\nhostname +box\n`, s.ok("capsule", "get", "web"))
	require.Regexp(t, `(?m)^env +A\nenv +B\n`, s.ok("capsule", "get", "web"))
	require.Contains(t, s.fails(1, "capsule", "create", "--name", "web"), "the name web is that of capsule "+web)
	require.Contains(t, s.ok("capsule", "ls", "--metadata", "env=prod"), web)
	require.NotContains(t, s.ok("capsule", "ls", "--metadata", "env=prod"), id)
	require.Equal(t, "CAPSULE  NAME  STATUS  TEMPLATE  VCPUS  MEMORY  CREATED\n", s.ok("capsule", "ls", "--metadata", "env=prod,x=y"))
	require.Equal(t, "ran\n", s.ok("exec", "web", "--", "echo", "ran"))
	require.Equal(t, "web\n", s.ok("capsule", "rm", "web"))
	require.Contains(t, s.fails(1, "capsule", "get", "cl-"+strings.Repeat("0", 25)), "capsule not found")
}

func TestKeys(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	file := filepath.Join(t.TempDir(), "api-key")
	require.NoError(t, os.WriteFile(file, []byte(s.server.Key+"\n"), 0o600))
	delete(s.env, "NESTBOX_API_KEY")
	said := s.fails(1, "capsule", "ls")
	require.Contains(t, said, "export NESTBOX_API_KEY=")
	require.Contains(t, said, "--key-file")
	s.ok("capsule", "ls", "--key-file", file)
	s.ok("capsule", "ls", "--key", s.server.Key)
	s.env["NESTBOX_API_KEY_FILE"] = file
	s.ok("capsule", "ls")
	require.Contains(t, s.fails(1, "capsule", "ls", "--key", "wrn_wrong"), "invalid API key")
	require.Contains(t, s.fails(125, "exec", "--key-file", file+".none", "cl-", "true"), "no such file")
}

func TestServerAway(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	s.server.Stop()
	said := s.fails(1, "capsule", "ls")
	require.Contains(t, said, "cannot reach "+s.server.URL)
	require.Contains(t, said, "connection refused")
	require.Contains(t, s.fails(1, "capsule", "ls", "--url", "localhost:1"), "is not the URL of a server")
}

func TestURL(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	require.Regexp(t, `^http://port\.test/\?token=\S+\n$`, s.ok("url", id, "8000"))
	require.Regexp(t, `^http`, decode[map[string]string](t, s.ok("url", id, "8000", "--json", "--expires", "5m"))["url"])
	for _, port := range []string{"0", "-1", "65536", "http"} {
		require.Contains(t, s.fails(1, "url", "--", id, port), "is not a port")
	}
	require.Contains(t, s.fails(1, "url", id, "80", "--expires", "1ms"), "less than a second")
	require.Contains(t, s.fails(1, "url", id, "80", "--expires", "30d"), "at most 7 days")
	require.Contains(t, s.fails(1, "url", id, "80", "--expires", "soon"), "no duration")
	require.Regexp(t, `^http://port\.test/a%20b\?x=1&token=\S+\n$`, s.ok("url", "--expires", "7d", id, "8000", "/a%20b?x=1"))
	require.Contains(t, s.fails(1, "url", id, "80", "path"), "no slash")
	require.Contains(t, s.fails(1, "url", id, "80", "//evil.test/"), "no path")
}

func TestCompletion(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	for _, command := range []string{"exec", "ps", "logs", "attach", "kill", "wait", "url", "network"} {
		require.Contains(t, s.ok("__complete", command, ""), id+"\tminimal, running", command)
	}
	require.Contains(t, s.ok("__complete", "capsule", "rm", id, ""), id)
	require.Contains(t, s.ok("__complete", "kill", "--signal", "SIGT"), "SIGTERM")
	s.ok("exec", "-d", "--tag", "named", id, "--", "sleep", "1000")
	for _, line := range [][]string{{"kill", id, ""}, {"kill", id, "other", ""}, {"send", id, ""}, {"attach", id, ""}} {
		require.Contains(t, s.ok(append([]string{"__complete"}, line...)...), "named\tsleep 1000")
	}
	require.NotContains(t, s.ok("__complete", "attach", id, "named", ""), "sleep 1000")
}
