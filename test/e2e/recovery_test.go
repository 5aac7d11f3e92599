package e2e

import (
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestGarbageRecord starts a server one of whose capsules has a record that
// cannot be read. It is shown with the reason and can be destroyed; nobody else
// notices.
func TestGarbageRecord(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	bad, good := s.newCapsule(), s.newCapsule()
	s.background(good, "web", "exec sleep 1000")
	s.kill9()
	require.NoError(t, os.WriteFile(filepath.Join(s.dir, "host", "capsules", bad+".json"), []byte("garbage"), 0o600))
	s.start()
	var c capsuleJSON
	require.Eventually(t, func() bool {
		c = call[capsuleJSON](s, http.MethodGet, "/v1/capsules/"+bad, nil, 200)
		return c.Status == "missing"
	}, patience, 10*time.Millisecond)
	require.Equal(t, "its record cannot be read", c.Reason)
	call[errorJSON](s, http.MethodPost, "/v1/capsules/"+bad+"/exec", none{"cmd": "true"}, 409)
	require.Equal(t, "running", call[processJSON](s, http.MethodGet, path(good, "web"), nil, 200).State)
	another := s.newCapsule()
	require.Equal(t, "well\n", s.sh(another, "echo well").Stdout)
	for _, id := range []string{another, bad} {
		call[none](s, http.MethodDelete, "/v1/capsules/"+id, nil, 204)
	}
	require.Equal(t, []string{good}, s.capsuleIDs())
}

// TestSandboxThatStays: a sandbox that cannot be removed keeps nobody waiting,
// and is removed as soon as it can be, also by the next server.
func TestSandboxThatStays(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	stays := s.newCapsule()
	busy := filepath.Join(s.dir, "sandboxes", "layers", stays, "busy")
	require.NoError(t, os.Mkdir(busy, 0o700))
	require.NoError(t, unix.Mount("tmpfs", busy, "tmpfs", 0, ""))
	unmounted := false
	defer func() {
		if !unmounted {
			_ = unix.Unmount(busy, unix.MNT_DETACH)
		}
	}()
	call[errorJSON](s, http.MethodDelete, "/v1/capsules/"+stays, nil, 503)
	for range 2 {
		other := s.newCapsule()
		require.Equal(t, "well\n", s.sh(other, "echo well").Stdout)
		call[none](s, http.MethodDelete, "/v1/capsules/"+other, nil, 204)
		s.kill9()
		s.start()
	}
	require.DirExists(t, busy)
	require.NoError(t, unix.Unmount(busy, 0))
	unmounted = true
	require.Eventually(t, func() bool {
		_, err := os.Stat(filepath.Dir(busy))
		return os.IsNotExist(err)
	}, patience, 50*time.Millisecond)
}
