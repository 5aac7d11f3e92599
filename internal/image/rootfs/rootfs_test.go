package rootfs

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofs/go-erofs"
	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
)

// entry of a layer: its header, and what is in it.
type item struct {
	tar.Header
	text string
}

func file(name, text string) item {
	return item{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644}, text}
}

func dir(name string) item {
	return item{Header: tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}}
}

func hardLink(name, target string) item {
	return item{Header: tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target}}
}

func symlink(name, target string) item {
	return item{Header: tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}}
}

func pack(t testing.TB, items ...item) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, i := range items {
		i.Size = int64(len(i.text))
		require.NoError(t, w.WriteHeader(&i.Header))
		_, err := io.WriteString(w, i.text)
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

func layer(archive []byte, d Dialect) Layer {
	return Layer{Name: "under test", Archive: bytes.NewReader(archive), Size: int64(len(archive)), Dialect: d}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "%s", out)
}

// write writes the tree of layers and returns the file.
func write(t *testing.T, tree *Tree) *os.File {
	t.Helper()
	out, err := os.Create(filepath.Join(t.TempDir(), "root.erofs"))
	require.NoError(t, err)
	t.Cleanup(func() { _ = out.Close() })
	require.NoError(t, tree.WriteEROFS(t.Context(), out, t.TempDir()))
	return out
}

// show lists what is in an EROFS file, as "path mode owner content".
func show(t *testing.T, file *os.File) map[string]string {
	t.Helper()
	fsys, err := erofs.Open(file)
	require.NoError(t, err)
	seen := map[string]string{}
	require.NoError(t, fs.WalkDir(fsys, ".", func(name string, e fs.DirEntry, err error) error {
		require.NoError(t, err, name)
		info, err := e.Info()
		require.NoError(t, err)
		stat := info.Sys().(*erofs.Stat)
		text := ""
		switch info.Mode().Type() {
		case 0:
			data, err := fs.ReadFile(fsys, name)
			require.NoError(t, err, name)
			text = string(data)
		case fs.ModeSymlink:
			text, err = fs.ReadLink(fsys, name)
			require.NoError(t, err)
		}
		seen[name] = fmt.Sprintf("%s %d:%d %s", stat.Mode, stat.UID, stat.GID, text)
		return nil
	}))
	return seen
}

