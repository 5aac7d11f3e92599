// Package durable writes files so that neither a crash nor a power cut leaves
// half of one: a file is the old one or the new one, and what was answered is on
// disk.
//
// It is a leaf: it imports the standard library only.
package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// temporary is what the names of files that are being written begin with.
const temporary = ".new-"

// WriteFile replaces path with a file of this content and exactly this mode,
// whatever the umask. It returns when that would survive a power cut. On error
// the old file is as it was. Of several callers at the same time one wins.
func WriteFile(path string, data []byte, mode fs.FileMode) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, temporary+"*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails, as it should, once it is renamed
	_, err = f.Write(data)
	if err := errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return SyncDir(dir)
}

// Remove removes a file, and returns when it would stay removed after a power
// cut. Nothing there is no error.
func Remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir makes what was added to and removed from a directory survive a power
// cut.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Leftover reports whether name is of a file that a WriteFile left which was
// killed; it may be removed once nobody writes.
func Leftover(name string) bool { return strings.HasPrefix(name, temporary) }
