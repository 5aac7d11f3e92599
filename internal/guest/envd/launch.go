package envd

import (
	"cmp"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest/outputlog"
)

const (
	// markVariable names the variable that every process of a tree inherits
	// and by which the tree is found again when its parents are gone.
	markVariable = "NESTBOX_PROCESS"

	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

	// pipeSize is that of an enlarged pipe, in bytes; enlargeAt is the size of
	// a read that shows that it is worth its price.
	pipeSize  = 1 << 20
	enlargeAt = 16 << 10
)

// launch is everything that a start needs, worked out from its spec.
type launch struct {
	path string
	argv []string
	env  []string
	cwd  string
	home bool // cwd is the user's home, and was not asked for
	user account
}

// plan works out a launch. What only a look at the disk could tell is assumed:
// each look costs a start more than it is worth, and check takes it if the
// start fails.
func (a *accounts) plan(spec nestbox.ProcessSpec, common map[string]string, mark string) (launch, error) {
	user, err := a.findToRun(cmp.Or(spec.User, a.user))
	if err != nil {
		return launch{}, err
	}
	if spec.Terminal != nil {
		common = maps.Clone(common)
		if common == nil {
			common = map[string]string{}
		}
		common["TERM"] = spec.Terminal.Term
	}
	env := environment(common, spec.Env, user, mark)
	l := launch{path: spec.Cmd, cwd: nestbox.PathBytes(cmp.Or(spec.Cwd, a.cwd)), user: user, argv: append([]string{spec.Cmd}, spec.Args...)}
	l.home = l.cwd == ""
	if l.home {
		l.cwd = user.home
	}
	if !filepath.IsAbs(l.path) {
		if l.path, err = findProgram(spec.Cmd, l.cwd, env["PATH"]); err != nil {
			return launch{}, err
		}
	}
	for _, k := range slices.Sorted(maps.Keys(env)) {
		l.env = append(l.env, k+"="+env[k])
	}
	return l, nil
}

// check says why a launch cannot do, or corrects it.
func (l *launch) check() (corrected bool, err error) {
	asked := l.cwd
	if l.home {
		asked = ""
	}
	cwd, err := workingDirectory(asked, l.user)
	if err != nil {
		return false, err
	}
	corrected = cwd != l.cwd
	l.cwd = cwd
	return corrected, executable(l.path)
}

// workingDirectory returns cwd, or the user's home. A user without one starts
// in the root directory, as login(1) has it.
func workingDirectory(cwd string, user account) (string, error) {
	if cwd == "" {
		info, err := os.Stat(user.home)
		switch {
		case outOf(err):
			return "", resourceError("look at the user's home", err)
		case err == nil && info.IsDir():
			return user.home, nil
		}
		return "/", nil
	}
	info, err := os.Stat(cwd)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "", nestbox.Errorf(nestbox.CodeInvalid, "cwd %.200q does not exist", cwd)
	case outOf(err):
		return "", resourceError("look at the working directory", err)
	case err != nil:
		return "", nestbox.Errorf(nestbox.CodeInvalid, "cwd %.200q cannot be used: %w", cwd, err)
	case !info.IsDir():
		return "", nestbox.Errorf(nestbox.CodeInvalid, "cwd %.200q is not a directory", cwd)
	}
	return cwd, nil
}

// environment returns the base environment of a user with what all processes have and
// what was asked for on top.
func environment(common, asked map[string]string, user account, mark string) map[string]string {
	env := map[string]string{
		"PATH": defaultPath, "LANG": "C.UTF-8", "NESTBOX": "true",
		// Output goes to pipes, where Python holds back what it prints until there are 8 KiB:
		// a log of a process that runs would be empty.
		"PYTHONUNBUFFERED": "1",
		"HOME":             user.home, "USER": user.name, "LOGNAME": user.name, "SHELL": user.shell,
	}
	maps.Copy(env, common)
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
	found := error(nestbox.Errorf(nestbox.CodeInvalid, "%.200s: no such program in PATH=%.500s", cmd, path).Detailed(nestbox.DetailNoProgram))
	for dir := range strings.SplitSeq(path, ":") {
		if !filepath.IsAbs(dir) {
			dir = cwd + "/" + dir
		}
		candidate := filepath.Join(dir, cmd)
		err := executable(candidate)
		if err == nil {
			return candidate, nil
		}
		if nestbox.CodeOf(err) == nestbox.CodeExhausted {
			return "", err // it may be this one: nobody can tell
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
		return nestbox.Errorf(nestbox.CodeInvalid, "%.200s: no such program", path).Detailed(nestbox.DetailNoProgram)
	case outOf(err):
		return resourceError("look at the program", err)
	case err != nil:
		return nestbox.Errorf(nestbox.CodeInvalid, "%.200s cannot be executed: %w", path, err).Detailed(nestbox.DetailNotExecutable)
	case info.IsDir():
		return nestbox.Errorf(nestbox.CodeInvalid, "%.200s is a directory", path).Detailed(nestbox.DetailNotExecutable)
	case info.Mode()&0o111 == 0:
		return nestbox.Errorf(nestbox.CodeInvalid, "%.200s: permission denied: it is not executable", path).Detailed(nestbox.DetailNotExecutable)
	}
	return nil
}

// start starts a process of spec in a session of its own, and in group if
// there is one. It corrects l where the machine is not as it was assumed.
func (l *launch) start(spec nestbox.ProcessSpec, stdio []uintptr, groups *treeGroups, group *treeGroup) (int, error) {
	sys := &syscall.SysProcAttr{Setsid: true, Setctty: spec.Terminal != nil, Credential: l.user.credential()}
	if sys.Credential != nil && os.Geteuid() != 0 {
		return 0, nestbox.Errorf(nestbox.CodeDenied, "the capsule's daemon does not run as root and cannot start processes of user %s", l.user.name)
	}
	for {
		pid, err := groups.start(group, sys.Credential == nil, func(fd int) (int, error) {
			sys.UseCgroupFD, sys.CgroupFD = fd >= 0, fd
			return syscall.ForkExec(l.path, l.argv, &syscall.ProcAttr{Dir: l.cwd, Env: l.env, Files: stdio, Sys: sys})
		})
		if err == nil {
			return pid, nil
		}
		corrected, checkErr := l.check()
		switch {
		case checkErr != nil:
			return 0, checkErr
		case !corrected:
			return 0, launchError(*l, err)
		}
	}
}

// launchError says why the program could not be started.
func launchError(l launch, err error) error {
	switch {
	case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR):
		return nestbox.Errorf(nestbox.CodeInvalid, "%.200s: no such program, or its interpreter does not exist", l.path).Detailed(nestbox.DetailNoProgram)
	case errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM):
		return nestbox.Errorf(nestbox.CodeInvalid, "%.200s: permission denied for user %s in cwd %.200s", l.path, l.user.name, l.cwd).Detailed(nestbox.DetailNotExecutable)
	case errors.Is(err, unix.ENOEXEC):
		return nestbox.Errorf(nestbox.CodeInvalid, "%.200s is not a program: it has no #! line and no known format", l.path).Detailed(nestbox.DetailNotExecutable)
	case errors.Is(err, unix.E2BIG):
		return nestbox.Errorf(nestbox.CodeInvalid, "arguments and environment are larger than the capsule allows")
	case errors.Is(err, unix.ETXTBSY):
		return nestbox.Errorf(nestbox.CodeConflict, "%.200s is being written", l.path).Detailed(nestbox.DetailNotExecutable)
	}
	return resourceError("start a process", err)
}