func TestLayers(t *testing.T) {
	t.Parallel()
	xattrOpaque := map[string]string{paxXattr + opaqueXattr: "y"}
	whiteout := func(name string) item { return item{Header: tar.Header{Name: name, Typeflag: tar.TypeChar}} }
	for name, tt := range map[string]struct {
		dialect Dialect
		lower   []item
		upper   []item
		want    map[string]string // "" = it is not there
	}{
		"a file is replaced": {
			OCI, []item{file("a", "old")}, []item{file("./a", "new")},
			map[string]string{"a": "-rw-r--r-- 0:0 new"},
		},
		"a whiteout takes away what is below, wherever it stands": {
			OCI, []item{file("d/a", "1"), file("d/b", "2")}, []item{file("d/a", "3"), file("d/.wh.a", ""), file("d/.wh.b", ""), file("d/.wh.none", "")},
			map[string]string{"d/a": "-rw-r--r-- 0:0 3", "d/b": ""},
		},
		"an opaque directory has what its own layer brings": {
			OCI, []item{file("d/x/a", "1"), file("d/x/y/b", "2"), file("d/c", "3")},
			[]item{file("d/x/y/n", "new"), file("d/.wh..wh..opq", "")},
			map[string]string{"d/x/a": "", "d/x/y/b": "", "d/c": "", "d/x/y/n": "-rw-r--r-- 0:0 new"},
		},
		"a directory takes the place of a file, and back": {
			OCI, []item{file("a", "1"), file("b/c", "2")}, []item{file("a/n", "3"), file("b", "4")},
			nil,
		},
		"a directory takes the place of a link": {
			OCI, []item{dir("usr/lib"), file("usr/lib/x", "1"), symlink("lib", "usr/lib")}, []item{dir("lib"), file("lib/y", "2")},
			map[string]string{"lib/y": "-rw-r--r-- 0:0 2", "usr/lib/y": "", "usr/lib/x": "-rw-r--r-- 0:0 1"},
		},
		"links on the way are followed, within the root": {
			OCI, []item{symlink("lib", "/../../usr/./lib"), symlink("up", "../../../.."), dir("usr/lib")},
			[]item{file("lib/x", "1"), file("up/y", "2")},
			map[string]string{"usr/lib/x": "-rw-r--r-- 0:0 1", "y": "-rw-r--r-- 0:0 2", "lib": "Lrwxrwxrwx 0:0 /../../usr/./lib"},
		},
		"a hard link keeps what its target was": {
			OCI, []item{file("a", "old")}, []item{hardLink("b", "/a"), file("a", "new")},
			map[string]string{"a": "-rw-r--r-- 0:0 new", "b": "-rw-r--r-- 0:0 old"},
		},
		"names are no paths of the host": {
			Plain, []item{file("/etc/x", "1"), file(".//./y//z", "2"), file("odd \n\xff name", "3"), file(strings.Repeat("n", 255), "4")}, nil,
			map[string]string{"etc/x": "-rw-r--r-- 0:0 1", "y/z": "-rw-r--r-- 0:0 2", "odd \n\xff name": "-rw-r--r-- 0:0 3", strings.Repeat("n", 255): "-rw-r--r-- 0:0 4"},
		},
		"owners and permissions": {
			Plain, []item{
				{tar.Header{Name: "su", Typeflag: tar.TypeReg, Mode: 0o4755}, "x"},
				{tar.Header{Name: "own", Typeflag: tar.TypeReg, Mode: 0o2600, Uid: 65535, Gid: 1000}, "x"},
				{tar.Header{Name: "tmp", Typeflag: tar.TypeDir, Mode: 0o1777}, ""},
				{tar.Header{Name: "pipe", Typeflag: tar.TypeFifo, Mode: 0o600}, ""},
			}, nil,
			map[string]string{"su": "urwxr-xr-x 0:0 x", "own": "grw------- 65535:1000 x", "tmp": "dtrwxrwxrwx 0:0 ", "pipe": "prw------- 0:0 "},
		},
		"an overlay's whiteouts": {
			Overlay, []item{file("a", "1"), file("b", "2"), file("c", "3"), file("d/e", "4")},
			[]item{whiteout("a"), hardLink("b", "a"), hardLink("c", "b"), {tar.Header{Name: "d", Typeflag: tar.TypeDir, Mode: 0o700, PAXRecords: xattrOpaque}, ""}, file("d/f", "5")},
			map[string]string{"a": "", "b": "", "d/e": "", "d/f": "-rw-r--r-- 0:0 5", "d": "drwx------ 0:0 "},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tree := New(1 << 20)
			require.NoError(t, tree.Add(t.Context(), layer(pack(t, tt.lower...), tt.dialect)))
			err := tree.Add(t.Context(), layer(pack(t, tt.upper...), tt.dialect))
			if tt.want == nil {
				require.ErrorContains(t, err, "is not a directory")
				return
			}
			require.NoError(t, err)
			got := show(t, write(t, tree))
			for path, want := range tt.want {
				require.Equal(t, want, got[path], path)
			}
		})
	}
}

func TestHardLinks(t *testing.T) {
	t.Parallel()
	items := []item{file("many/target", "text")}
	for i := range 500 { // a directory of several blocks
		items = append(items, hardLink(fmt.Sprintf("many/%s-%d", strings.Repeat("long", 10), i), "many/target"))
	}
	items = append(items, symlink("s", "many"), hardLink("s2", "s"))
	tree := New(1 << 20)
	require.NoError(t, tree.Add(t.Context(), layer(pack(t, items...), Plain)))
	out := write(t, tree)

	fsys, err := erofs.Open(out)
	require.NoError(t, err)
	first, err := fs.Stat(fsys, "many/target")
	require.NoError(t, err)
	for i := range 500 {
		name := fmt.Sprintf("many/%s-%d", strings.Repeat("long", 10), i)
		info, err := fs.Stat(fsys, name)
		require.NoError(t, err)
		require.Equal(t, first.Sys().(*erofs.Stat).Ino, info.Sys().(*erofs.Stat).Ino)
		require.Equal(t, 501, info.Sys().(*erofs.Stat).Nlink)
	}
	require.Equal(t, "Lrwxrwxrwx 0:0 many", show(t, out)["s2"])

	t.Run("and stay links when the image is a base", func(t *testing.T) {
		t.Parallel()
		again := New(1 << 20)
		require.NoError(t, again.AddEROFS(t.Context(), out))
		require.EqualValues(t, len("text"), again.Size())
		require.Equal(t, sum(t, out), sum(t, write(t, again)), "the same files are the same bytes")
	})
}

