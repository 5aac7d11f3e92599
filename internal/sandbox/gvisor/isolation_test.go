package gvisor_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/image"
	"github.com/nestbox/nestbox/internal/netns"
	"github.com/nestbox/nestbox/internal/sandbox"
	"github.com/nestbox/nestbox/internal/sandbox/gvisor"
	"github.com/nestbox/nestbox/internal/sandbox/sandboxtest"
)

// capsule is one running sandbox of a driver of its own.
type capsule struct {
	sandbox.Sandbox
	d   *gvisor.Driver
	dir string
}

var small = nestbox.Resources{VCPUs: 1, MemoryMB: 192, DiskMB: 64, PidsMax: 200}

func newDriver(t *testing.T) (*gvisor.Driver, string) {
	t.Helper()
	dir := newDir(t)
	d, err := open(dir)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, d.Close())
		require.NoDirExists(t, filepath.Join(dir, "run"), "nothing is left outside the state directory")
	})
	return d.(*gvisor.Driver), dir
}

func newCapsule(t *testing.T, d *gvisor.Driver, dir string, root image.Root, r nestbox.Resources) capsule {
	t.Helper()
	spec := sandbox.Spec{
		ID: nestbox.NewID(nestbox.PrefixCapsule), Root: root, Resources: r,
		Env: map[string]string{sandbox.EnvToken: "token-of-the-test"},
	}
	sb, err := d.Create(t.Context(), spec)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, d.Destroy(context.Background(), spec.ID))
		require.NoError(t, sb.Close())
	})
	return capsule{sb, d, dir}
}

func oneCapsule(t *testing.T) capsule {
	d, dir := newDriver(t)
	return newCapsule(t, d, dir, minimalRoot(t), small)
}

// sh runs a script in the capsule, which must succeed.
func (c capsule) sh(t *testing.T, script string) string {
	t.Helper()
	out, err := c.try(t, script)
	require.NoError(t, err, "%s: %s", script, out)
	return strings.TrimSpace(out)
}

func (c capsule) try(t *testing.T, script string) (string, error) {
	t.Helper()
	out, err := c.d.Exec(t.Context(), c.ID(), "/bin/bash", "-c", script)
	return string(out), err
}

func TestRootIsItsOwn(t *testing.T) {
	t.Parallel()
	c := oneCapsule(t)
	require.Equal(t, "0:0", c.sh(t, "stat -L -c %u:%g /bin/bash /etc/passwd /root /usr /.envd /etc/hosts | sort -u"))
	require.Equal(t, "1000:1000", c.sh(t, "stat -c %u:%g /home/user /home/user/.bashrc | sort -u"))
	require.Equal(t, "1777", c.sh(t, "stat -c %a /tmp"))
	require.Equal(t, c.ID(), c.sh(t, "hostname"))
	require.Equal(t, c.ID(), c.sh(t, "cat /etc/hostname"))
	require.Equal(t, "127.0.0.1", c.sh(t, "getent ahostsv4 $(hostname) | awk 'NR == 1 { print $1 }'"))
	require.Equal(t, "/home/user user", c.sh(t, `su user -s /bin/bash -c 'cd; echo $PWD $(id -un)'`))

	// All of it can be written, and none of that shows outside.
	c.sh(t, "echo mine | tee /usr/bin/mine /usr/local/bin/mine /etc/mine /opt/mine /tmp/mine && chown user /etc/mine && rm /usr/bin/env")
	root := minimalRoot(t)
	for _, path := range []string{"/usr/bin/mine", "/usr/local/bin/mine", filepath.Join(root.Dir, "etc/mine"), "/etc/mine"} {
		require.NoFileExists(t, path)
	}
	require.FileExists(t, "/usr/bin/env")
}

