package pidfd_test

import (
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox/internal/pidfd"
)

const never = time.Minute

func start(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(name, args...)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return cmd
}

func TestWaitReapSignal(t *testing.T) {
	t.Parallel()
	cmd := start(t, "sleep", "1000")
	p, err := pidfd.Lookup(cmd.Process.Pid)
	require.NoError(t, err)
	f, err := p.Open()
	require.NoError(t, err)
	defer f.Close()

	require.ErrorIs(t, f.Wait(time.Millisecond), os.ErrDeadlineExceeded, "it lives")
	_, reaped := pidfd.Reap(p.PID)
	require.False(t, reaped)

	require.NoError(t, f.Signal(syscall.SIGKILL))
	require.NoError(t, f.Wait(never))
	_, err = p.Open()
	require.Error(t, err, "a zombie is not a process")
	status, reaped := pidfd.Reap(p.PID)
	require.True(t, reaped)
	require.Equal(t, syscall.SIGKILL, status.Signal())
	_, reaped = pidfd.Reap(p.PID)
	require.False(t, reaped)
	require.ErrorIs(t, f.Signal(0), syscall.ESRCH)
}

func TestCloseEndsWait(t *testing.T) {
	t.Parallel()
	p, err := pidfd.Lookup(start(t, "sleep", "1000").Process.Pid)
	require.NoError(t, err)
	f, err := p.Open()
	require.NoError(t, err)
	ended := make(chan error)
	go func() { ended <- f.Wait(0) }()
	require.NoError(t, f.Close())
	require.Error(t, <-ended)
}

func TestPIDOfAnother(t *testing.T) {
	t.Parallel()
	self, err := pidfd.Lookup(os.Getpid())
	require.NoError(t, err)
	self.Start++
	_, err = self.Open()
	require.ErrorContains(t, err, "another")
}
