package main

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/nestbox/nestbox/internal/doctor"
)

// secureStateDir makes a state directory if need be, and its mode 0700 whatever
// it was: there are keys in it. See doctor.OpenStateDir for what it refuses.
func secureStateDir(dir string) error {
	dir = filepath.Clean(dir)
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	f, err := doctor.OpenStateDir(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Chmod(0o700)
}
