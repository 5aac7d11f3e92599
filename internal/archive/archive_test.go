package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
)

var someTime = time.Unix(1_600_000_000, 123_456_789)

// makeTree makes a tree with something of everything.
func makeTree(t *testing.T) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "tree")
	write := func(name string, content []byte, mode os.FileMode) {
		require.NoError(t, os.MkdirAll(filepath.Dir(root+"/"+name), 0o755))
		require.NoError(t, os.WriteFile(root+"/"+name, content, 0o600))
		require.NoError(t, os.Chmod(root+"/"+name, mode))
	}
	large := make([]byte, 3<<20+17)
	_, err := rand.NewChaCha8([32]byte{}).Read(large)
	require.NoError(t, err)
	write("large", large, 0o640)
	write("empty", nil, 0o644)
	write("private/key", []byte("secret"), 0o400)
	write("setuid", []byte("#!"), 0o755|fs.ModeSetuid)
	write(strings.Repeat("long/", 60)+strings.Repeat("n", 200), []byte("deep"), 0o644)
	write("odd/new\nline", []byte("1"), 0o644)
	write("odd/ sp ace ", []byte("2"), 0o644)
	write("odd/ü€😀", []byte("3"), 0o644)
	write("odd/not\xff\xfeutf8", []byte("4"), 0o644)
	write("odd/back\\slash", []byte("5"), 0o644)
	write("owned", []byte("o"), 0o644)
	require.NoError(t, os.Chown(root+"/owned", 1234, 5678))
	require.NoError(t, os.Link(root+"/large", root+"/odd/hardlink"))
	require.NoError(t, os.Symlink("../large", root+"/odd/link"))
	require.NoError(t, os.Symlink("/nowhere/at/all", root+"/dangling"))
	require.NoError(t, os.Symlink("odd", root+"/dirlink"))
	require.NoError(t, os.Mkdir(root+"/emptydir", 0o755))
	require.NoError(t, syscall.Mkfifo(root+"/fifo", 0o620))
	require.NoError(t, os.Chmod(root+"/private", 0o700))
	sparse(t, root+"/sparse", 64<<20, 5<<20, 40<<20)
	sparse(t, root+"/allhole", 10<<20)
	require.NoError(t, filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		return errors.Join(err, unix.UtimesNanoAt(unix.AT_FDCWD, p, timesOf(&tar.Header{ModTime: someTime}), unix.AT_SYMLINK_NOFOLLOW))
	}))
	return root
}

// sparse makes a file of a size with 5 bytes at each of the given places.
func sparse(t *testing.T, path string, size int64, at ...int64) {
	t.Helper()
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, f.Truncate(size))
	for _, o := range at {
		_, err := f.WriteAt([]byte("bytes"), o)
		require.NoError(t, err)
	}
}

// look describes everything below root, one line for each path.
func look(t *testing.T, root string, without ...string) []string {
	t.Helper()
	names := map[uint64]string{}
	var lines []string
	require.NoError(t, filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		require.NoError(t, err)
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(p, &st))
		rel, _ := filepath.Rel(root, p)
		line := fmt.Sprintf("%q %o", rel, st.Mode)
		if !slices.Contains(without, "owners") {
			line += fmt.Sprintf(" %d:%d", st.Uid, st.Gid)
		}
		if !slices.Contains(without, "times") && rel != "." {
			line += fmt.Sprintf(" %d.%09d", st.Mtim.Sec, st.Mtim.Nsec)
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			content, err := os.ReadFile(p)
			require.NoError(t, err)
			line += fmt.Sprintf(" %d %x", st.Size, sum(content))
			if first, ok := names[st.Ino]; ok {
				line += " = " + first
			}
			names[st.Ino] = rel
			if len(content) > 1<<20 {
				line += fmt.Sprintf(" sparse=%v", st.Blocks*512 < st.Size/2)
			}
		case unix.S_IFLNK:
			target, err := os.Readlink(p)
			require.NoError(t, err)
			line += " -> " + target
		}
		lines = append(lines, line)
		return nil
	}))
	return lines
}

func sum(b []byte) (n uint64) {
	for i, c := range b {
		n = n*31 + uint64(c) + uint64(i&1)
	}
	return n
}

