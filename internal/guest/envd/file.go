package envd

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/archive"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/filewatch"
	"github.com/nestbox/nestbox/internal/pseudofs"
)

// files are the files of the machine that envd runs on, with envd's rights. Its
// methods take and return paths as text, and have them as bytes within.
type files struct {
	accounts *accounts
	watcher  *filewatch.Watcher
	commit   sync.Mutex // held while a file that was written takes the place of the old one
}

var _ guest.Files = (*files)(nil)

func newFiles() *files {
	return &files{accounts: newAccounts("/etc"), watcher: filewatch.New(filewatch.Limits{})}
}

// Read implements guest.Files.
func (f *files) Read(ctx context.Context, path string, from int64) (io.ReadCloser, nestbox.FileInfo, error) {
	path, err := filePath(ctx, path)
	if err == nil && from < 0 {
		err = nestbox.Errorf(nestbox.CodeInvalid, "%d is no offset", from)
	}
	if err != nil {
		return nil, nestbox.FileInfo{}, err
	}
	// Devices are not even opened: that alone can have effects.
	st, err := os.Stat(path)
	if err != nil {
		return nil, nestbox.FileInfo{}, fileError(path, err)
	}
	if !st.Mode().IsRegular() {
		return nil, nestbox.FileInfo{}, notRegular(path, st)
	}
	// Should a FIFO have taken its place, O_NONBLOCK opens it without a writer.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, nestbox.FileInfo{}, fileError(path, err)
	}
	st, err = file.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = notRegular(path, st)
	}
	if err == nil && from > 0 {
		_, err = file.Seek(from, io.SeekStart)
	}
	if err != nil {
		_ = file.Close()
		return nil, nestbox.FileInfo{}, fileError(path, err)
	}
	return &openFile{ctx: ctx, path: path, file: file}, fileInfo(path, st, f.accounts.owners()), nil
}

func notRegular(path string, st fs.FileInfo) error {
	if st.IsDir() {
		return nestbox.Errorf(nestbox.CodeInvalid, "%s is a directory", path)
	}
	return nestbox.Errorf(nestbox.CodeInvalid, "%s is not a regular file", path)
}

// openFile is the content of a file.
type openFile struct {
	ctx  context.Context
	path string
	file *os.File
}

// Read implements io.Reader.
func (o *openFile) Read(p []byte) (int, error) {
	if o.ctx.Err() != nil {
		return 0, guest.ContextError(o.ctx)
	}
	n, err := o.file.Read(p)
	if err != nil && err != io.EOF {
		err = fileError(o.path, err)
	}
	return n, err
}

// Close implements io.Closer.
func (o *openFile) Close() error { return o.file.Close() }

// Stat implements guest.Files.
func (f *files) Stat(ctx context.Context, path string) (nestbox.FileInfo, error) {
	path, err := cleanPath(ctx, path)
	if err != nil {
		return nestbox.FileInfo{}, err
	}
	return f.stat(path)
}

// stat describes what is at a path that is clean.
func (f *files) stat(path string) (nestbox.FileInfo, error) {
	st, err := os.Lstat(path)
	if err != nil {
		return nestbox.FileInfo{}, fileError(path, err)
	}
	return fileInfo(path, st, f.accounts.owners()), nil
}

// Mkdir implements guest.Files. What is made has mode 0755 and envd's owner.
func (f *files) Mkdir(ctx context.Context, path string) (nestbox.FileInfo, error) {
	path, err := cleanPath(ctx, path)
	if err != nil {
		return nestbox.FileInfo{}, err
	}
	if _, err := os.Lstat(path); err == nil {
		return nestbox.FileInfo{}, nestbox.Errorf(nestbox.CodeConflict, "%s exists already", path)
	}
	made, err := makeDirs(filepath.Dir(path), nil)
	if err == nil {
		err = os.Mkdir(path, 0o755)
	}
	if err != nil {
		removeDirs(made)
		return nestbox.FileInfo{}, writeError(path, err)
	}
	return f.stat(path)
}

// Remove implements guest.Files.
func (f *files) Remove(ctx context.Context, path string) error {
	path, err := cleanPath(ctx, path)
	if err != nil {
		return err
	}
	if path == "/" {
		return nestbox.Errorf(nestbox.CodeInvalid, "/ cannot be removed")
	}
	if kernelsOwn(path) {
		return nestbox.Errorf(nestbox.CodeDenied, "%s cannot be removed: it belongs to the kernel", path)
	}
	err = os.RemoveAll(path)
	switch {
	case err == nil, errors.Is(err, syscall.ENOTDIR): // below a file there is nothing
		return nil
	case errors.Is(err, syscall.EBUSY):
		return nestbox.Errorf(nestbox.CodeInvalid, "%s cannot be removed: it is or holds a mount point", path)
	}
	return fileError(path, err)
}

// Watch implements guest.Files.
func (f *files) Watch(ctx context.Context, path string, recursive bool) (guest.FileWatch, error) {
	path, err := cleanPath(ctx, path)
	if err != nil {
		return nil, err
	}
	w, err := f.watcher.Watch(path, recursive)
	if err != nil {
		return nil, err
	}
	return w, nil
}

