package doctor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// OpenStateDir opens a state directory that is safe to use. It refuses one that
// is a symbolic link, that is another user's, or in which others may have put
// something. fs.ErrNotExist: there is none.
func OpenStateDir(dir string) (*os.File, error) {
	dir = filepath.Clean(dir) // a slash at the end would follow a link
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
		if target, linkErr := os.Readlink(dir); linkErr == nil {
			return nil, fmt.Errorf("the state directory %s is a symbolic link; name the directory itself: %s", dir, target)
		}
		return nil, fmt.Errorf("the state directory %s is no directory", dir)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	f := os.NewFile(uintptr(fd), dir)
	if err := safe(f, dir); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func safe(f *os.File, dir string) error {
	var info unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &info); err != nil {
		return err
	}
	if int(info.Uid) != os.Geteuid() {
		return fmt.Errorf("the state directory %s belongs to user %d; if what is in it is yours: chown root %s", dir, info.Uid, dir)
	}
	if info.Mode&0o022 != 0 {
		if names, _ := f.Readdirnames(1); len(names) > 0 {
			return fmt.Errorf("the state directory %s may be written by others (mode %04o), and is not empty; if what is in it is yours: chmod 700 %s", dir, info.Mode&0o7777, dir)
		}
	}
	return nil
}
