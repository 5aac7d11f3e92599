package e2e

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox/internal/testbin"
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
	require.Eventually(t, func() bool { return unix.Unmount(busy, 0) == nil }, patience, time.Millisecond) // it may be trying just now
	unmounted = true
	require.Eventually(t, func() bool {
		_, err := os.Stat(filepath.Dir(busy))
		return os.IsNotExist(err)
	}, patience, 50*time.Millisecond)
}

// TestFullHostDisk fills the disk that a server keeps its state on. It says so,
// loses nothing, and can be stopped, started, and made to give room.
func TestFullHostDisk(t *testing.T) {
	t.Parallel()
	dir := stateDir(t)
	image, mount := dir+".ext4", filepath.Join(dir, "disk")
	require.NoError(t, os.Mkdir(mount, 0o711))
	mountSmall(t, image, mount)
	t.Cleanup(func() {
		require.NoError(t, unix.Unmount(mount, 0))
		require.NoError(t, os.Remove(image))
	})
	s := &server{t: t, bin: testbin.Nestbox(t), dir: filepath.Join(mount, "state"), addr: freeAddr(t)}
	require.NoError(t, os.Mkdir(s.dir, 0o711))
	s.start()
	t.Cleanup(s.finish)
	ids := []string{s.newCapsule(), s.newCapsule(), s.newCapsule()}
	s.background(ids[0], "before", "echo said before; exec sleep 1000")
	reserve := filepath.Join(s.dir, "reserve")
	require.Eventually(t, func() bool { _, err := os.Stat(reserve); return err == nil }, patience, 10*time.Millisecond)

	fill(t, mount)
	answer := call[errorJSON](s, http.MethodPost, "/v1/capsules", none{}, 507)
	require.Equal(t, "exhausted", answer.Error.Code)
	res := s.sh(ids[0], `python3 -c "
import os
f = os.open('/root/big', os.O_CREAT | os.O_WRONLY)
try:
    while True: os.write(f, bytes(1 << 20))
except OSError as e: print(e.errno)"`)
	require.Equal(t, "28\n", res.Stdout, "ENOSPC")
	call[none](s, http.MethodDelete, "/v1/capsules/"+ids[1], nil, 204)

	fill(t, mount)
	s.signal(syscall.SIGTERM)
	s.start()
	require.Equal(t, "said before\n", s.text(path(ids[0], "before")+"/logs"))
	fill(t, mount)
	call[none](s, http.MethodDelete, "/v1/capsules/"+ids[2], nil, 204)
	s.kill9()
	fill(t, mount)
	s.start()
	require.Equal(t, []string{ids[0]}, s.capsuleIDs())

	for _, name := range []string{"fill-1048576", "fill-1024"} {
		require.NoError(t, os.Remove(filepath.Join(mount, name)))
	}
	require.Equal(t, "well\n", s.sh(s.newCapsule(), "echo well").Stdout)
}

// mountSmall mounts a file system of 300 MiB: ext4 in a file, or in memory on a
// machine without loop devices.
func mountSmall(t *testing.T, image, dir string) {
	t.Helper()
	for _, args := range [][]string{{"truncate", "-s", "300M", image}, {"mkfs.ext4", "-q", "-m", "0", image}} {
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	if out, err := exec.Command("mount", "-o", "loop", image, dir).CombinedOutput(); err != nil {
		t.Logf("no loop device: %s", out)
		require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=300m,mode=711"))
	}
}

// fill leaves no room on a file system.
func fill(t *testing.T, dir string) {
	t.Helper()
	for _, piece := range []int{1 << 20, 1 << 10} {
		f, err := os.OpenFile(filepath.Join(dir, fmt.Sprintf("fill-%d", piece)), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		require.NoError(t, err)
		for err == nil {
			_, err = f.Write(make([]byte, piece))
		}
		require.ErrorIs(t, err, unix.ENOSPC)
		require.NoError(t, f.Close())
	}
}

// TestPlatformThatCannotRun: a server on a platform that does not work here says
// so, with the cause, and does not start; where it does work it has capsules.
func TestPlatformThatCannotRun(t *testing.T) {
	t.Parallel()
	s := &server{t: t, bin: testbin.Nestbox(t), dir: stateDir(t), addr: freeAddr(t)}
	cmd := exec.Command(s.bin, "up", "--dir", s.dir, "--listen", s.addr, "--platform", "kvm")
	log, err := os.Create(filepath.Join(s.dir, "server.log"))
	require.NoError(t, err)
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	require.NoError(t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	require.Eventually(t, func() bool {
		select {
		case err := <-ended:
			require.Error(t, err)
			said, err := os.ReadFile(log.Name())
			require.NoError(t, err)
			require.Regexp(t, `--platform kvm: a first sandbox d|platform: /dev/kvm: `, string(said))
			ended <- nil
			return true
		default:
			res, err := http.Get("http://" + s.addr + "/health")
			if err == nil {
				res.Body.Close()
				id := s.newCapsule()
				require.Equal(t, "well\n", s.sh(id, "echo well").Stdout)
				call[none](s, http.MethodDelete, "/v1/capsules/"+id, nil, 204)
				require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
			}
			return err == nil
		}
	}, patience, 10*time.Millisecond)
	<-ended
	said, err := os.ReadFile(log.Name())
	require.NoError(t, err)
	if !strings.Contains(string(said), "platform: /dev/kvm: ") { // else it was not tried
		requireNoTrace(t, s.dir)
	}
}