func TestNothingOfTheHost(t *testing.T) {
	t.Parallel()
	c := oneCapsule(t)
	require.Equal(t, ".bashrc .profile", c.sh(t, "echo $(ls -A /root)"))
	require.Equal(t, "user", c.sh(t, "ls -A /home"))
	require.Empty(t, c.sh(t, "find /usr/local /usr/src /mnt /srv /opt /media /var/log /var/mail -type f"))
	require.Empty(t, c.sh(t, "ls -d /etc/ssh /etc/machine-id /etc/ssl/private /var/lib/dpkg/info /boot /lost+found 2>/dev/null; true"))
	require.Empty(t, c.sh(t, "cut -d: -f2 /etc/shadow | tr -d '*\n'"), "password hashes")
	require.NotContains(t, c.sh(t, "cat /proc/mounts /proc/self/mountinfo"), c.dir)
	// Neither the host's processes nor its files: a canary in a place of each kind.
	canary := fmt.Sprintf("canary-%d", os.Getpid())
	require.NoError(t, os.WriteFile(filepath.Join(c.dir, canary), nil, 0o644))
	require.Empty(t, c.sh(t, "find / -xdev -path /usr -prune -o -name '"+canary+"' -print"))
	require.NotContains(t, c.sh(t, "ps axww -o args 2>/dev/null || cat /proc/[0-9]*/cmdline | tr '\\0' ' '"), filepath.Base(os.Args[0]))
	require.Contains(t, c.sh(t, "cat /proc/version"), "4.", "not the host's kernel")
	_, err := c.try(t, "mount -t tmpfs none /mnt")
	require.Error(t, err)
	_, err = c.try(t, "mknod /tmp/disk b 8 0 && head -c 1 /tmp/disk")
	require.Error(t, err, "a disk of the host")
}

func TestReachesNothing(t *testing.T) {
	t.Parallel()
	d, dir := newDriver(t)
	a := newCapsule(t, d, dir, minimalRoot(t), small)
	b := newCapsule(t, d, dir, minimalRoot(t), small)
	listener, err := net.Listen("tcp", ":0")
	require.NoError(t, err)
	defer listener.Close()
	port := netip.MustParseAddrPort(listener.Addr().String()).Port()
	targets := []string{"169.254.169.254", "8.8.8.8", netns.OuterAddr.String(), netns.GuestAddr.String()}
	addrs, err := net.InterfaceAddrs()
	require.NoError(t, err)
	for _, addr := range addrs {
		prefix, err := netip.ParsePrefix(addr.String())
		require.NoError(t, err)
		targets = append(targets, prefix.Addr().WithZone("").String())
	}
	sandboxtest.Answers(t, a)
	sandboxtest.Answers(t, b)
	for _, ip := range targets {
		for _, p := range []uint16{port, 80, 22} {
			out, err := a.try(t, fmt.Sprintf("timeout 2 bash -c 'exec 3<>/dev/tcp/%s/%d' && echo connected", ip, p))
			require.Error(t, err, "%s port %d: %s", ip, p, out)
			require.NotContains(t, out, "connected")
		}
	}
	require.Empty(t, a.sh(t, "tail -n +2 /proc/net/route | awk '$2 == \"00000000\"'"), "a default route")
	// The same port and the same address in both, and yet two machines.
	require.NotEqual(t, a.sh(t, "hostname"), b.sh(t, "hostname"))
	b.sh(t, "touch /tmp/of-b")
	a.sh(t, "test ! -e /tmp/of-b")
	require.NotContains(t, a.sh(t, "cat /proc/net/tcp /etc/hosts"), b.ID())
	require.Equal(t, "::1", a.sh(t, "awk '{ print $6 }' /proc/net/if_inet6 | grep -q lo && echo ::1"), "IPv6 loopback")
}

func TestProcessesOfTheHost(t *testing.T) {
	t.Parallel()
	d, dir := newDriver(t)
	ranges := map[string]bool{}
	for range 2 {
		c := newCapsule(t, d, dir, minimalRoot(t), small)
		pids, err := cgroupProcs(dir, c.ID())
		require.NoError(t, err)
		require.GreaterOrEqual(t, len(pids), 2, "the sandbox and its gofer")
		for _, pid := range pids {
			status := readProc(t, pid, "status")
			require.Contains(t, status, "NoNewPrivs:\t1", "%s", status)
			require.Contains(t, status, "Seccomp:\t2", "%s", status)
			require.Empty(t, readProc(t, pid, "environ"))
			require.NotContains(t, readProc(t, pid, "mountinfo"), "/run/netns/", "mounts of other sandboxes are held")
			fields := strings.Fields(readProc(t, pid, "uid_map"))
			require.Len(t, fields, 3)
			require.Equal(t, "0", fields[0])
			require.Equal(t, "65536", fields[2])
			ranges[fields[1]] = true
			require.Contains(t, status, "Uid:\t"+fields[1], "runs as its own first user")
		}
		require.Contains(t, readProc(t, sentryPID(t, dir, c.ID()), "cmdline"), "runsc")
	}
	require.Len(t, ranges, 2, "each has a range of its own")
}

