package envd

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/filewatch"
)

// copyBuffer is large because every system call is expensive inside a sandbox.
const copyBuffer = 256 << 10

// maxSymlinks is how many symlinks in a row are followed, as in the kernel.
const maxSymlinks = 40

// Write implements guest.Files. A symlink at path is written through. The new
// file has another inode than the old one.
func (f *files) Write(ctx context.Context, path string, r io.Reader, opts guest.WriteOptions) (nestbox.FileInfo, error) {
	path, err := filePath(ctx, path)
	if err != nil {
		return nestbox.FileInfo{}, err
	}
	if err := checkWrite(opts); err != nil {
		return nestbox.FileInfo{}, err
	}
	target, st, err := resolve(path)
	if err != nil {
		return nestbox.FileInfo{}, writeError(path, err)
	}
	// Also here, so that nobody sends much in vain.
	attr, err := f.attributes(target, st, opts)
	if err != nil {
		return nestbox.FileInfo{}, writeError(path, err)
	}
	var made []string
	if attr.isNew {
		made, err = makeDirs(filepath.Dir(target), attr.newOwner)
	}
	switch {
	case err != nil:
	case opts.Append:
		st, err = appendTo(ctx, target, r, attr)
	default:
		st, err = f.replace(ctx, target, r, attr, opts)
	}
	if err != nil {
		removeDirs(made)
		return nestbox.FileInfo{}, writeError(path, err)
	}
	return fileInfo(path, st, f.accounts.owners()), nil
}

// resolve follows path while it is a symlink, and returns where a file is to
// be made or replaced, and what is there.
func resolve(path string) (string, fs.FileInfo, error) {
	for range maxSymlinks {
		st, err := lstat(path)
		if err != nil || st == nil || st.Mode()&fs.ModeSymlink == 0 {
			return path, st, err
		}
		target, err := os.Readlink(path)
		if err != nil {
			return "", nil, err
		}
		if !filepath.IsAbs(target) {
			target = filepath.Dir(path) + "/" + target
		}
		// Only the file system knows what ".." after a symlink is.
		dir, name := filepath.Split(strings.TrimRight(target, "/"))
		if real, err := filepath.EvalSymlinks(dir); err == nil {
			dir = real
		}
		path = filepath.Join(dir, name)
	}
	return "", nil, syscall.ELOOP
}

// lstat returns nil if nothing is there.
func lstat(path string) (fs.FileInfo, error) {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return st, err
}

// owner is who is to own what is made; nil = the user that envd runs as.
type owner struct{ uid, gid int }

// checkWrite refuses options that cannot be meant.
func checkWrite(opts guest.WriteOptions) error {
	switch {
	case opts.Append && (opts.IfAbsent || len(opts.IfVersion) > 0):
		return nestbox.Errorf(nestbox.CodeInvalid, "appending takes no conditions")
	case opts.IfAbsent && len(opts.IfVersion) > 0:
		return nestbox.Errorf(nestbox.CodeInvalid, "a file cannot be absent and of a version")
	case len(opts.IfVersion) > guest.MaxVersions:
		return nestbox.Errorf(nestbox.CodeInvalid, "more than %d versions", guest.MaxVersions)
	}
	return nil
}

// attributes are those of the file to come.
type attributes struct {
	owner      *owner
	newOwner   *owner // of what is made new beside it
	mode       uint32
	modifiedAt time.Time // zero = now
	isNew      bool
}

// attributes returns what opts ask for, and else what the file has that is there; st
// nil = none. It fails if the conditions do not hold.
func (f *files) attributes(path string, st fs.FileInfo, opts guest.WriteOptions) (attributes, error) {
	attr := attributes{mode: opts.Mode & 0o7777, modifiedAt: opts.ModifiedAt}
	if opts.User != "" {
		user, err := f.accounts.find(opts.User)
		if err != nil {
			return attributes{}, err
		}
		attr.newOwner = &owner{int(user.uid), int(user.gid)}
	}
	attr.owner = attr.newOwner
	switch {
	case st == nil:
		if len(opts.IfVersion) > 0 {
			return attributes{}, nestbox.Errorf(nestbox.CodePrecondition, "%s is not there", path)
		}
		attr.isNew = true
		if attr.mode == 0 {
			attr.mode = 0o644
		}
		return attr, nil
	case opts.IfAbsent:
		return attributes{}, nestbox.Errorf(nestbox.CodePrecondition, "%s is there already", path)
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok || !st.Mode().IsRegular() {
		return attributes{}, nestbox.Errorf(nestbox.CodeConflict, "%s exists and is not a regular file", path)
	}
	if !isVersion(st, opts.IfVersion) {
		return attributes{}, nestbox.Errorf(nestbox.CodePrecondition, "%s has changed", path)
	}
	if attr.owner == nil {
		attr.owner = &owner{int(sys.Uid), int(sys.Gid)}
	}
	if attr.mode == 0 {
		attr.mode = sys.Mode & 0o7777
	}
	return attr, nil
}

// isVersion reports whether a file is of one of the versions; of none, any is.
func isVersion(st fs.FileInfo, versions []string) bool {
	version := nestbox.FileInfo{Size: st.Size(), ModifiedAt: st.ModTime()}.Version()
	return len(versions) == 0 || slices.Contains(versions, version) || slices.Contains(versions, "*")
}

// appendTo adds all of r to the end of the file at path, which is made if it is
// missing.
func appendTo(ctx context.Context, path string, r io.Reader, attr attributes) (fs.FileInfo, error) {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	before, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !before.Mode().IsRegular() { // it has taken the place of the one that was
		return nil, nestbox.Errorf(nestbox.CodeConflict, "%s exists and is not a regular file", path)
	}
	w := &contentWriter{ctx: ctx, file: file}
	err = copyAll(w, r)
	if err == nil {
		err = attr.set(file)
	}
	if err == nil {
		return file.Stat()
	}
	if st, statErr := file.Stat(); statErr == nil && st.Size() == before.Size()+w.written {
		_ = file.Truncate(before.Size()) // best effort: the error is told
		if attr.isNew && before.Size() == 0 {
			_ = os.Remove(path)
		}
	}
	return nil, err
}

// replace puts all of r into a new file and that in the place of path.
func (f *files) replace(ctx context.Context, path string, r io.Reader, attr attributes, opts guest.WriteOptions) (st fs.FileInfo, err error) {
	prefix := filewatch.TempWrite
	if attr.isNew {
		prefix = filewatch.TempCreate
	}
	temp, err := os.CreateTemp(filepath.Dir(path), prefix+"*")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(temp.Name())
		}
		_ = temp.Close()
	}()
	if err := copyAll(&contentWriter{ctx: ctx, file: temp}, r); err != nil {
		return nil, err
	}
	if err := attr.set(temp); err != nil {
		return nil, err
	}
	if st, err = temp.Stat(); err != nil {
		return nil, err
	}
	return st, f.commitAs(path, temp, opts)
}

