package gvisor_test

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox/internal/image"
	"github.com/nestbox/nestbox/internal/image/rootfs"
)

// packages of this machine are in the image of the tests.
var packages = []string{
	"base-files", "base-passwd", "bash", "coreutils", "dash", "findutils", "grep", "hostname", "libacl1", "libattr1", "libc-bin", "libc6",
	"libcrypt1", "libgmp10", "libpcre2-8-0", "libselinux1", "libssl3", "libssl3t64", "libtinfo6", "mawk", "sed", "util-linux", "libsystemd0", "libudev1", "libcap-ng0",
}

// debian is an image of some packages of this machine, with programs that are setuid and
// have capabilities.
var debian = sync.OnceValues(func() (image.Root, error) {
	var names []string
	for _, link := range []string{"bin", "sbin", "lib", "lib64"} {
		if _, err := os.Lstat("/" + link); err == nil {
			names = append(names, link)
		}
	}
	for _, p := range packages {
		if out, err := exec.Command("dpkg", "-L", p).Output(); err == nil {
			for name := range strings.Lines(string(out)) {
				name = strings.Trim(name, "/.\n")
				if _, err := os.Lstat("/" + name); err == nil && name != "" {
					names = append(names, name)
				}
			}
		}
	}
	cmd := exec.Command("tar", "--no-recursion", "-C", "/", "-cf", "-", "-T", "-")
	cmd.Stdin = strings.NewReader(strings.Join(names, "\n"))
	packed, err := cmd.Output()
	if err != nil {
		return image.Root{}, err
	}
	more, err := moreOfDebian()
	if err != nil {
		return image.Root{}, err
	}
	store, err := openImages()
	if err != nil {
		return image.Root{}, err
	}
	made, err := store.Make(context.Background(), func(ctx context.Context, tree *rootfs.Tree, _ string) error {
		for _, l := range [][]byte{packed, more} {
			if err := tree.Add(ctx, rootfs.Layer{Name: "test", Archive: bytes.NewReader(l), Size: int64(len(l))}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return image.Root{}, err
	}
	return store.Acquire(made.Name)
})

// moreOfDebian is a layer of files that need care.
func moreOfDebian() ([]byte, error) {
	program, err := os.ReadFile("/usr/bin/id")
	if err != nil {
		return nil, err
	}
	chown, err := os.ReadFile("/usr/bin/chown")
	if err != nil {
		return nil, err
	}
	const capChown = "\x01\x00\x00\x02\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" // cap_chown=ep, capabilities(7)
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range []struct {
		tar.Header
		text string
	}{
		{tar.Header{Name: "usr/local/bin/setuid-id", Mode: 0o4755, Typeflag: tar.TypeReg}, string(program)},
		{tar.Header{Name: "usr/local/bin/may-chown", Mode: 0o755, Typeflag: tar.TypeReg, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": capChown}}, string(chown)},
		{tar.Header{Name: "srv/owned", Mode: 0o640, Uid: 1000, Gid: 50, Typeflag: tar.TypeReg}, "owned"},
		{tar.Header{Name: "srv/linked", Linkname: "srv/owned", Typeflag: tar.TypeLink}, ""},
		{tar.Header{Name: "etc/resolv.conf", Linkname: "../run/nowhere/resolv.conf", Typeflag: tar.TypeSymlink}, ""},
		{tar.Header{Name: "srv/pipe", Mode: 0o600, Typeflag: tar.TypeFifo}, ""},
	} {
		f.Size = int64(len(f.text))
		if err := w.WriteHeader(&f.Header); err != nil {
			return nil, err
		}
		if _, err := io.WriteString(w, f.text); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), w.Close()
}

func debianRoot(t *testing.T) image.Root {
	t.Helper()
	root, err := debian()
	require.NoError(t, err)
	require.NotEmpty(t, root.EROFS)
	require.NotEmpty(t, root.Upper, "there are extended attributes")
	return root
}

func TestSuiteOnEROFS(t *testing.T) {
	t.Parallel()
	runSuite(t, debianRoot(t))
}

func TestEROFS(t *testing.T) {
	t.Parallel()
	d, dir := newDriver(t)
	c := newCapsule(t, d, dir, debianRoot(t), small)
	other := newCapsule(t, d, dir, debianRoot(t), small)

	t.Run("what is in it is right", func(t *testing.T) {
		c.sh(t, "until [ -s /etc/hostname ] && [ -s /etc/hosts ] && [ -s /etc/resolv.conf ]; do sleep 0.01; done") // envd writes them
		require.Equal(t, "0:0", c.sh(t, "stat -L -c %u:%g /bin/bash /root /usr /.envd /etc/hosts / | sort -u"))
		require.Equal(t, "640 1000:50 2 640 1000:50 2", c.sh(t, "echo $(stat -c '%a %u:%g %h' /srv/owned /srv/linked)"))
		require.Equal(t, "yes", c.sh(t, "[ /srv/owned -ef /srv/linked ] && echo yes"))
		require.Equal(t, "fifo", c.sh(t, "stat -c %F /srv/pipe"))
		require.Equal(t, "1777", c.sh(t, "stat -c %a /tmp"))
		require.Equal(t, c.ID(), c.sh(t, "cat /etc/hostname"))
		require.Contains(t, c.sh(t, "cat /etc/hosts"), "localhost "+c.ID())
		require.Equal(t, "# There is no name server in reach.", c.sh(t, "[ ! -L /etc/resolv.conf ] && cat /etc/resolv.conf"))
		require.Equal(t, "tmpfs", c.sh(t, "stat -f -c %T /dev/shm"))
	})
	t.Run("programs are who their files say", func(t *testing.T) {
		require.Equal(t, "0", c.sh(t, "setpriv --reuid=1000 --regid=1000 --clear-groups setuid-id -u"))
		c.sh(t, "echo x > /srv/x && setpriv --reuid=1000 --regid=1000 --clear-groups may-chown 1000 /srv/x")
		require.Equal(t, "1000", c.sh(t, "stat -c %u /srv/x"))
		_, err := c.try(t, "setpriv --reuid=1000 --regid=1000 --clear-groups chown 0 /srv/x")
		require.Error(t, err, "without the capability")
	})
	t.Run("small files can be mapped", func(t *testing.T) {
		// As the C library does with those of a locale.
		require.Equal(t, "owned", c.sh(t, "[ -s /usr/lib/locale/C.utf8/LC_MEASUREMENT ] && LC_ALL=C.UTF-8 find /srv -name owned -printf %f 2>&1"))
	})
	t.Run("what one writes the other does not see", func(t *testing.T) {
		c.sh(t, "echo mine > /srv/owned && rm /usr/bin/env && mkdir /usr/mine && echo x > /etc/hosts.new && mv /etc/hosts.new /etc/hosts")
		require.Equal(t, "owned", other.sh(t, "cat /srv/owned"))
		require.Equal(t, "yes", other.sh(t, "[ -e /usr/bin/env ] && [ ! -e /usr/mine ] && echo yes"))
	})
	t.Run("the disk has its limit", func(t *testing.T) {
		out, err := c.try(t, fmt.Sprintf("head -c %dM /dev/zero > /big", small.DiskMB+1))
		require.Error(t, err)
		require.Contains(t, out, "No space left")
		c.sh(t, "rm /big")
	})
	require.NotContains(t, c.sh(t, "cat /proc/mounts /proc/self/mountinfo"), dir)
}
