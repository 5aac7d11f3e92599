// Package testbin builds the project's binaries for tests that run them as
// they are. It is for tests only.
//
// Where there is no Go, the environment variable NESTBOX_TEST_BIN names a folder
// of binaries that were built elsewhere.
package testbin

import (
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

var (
	envd    = sync.OnceValues(func() (string, error) { return build("envd") })
	nestbox = sync.OnceValues(func() (string, error) { return build("nestbox") })
)

// Envd returns the path of a static envd built from this tree.
func Envd(t testing.TB) string { return must(t, envd) }

// Nestbox returns the path of nestbox built from this tree, with envd beside it.
func Nestbox(t testing.TB) string {
	Envd(t)
	return must(t, nestbox)
}

func must(t testing.TB, f func() (string, error)) string {
	t.Helper()
	path, err := f()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// build writes to one directory per checkout, so that the packages of one
// `go test ./...` share the work: the go command leaves an up-to-date binary
// as it is, and replaces an old one by rename.
func build(name string) (string, error) {
	if dir := os.Getenv("NESTBOX_TEST_BIN"); dir != "" {
		path := filepath.Join(dir, name)
		_, err := os.Stat(path)
		return path, err
	}
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	path := filepath.Join(root, "bin", "test", name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	tmp := path + "." + filepath.Base(os.Args[0])
	cmd := exec.Command("go", "build", "-trimpath", "-o", tmp, "./cmd/"+name)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", &os.PathError{Op: "build", Path: name + ": " + string(out), Err: err}
	}
	return path, os.Rename(tmp, path)
}

func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	for err == nil {
		if _, statErr := os.Stat(filepath.Join(dir, "go.mod")); statErr == nil {
			return dir, nil
		}
		if filepath.Dir(dir) == dir {
			return "", os.ErrNotExist
		}
		dir = filepath.Dir(dir)
	}
	return "", err
}