// commitAs puts a file that is complete in the place of path, if the conditions
// still hold.
func (f *files) commitAs(path string, temp *os.File, opts guest.WriteOptions) error {
	f.commit.Lock()
	defer f.commit.Unlock()
	if len(opts.IfVersion) > 0 {
		st, err := lstat(path)
		if err == nil {
			_, err = f.attributes(path, st, opts)
		}
		if err != nil {
			return err
		}
	}
	if opts.IfAbsent {
		err := unix.Renameat2(unix.AT_FDCWD, temp.Name(), unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
		if errors.Is(err, syscall.EEXIST) {
			return nestbox.Errorf(nestbox.CodePrecondition, "%s is there already", path)
		}
		return err
	}
	// By itself, not os.Rename, which looks first at what is there.
	err := unix.Rename(temp.Name(), path)
	if errors.Is(err, syscall.EBUSY) {
		if err = overwrite(path, temp); err == nil {
			err = os.Remove(temp.Name())
		}
	}
	return err
}

// set gives an open file its attributes.
func (a attributes) set(file *os.File) error {
	if a.owner != nil && !owned(file, *a.owner) {
		if err := file.Chown(a.owner.uid, a.owner.gid); err != nil {
			return err
		}
	}
	// After chown, which takes setuid away. By number, as os.FileMode has its
	// own bits for setuid, setgid and sticky.
	if err := syscall.Fchmod(int(file.Fd()), a.mode); err != nil {
		return err
	}
	if a.modifiedAt.IsZero() {
		return nil
	}
	at := unix.NsecToTimespec(a.modifiedAt.UnixNano())
	return unix.UtimesNanoAt(unix.AT_FDCWD, file.Name(), []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW)
}

func owned(file *os.File, by owner) bool {
	st, err := file.Stat()
	if err != nil {
		return false
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	return ok && int(sys.Uid) == by.uid && int(sys.Gid) == by.gid
}

// overwrite copies temp into the file at path. That is all that can be done
// with a mount point, such as /etc/resolv.conf often is; readers may see a
// part.
func overwrite(path string, temp *os.File) error {
	if _, err := temp.Seek(0, io.SeekStart); err != nil {
		return err
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	_, err = io.Copy(file, temp)
	return errors.Join(err, file.Close())
}

// copyAll copies r to a file until r ends or w's context does.
func copyAll(w *contentWriter, r io.Reader) error {
	var buf []byte
	if _, ok := r.(io.WriterTo); !ok {
		buf = make([]byte, copyBuffer)
	}
	_, err := io.CopyBuffer(w, r, buf)
	switch {
	case err == nil:
		return nil
	case w.ctx.Err() != nil:
		return guest.ContextError(w.ctx)
	case w.err != nil:
		return w.err
	}
	return guest.ContentError(err)
}

// contentWriter writes to a file while its context lasts. It has no ReadFrom, as
// files do, whose buffer is small.
type contentWriter struct {
	ctx     context.Context
	file    *os.File
	written int64
	err     error // of the file, as opposed to the content's
}

// Write implements io.Writer.
func (w *contentWriter) Write(p []byte) (int, error) {
	if w.ctx.Err() != nil {
		return 0, w.ctx.Err()
	}
	n, err := w.file.Write(p)
	w.written += int64(n)
	w.err = err
	return n, err
}

// makeDirs makes a directory and its missing parents, and returns what it made,
// outermost first, also with an error. by owns them; nil = the user that envd runs as.
func makeDirs(path string, by *owner) ([]string, error) {
	var missing []string
	for {
		st, err := os.Stat(path)
		if err == nil && !st.IsDir() {
			return nil, syscall.ENOTDIR
		}
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		missing = append(missing, path)
		path = filepath.Dir(path)
	}
	slices.Reverse(missing)
	for i, dir := range missing {
		err := os.Mkdir(dir, 0o755)
		if errors.Is(err, fs.ErrExist) { // somebody else was faster, or it is a dangling symlink
			if st, statErr := os.Stat(dir); statErr == nil && st.IsDir() {
				continue
			}
		}
		if err == nil && by != nil {
			err = os.Lchown(dir, by.uid, by.gid)
		}
		if err != nil {
			return missing[:i], err
		}
	}
	return missing, nil
}

// removeDirs undoes makeDirs, except for what is used meanwhile.
func removeDirs(made []string) {
	for _, dir := range slices.Backward(made) {
		_ = syscall.Rmdir(dir)
	}
}
