// Package reserve keeps some disk space for the time when the disk is full: to
// end things, which needs a little space before it gives much back. It is a leaf.
package reserve

import (
	"errors"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// What is kept, and given at a time, in bytes. A database needs less than that for
// some changes; who else gets the rest, on a disk where many want it, is anybody's
// guess.
const (
	size  = 16 << 20
	piece = 1 << 20
)

// Reserve is a file that holds the space. Its methods are safe for concurrent
// use.
type Reserve struct {
	path string
	mu   sync.Mutex
}

// New returns the reserve in a directory, as it is.
func New(dir string) *Reserve { return &Reserve{path: filepath.Join(dir, "reserve")} }

// Keep makes sure that there is a reserve, if the disk has room enough for that
// not to be felt.
func (r *Reserve) Keep() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if info, err := os.Stat(r.path); err == nil && info.Size() == size {
		return nil
	}
	if free, err := r.free(); err != nil || free < 4*size {
		return err
	}
	f, err := os.OpenFile(r.path, os.O_CREATE|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	err = unix.Fallocate(int(f.Fd()), 0, 0, size)
	if errors.Is(err, unix.EOPNOTSUPP) {
		_, err = f.Write(make([]byte, size))
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(r.path)
	}
	return err
}

// GiveIfFull gives a piece if the disk is as good as full.
func (r *Reserve) GiveIfFull() {
	if free, err := r.free(); err == nil && free < piece {
		r.Give()
	}
}

// Give gives a piece of the reserve to whoever asks first.
func (r *Reserve) Give() {
	r.mu.Lock()
	defer r.mu.Unlock()
	info, err := os.Lstat(r.path)
	if err == nil && info.Mode().IsRegular() && info.Size() > 0 {
		_ = os.Truncate(r.path, max(info.Size()-piece, 0))
	}
}

// free returns how many bytes of the disk are free.
func (r *Reserve) free() (int64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(r.path), &fs); err != nil {
		return 0, err
	}
	return int64(fs.Bavail) * fs.Bsize, nil
}
