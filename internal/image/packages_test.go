package image_test

import (
	"crypto/md5"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox/internal/image"
)

// debian is the root of a made-up machine.
type debian struct {
	t    *testing.T
	root string
}

func newDebian(t *testing.T) debian {
	d := debian{t, t.TempDir()}
	d.write("usr/bin/python3", "", 0o755)
	d.write("usr/local/bin/of-the-site", "", 0o755)
	d.write("etc/passwd", "root:x:0:0::/root:/bin/sh\noperator:x:1000:1000:Jane Doe:/home/operator:/bin/sh\nkeydb:$6$secret:115:121:Key DB:/var/lib/keydb:/bin/false\nelsewhere:x:116:122::/:/bin/false\n", 0o644)
	d.write("etc/group", "root:x:0:\nkeydb:x:121:operator\n", 0o644)
	return d
}

func (d debian) write(path, text string, mode os.FileMode) {
	d.t.Helper()
	path = filepath.Join(d.root, path)
	require.NoError(d.t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(d.t, os.WriteFile(path, []byte(text), mode))
	require.NoError(d.t, os.Chmod(path, mode))
}

// pack has dpkg say that a package owns files and directories. Those of conffiles it has
// shipped with the text that they lead to.
func (d debian) pack(name string, list []string, conffiles map[string]string) {
	d.t.Helper()
	status, err := os.ReadFile(filepath.Join(d.root, "var/lib/dpkg/status"))
	if err != nil {
		status = nil
	}
	entry := "Package: " + name + "\nStatus: install ok installed\nConffiles:\n"
	for path, text := range conffiles {
		sum := md5.Sum([]byte(text))
		entry += " " + path + " " + hex.EncodeToString(sum[:]) + "\n"
		list = append(list, path)
	}
	d.write("var/lib/dpkg/status", string(status)+entry+"Description: x\n\n", 0o644)
	d.write("var/lib/dpkg/info/"+name+".list", strings.Join(list, "\n")+"\n", 0o644)
}

func (d debian) store() *image.Store {
	d.t.Helper()
	s, err := image.NewStore(image.Config{Dir: filepath.Join(d.root, "store"), Host: d.root})
	require.NoError(d.t, err)
	return s
}

func acquire(t *testing.T, s *image.Store) image.Root {
	t.Helper()
	root, err := s.Acquire("minimal")
	require.NoError(t, err)
	return root
}

// TestWhatPackagesOwn: programs find the files that their packages keep outside /usr,
// and nothing of what the operator has put there comes along.
func TestWhatPackagesOwn(t *testing.T) {
	t.Parallel()
	d := newDebian(t)
	shipped := map[string]string{
		"/etc/tool/tool.conf": "as shipped", "/etc/tool/changed.conf": "as shipped", "/etc/tool/private.conf": "as shipped",
		"/etc/pam.d/tool": "auth", "/etc/sudoers.d/tool": "all", "/etc/bash.bashrc": "theirs", "/etc/linked/file": "as shipped",
	}
	for path, text := range shipped {
		d.write(path, text, 0o644)
	}
	d.write("etc/tool/changed.conf", "password=secret", 0o644)
	d.write("etc/tool/of-the-operator.conf", "password=secret", 0o644)
	require.NoError(t, os.Chmod(filepath.Join(d.root, "etc/tool/private.conf"), 0o640))
	d.write("etc/tool/generated", "no sum is known of it", 0o644)
	require.NoError(t, os.Symlink("tool.conf", filepath.Join(d.root, "etc/tool/link")))
	require.NoError(t, os.Symlink("/root/secret", filepath.Join(d.root, "etc/tool/out")))
	// A directory that the operator has made a link: it leads into what is shown of the host.
	require.NoError(t, os.MkdirAll(filepath.Join(d.root, "usr/share/elsewhere"), 0o755))
	require.NoError(t, os.Rename(filepath.Join(d.root, "etc/linked/file"), filepath.Join(d.root, "usr/share/elsewhere/file")))
	require.NoError(t, os.Remove(filepath.Join(d.root, "etc/linked")))
	require.NoError(t, os.Symlink("/usr/share/elsewhere", filepath.Join(d.root, "etc/linked")))
	d.write("var/lib/keydb/secret", "key", 0o600)
	require.NoError(t, os.Chown(filepath.Join(d.root, "var/lib/keydb"), 115, 121))
	require.NoError(t, os.Chmod(filepath.Join(d.root, "var/lib/keydb"), 0o750))
	d.pack("tool", []string{"/etc/tool", "/etc/tool/generated", "/etc/tool/link", "/etc/tool/out", "/etc/linked", "/var/lib/keydb", "/etc/../root/x", "/etc/gone"}, shipped)

	root := acquire(t, d.store())
	read := func(path string) string {
		text, err := os.ReadFile(filepath.Join(root.Dir, path))
		if err != nil {
			return ""
		}
		return string(text)
	}
	require.Equal(t, "as shipped", read("etc/tool/tool.conf"))
	require.Equal(t, "as shipped", read("etc/tool/link"))
	require.NotEqual(t, "theirs", read("etc/bash.bashrc"), "the template has its own")
	for _, path := range []string{
		"etc/tool/changed.conf", "etc/tool/of-the-operator.conf", "etc/tool/private.conf", "etc/tool/generated", "etc/tool/out",
		"etc/pam.d/tool", "etc/sudoers.d/tool", "var/lib/keydb/secret", "etc/gone",
	} {
		_, err := os.Lstat(filepath.Join(root.Dir, path))
		require.ErrorIs(t, err, os.ErrNotExist, path)
	}
	target, err := os.Readlink(filepath.Join(root.Dir, "etc/linked"))
	require.NoError(t, err)
	require.Equal(t, "/usr/share/elsewhere", target)
	info, err := os.Stat(filepath.Join(root.Dir, "var/lib/keydb"))
	require.NoError(t, err)
	require.Equal(t, "drwxr-x--- 115 121", fmt.Sprintf("%v %d %d", info.Mode(), owner(info).Uid, owner(info).Gid))
	require.Contains(t, read("etc/passwd"), "\nkeydb:x:115:121:Key DB:/var/lib/keydb:/bin/false\n")
	require.Contains(t, read("etc/group"), "\nkeydb:x:121:\n")
	for _, not := range []string{"operator", "elsewhere", "secret"} {
		require.NotContains(t, read("etc/passwd")+read("etc/group"), not)
	}
	for _, bind := range root.Binds {
		if bind.Target == "/usr/local" {
			link, err := os.Readlink(filepath.Join(bind.Source, "bin/python"))
			require.NoError(t, err)
			require.Equal(t, "/usr/bin/python3", link)
		}
	}
}

// TestImagesInUse: what is installed is in capsules that are made from then on, and an
// image stays for as long as a capsule uses it, over restarts too.
func TestImagesInUse(t *testing.T) {
	t.Parallel()
	d := newDebian(t)
	d.pack("one", nil, nil)
	images := func() (names []string) {
		entries, err := os.ReadDir(filepath.Join(d.root, "store"))
		require.NoError(t, err)
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return names
	}
	s := d.store()
	first := acquire(t, s)
	require.Equal(t, first, acquire(t, s), "nothing has changed")
	require.Equal(t, []string{first.Image}, images())

	d.write("etc/two/two.conf", "two", 0o644)
	d.pack("two", nil, map[string]string{"/etc/two/two.conf": "two"})
	second := acquire(t, s)
	require.NotEqual(t, first.Image, second.Image)
	require.FileExists(t, filepath.Join(second.Dir, "etc/two/two.conf"))
	s.Release(first.Image)
	require.ElementsMatch(t, []string{first.Image, second.Image}, images(), "one capsule uses it still")

	s = d.store() // a restart: the capsules of both are found again
	s.Use(first.Image)
	s.Use(second.Image)
	s.Sweep()
	require.ElementsMatch(t, []string{first.Image, second.Image}, images())
	s.Release(first.Image)
	require.Equal(t, []string{second.Image}, images())
	s.Release(second.Image)
	require.Equal(t, []string{second.Image}, images(), "the next capsule starts from it")

	d.write("etc/three/three.conf", "three", 0o644)
	d.pack("three", nil, map[string]string{"/etc/three/three.conf": "three"})
	s = d.store()
	s.Sweep()
	require.Equal(t, []string{acquire(t, s).Image}, images(), "what nobody uses went while no server ran")

	require.NoError(t, os.Mkdir(filepath.Join(d.root, "store", "minimal-of-a-capsule-from-before"), 0o700))
	s = d.store()
	s.Use("")
	s.Sweep()
	require.Contains(t, images(), "minimal-of-a-capsule-from-before", "somebody may use it")
}