func pack(t *testing.T, path string, opts PackOptions) []byte {
	t.Helper()
	var b bytes.Buffer
	warnings, err := Pack(t.Context(), path, opts, &b, nil)
	require.NoError(t, err)
	require.Empty(t, warnings)
	return b.Bytes()
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	root := makeTree(t)
	want := look(t, root)
	for _, c := range []nestbox.Compression{"", nestbox.CompressionGzip, nestbox.CompressionZstd} {
		t.Run("compressed by "+string(c), func(t *testing.T) {
			t.Parallel()
			to := t.TempDir()
			packed := pack(t, root, PackOptions{Compression: c})
			require.Less(t, len(packed), 8<<20, "holes are packed")
			done, err := Unpack(t.Context(), to, iotest.HalfReader(bytes.NewReader(packed)), UnpackOptions{KeepOwners: true})
			require.NoError(t, err)
			require.Empty(t, done.Warnings)
			require.Equal(t, int64(len(want)), done.Entries)
			require.Equal(t, want, look(t, to+"/tree"))
			// Once more over what is there: nothing changes.
			_, err = Unpack(t.Context(), to, bytes.NewReader(packed), UnpackOptions{KeepOwners: true, KeepKind: true})
			require.NoError(t, err)
			require.Equal(t, want, look(t, to+"/tree"))
		})
	}
}

// TestOtherTar has GNU tar unpack what is packed here, and the other way round.
func TestOtherTar(t *testing.T) {
	t.Parallel()
	root := makeTree(t)
	want := look(t, root)
	t.Run("unpacks", func(t *testing.T) {
		t.Parallel()
		to := t.TempDir()
		cmd := exec.CommandContext(t.Context(), "tar", "-x", "-p", "--numeric-owner", "-C", to)
		cmd.Stdin = bytes.NewReader(pack(t, root, PackOptions{}))
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Empty(t, string(out))
		require.Equal(t, want, look(t, to+"/tree"))
	})
	for _, format := range []string{"pax", "gnu"} {
		for _, how := range []string{"", "--gzip", "--sparse"} {
			t.Run("packs "+format+how, func(t *testing.T) {
				t.Parallel()
				args := []string{"-c", "--format=" + format, "-C", filepath.Dir(root)}
				if how != "" {
					args = append(args, how)
				}
				packed, err := exec.CommandContext(t.Context(), "tar", append(args, "tree")...).Output()
				require.NoError(t, err)
				to := t.TempDir()
				done, err := Unpack(t.Context(), to, bytes.NewReader(packed), UnpackOptions{KeepOwners: true})
				require.NoError(t, err)
				require.Empty(t, done.Warnings)
				got, want := look(t, to+"/tree"), want
				if format == "gnu" || how != "--sparse" { // whole seconds; no holes
					got, want = look(t, to+"/tree", "times"), look(t, root, "times")
				}
				if how != "--sparse" {
					for i := range want {
						want[i] = strings.Replace(want[i], "sparse=true", "sparse=false", 1)
					}
				}
				require.Equal(t, want, got)
			})
		}
	}
}

func TestContentsAndNames(t *testing.T) {
	t.Parallel()
	root := makeTree(t)
	names := func(packed []byte) (names []string) {
		for r := tar.NewReader(bytes.NewReader(packed)); ; {
			h, err := r.Next()
			if err == io.EOF {
				return names
			}
			require.NoError(t, err)
			names = append(names, h.Name)
		}
	}
	require.Equal(t, []string{"private/", "private/key"}, names(pack(t, root+"/private", PackOptions{})))
	require.Equal(t, []string{"p/", "p/key"}, names(pack(t, root+"/private", PackOptions{Name: "p"})))
	require.Equal(t, []string{"./", "key"}, names(pack(t, root+"/private", PackOptions{Contents: true})))
	require.Equal(t, []string{"link"}, names(pack(t, root+"/odd/link", PackOptions{})))
	require.Len(t, names(pack(t, root+"/dirlink", PackOptions{Contents: true})), 8)
	for path, code := range map[string]nestbox.Code{root + "/missing": nestbox.CodeNotFound, root + "/empty/below": nestbox.CodeNotFound} {
		_, err := Pack(t.Context(), path, PackOptions{}, io.Discard, nil)
		require.Equal(t, code, nestbox.CodeOf(err), "%v", err)
	}
	_, err := Pack(t.Context(), root+"/empty", PackOptions{Contents: true}, io.Discard, nil)
	require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err), "%v", err)
	_, err = Pack(t.Context(), root+"/missing", PackOptions{Contents: true}, io.Discard, nil)
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err), "%v", err)
}

