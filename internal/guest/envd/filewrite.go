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
	target, err := resolve(path)
	if err != nil {
		return nestbox.FileInfo{}, writeError(path, err)
	}
	attr, err := f.attributes(target, opts)
	if err != nil {
		return nestbox.FileInfo{}, writeError(path, err)
	}
	made, err := makeDirs(filepath.Dir(target), attr.owner)
	if err == nil {
		err = replace(ctx, target, r, attr)
	}
	if err != nil {
		removeDirs(made)
		return nestbox.FileInfo{}, writeError(path, err)
	}
	return f.Stat(ctx, path)
}

// resolve follows path while it is a symlink, and returns where a file is to
// be made or replaced.
func resolve(path string) (string, error) {
	for range maxSymlinks {
		target, err := os.Readlink(path)
		if errors.Is(err, syscall.EINVAL) || errors.Is(err, fs.ErrNotExist) { // no symlink, or nothing yet
			return path, nil
		}
		if err != nil {
			return "", err
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
	return "", syscall.ELOOP
}

// owner is who is to own what is made; nil = the user that envd runs as.
type owner struct{ uid, gid int }

// attributes are those of the file to come.
type attributes struct {
	owner *owner
	mode  uint32
	isNew bool
}

// attributes returns those of an existing file, or what opts ask for.
func (f *files) attributes(path string, opts guest.WriteOptions) (attributes, error) {
	st, err := os.Lstat(path)
	if err == nil {
		sys, ok := st.Sys().(*syscall.Stat_t)
		if !ok || !st.Mode().IsRegular() {
			return attributes{}, nestbox.Errorf(nestbox.CodeConflict, "%s exists and is not a regular file", path)
		}
		return attributes{owner: &owner{int(sys.Uid), int(sys.Gid)}, mode: sys.Mode & 0o7777}, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return attributes{}, err
	}
	attr := attributes{mode: opts.Mode & 0o7777, isNew: true}
	if attr.mode == 0 {
		attr.mode = 0o644
	}
	if opts.User == "" {
		return attr, nil
	}
	user, err := f.accounts.find(opts.User)
	attr.owner = &owner{int(user.uid), int(user.gid)}
	return attr, err
}

// replace puts all of r into a new file and that in the place of path.
func replace(ctx context.Context, path string, r io.Reader, attr attributes) error {
	prefix := filewatch.TempWrite
	if attr.isNew {
		prefix = filewatch.TempCreate
	}
	temp, err := os.CreateTemp(filepath.Dir(path), prefix+"*")
	if err != nil {
		return err
	}
	defer temp.Close()
	defer os.Remove(temp.Name()) // fails, as it should, once it is renamed
	if err := copyAll(ctx, temp, r); err != nil {
		return err
	}
	if attr.owner != nil && !owned(temp, *attr.owner) {
		if err := temp.Chown(attr.owner.uid, attr.owner.gid); err != nil {
			return err
		}
	}
	// After chown, which takes setuid away. By number, as os.FileMode has its
	// own bits for setuid, setgid and sticky.
	if err := syscall.Fchmod(int(temp.Fd()), attr.mode); err != nil {
		return err
	}
	err = os.Rename(temp.Name(), path)
	if errors.Is(err, syscall.EBUSY) {
		return overwrite(path, temp)
	}
	return err
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

// copyAll copies r to file until r ends or ctx does.
func copyAll(ctx context.Context, file *os.File, r io.Reader) error {
	// Hides file's ReadFrom, whose buffer is small.
	w := &contentWriter{ctx: ctx, file: file}
	_, err := io.CopyBuffer(w, r, make([]byte, copyBuffer))
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return guest.ContextError(ctx)
	case w.err != nil:
		return w.err
	}
	return guest.ContentError(err)
}

// contentWriter writes to a file while its context lasts.
type contentWriter struct {
	ctx  context.Context
	file *os.File
	err  error // of the file, as opposed to the content's
}

// Write implements io.Writer.
func (w *contentWriter) Write(p []byte) (int, error) {
	if w.ctx.Err() != nil {
		return 0, w.ctx.Err()
	}
	n, err := w.file.Write(p)
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
