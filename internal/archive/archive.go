// Package archive packs trees of files into tar streams and unpacks such streams,
// keeping modes, times, links, holes and names as they are, in memory that does not
// grow with the tree.
//
// It knows nothing of capsules and may import the root package and internal/pseudofs only. Pack writes
// the POSIX format (pax), holes as GNU tar's sparse format 1.0 has them. Unpack
// reads what archive/tar reads, also compressed by gzip or zstd.
package archive

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"

	"github.com/nestbox/nestbox"
)

// Bounds of what is told of one archive, beside its end: how many, and bytes of each.
const (
	maxWarnings = 100
	maxWarning  = 500
)

// warnings are what went otherwise than was asked for.
type warnings []string

func (w *warnings) add(format string, args ...any) {
	switch {
	case len(*w) < maxWarnings:
		text := fmt.Sprintf(format, args...)
		*w = append(*w, strings.ToValidUTF8(text[:min(len(text), maxWarning)], "\uFFFD"))
	case len(*w) == maxWarnings:
		*w = append(*w, "and more")
	}
}

// vanished reports whether err says that a file is no longer there, or no longer
// of its kind.
func vanished(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP)
}

// pathError gives an operating system's error its code. An error that has one
// stays as it is.
func pathError(path string, err error) error {
	if _, ours := errors.AsType[*nestbox.Error](err); ours {
		return err
	}
	code := nestbox.CodeGuest
	errno, _ := errors.AsType[syscall.Errno](err)
	switch errno {
	case syscall.ENOENT:
		return nestbox.Errorf(nestbox.CodeNotFound, "no such file or directory: %s", path)
	case syscall.EACCES, syscall.EPERM, syscall.EROFS:
		code = nestbox.CodeDenied
	case syscall.EEXIST, syscall.EISDIR, syscall.ENOTDIR, syscall.ENOTEMPTY, syscall.ETXTBSY:
		code = nestbox.CodeConflict
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM:
		code = nestbox.CodeExhausted
	case syscall.EFBIG:
		code = nestbox.CodeTooLarge
	case syscall.EXDEV: // what RESOLVE_BENEATH answers
		return nestbox.Errorf(nestbox.CodeInvalid, "%s leads out of the directory", path)
	case syscall.ENAMETOOLONG, syscall.ELOOP, syscall.EINVAL, syscall.EBUSY:
		code = nestbox.CodeInvalid
	}
	return nestbox.Errorf(code, "%s: %w", path, err)
}

// contextError is the end of ctx as an error of ours.
func contextError(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return nestbox.Errorf(nestbox.CodeTimeout, "time ran out: %w", ctx.Err())
	}
	return nestbox.Errorf(nestbox.CodeCanceled, "canceled: %w", ctx.Err())
}