func TestOwner(t *testing.T) {
	t.Parallel()
	packed := pack(t, makeTree(t), PackOptions{})
	for owner, opts := range map[string]UnpackOptions{"0:0": {}, "7:8": {Owner: &Owner{7, 8}}} {
		to := t.TempDir()
		_, err := Unpack(t.Context(), to, bytes.NewReader(packed), opts)
		require.NoError(t, err)
		for _, line := range look(t, to+"/tree", "times") {
			require.Contains(t, line, " "+owner)
		}
		st, err := os.Stat(to + "/tree/setuid")
		require.NoError(t, err)
		require.NotZero(t, st.Mode()&fs.ModeSetuid)
	}
}

// archiveOf makes an archive by hand. Content is what a file holds, or a link leads to.
func archiveOf(t *testing.T, entries ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		content := ""
		if h.Typeflag == tar.TypeReg {
			content, h.Linkname = h.Linkname, ""
			h.Size = int64(len(content))
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		require.NoError(t, w.WriteHeader(&h))
		_, err := io.WriteString(w, content)
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

func file(name, content string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeReg, Linkname: content}
}

func symlink(name, target string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target}
}

func hardLink(name, target string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target}
}

func dir(name string) tar.Header { return tar.Header{Name: name, Typeflag: tar.TypeDir} }

// TestCannotLeave: no archive makes or changes anything outside of the directory.
func TestCannotLeave(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		entries []tar.Header
		ok      bool
	}{
		"dots":                   {entries: []tar.Header{file("../out", "x")}},
		"dots below":             {entries: []tar.Header{file("a/../../out", "x")}},
		"only dots":              {entries: []tar.Header{dir("..")}},
		"absolute":               {entries: []tar.Header{file("/out", "x")}, ok: true}, // below the directory
		"link up, file":          {entries: []tar.Header{symlink("up", ".."), file("up/out", "x")}},
		"absolute link, file":    {entries: []tar.Header{symlink("abs", "OUTSIDE"), file("abs/out", "x")}},
		"link up, dir":           {entries: []tar.Header{symlink("up", ".."), dir("up/out")}},
		"link up, link":          {entries: []tar.Header{symlink("up", ".."), symlink("up/out", "x")}},
		"link to file, write":    {entries: []tar.Header{symlink("f", "../victim"), file("f", "x")}, ok: true}, // replaces the link
		"hard link of outside":   {entries: []tar.Header{hardLink("h", "../victim")}},
		"hard link by link":      {entries: []tar.Header{symlink("up", ".."), hardLink("h", "up/victim")}},
		"hard link absolute":     {entries: []tar.Header{hardLink("h", "/victim")}},               // not there, below the directory
		"link, then dir of it":   {entries: []tar.Header{symlink("d", ".."), dir("d")}, ok: true}, // replaces the link
		"link twice":             {entries: []tar.Header{symlink("a", "b"), symlink("b", ".."), file("a/out", "x")}},
		"dir, then link, inside": {entries: []tar.Header{dir("d"), symlink("d/e", "../.."), file("d/e/out", "x")}},
		"existing link":          {entries: []tar.Header{file("existing/out", "x")}},
		"existing hard link":     {entries: []tar.Header{file("same", "x")}, ok: true}, // a new file
		"hard link, then write":  {entries: []tar.Header{hardLink("h", "same"), file("h", "x")}, ok: true},
		"mode of link":           {entries: []tar.Header{{Name: "existing", Typeflag: tar.TypeDir, Mode: 0o777}}, ok: true},
		"own mode":               {entries: []tar.Header{{Name: "./", Typeflag: tar.TypeDir, Mode: 0o700}}, ok: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			outside := t.TempDir()
			to := outside + "/to"
			require.NoError(t, os.Mkdir(to, 0o755))
			require.NoError(t, os.WriteFile(outside+"/victim", []byte("victim"), 0o644))
			require.NoError(t, os.Symlink("..", to+"/existing"))
			require.NoError(t, os.Link(outside+"/victim", to+"/same"))
			before, err := os.Stat(outside)
			require.NoError(t, err)
			for i := range tc.entries {
				tc.entries[i].Linkname = strings.ReplaceAll(tc.entries[i].Linkname, "OUTSIDE", outside)
			}
			_, err = Unpack(t.Context(), to, bytes.NewReader(archiveOf(t, tc.entries...)), UnpackOptions{Owner: &Owner{1, 1}})
			if tc.ok {
				require.NoError(t, err)
			} else {
				require.Contains(t, []nestbox.Code{nestbox.CodeInvalid, nestbox.CodeNotFound}, nestbox.CodeOf(err), "%v", err)
			}
			left, err := os.ReadDir(outside)
			require.NoError(t, err)
			require.Len(t, left, 2)
			content, err := os.ReadFile(outside + "/victim")
			require.NoError(t, err)
			require.Equal(t, "victim", string(content))
			after, err := os.Stat(outside)
			require.NoError(t, err)
			require.Equal(t, before.Mode(), after.Mode())
			require.Equal(t, before.Sys().(*syscall.Stat_t).Uid, after.Sys().(*syscall.Stat_t).Uid)
			victim, err := os.Stat(outside + "/victim")
			require.NoError(t, err)
			require.Zero(t, victim.Sys().(*syscall.Stat_t).Uid)
		})
	}
}

