package doctor

import (
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox/internal/cgroup"
	"github.com/nestbox/nestbox/internal/egress"
)

// calls are what is asked of the kernel by system calls.
type calls struct {
	release    func() (string, error)
	euid       func() int
	groups     func() error // whether control groups can be used
	namespaces func() error // whether they can be made
	open       func(path string) error
	disk       func(path string) (unix.Statfs_t, error)
	openFiles  func() (uint64, error)
	egress     func() error // whether capsules can have a way out
}

var kernelCalls = calls{
	release: func() (string, error) {
		var uts unix.Utsname
		err := unix.Uname(&uts)
		return unix.ByteSliceToString(uts.Release[:]), err
	},
	euid: unix.Geteuid,
	groups: func() error {
		_, err := cgroup.Detect()
		return err
	},
	namespaces: tryNamespaces,
	open: func(path string) error {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Close(fd)
		}
		return err
	},
	disk: func(path string) (stat unix.Statfs_t, err error) {
		return stat, unix.Statfs(path, &stat)
	},
	openFiles: func() (uint64, error) {
		var limit unix.Rlimit
		err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
		return limit.Max, err
	},
	egress: egress.Probe,
}

// tryNamespaces starts a program in namespaces of all the kinds that a capsule
// has. It does not matter what the program does.
func tryNamespaces() error {
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
	cmd := exec.Command("/proc/self/exe", "--version")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID |
			unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		UidMappings: ids, GidMappings: ids,
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait() // it was killed
	return nil
}
