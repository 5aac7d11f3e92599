package envd

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
)

const (
	// markVariable names the variable that every process of a tree inherits
	// and by which the tree is found again when its parents are gone.
	markVariable = "NESTBOX_PROCESS"

	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

	// pipeSize is asked for, because a large pipe lets a writer go on while
	// we are not scheduled. Refusal does no harm.
	pipeSize = 1 << 20
)

// launch is everything that a start needs, worked out from its spec.
type launch struct {
	path string
	argv []string
	env  []string
	cwd  string
	user account
}

// plan checks a spec against the machine.
func (a *accounts) plan(spec nestbox.ProcessSpec, mark string) (launch, error) {
	user, err := a.find(spec.User)
	if err != nil {
		return launch{}, err
	}
	cwd, err := workingDirectory(spec.Cwd, user)
	if err != nil {
		return launch{}, err
	}
	env := environment(spec.Env, user, mark)
	path, err := findProgram(spec.Cmd, cwd, env["PATH"])
	if err != nil {
		return launch{}, err
	}
	l := launch{path: path, cwd: cwd, user: user, argv: append([]string{spec.Cmd}, spec.Args...)}
	for _, k := range slices.Sorted(maps.Keys(env)) {
		l.env = append(l.env, k+"="+env[k])
	}
	return l, nil
}

// workingDirectory returns cwd, or the user's home. A user without one starts
// in the root directory, as login(1) has it.
func workingDirectory(cwd string, user account) (string, error) {
	if cwd == "" {
		if info, err := os.Stat(user.home); err == nil && info.IsDir() {
			return user.home, nil
		}
		return "/", nil
	}
	info, err := os.Stat(cwd)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "", nestbox.Errorf(nestbox.CodeInvalid, "cwd %.200q does not exist", cwd)
	case err != nil:
		return "", nestbox.Errorf(nestbox.CodeInvalid, "cwd %.200q cannot be used: %w", cwd, err)
	case !info.IsDir():
		return "", nestbox.Errorf(nestbox.CodeInvalid, "cwd %.200q is not a directory", cwd)
	}
	return cwd, nil
}

// environment returns the base environment of a user with what was asked for
// on top.
func environment(asked map[string]string, user account, mark string) map[string]string {
	env := map[string]string{
		"PATH": defaultPath, "LANG": "C.UTF-8", "NESTBOX": "true",
		"HOME": user.home, "USER": user.name, "LOGNAME": user.name, "SHELL": user.shell,
	}
	maps.Copy(env, asked)
	env[markVariable] = mark
	return env
}

// findProgram looks cmd up in path as execvp(3) does, with relative paths
// taken from cwd.
func findProgram(cmd, cwd, path string) (string, error) {
	if strings.Contains(cmd, "/") {
		if !filepath.IsAbs(cmd) {
			cmd = cwd + "/" + cmd
		}
		return cmd, executable(cmd)
	}
	found := error(nestbox.Errorf(nestbox.CodeInvalid, "%.200s: no such program in PATH=%.500s", cmd, path))
	for dir := range strings.SplitSeq(path, ":") {
		if !filepath.IsAbs(dir) {
			dir = cwd + "/" + dir
		}
		candidate := filepath.Join(dir, cmd)
		err := executable(candidate)
		if err == nil {
			return candidate, nil
		}
		if _, statErr := os.Stat(candidate); statErr == nil {
			found = err
		}
	}
	return "", found
}

func executable(path string) error {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENOTDIR):
		return nestbox.Errorf(nestbox.CodeInvalid, "%.200s: no such program", path)
	case err != nil:
		return nestbox.Errorf(nestbox.CodeInvalid, "%.200s cannot be executed: %w", path, err)
	case info.IsDir():
		return nestbox.Errorf(nestbox.CodeInvalid, "%.200s is a directory", path)
	case info.Mode()&0o111 == 0:
		return nestbox.Errorf(nestbox.CodeInvalid, "%.200s: permission denied: it is not executable", path)
	}
	return nil
}