// TestSymlinksInside are followed, if they lead to below the directory.
func TestSymlinksInside(t *testing.T) {
	t.Parallel()
	to := t.TempDir()
	require.NoError(t, os.Symlink("real", to+"/link"))
	require.NoError(t, os.Mkdir(to+"/real", 0o755))
	_, err := Unpack(t.Context(), to, bytes.NewReader(archiveOf(t, dir("link"), file("link/f", "x"))), UnpackOptions{})
	require.NoError(t, err)
	content, err := os.ReadFile(to + "/real/f")
	require.NoError(t, err)
	require.Equal(t, "x", string(content))
}

func TestKinds(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		have string // a script
		in   tar.Header
		keep bool // refused with KeepKind
	}{
		"file over dir":    {"mkdir -p x/y; echo z > x/y/z", file("x", "new"), true},
		"link over dir":    {"mkdir -p x/y", symlink("x", "new"), true},
		"dir over file":    {"echo z > x", dir("x"), true},
		"dir over link":    {"ln -s nowhere x", dir("x"), true},
		"file over file":   {"echo z > x", file("x", "new"), false},
		"file over link":   {"ln -s /etc/passwd x", file("x", "new"), false},
		"link over file":   {"echo z > x", symlink("x", "new"), false},
		"fifo over file":   {"echo z > x", tar.Header{Name: "x", Typeflag: tar.TypeFifo}, false},
		"file over socket": {"mkfifo x", file("x", "new"), false},
		"dir over dir":     {"mkdir x", dir("x"), false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, keep := range []bool{true, false} {
				to := t.TempDir()
				cmd := exec.CommandContext(t.Context(), "sh", "-c", tc.have)
				cmd.Dir = to
				require.NoError(t, cmd.Run())
				before := look(t, to)
				_, err := Unpack(t.Context(), to, bytes.NewReader(archiveOf(t, tc.in)), UnpackOptions{KeepKind: keep})
				if keep && tc.keep {
					require.Equal(t, nestbox.CodeConflict, nestbox.CodeOf(err), "%v", err)
					require.Equal(t, before, look(t, to), "what is there stays")
					continue
				}
				require.NoError(t, err)
				st, err := os.Lstat(to + "/x")
				require.NoError(t, err)
				require.Equal(t, tc.in.FileInfo().Mode().Type(), st.Mode().Type())
				left, err := os.ReadDir(to)
				require.NoError(t, err)
				require.Len(t, left, 1)
			}
		})
	}
}

