package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// lockDir makes sure that one server at a time works on a state directory. The
// kernel lets the lock go however the process ends. The file holds the PID of
// the server, for stopServer.
func lockDir(dir string) (unlock func() error, err error) {
	f, err := tryLock(dir)
	if err != nil {
		return nil, err
	}
	_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())), 0)
	if err := errors.Join(err, f.Truncate(int64(len(strconv.Itoa(os.Getpid()))))); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f.Close, nil
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
			if err := terminateHolder(dir); err != nil {
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

// terminateHolder signals the process that the lock file names. The lock is
// held, so the PID is that of a live server.
func terminateHolder(dir string) error {
	data, err := os.ReadFile(filepath.Join(dir, "lock"))
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil || pid <= 1 {
		return fmt.Errorf("%s names no process", filepath.Join(dir, "lock"))
	}
	return unix.Kill(pid, unix.SIGTERM)
}
