package e2e

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestSettings: what a capsule is made with holds inside, for all its processes, and
// what is secret of it is shown nowhere.
func TestSettings(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	c := call[map[string]any](s, http.MethodPost, "/v1/capsules", none{
		"name": "box", "hostname": "worker-1", "envs": none{"SECRET": "hunter-two", "MODE": "capsule", "PATH": "/opt/bin:/usr/bin:/bin"},
	}, 201)
	require.Equal(t, []any{"MODE", "PATH", "SECRET"}, c["env_names"])
	run := func(body none) string {
		return strings.TrimSpace(call[execJSON](s, http.MethodPost, "/v1/capsules/box/exec", body, 200).Stdout)
	}
	require.Equal(t, "hunter-two capsule /opt/bin:/usr/bin:/bin worker-1 worker-1",
		run(none{"cmd": "sh", "args": []string{"-c", "echo $SECRET $MODE $PATH $(hostname) $(cat /etc/hostname)"}}))
	require.Equal(t, "hunter-two process", run(none{"cmd": "sh", "args": []string{"-c", "echo $SECRET $MODE"}, "user": "user", "envs": none{"MODE": "process"}}))
	require.Equal(t, "/opt/bin:/usr/bin:/bin", run(none{"cmd": "bash", "args": []string{"-lc", "echo $PATH"}}), "a login shell too")
	require.Equal(t, "127.0.0.1", run(none{"cmd": "sh", "args": []string{"-c", "getent ahostsv4 worker-1 | awk 'NR == 1 { print $1 }'"}}))
	started := call[startedJSON](s, http.MethodPost, "/v1/capsules/box/exec", none{"cmd": "sleep", "args": []string{"1000"}, "background": true, "tag": "p"}, 202)
	require.Equal(t, c["id"], started.SandboxID)
	call[processesJSON](s, http.MethodGet, "/v1/capsules/box/processes", nil, 200)

	s.kill9()
	s.start()
	require.Equal(t, "hunter-two", run(none{"cmd": "sh", "args": []string{"-c", "echo $SECRET"}}))
	for _, shown := range []string{s.text("/v1/capsules"), s.text("/v1/capsules/box")} {
		require.Contains(t, shown, "SECRET")
		require.NotContains(t, shown, "hunter-two")
	}
	for _, name := range []string{"server.log", "nestbox.db", "nestbox.db-wal"} {
		data, err := os.ReadFile(filepath.Join(s.dir, name))
		require.NoError(t, err)
		require.NotContains(t, string(data), "hunter-two", name)
	}
}

// TestUnusedCapsuleEnds: a capsule that nobody uses is destroyed, and says why.
func TestUnusedCapsuleEnds(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	unused := call[capsuleJSON](s, http.MethodPost, "/v1/capsules", none{"timeout_sec": 1}, 201)
	used := call[capsuleJSON](s, http.MethodPost, "/v1/capsules", none{"timeout_sec": 3}, 201)
	done := make(chan execJSON, 1)
	go func() {
		done <- call[execJSON](s, http.MethodPost, "/v1/capsules/"+used.ID+"/exec", none{"cmd": "sh", "args": []string{"-c", "until [ -e /tmp/go ]; do sleep 0.2; done; echo well"}, "timeout_sec": 600}, 200)
	}()
	require.Eventually(t, func() bool {
		now := call[capsuleJSON](s, http.MethodGet, "/v1/capsules/"+unused.ID, nil, 200)
		return now.Status == "stopped" && now.Reason == "nobody used it for 1s"
	}, patience, 100*time.Millisecond)
	require.Equal(t, "running", call[capsuleJSON](s, http.MethodGet, "/v1/capsules/"+used.ID, nil, 200).Status)
	require.Empty(t, s.sh(used.ID, "touch /tmp/go").Stderr)
	require.Equal(t, "well\n", (<-done).Stdout)
}
