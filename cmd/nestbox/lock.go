package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// lockDir makes sure that one server at a time works on a state directory. The
// kernel lets the lock go however the process ends.
func lockDir(dir string) (*dirLock, error) {
	f, err := tryLock(dir)
	if err != nil {
		return nil, err
	}
	lock := &dirLock{f}
	if err := lock.note(""); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return lock, nil
}

// dirLock is a lock that is held. Its file holds the PID of the server, for
// stopServer, and once there is one the address that it answers on.
type dirLock struct{ file *os.File }

// note writes down on which address the server answers.
func (l *dirLock) note(addr string) error {
	text := fmt.Sprintf("%d\n%s\n", os.Getpid(), addr)
	_, err := l.file.WriteAt([]byte(text), 0)
	return errors.Join(err, l.file.Truncate(int64(len(text))))
}

// Close lets the lock go.
func (l *dirLock) Close() error { return l.file.Close() }

// holder returns the server that works on a state directory, if one does; addr is ""
// until it answers. The PID is that of a live process.
func holder(dir string) (pid int, addr string, err error) {
	f, err := os.Open(filepath.Join(dir, "lock"))
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	if !held(f) {
		return 0, "", nil
	}
	text, err := io.ReadAll(io.LimitReader(f, 1<<10))
	if err != nil {
		return 0, "", err
	}
	first, rest, _ := strings.Cut(string(text), "\n")
	if pid, err = strconv.Atoi(first); err != nil || pid <= 1 {
		return 0, "", fmt.Errorf("%s names no process", f.Name())
	}
	return pid, strings.TrimSpace(rest), nil
}

var errLocked = errors.New("a nestbox server works on this directory")

func tryLock(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("%s: %w", dir, errLocked)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// held reports whether a server works on the directory of a lock file.
func held(lock *os.File) bool {
	return errors.Is(unix.Flock(int(lock.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

// stopServer asks the server of a state directory to end and waits until it
// has. It returns false if none ran.
func stopServer(ctx context.Context, dir string) (bool, error) {
	if _, err := os.Stat(filepath.Join(dir, "lock")); errors.Is(err, os.ErrNotExist) {
		return false, fmt.Errorf("no server was ever started in %s: --dir names the folder that `nestbox up` was given", dir)
	}
	asked := false
	for {
		f, err := tryLock(dir)
		if err == nil {
			return asked, f.Close()
		}
		if !errors.Is(err, errLocked) {
			return asked, err
		}
		if !asked {
			pid, _, err := holder(dir)
			if err == nil && pid != 0 {
				err = unix.Kill(pid, unix.SIGTERM)
			}
			if err != nil {
				return false, err
			}
			asked = true
		}
		select {
		case <-ctx.Done():
			return asked, fmt.Errorf("the server of %s did not end: %w", dir, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}