// TestFilesHaveTheirOwnBlocks: else gVisor cannot map them into memory.
func TestFilesHaveTheirOwnBlocks(t *testing.T) {
	t.Parallel()
	var items []item
	want := map[string]string{}
	for i := range 3000 {
		name, text := fmt.Sprintf("d%d/f%d", i%7, i), strings.Repeat(fmt.Sprint(i), i%1500)
		items = append(items, file(name, text))
		want[name] = text
	}
	tree := New(1 << 30)
	require.NoError(t, tree.Add(t.Context(), layer(pack(t, items...), Plain)))
	out := write(t, tree)
	info, err := out.Stat()
	require.NoError(t, err)
	require.Zero(t, info.Size()%4096)
	fsys, err := erofs.Open(out)
	require.NoError(t, err)
	for name, text := range want {
		data, err := fs.ReadFile(fsys, name)
		require.NoError(t, err)
		require.Equal(t, text, string(data), name)
		stat, err := fs.Stat(fsys, name)
		require.NoError(t, err)
		require.EqualValues(t, layoutPlain, stat.Sys().(*erofs.Stat).InodeLayout, name)
	}
}

func sum(t *testing.T, f *os.File) string {
	t.Helper()
	h := sha256.New()
	_, err := io.Copy(h, io.NewSectionReader(f, 0, 1<<40))
	require.NoError(t, err)
	return fmt.Sprintf("%x", h.Sum(nil))
}

func TestHostileLayers(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		items []item
		says  string
		code  nestbox.Code
	}{
		"a path that leads upwards":         {[]item{file("a/../../etc/passwd", "x")}, "leaves the root", nestbox.CodeInvalid},
		"a link's target that leads up":     {[]item{hardLink("a", "../../etc/shadow")}, "leaves the root", nestbox.CodeInvalid},
		"a hard link to nothing":            {[]item{hardLink("a", "/etc/shadow")}, "not there", nestbox.CodeInvalid},
		"a hard link to itself":             {[]item{hardLink("a", "a")}, "not there", nestbox.CodeInvalid},
		"a hard link to a directory":        {[]item{dir("d"), hardLink("d/up", "d")}, "directory", nestbox.CodeInvalid},
		"a block device":                    {[]item{{tar.Header{Name: "dev/sda", Typeflag: tar.TypeBlock, Devmajor: 8}, ""}}, "device node", nestbox.CodeInvalid},
		"a character device":                {[]item{{tar.Header{Name: "mem", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 1}, ""}}, "device node", nestbox.CodeInvalid},
		"an owner that no capsule has":      {[]item{{tar.Header{Name: "a", Typeflag: tar.TypeReg, Uid: 1 << 20}, ""}}, "0 to 65535", nestbox.CodeInvalid},
		"a name that is too long":           {[]item{file(strings.Repeat("n", 256), "")}, "longer than 255", nestbox.CodeInvalid},
		"a path that is too long":           {[]item{file(strings.Repeat("n/", 2100)+"x", "")}, "longer than 4095", nestbox.CodeInvalid},
		"a depth that is too great":         {[]item{file(strings.Repeat("n/", 600)+"x", "")}, "directories", nestbox.CodeInvalid},
		"links that go round":               {[]item{symlink("a", "b"), symlink("b", "a"), file("a/x", "")}, "too many symbolic links", nestbox.CodeInvalid},
		"a path through a file":             {[]item{file("a", ""), file("a/b", "")}, "not a directory", nestbox.CodeInvalid},
		"a whiteout of what is above":       {[]item{file("d/.wh...", "")}, "names nothing", nestbox.CodeInvalid},
		"a root that is a file":             {[]item{file(".", "x")}, "not a directory", nestbox.CodeInvalid},
		"more bytes than the limit":         {[]item{file("a", strings.Repeat("x", 600)), file("a", strings.Repeat("x", 600))}, "more than 1000 bytes", nestbox.CodeExhausted},
		"a link whose target is no link's":  {[]item{symlink("a", strings.Repeat("x", 5000))}, "target of the symbolic link", nestbox.CodeInvalid},
		"more attributes than a file takes": {[]item{{tar.Header{Name: "a", Typeflag: tar.TypeReg, PAXRecords: map[string]string{paxXattr + "user.x": strings.Repeat("x", 70000)}}, ""}}, "extended attributes", nestbox.CodeInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := New(1000).Add(t.Context(), layer(pack(t, tt.items...), OCI))
			require.ErrorContains(t, err, tt.says)
			require.Equal(t, tt.code, nestbox.CodeOf(err))
			require.Contains(t, nestbox.MessageOf(err), "layer under test, entry ")
		})
	}
	t.Run("depth by links", func(t *testing.T) {
		t.Parallel()
		deep := strings.Repeat("n/", 400)
		err := New(1000).Add(t.Context(), layer(pack(t, dir(deep), symlink("s", deep), dir("s/"+deep)), OCI))
		require.ErrorContains(t, err, "directories")
	})
	t.Run("cut", func(t *testing.T) {
		t.Parallel()
		archive := pack(t, file("a", strings.Repeat("x", 900)))
		for _, n := range []int{1, 511, 513, 700, 1100} {
			require.Error(t, New(1000).Add(t.Context(), layer(archive[:n], OCI)), n)
		}
	})
	t.Run("no archive", func(t *testing.T) {
		t.Parallel()
		require.Error(t, New(1000).Add(t.Context(), layer(bytes.Repeat([]byte("garbage "), 1000), OCI)))
	})
}

