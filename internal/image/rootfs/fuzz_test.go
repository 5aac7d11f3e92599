package rootfs

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/erofs/go-erofs"
	"github.com/stretchr/testify/require"
)

// FuzzAdd puts any two layers together: what is not refused becomes an image that can be
// read whole.
func FuzzAdd(f *testing.F) {
	f.Add([]byte("not a tar archive"), []byte{}, uint8(0))
	for _, l := range [][2][]item{
		{{file("a/b", "text"), hardLink("c", "a/b"), symlink("d", "/a")}, {file("d/e", "x"), file("a/.wh.b", ""), file(".wh..wh..opq", "")}},
		{{dir("a"), symlink("a/up", "../.."), hardLink("l", "a/up")}, {file("a/up/x", "y"), hardLink("a/y", "l")}},
	} {
		f.Add(pack(f, l[0]...), pack(f, l[1]...), uint8(OCI))
	}
	f.Fuzz(func(t *testing.T, lower, upper []byte, dialect uint8) {
		tree := New(1 << 20)
		for _, archive := range [][]byte{lower, upper} {
			l := layer(archive, Dialect(dialect%3))
			spare, err := os.Create(filepath.Join(t.TempDir(), "spare"))
			require.NoError(t, err)
			defer spare.Close()
			l.Spare = spare
			if tree.Add(t.Context(), l) != nil {
				return
			}
		}
		if tree.Complete() != nil {
			return
		}
		out, err := os.Create(filepath.Join(t.TempDir(), "out"))
		require.NoError(t, err)
		defer out.Close()
		require.NoError(t, tree.WriteEROFS(t.Context(), out, t.TempDir()))
		fsys, err := erofs.Open(out)
		require.NoError(t, err)
		require.NoError(t, fs.WalkDir(fsys, ".", func(name string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			_, err = fs.ReadFile(fsys, name)
			return err
		}))
	})
}
