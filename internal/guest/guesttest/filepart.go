package guesttest

import (
	"errors"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

func testReadFrom(t *testing.T, files guest.Files, dir string) {
	content := strings.Repeat("0123456789", 100_000)
	put(t, files, dir+"/f", content)
	for _, from := range []int64{0, 1, 999_999, 1_000_000, 1 << 40} {
		r, info, err := files.Read(t.Context(), dir+"/f", from)
		require.NoError(t, err)
		require.EqualValues(t, len(content), info.Size)
		got, err := io.ReadAll(r)
		require.NoError(t, err)
		require.Equal(t, content[min(from, info.Size):], string(got))
		require.NoError(t, r.Close())
	}
	_, _, err := files.Read(t.Context(), dir+"/f", -1)
	requireCode(t, err, nestbox.CodeInvalid)
}

func testAppend(t *testing.T, files guest.Files, dir string) {
	add := func(r io.Reader, opts guest.WriteOptions) (nestbox.FileInfo, error) {
		opts.Append = true
		return files.Write(t.Context(), dir+"/a/f", r, opts)
	}
	_, err := add(iotest.ErrReader(errors.New("cut")), guest.WriteOptions{})
	require.Error(t, err)
	require.Eventually(t, func() bool { return len(paths(t, files, dir)) == 0 }, time.Minute, 10*time.Millisecond)
	info, err := add(strings.NewReader("one"), guest.WriteOptions{Mode: 0o640})
	require.NoError(t, err)
	require.EqualValues(t, 0o640, info.Mode)
	_, err = add(strings.NewReader(" two"), guest.WriteOptions{})
	require.NoError(t, err)
	_, err = add(strings.NewReader(""), guest.WriteOptions{})
	require.NoError(t, err)
	_, err = add(io.MultiReader(strings.NewReader(strings.Repeat("x", 1<<20)), iotest.ErrReader(errors.New("cut"))), guest.WriteOptions{})
	require.Error(t, err)
	require.Eventually(t, func() bool { // the guest may hear of it later than we do
		return get(t, files, dir+"/a/f") == "one two"
	}, time.Minute, 10*time.Millisecond, "what broke off has added nothing")
	info, err = files.Stat(t.Context(), dir+"/a/f")
	require.NoError(t, err)
	require.EqualValues(t, 0o640, info.Mode)
	_, err = files.Write(t.Context(), dir, strings.NewReader("x"), guest.WriteOptions{Append: true})
	requireCode(t, err, nestbox.CodeConflict)
	_, err = add(strings.NewReader("x"), guest.WriteOptions{IfAbsent: true})
	requireCode(t, err, nestbox.CodeInvalid)
}

func testWriteConditions(t *testing.T, files guest.Files, dir string) {
	path := dir + "/a/f"
	write := func(content string, opts guest.WriteOptions) (nestbox.FileInfo, error) {
		return files.Write(t.Context(), path, strings.NewReader(content), opts)
	}
	for _, version := range []string{"*", "0-0"} {
		_, err := write("x", guest.WriteOptions{IfVersion: []string{version}})
		requireCode(t, err, nestbox.CodePrecondition)
	}
	requireOnly(t, files, dir)
	first, err := write("one", guest.WriteOptions{IfAbsent: true})
	require.NoError(t, err)
	_, err = write("two", guest.WriteOptions{IfAbsent: true})
	requireCode(t, err, nestbox.CodePrecondition)
	_, err = files.Write(t.Context(), dir+"/a", strings.NewReader("x"), guest.WriteOptions{IfAbsent: true})
	requireCode(t, err, nestbox.CodePrecondition)
	stat, err := files.Stat(t.Context(), path)
	require.NoError(t, err)
	require.Equal(t, first.Version(), stat.Version())
	second, err := write("three", guest.WriteOptions{IfVersion: []string{"0-0", first.Version()}})
	require.NoError(t, err)
	_, err = write("four", guest.WriteOptions{IfVersion: []string{first.Version()}})
	requireCode(t, err, nestbox.CodePrecondition)
	_, err = write("five", guest.WriteOptions{IfVersion: []string{second.Version()}, IfAbsent: true})
	requireCode(t, err, nestbox.CodeInvalid)
	_, err = write("six", guest.WriteOptions{IfVersion: make([]string, guest.MaxVersions+1)})
	requireCode(t, err, nestbox.CodeInvalid)
	require.Equal(t, "three", get(t, files, path))
	_, err = write("seven", guest.WriteOptions{IfVersion: []string{"*"}})
	require.NoError(t, err)
	requireOnly(t, files, dir+"/a", "f")
}

// testWriteRace has many writers want to be the first, and then to follow what
// they have read: none may undo what another has done.
func testWriteRace(t *testing.T, files guest.Files, dir string) {
	const writers = 8
	path := dir + "/f"
	var firsts atomic.Int64
	var group sync.WaitGroup
	for range writers {
		group.Go(func() {
			_, err := files.Write(t.Context(), path, strings.NewReader(""), guest.WriteOptions{IfAbsent: true})
			if err == nil {
				firsts.Add(1)
			} else if nestbox.CodeOf(err) != nestbox.CodePrecondition {
				t.Error(err)
			}
		})
	}
	group.Wait()
	require.EqualValues(t, 1, firsts.Load())
	for range writers {
		group.Go(func() {
			for { // adds one byte
				r, info, err := files.Read(t.Context(), path, 0)
				if err != nil {
					t.Error(err)
					return
				}
				content, err := io.ReadAll(r)
				_ = r.Close()
				if err == nil {
					_, err = files.Write(t.Context(), path, strings.NewReader(string(content)+"x"), guest.WriteOptions{IfVersion: []string{info.Version()}})
				}
				if err == nil {
					return
				}
				if nestbox.CodeOf(err) != nestbox.CodePrecondition {
					t.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
	require.Equal(t, strings.Repeat("x", writers), get(t, files, path))
}