// Pack implements guest.Files.
func (f *files) Pack(ctx context.Context, path string, opts guest.PackOptions, w io.Writer, begin func() error) ([]string, error) {
	path, err := cleanPath(ctx, path)
	if err != nil {
		return nil, err
	}
	names := f.accounts.owners()
	return archive.Pack(ctx, path, archive.PackOptions{
		Contents: opts.Contents, Compression: opts.Compression, UserName: names.user, GroupName: names.group,
	}, w, begin)
}

// Unpack implements guest.Files.
func (f *files) Unpack(ctx context.Context, path string, r io.Reader, opts guest.UnpackOptions) (nestbox.Unpacked, error) {
	path, err := cleanPath(ctx, path)
	if err != nil {
		return nestbox.Unpacked{}, err
	}
	how := archive.UnpackOptions{KeepOwners: opts.KeepOwners, KeepKind: opts.KeepKind, TempPrefix: filewatch.TempWrite}
	var by *owner
	if opts.User != "" {
		user, err := f.accounts.find(opts.User)
		if err != nil {
			return nestbox.Unpacked{}, err
		}
		by = &owner{int(user.uid), int(user.gid)}
		how.Owner = &archive.Owner{UID: by.uid, GID: by.gid}
	}
	made, err := makeDirs(path, by)
	if err != nil {
		removeDirs(made)
		return nestbox.Unpacked{}, writeError(path, err)
	}
	how.New = len(made) > 0
	done, err := archive.Unpack(ctx, path, r, how)
	if err != nil {
		removeDirs(made) // unless something was unpacked
	}
	return done, err
}

// kernelsOwn reports whether path is in a file system that shows the kernel's
// state. In gVisor, links there that lead out of it are opened as what they
// point to even with O_NOFOLLOW, so that a removal would go on to all of /.
func kernelsOwn(path string) bool {
	if st, err := os.Lstat(path); err != nil || !st.IsDir() {
		path = filepath.Dir(path) // a link that leads there is not itself there
	}
	return pseudofs.At(path)
}

// fileInfo describes what is at path, where st comes from.
func fileInfo(path string, st fs.FileInfo, names ownerNames) nestbox.FileInfo {
	out := nestbox.FileInfo{
		Name:       nestbox.PathText(filepath.Base(path)),
		Path:       nestbox.PathText(path),
		Size:       st.Size(),
		ModifiedAt: st.ModTime().UTC(),
	}
	switch st.Mode().Type() {
	case 0:
		out.Type = nestbox.FileTypeFile
	case fs.ModeDir:
		out.Type = nestbox.FileTypeDirectory
	case fs.ModeSymlink:
		out.Type = nestbox.FileTypeSymlink
		if target, err := os.Readlink(path); err == nil {
			out.SymlinkTarget = nestbox.PathText(target)
		}
	default:
		out.Type = nestbox.FileTypeOther
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		out.Mode = sys.Mode & 0o7777
		out.Owner = names.user(sys.Uid)
		out.Group = names.group(sys.Gid)
	}
	return out
}

// cleanPath returns the shortest form of the path that a text asks for.
func cleanPath(ctx context.Context, path string) (string, error) {
	if err := nestbox.ValidatePath(path); err != nil {
		return "", err
	}
	if ctx.Err() != nil {
		return "", guest.ContextError(ctx)
	}
	return filepath.Clean(nestbox.PathBytes(path)), nil
}

// filePath is cleanPath for the path of a file. One that can only mean a directory
// is refused, as open(2) does.
func filePath(ctx context.Context, path string) (string, error) {
	clean, err := cleanPath(ctx, path)
	if err != nil {
		return "", err
	}
	switch _, name := filepath.Split(path); name {
	case "", ".", "..":
		return "", nestbox.Errorf(nestbox.CodeInvalid, "%s means a directory: a file is wanted", path)
	}
	return clean, nil
}

// fileError gives an operating system's error its code and a message. An error
// that has a code stays as it is.
func fileError(path string, err error) error {
	if e, ok := errors.AsType[*nestbox.Error](err); ok {
		return e
	}
	errno, ok := errors.AsType[syscall.Errno](err)
	if !ok {
		return nestbox.Errorf(nestbox.CodeGuest, "%s: %w", path, err)
	}
	code := nestbox.CodeGuest
	switch errno {
	case syscall.ENOENT, syscall.ENOTDIR:
		return &nestbox.Error{Code: nestbox.CodeNotFound, Message: "no such file or directory: " + path, Err: errno}
	case syscall.EACCES, syscall.EPERM, syscall.EROFS:
		code = nestbox.CodeDenied
	case syscall.EEXIST, syscall.EISDIR, syscall.ENOTEMPTY, syscall.ETXTBSY:
		code = nestbox.CodeConflict
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM:
		code = nestbox.CodeExhausted
	case syscall.EFBIG:
		code = nestbox.CodeTooLarge
	case syscall.ENAMETOOLONG, syscall.ELOOP, syscall.EINVAL, syscall.ENXIO, syscall.EBUSY:
		code = nestbox.CodeInvalid
	}
	return nestbox.Errorf(code, "%s: %w", path, errno)
}

// writeError is fileError for what makes path: something in its way that is no
// directory is a conflict then.
func writeError(path string, err error) error {
	if errors.Is(err, syscall.ENOTDIR) {
		return nestbox.Errorf(nestbox.CodeConflict, "a parent of %s is not a directory", path)
	}
	return fileError(path, err)
}