// TestBroken: a stream that is cut at any place, or is none, is an error that says
// what was unpacked; what it was about to replace is as it was.
func TestBroken(t *testing.T) {
	t.Parallel()
	packed := archiveOf(t, dir("d"), file("d/a", "aaa"), file("d/b", strings.Repeat("b", 2000)))
	for cut := 1; cut < len(packed)-1024-48; cut += 97 { // 48 bytes pad the content of d/b
		to := t.TempDir()
		require.NoError(t, os.Mkdir(to+"/d", 0o755))
		require.NoError(t, os.WriteFile(to+"/d/b", []byte("old"), 0o644))
		lost := nestbox.Errorf(nestbox.CodeCanceled, "the sender left")
		_, err := Unpack(t.Context(), to, io.MultiReader(bytes.NewReader(packed[:cut]), iotest.ErrReader(lost)), UnpackOptions{})
		require.Equal(t, nestbox.CodeCanceled, nestbox.CodeOf(err))
		require.Contains(t, err.Error(), "unpacked before: ")
		content, err := os.ReadFile(to + "/d/b")
		require.NoError(t, err)
		require.Equal(t, "old", string(content))
		left, err := os.ReadDir(to + "/d")
		require.NoError(t, err)
		require.LessOrEqual(t, len(left), 2, "nothing half is left")
	}
	_, err := Unpack(t.Context(), t.TempDir(), bytes.NewReader(packed[:3000]), UnpackOptions{})
	require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err))
	require.Contains(t, err.Error(), `the archive is cut off (unpacked before: 2 entries; stopped at "d/b")`)
	for _, garbage := range []string{"hello world, this is no archive" + strings.Repeat("x", 1000), "\x1f\x8bno gzip", "\x28\xb5\x2f\xfdno zstd"} {
		_, err := Unpack(t.Context(), t.TempDir(), strings.NewReader(garbage), UnpackOptions{})
		require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err), "%v", err)
	}
	done, err := Unpack(t.Context(), t.TempDir(), strings.NewReader(""), UnpackOptions{})
	require.NoError(t, err)
	require.Zero(t, done.Entries)
	_, err = Unpack(t.Context(), t.TempDir()+"/missing", strings.NewReader(""), UnpackOptions{})
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
	_, err = Unpack(t.Context(), "/etc/passwd", strings.NewReader(""), UnpackOptions{})
	require.Equal(t, nestbox.CodeConflict, nestbox.CodeOf(err))
}

func TestEndsWithContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := Pack(ctx, makeTree(t), PackOptions{}, io.Discard, nil)
	require.Equal(t, nestbox.CodeCanceled, nestbox.CodeOf(err))
	_, err = Unpack(ctx, t.TempDir(), bytes.NewReader(archiveOf(t, file("f", "x"))), UnpackOptions{})
	require.Equal(t, nestbox.CodeCanceled, nestbox.CodeOf(err))
}

// TestErrorOfWriter is returned as it is.
func TestErrorOfWriter(t *testing.T) {
	t.Parallel()
	full := errors.New("full")
	_, err := Pack(t.Context(), makeTree(t), PackOptions{}, failing{full}, nil)
	require.Equal(t, full, err)
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

// TestWhileItChanges packs a tree that somebody changes meanwhile: it is whole all the same.
func TestWhileItChanges(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			p := fmt.Sprintf("%s/%d", root, i%7)
			switch i % 5 {
			case 0:
				_ = os.WriteFile(p, make([]byte, 1+i%300_000), 0o644)
			case 1:
				_ = os.Truncate(p, 10)
			case 2:
				_ = os.RemoveAll(p)
			case 3:
				_ = os.MkdirAll(p+"/sub", 0o755)
			case 4:
				_ = os.Symlink("x", p)
			}
		}
	}()
	for range 100 {
		var b bytes.Buffer
		_, err := Pack(t.Context(), root, PackOptions{Contents: true}, &b, nil)
		require.NoError(t, err)
		_, err = Unpack(t.Context(), t.TempDir(), &b, UnpackOptions{})
		require.NoError(t, err)
	}
	close(stop)
	<-stopped
}

// FuzzUnpack: whatever comes, nothing is made outside.
func FuzzUnpack(f *testing.F) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []tar.Header{symlink("up", ".."), dir("d"), hardLink("h", "d"), {Name: "up/x", Typeflag: tar.TypeFifo}} {
		_ = w.WriteHeader(&h)
	}
	_ = w.Close()
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		outside := t.TempDir()
		require.NoError(t, os.Mkdir(outside+"/to", 0o755))
		_, err := Unpack(t.Context(), outside+"/to", bytes.NewReader(data), UnpackOptions{})
		if err != nil {
			var e *nestbox.Error
			require.ErrorAs(t, err, &e)
		}
		left, err := os.ReadDir(outside)
		require.NoError(t, err)
		require.Len(t, left, 1)
	})
}