func readProc(t *testing.T, pid, file any) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%v/%v", pid, file))
	require.NoError(t, err)
	return string(text)
}

func cgroupProcs(dir, id string) ([]string, error) {
	paths, err := filepath.Glob(filepath.Join("/sys/fs/cgroup", "memory", "nestbox", escaped(dir), id, "cgroup.procs"))
	if err != nil || len(paths) == 0 {
		paths = []string{filepath.Join("/sys/fs/cgroup/nestbox", escaped(dir), id, "cgroup.procs")}
	}
	text, err := os.ReadFile(paths[0])
	return strings.Fields(string(text)), err
}

func TestSizeInside(t *testing.T) {
	t.Parallel()
	c := oneCapsule(t)
	require.Equal(t, "1", c.sh(t, "nproc"))
	require.Equal(t, fmt.Sprint(small.MemoryMB*1024), c.sh(t, "awk '/^MemTotal/ { print $2 }' /proc/meminfo"))
	require.Equal(t, fmt.Sprint(small.PidsMax), c.sh(t, "cat /sys/fs/cgroup/nestbox/pids.max"))
	require.Equal(t, fmt.Sprint(small.DiskMB), c.sh(t, "df -m --output=size / | tail -1 | tr -d ' '"))
}

func TestDiskLimit(t *testing.T) {
	t.Parallel()
	d, dir := newDriver(t)
	c, other := newCapsule(t, d, dir, minimalRoot(t), small), newCapsule(t, d, dir, minimalRoot(t), small)
	out, err := c.try(t, "dd if=/dev/zero of=/var/tmp/full bs=1M count=200")
	require.Error(t, err)
	require.Contains(t, out, "No space left on device")
	other.sh(t, "dd if=/dev/zero of=/tmp/some bs=1M count=40")
	sandboxtest.Answers(t, c)
	c.sh(t, "rm /var/tmp/full && dd if=/dev/zero of=/tmp/some bs=1M count=40")
}

func TestMemoryLimit(t *testing.T) {
	t.Parallel()
	d, dir := newDriver(t)
	c, other := newCapsule(t, d, dir, minimalRoot(t), small), newCapsule(t, d, dir, minimalRoot(t), small)
	const hog = "dd if=/dev/zero of=/dev/null bs=1600M count=1"
	if slows, err := filepath.Glob(filepath.Join("/sys/fs/cgroup/nestbox", escaped(dir), c.ID(), "memory.high")); err == nil && len(slows) > 0 {
		// Nobody guards it, so control groups v2 slow it down until somebody does.
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { _, _ = d.Exec(ctx, c.ID(), "/bin/bash", "-c", hog) }()
		events := filepath.Join(filepath.Dir(slows[0]), "memory.events")
		require.Eventually(t, func() bool {
			text, err := os.ReadFile(events)
			return err == nil && !strings.Contains(string(text), "high 0\n")
		}, time.Minute, time.Millisecond)
	} else {
		// Nobody guards it, so the kernel ends the program, or all of the sandbox.
		_, err := c.try(t, hog)
		require.Error(t, err)
		if _, err := c.try(t, "true"); err != nil {
			require.Contains(t, sandboxtest.Ended(t, c), "memory")
		}
	}
	sandboxtest.Answers(t, other)
	require.NoError(t, d.Destroy(t.Context(), c.ID()))
	require.Empty(t, cgroupTraces(t, dir, c.ID()))
}

func cgroupTraces(t *testing.T, dir, id string) []string {
	t.Helper()
	var found []string
	for _, path := range cgroups(t, dir) {
		if filepath.Base(path) == id {
			found = append(found, path)
		}
	}
	return found
}

func TestForkBomb(t *testing.T) {
	t.Parallel()
	d, dir := newDriver(t)
	c, other := newCapsule(t, d, dir, minimalRoot(t), small), newCapsule(t, d, dir, minimalRoot(t), small)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	_, err := c.d.Exec(ctx, c.ID(), "/bin/su", "user", "-s", "/bin/bash", "-c", "bomb() { bomb | bomb & }; bomb; sleep 1000")
	require.Error(t, err)
	sandboxtest.Answers(t, other)
	sandboxtest.Answers(t, c)
	require.NoError(t, d.Destroy(t.Context(), c.ID()))
	require.Empty(t, cgroupTraces(t, dir, c.ID()))
}