// resourceError maps what the kernel answers when something has run out.
func resourceError(what string, err error) error {
	var known *nestbox.Error
	if errors.As(err, &known) {
		return err
	}
	if outOf(err) {
		return nestbox.Errorf(nestbox.CodeExhausted, "the capsule cannot %s now: %w", what, err)
	}
	return nestbox.Errorf(nestbox.CodeGuest, "cannot %s: %w", what, err)
}

// outOf reports whether err says that something has run out. That says nothing
// of what was asked for: a file that cannot be opened may well exist.
func outOf(err error) bool {
	return slices.ContainsFunc([]error{unix.EAGAIN, unix.ENOMEM, unix.EMFILE, unix.ENFILE, unix.ENOSPC}, func(errno error) bool { return errors.Is(err, errno) })
}

// stdio are the two ends of a process's standard streams.
type stdio struct {
	files  []uintptr // what the process gets as in, out and err
	theirs [3]int    // those of them that are to be closed; -1 if there is none
	stdin  *os.File  // ours; nil if it is /dev/null for them
	out    []output

	terminal *terminal // nil = there is none
}

// output is our end of one of a process's streams.
type output struct {
	stream int // of the log
	file   *os.File
}

// openStdio makes the pipes of a process whose input is devNull if withStdin is
// not, and whose two outputs are one if merge is. They are owner's, who could not open /dev/stdout otherwise; nil = ours. The
// caller closes both ends.
func openStdio(withStdin, merge bool, devNull int, owner *syscall.Credential) (s *stdio, err error) {
	s = &stdio{theirs: [3]int{-1, -1, -1}, files: []uintptr{uintptr(devNull), 0, 0}}
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
		own(p[0], owner)
		s.files[0] = uintptr(p[0])
		s.theirs[0], s.stdin = p[0], pollable(p[1], "stdin")
	}
	for _, stream := range []int{outputlog.Stdout, outputlog.Stderr} {
		if merge && stream == outputlog.Stderr {
			s.files[1+stream] = s.files[1+outputlog.Stdout]
			break
		}
		if err = unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			return nil, resourceError("make a pipe", err)
		}
		own(p[1], owner)
		s.files[1+stream] = uintptr(p[1])
		s.out = append(s.out, output{stream, pollable(p[0], string(outputlog.StreamNames[stream]))})
		s.theirs[1+stream] = p[1]
	}
	return s, nil
}

// own makes a pipe a user's. Where that cannot be, the user writes to it all the
// same, but cannot open it by name.
func own(fd int, owner *syscall.Credential) {
	if owner != nil {
		_ = unix.Fchown(fd, int(owner.Uid), int(owner.Gid))
	}
}

// pollable makes a file of our end of a pipe, which waits in the runtime's
// poller and not in a thread. The other end stays blocking.
func pollable(fd int, name string) *os.File {
	_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFL, unix.O_NONBLOCK) // a new pipe has no other flags
	return os.NewFile(uintptr(fd), name)
}

// enlarge makes room in the pipe of a process that writes much, so that it can
// go on while we are not scheduled. Refusal does no harm.
func enlarge(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeSize) }

func (s *stdio) closeTheirs() {
	for _, fd := range s.theirs {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

func (s *stdio) closeOurs() {
	if s.stdin != nil {
		_ = s.stdin.Close()
	}
	for _, o := range s.out {
		_ = o.file.Close()
	}
}
