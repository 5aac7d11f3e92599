package guesttest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// archiveOf makes an archive: of directories, whose names end with a slash, and files.
func archiveOf(t *testing.T, names ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i, name := range names {
		h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o640, Size: int64(len(name)), ModTime: time.Unix(1_600_000_000+int64(i), 0), Uid: 7, Gid: 8}
		if strings.HasSuffix(name, "/") {
			h.Typeflag, h.Size, h.Mode = tar.TypeDir, 0, 0o700
		}
		require.NoError(t, w.WriteHeader(h))
		if h.Size > 0 {
			_, err := io.WriteString(w, name)
			require.NoError(t, err)
		}
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

func testArchive(t *testing.T, files guest.Files, dir string) {
	ctx := t.Context()
	names := []string{"d/", "d/a", "d/sub/", "d/sub/b"}
	done, err := files.Unpack(ctx, dir+"/new/place", bytes.NewReader(archiveOf(t, names...)), guest.UnpackOptions{})
	require.NoError(t, err)
	require.Equal(t, nestbox.Unpacked{Entries: 4, Bytes: 10}, done)
	info, err := files.Stat(ctx, dir+"/new/place/d/sub/b")
	require.NoError(t, err)
	require.Equal(t, uint32(0o640), info.Mode)
	require.Equal(t, time.Unix(1_600_000_003, 0).UTC(), info.ModifiedAt)
	require.Equal(t, "root", info.Owner)
	info, err = files.Stat(ctx, dir+"/new/place/d")
	require.NoError(t, err)
	require.Equal(t, uint32(0o700), info.Mode)
	require.Equal(t, time.Unix(1_600_000_000, 0).UTC(), info.ModifiedAt)
	for _, c := range []nestbox.Compression{"", nestbox.CompressionGzip, nestbox.CompressionZstd} {
		var packed bytes.Buffer
		begun := 0
		warnings, err := files.Pack(ctx, dir+"/new/place/d", guest.PackOptions{Compression: c}, &packed, func() error { begun++; return nil })
		require.NoError(t, err)
		require.Empty(t, warnings)
		require.Equal(t, 1, begun)
		to := dir + "/again" + string(c)
		done, err := files.Unpack(ctx, to, &packed, guest.UnpackOptions{User: "1"})
		require.NoError(t, err)
		require.Equal(t, int64(4), done.Entries)
		require.Equal(t, "d/sub/b", get(t, files, to+"/d/sub/b"))
		info, err := files.Stat(ctx, to+"/d/sub/b")
		require.NoError(t, err)
		require.NotEqual(t, "root", info.Owner)
	}
	_, err = files.Unpack(ctx, dir, bytes.NewReader(archiveOf(t, names...)), guest.UnpackOptions{KeepOwners: true})
	require.NoError(t, err)
	info, err = files.Stat(ctx, dir+"/d/a")
	require.NoError(t, err)
	require.NotEqual(t, "root", info.Owner)
}

func testArchiveContents(t *testing.T, files guest.Files, dir string) {
	put(t, files, dir+"/d/f", "x")
	for _, c := range []struct {
		contents bool
		want     []string
	}{{true, []string{"./", "f"}}, {false, []string{"d/", "d/f"}}} {
		var packed bytes.Buffer
		_, err := files.Pack(t.Context(), dir+"/d", guest.PackOptions{Contents: c.contents}, &packed, nil)
		require.NoError(t, err)
		var names []string
		r := tar.NewReader(&packed)
		h, err := r.Next()
		for ; err == nil; h, err = r.Next() {
			names = append(names, h.Name)
		}
		require.Equal(t, io.EOF, err)
		require.Equal(t, c.want, names)
	}
}

func testArchiveFails(t *testing.T, files guest.Files, dir string) {
	ctx := t.Context()
	put(t, files, dir+"/f", "x")
	for path, code := range map[string]nestbox.Code{dir + "/missing": nestbox.CodeNotFound, "relative": nestbox.CodeInvalid} {
		_, err := files.Pack(ctx, path, guest.PackOptions{}, io.Discard, func() error { return errors.New("begun") })
		requireCode(t, err, code)
	}
	_, err := files.Pack(ctx, dir+"/f", guest.PackOptions{Contents: true}, io.Discard, nil)
	requireCode(t, err, nestbox.CodeInvalid)
	_, err = files.Pack(ctx, dir+"/f", guest.PackOptions{Compression: "rot13"}, io.Discard, nil)
	requireCode(t, err, nestbox.CodeInvalid)
	full := errors.New("full")
	_, err = files.Pack(ctx, dir, guest.PackOptions{}, failingWriter{full}, nil)
	require.Equal(t, full, err)
	_, err = files.Pack(ctx, dir, guest.PackOptions{}, io.Discard, func() error { return full })
	require.Equal(t, full, err)

	packed := archiveOf(t, "a", "b", "c")
	_, err = files.Unpack(ctx, dir+"/f", bytes.NewReader(packed), guest.UnpackOptions{})
	requireCode(t, err, nestbox.CodeConflict)
	_, err = files.Unpack(ctx, dir+"/u", bytes.NewReader(packed), guest.UnpackOptions{User: "nobody-of-that-name"})
	requireCode(t, err, nestbox.CodeInvalid)
	_, err = files.Unpack(ctx, dir+"/u", strings.NewReader(strings.Repeat("no archive", 1000)), guest.UnpackOptions{})
	requireCode(t, err, nestbox.CodeInvalid)
	_, err = files.Stat(ctx, dir+"/u")
	requireCode(t, err, nestbox.CodeNotFound)
	_, err = files.Unpack(ctx, dir+"/out", bytes.NewReader(archiveOf(t, "a", "../b")), guest.UnpackOptions{})
	requireCode(t, err, nestbox.CodeInvalid)
	require.Contains(t, err.Error(), "leads out of the directory")
	require.Contains(t, err.Error(), "unpacked before: 1 entries")
	_, err = files.Unpack(ctx, dir+"/cut", bytes.NewReader(packed[:1500]), guest.UnpackOptions{})
	requireCode(t, err, nestbox.CodeInvalid)
	_, err = files.Unpack(ctx, dir+"/broken", io.MultiReader(bytes.NewReader(packed[:1100]), iotest.ErrReader(errors.New("lost"))), guest.UnpackOptions{})
	requireCode(t, err, nestbox.CodeCanceled)
	_, err = files.Stat(ctx, dir+"/broken/b")
	requireCode(t, err, nestbox.CodeNotFound)
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	_, err = files.Unpack(canceled, dir+"/c", bytes.NewReader(packed), guest.UnpackOptions{})
	requireCode(t, err, nestbox.CodeCanceled)
	_, err = files.Pack(canceled, dir, guest.PackOptions{}, io.Discard, nil)
	requireCode(t, err, nestbox.CodeCanceled)
}

type failingWriter struct{ err error }

func (f failingWriter) Write([]byte) (int, error) { return 0, f.err }