// launch starts l with its standard streams, and gives it a session of its own.
func (s *spawner) launch(ctx context.Context, l launch, stdio []uintptr) (int, error) {
	sys := &syscall.SysProcAttr{Setsid: true}
	if os.Geteuid() == 0 {
		sys.Credential = &syscall.Credential{Uid: l.user.uid, Gid: l.user.gid, Groups: l.user.groups}
	} else if int(l.user.uid) != os.Geteuid() {
		return 0, nestbox.Errorf(nestbox.CodeDenied, "the capsule's daemon does not run as root and cannot start processes of user %s", l.user.name)
	}
	pid, err := s.spawn(ctx, l.path, l.argv, &syscall.ProcAttr{Dir: l.cwd, Env: l.env, Files: stdio, Sys: sys})
	if err != nil {
		return 0, launchError(l, err)
	}
	return pid, nil
}

// launchError says why the program could not be started.
func launchError(l launch, err error) error {
	switch {
	case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR):
		return nestbox.Errorf(nestbox.CodeInvalid, "%.200s: no such program, or its interpreter does not exist", l.path)
	case errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM):
		return nestbox.Errorf(nestbox.CodeInvalid, "%.200s: permission denied for user %s in cwd %.200s", l.path, l.user.name, l.cwd)
	case errors.Is(err, unix.ENOEXEC):
		return nestbox.Errorf(nestbox.CodeInvalid, "%.200s is not a program: it has no #! line and no known format", l.path)
	case errors.Is(err, unix.E2BIG):
		return nestbox.Errorf(nestbox.CodeInvalid, "arguments and environment are larger than the capsule allows")
	case errors.Is(err, unix.ETXTBSY):
		return nestbox.Errorf(nestbox.CodeConflict, "%.200s is being written", l.path)
	}
	return resourceError("start a process", err)
}

// resourceError maps what the kernel answers when something has run out.
func resourceError(what string, err error) error {
	var known *nestbox.Error
	if errors.As(err, &known) {
		return err
	}
	for _, errno := range []error{unix.EAGAIN, unix.ENOMEM, unix.EMFILE, unix.ENFILE, unix.ENOSPC} {
		if errors.Is(err, errno) {
			return nestbox.Errorf(nestbox.CodeExhausted, "the capsule cannot %s now: %w", what, err)
		}
	}
	return nestbox.Errorf(nestbox.CodeGuest, "cannot %s: %w", what, err)
}

// stdio are the two ends of a process's standard streams.
type stdio struct {
	theirs [3]int   // in, out, err; -1 if not open
	stdin  *os.File // ours; nil if it is /dev/null for them
	out    [2]*os.File
}

// openStdio makes the pipes of a process. The caller closes both ends.
func openStdio(withStdin bool) (s *stdio, err error) {
	s = &stdio{theirs: [3]int{-1, -1, -1}}
	defer func() {
		if err != nil {
			s.closeTheirs()
			s.closeOurs()
		}
	}()
	var p [2]int
	if withStdin {
		if err = unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			return nil, resourceError("make a pipe", err)
		}
		s.theirs[0], s.stdin = p[0], pollable(p[1], "stdin")
	} else if s.theirs[0], err = unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return nil, resourceError("open /dev/null", err)
	}
	for stream, name := range streamNames {
		if err = unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			return nil, resourceError("make a pipe", err)
		}
		_, _ = unix.FcntlInt(uintptr(p[0]), unix.F_SETPIPE_SZ, pipeSize)
		s.out[stream], s.theirs[1+stream] = pollable(p[0], string(name)), p[1]
	}
	return s, nil
}

// pollable makes a file of our end of a pipe, which waits in the runtime's
// poller and not in a thread. The other end stays blocking.
func pollable(fd int, name string) *os.File {
	_ = unix.SetNonblock(fd, true)
	return os.NewFile(uintptr(fd), name)
}

func (s *stdio) files() []uintptr {
	return []uintptr{uintptr(s.theirs[0]), uintptr(s.theirs[1]), uintptr(s.theirs[2])}
}

func (s *stdio) closeTheirs() {
	for _, fd := range s.theirs {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

func (s *stdio) closeOurs() {
	for _, f := range [...]*os.File{s.stdin, s.out[stdout], s.out[stderr]} {
		if f != nil {
			_ = f.Close()
		}
	}
}
