package envd

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
)

func TestAccounts(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		tmp := filepath.Join(dir, name+".new")
		require.NoError(t, os.WriteFile(tmp, []byte(text), 0o644))
		require.NoError(t, os.Rename(tmp, filepath.Join(dir, name)))
	}
	a := newAccounts(dir)
	for _, user := range []string{"", "root", "0"} { // without any file
		acc, err := a.find(user)
		require.NoError(t, err)
		require.Equal(t, account{name: "root", home: "/root", shell: "/bin/sh"}, acc)
	}

	write("passwd", "root:x:0:0:root:/home/root:/bin/bash\n# comment\nbroken:x:one:2:::\nsame:x:4294967295:5:::\nuser:x:1000:1001:A User:/home/user:/bin/zsh\nalias:x:1000:5::/alias:\nnohome:x:7:7:::\n123:x:9:9::/n:/bin/sh")
	write("group", "root:x:0:\nusers:x:100:user,alias\nwheel:x:10: user\nbad:x:y:user\n")
	for user, want := range map[string]account{
		"":       {name: "root", home: "/home/root", shell: "/bin/bash"},
		"user":   {name: "user", uid: 1000, gid: 1001, home: "/home/user", shell: "/bin/zsh", groups: []uint32{100, 10}},
		"1000":   {name: "user", uid: 1000, gid: 1001, home: "/home/user", shell: "/bin/zsh", groups: []uint32{100, 10}},
		"alias":  {name: "alias", uid: 1000, gid: 5, home: "/alias", shell: "/bin/sh", groups: []uint32{100}},
		"nohome": {name: "nohome", uid: 7, gid: 7, home: "/", shell: "/bin/sh"},
		"123":    {name: "123", uid: 9, gid: 9, home: "/n", shell: "/bin/sh"},
	} {
		acc, err := a.find(user)
		require.NoError(t, err, user)
		require.Equal(t, want, acc)
	}
	for _, user := range []string{"broken", "same", "nobody", "4711", "-1", "99999999999"} {
		_, err := a.find(user)
		require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err), user)
		require.Contains(t, err.Error(), user)
	}

	write("passwd", "root:x:0:0:root:/root:/bin/sh\nnew:x:5:5::/new:/bin/sh\n")
	acc, err := a.find("new") // a changed file is seen
	require.NoError(t, err)
	require.Equal(t, "/new", acc.home)
	_, err = a.find("user")
	require.Error(t, err)
	require.Equal(t, "new", a.owners().user(5))
	require.Equal(t, "users", a.owners().group(100))
	require.Equal(t, "1000", a.owners().user(1000))
	require.Equal(t, "4294967295", a.owners().group(1<<32-1))
}

// TestHostileAccountFiles: what root inside puts in place of the files costs
// neither time nor memory without a bound.
func TestHostileAccountFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "passwd"), 0o644))
	require.NoError(t, os.Symlink("/dev/zero", filepath.Join(dir, "group")))
	acc, err := newAccounts(dir).find("root")
	require.NoError(t, err)
	require.Equal(t, "/root", acc.home)
}