func TestEndOfEnvd(t *testing.T) {
	t.Parallel()
	c := oneCapsule(t)
	sandboxtest.Answers(t, c)
	_, err := c.try(t, "kill -SEGV 1; kill -ABRT 1; sleep 1000")
	require.Error(t, err)
	require.Contains(t, sandboxtest.Ended(t, c), "daemon exited")
}

func TestBadRoot(t *testing.T) {
	t.Parallel()
	d, dir := newDriver(t)
	_, err := d.Create(t.Context(), sandbox.Spec{ID: nestbox.NewID(nestbox.PrefixCapsule), Root: image.Root{Dir: t.TempDir()}, Resources: small})
	require.Equal(t, nestbox.CodeInternal, nestbox.CodeOf(err))
	require.Empty(t, traces(t, dir))
}

func TestOutsideSignals(t *testing.T) {
	t.Parallel()
	c := oneCapsule(t)
	sandboxtest.Answers(t, c)
	out, err := exec.Command("ps", "-o", "sid=,pgid=", "-p", fmt.Sprint(sentryPID(t, c.dir, c.ID()))).Output()
	require.NoError(t, err)
	self, err := exec.Command("ps", "-o", "sid=,pgid=", "-p", fmt.Sprint(os.Getpid())).Output()
	require.NoError(t, err)
	for _, f := range strings.Fields(string(self)) {
		require.NotContains(t, strings.Fields(string(out)), f, "a Ctrl-C would reach the sandbox")
	}
}

func TestOwnersCannotBeMapped(t *testing.T) {
	t.Parallel()
	root := minimalRoot(t)
	// overlayfs, on which containers are, is one that the kernel cannot map.
	over := func(lower string) string {
		dir := t.TempDir()
		for _, sub := range []string{"upper", "work", "merged"} {
			require.NoError(t, os.Mkdir(filepath.Join(dir, sub), 0o755))
		}
		merged := filepath.Join(dir, "merged")
		options := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, dir, dir)
		require.NoError(t, unix.Mount("overlay", merged, "overlay", 0, options))
		t.Cleanup(func() { require.NoError(t, unix.Unmount(merged, unix.MNT_DETACH)) })
		return merged
	}
	plain := image.Root{Dir: over(root.Dir)}
	for _, b := range root.Binds {
		if !strings.HasPrefix(b.Source, filepath.Dir(root.Dir)) {
			b.Source = over(b.Source)
		}
		plain.Binds = append(plain.Binds, b)
	}
	d, dir := newDriver(t)
	c := newCapsule(t, d, dir, plain, small)
	sandboxtest.Answers(t, c)
	require.Equal(t, "0:0", c.sh(t, "stat -L -c %u:%g / /etc/passwd /etc/hosts /root /usr/local | sort -u"), "what is the template's is copied")
	require.Equal(t, "1000:1000", c.sh(t, "stat -c %u:%g /home/user"))
	require.Equal(t, "65534:65534", c.sh(t, "stat -c %u:%g /usr /usr/bin/bash | sort -u"), "what is the host's belongs to nobody")
	c.sh(t, "echo x >>/etc/hosts && echo x >/etc/hostname && touch /root/x /usr/x /usr/local/bin/x && su user -s /bin/bash -c 'touch ~/x'")
}

// TestGuardMemory: while a sandbox holds too much, what is inside is
// asked to free some, and the sandbox lives.
func TestGuardMemory(t *testing.T) {
	t.Parallel()
	d, dir := newDriver(t)
	c := newCapsule(t, d, dir, minimalRoot(t), small)
	ctx, stop := context.WithCancel(t.Context())
	asked, guarded := make(chan int64, 1), make(chan struct{})
	go func() {
		defer close(guarded)
		c.GuardMemory(ctx, func(_ context.Context, used int64) error {
			select {
			case asked <- used:
			default: // not for the first time
			}
			_, err := c.try(t, "pkill -9 python3")
			return err
		})
	}()
	hog := make(chan error, 1)
	go func() {
		out, err := c.try(t, "exec python3 -c 'import time; b = bytearray(300 << 20); time.sleep(1000)' 2>&1")
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		hog <- err
	}()
	select {
	case used := <-asked:
		require.Greater(t, used, int64(small.MemoryMB)<<20)
	case err := <-hog:
		require.Fail(t, "the program that takes too much ended before anybody was asked", "%v", err)
	}
	require.Error(t, <-hog)
	sandboxtest.Answers(t, c)
	stop()
	<-guarded
}