func TestSparseFiles(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"gnu", "pax"} {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			source := t.TempDir()
			f, err := os.Create(filepath.Join(source, "sparse"))
			require.NoError(t, err)
			for _, at := range []int64{70 << 10, 300 << 10} {
				_, err = f.WriteAt([]byte("island"), at)
				require.NoError(t, err)
			}
			require.NoError(t, f.Truncate(1<<20))
			require.NoError(t, f.Close())
			want, err := os.ReadFile(f.Name())
			require.NoError(t, err)
			archive := filepath.Join(t.TempDir(), "a.tar")
			run(t, "tar", "--sparse", "--format="+format, "-C", source, "-cf", archive, ".")
			data, err := os.ReadFile(archive)
			require.NoError(t, err)
			require.Less(t, len(data), 1<<19, "tar has left the holes out")
			spare, err := os.Create(filepath.Join(t.TempDir(), "spare"))
			require.NoError(t, err)
			t.Cleanup(func() { _ = spare.Close() })
			tree := New(1 << 30)
			l := layer(data, Plain)
			l.Spare = spare
			require.NoError(t, tree.Add(t.Context(), l))
			fsys, err := erofs.Open(write(t, tree))
			require.NoError(t, err)
			got, err := fs.ReadFile(fsys, "sparse")
			require.NoError(t, err)
			require.True(t, bytes.Equal(want, got))
		})
	}
}

func TestUpperHasWhatHasAttributes(t *testing.T) {
	t.Parallel()
	capable := item{tar.Header{Name: "usr/bin/ping", Typeflag: tar.TypeReg, Mode: 0o755, PAXRecords: map[string]string{
		paxXattr + "security.capability": "\x01\x00\x00\x02", paxXattr + "security.selinux": "gone",
	}}, "program"}
	tree := New(1 << 20)
	require.NoError(t, tree.Add(t.Context(), layer(pack(t, dir("usr"), capable, hardLink("usr/bin/ping4", "usr/bin/ping"), file("usr/other", "x")), OCI)))
	var upper bytes.Buffer
	n, err := tree.WriteUpper(t.Context(), &upper)
	require.NoError(t, err)
	require.Equal(t, 2, n)
	var names []string
	for r := tar.NewReader(&upper); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		names = append(names, h.Name)
		if h.Name == "./usr/bin/ping" {
			require.Equal(t, map[string]string{paxXattr + "security.capability": "\x01\x00\x00\x02"}, h.PAXRecords)
			text, err := io.ReadAll(r)
			require.NoError(t, err)
			require.Equal(t, "program", string(text))
		}
	}
	require.Equal(t, []string{"./", "./usr/", "./usr/bin/", "./usr/bin/ping", "./usr/bin/ping4"}, names)
	require.Equal(t, "-rwxr-xr-x 0:0 program", show(t, write(t, tree))["usr/bin/ping"])
}

func TestComplete(t *testing.T) {
	t.Parallel()
	tree := New(1 << 20)
	require.NoError(t, tree.Add(t.Context(), layer(pack(t, symlink("tmp", "var/tmp"), item{Header: tar.Header{Name: "root", Typeflag: tar.TypeDir, Mode: 0o755}}), Plain)))
	require.NoError(t, tree.Complete())
	got := show(t, write(t, tree))
	require.Equal(t, "drwxr-xr-x 0:0 ", got["root"], "what an image brings stays")
	require.Equal(t, "dtrwxrwxrwx 0:0 ", got["var/tmp/.X11-unix"])
	require.Equal(t, "drwxr-xr-x 0:0 ", got["etc"])
	require.Equal(t, "-rwxr-xr-x 0:0 ", got[".envd"])
}

func TestCanceled(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := New(1<<20).Add(ctx, layer(pack(t, file("a", "x")), OCI))
	require.Equal(t, nestbox.CodeCanceled, nestbox.CodeOf(err))
}
