package guesttest

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"sort"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

func newHash() hash.Hash { return sha256.New() }

// testWriteThroughSymlink uses symlinks that every Linux has, as the interface
// makes none: /proc/self/cwd is a directory, /proc/self/fd/… are files.
func testWriteThroughSymlink(t *testing.T, files guest.Files, dir string) {
	entries, err := files.List(t.Context(), "/proc/self/fd", 1)
	require.NoError(t, err, "the directory itself may be behind a symlink")
	require.NotEmpty(t, entries)
	for _, e := range entries {
		require.True(t, strings.HasPrefix(e.Path, "/proc/self/fd/"), "%q is not the path that was asked for", e.Path)
	}
	_, err = files.Write(t.Context(), "/proc/self/cwd", strings.NewReader("x"), guest.WriteOptions{})
	requireCode(t, err, nestbox.CodeConflict)
	_, _, err = files.Read(t.Context(), "/proc/self/cwd", 0)
	requireCode(t, err, nestbox.CodeInvalid)
	put(t, files, "/proc/self/root"+dir+"/f", "through a directory's symlink")
	require.Equal(t, "through a directory's symlink", get(t, files, dir+"/f"))
}

func testList(t *testing.T, files guest.Files, dir string) {
	entries, err := files.List(t.Context(), dir, 1)
	require.NoError(t, err)
	require.Empty(t, entries)
	for _, path := range []string{"b/x/1", "b/x/y/2", "b-c", "a", "c/3", "b.d"} {
		put(t, files, dir+"/"+path, path)
	}
	want := map[int][]string{
		0: {"a", "b", "b-c", "b.d", "c"},
		1: {"a", "b", "b-c", "b.d", "c"},
		2: {"a", "b", "b-c", "b.d", "b/x", "c", "c/3"},
		3: {"a", "b", "b-c", "b.d", "b/x", "b/x/1", "b/x/y", "c", "c/3"},
		4: {"a", "b", "b-c", "b.d", "b/x", "b/x/1", "b/x/y", "b/x/y/2", "c", "c/3"},
	}
	for depth, names := range want {
		entries, err := files.List(t.Context(), dir+"/", depth)
		require.NoError(t, err)
		got := []string{}
		for _, e := range entries {
			got = append(got, strings.TrimPrefix(e.Path, dir+"/"))
			one, err := files.Stat(t.Context(), e.Path)
			require.NoError(t, err)
			require.Equal(t, one, e, "an entry is what Stat says of it")
		}
		require.Equal(t, names, got)
	}
	for path, code := range map[string]nestbox.Code{
		dir + "/none":   nestbox.CodeNotFound,
		dir + "/a":      nestbox.CodeInvalid,
		dir + "/a/none": nestbox.CodeNotFound,
	} {
		_, err := files.List(t.Context(), path, 1)
		requireCode(t, err, code)
	}
	_, err = files.List(t.Context(), dir, nestbox.MaxListDepth+1)
	requireCode(t, err, nestbox.CodeInvalid)
	_, err = files.List(t.Context(), dir, 1<<40)
	requireCode(t, err, nestbox.CodeInvalid)
	entries, err = files.List(t.Context(), "/", 1)
	require.NoError(t, err)
	require.Equal(t, "/", entries[0].Path[:1])
	require.NotEqual(t, "//", entries[0].Path[:2])
}

// testListMany lists more than fits one message or one read of a directory.
func testListMany(t *testing.T, files guest.Files, dir string) {
	const n, writers = 1100, 8
	done := make(chan error, writers)
	for w := range writers {
		go func() {
			var err error
			for i := w; i < n && err == nil; i += writers {
				_, err = files.Write(t.Context(), fmt.Sprintf("%s/%04d", dir, i), strings.NewReader(""), guest.WriteOptions{})
			}
			done <- err
		}()
	}
	for range writers {
		require.NoError(t, <-done)
	}
	got := paths(t, files, dir)
	require.Len(t, got, n)
	require.True(t, sort.StringsAreSorted(got))
}
