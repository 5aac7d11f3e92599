package fake

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/nestbox/nestbox/internal/pidfd"
)

// killTree kills the processes and all their descendants, and returns when they
// are dead. A process that is stopped starts no more children, and envd, which
// adopts orphans, goes last: so nothing gets away.
func killTree(ctx context.Context, roots ...pidfd.Process) error {
	for _, root := range roots {
		f, err := root.Open()
		if err != nil {
			pidfd.Reap(root.PID)
			continue // dead already
		}
		err = killBelow(ctx, root.PID, f)
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("kill process %d: %w", root.PID, err)
		}
		pidfd.Reap(root.PID)
	}
	return nil
}

func killBelow(ctx context.Context, root int, f *pidfd.File) error {
	if err := f.Signal(syscall.SIGSTOP); err != nil {
		return nil // it ended meanwhile
	}
	for {
		below, err := descendants(root)
		if err != nil {
			return err
		}
		if len(below) == 0 {
			break
		}
		for _, pid := range below {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
	if err := f.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return f.Wait(time.Minute)
}

// descendants returns the living processes below pid.
func descendants(pid int) ([]int, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	children := map[int][]int{}
	dead := map[int]bool{}
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // ended meanwhile
		}
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		child, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil || len(fields) < 2 {
			continue
		}
		parent, err := strconv.Atoi(fields[1])
		if err != nil {
			continue
		}
		children[parent] = append(children[parent], child)
		dead[child] = fields[0] == "Z" || fields[0] == "X"
	}
	var below []int
	for queue := children[pid]; len(queue) > 0; queue = queue[1:] {
		below = append(below, queue[0])
		queue = append(queue, children[queue[0]]...)
	}
	return slices.DeleteFunc(below, func(pid int) bool { return dead[pid] }), nil
}

// processes finds what there is of a sandbox's envd: also one of which no
// handle was written, by the path of its port file.
func (d *Driver) processes(id string) ([]pidfd.Process, error) {
	var found []pidfd.Process
	if rec, err := d.readHandle(id); err == nil {
		found = append(found, rec.Envd)
	}
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(text, []byte(d.path(id, portFile)+"\x00")) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			continue
		}
		if p, err := pidfd.Lookup(pid); err == nil && !slices.Contains(found, p) {
			found = append(found, p)
		}
	}
	return found, nil
}
