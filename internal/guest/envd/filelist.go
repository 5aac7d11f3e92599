package envd

import (
	"cmp"
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// listBatch is how many names are read from a directory at once.
const listBatch = 1024

// List implements guest.Files. A symlink at path itself is followed, so that
// /bin can be listed; those below are not. What vanishes meanwhile, or must
// not be read, is left out.
func (f *files) List(ctx context.Context, path string, depth int) ([]nestbox.FileInfo, error) {
	path, err := cleanPath(ctx, path)
	if err != nil {
		return nil, err
	}
	if depth > nestbox.MaxListDepth {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "depth must be 1 to %d", nestbox.MaxListDepth)
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, fileError(path, err)
	}
	if !st.IsDir() {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "%s is not a directory", path)
	}
	l := listing{names: f.accounts.owners(), entries: []nestbox.FileInfo{}}
	if err := l.walk(ctx, path, max(depth, 1)); err != nil {
		return nil, fileError(path, err)
	}
	slices.SortFunc(l.entries, func(a, b nestbox.FileInfo) int { return cmp.Compare(a.Path, b.Path) })
	return l.entries, nil
}

// listing gathers entries.
type listing struct {
	names   ownerNames
	entries []nestbox.FileInfo
}

// walk adds the entries of dir, and of what is below it down to depth levels.
// Of a directory that cannot be opened it returns the error.
func (l *listing) walk(ctx context.Context, path string, depth int) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	for {
		if ctx.Err() != nil {
			return guest.ContextError(ctx)
		}
		batch, err := dir.ReadDir(listBatch)
		for _, entry := range batch {
			if err := l.add(ctx, path, entry, depth); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (l *listing) add(ctx context.Context, dir string, entry os.DirEntry, depth int) error {
	st, err := entry.Info()
	if err != nil {
		return nil // vanished
	}
	if len(l.entries) == nestbox.MaxListEntries {
		return nestbox.Errorf(nestbox.CodeTooLarge, "more than %d entries: ask for less depth, or for a directory below", nestbox.MaxListEntries)
	}
	path := strings.TrimSuffix(dir, "/") + "/" + entry.Name()
	l.entries = append(l.entries, fileInfo(path, st, l.names))
	if depth == 1 || !st.IsDir() {
		return nil
	}
	err = l.walk(ctx, path, depth-1)
	if _, ours := errors.AsType[*nestbox.Error](err); ours {
		return err
	}
	return nil // it vanished, or may not be read: its own entry is there
}
