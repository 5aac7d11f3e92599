package gvisor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox/internal/image"
	"github.com/nestbox/nestbox/internal/netns"
)

// Where what a sandbox with an EROFS file starts from is, in its own mount namespace: in
// all sandboxes of all hosts the same, since gVisor restores a sandbox only if it is told
// the same paths again.
const (
	rootDir   = runBase + "/root"
	rootEmpty = rootDir + "/empty"     // an empty directory
	rootImage = rootDir + "/image"     // the EROFS file
	rootUpper = rootDir + "/upper.tar" // what the writable layer begins with
	rootEnvd  = rootDir + "/envd"
	rootLayer = rootDir + "/layer" // the directory in which gVisor makes the writable layer
)

// mountRoot moves the calling thread into a mount namespace of its own and mounts there
// what the sandbox's root is made of. The mounts end with the last process in the
// namespace. Nothing of it is written to: what the sandbox writes goes into the layer
// that gVisor lays over it.
func (d *Driver) mountRoot(root image.Root, id string, ids userns) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	// Nothing mounted here shows elsewhere; what is unmounted elsewhere goes.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("detach the mount namespace: %w", err)
	}
	if root.Upper != "" {
		if err := bind(root.Upper, rootUpper, nil); err != nil {
			return fmt.Errorf("show %s: %w", root.Upper, err)
		}
	}
	if root.EROFS != "" {
		return d.mountEROFS(root, id, ids)
	}
	return d.mountDir(root, id, ids)
}

// mountEROFS puts at their places what gVisor itself opens, and envd.
func (d *Driver) mountEROFS(root image.Root, id string, ids userns) error {
	if err := bind(root.EROFS, rootImage, nil); err != nil {
		return fmt.Errorf("show %s: %w", root.EROFS, err)
	}
	err := bind(d.cfg.Envd, rootEnvd, ids.file)
	if errors.Is(err, errUnmappable) {
		err = bind(d.cfg.Envd, rootEnvd, nil)
	}
	if err != nil {
		return fmt.Errorf("show envd: %w", err)
	}
	if err := unix.Mount(d.layer(id), rootLayer, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("show %s: %w", d.layer(id), err)
	}
	return nil
}

// mountDir mounts a root that is a directory in one tree. Files of the host's root belong
// to the sandbox's root, and so on, where the file systems can map owners.
func (d *Driver) mountDir(root image.Root, id string, ids userns) error {
	binds := append([]image.Bind{{Source: root.Dir, Target: "/"}}, root.Binds...)
	binds = append(binds, image.Bind{Source: d.cfg.Envd, Target: image.EnvdPath})
	template := filepath.Dir(root.Dir) + "/"
	for _, b := range binds {
		target := filepath.Join(d.rootfs(), b.Target)
		err := bind(b.Source, target, ids.file)
		if errors.Is(err, errUnmappable) {
			d.warn.Do(func() {
				d.cfg.Log.Warn("the file system cannot map owners: the host's files belong to nobody in capsules", "path", b.Source)
			})
			if strings.HasPrefix(b.Source, template) {
				err = copyTree(b.Source, target, ids.first)
			} else {
				err = bind(b.Source, target, nil)
			}
		}
		if err != nil {
			return fmt.Errorf("show %s at %s: %w", b.Source, b.Target, err)
		}
	}
	for _, name := range ownFiles {
		if err := bind(filepath.Join(d.bundle(id), name), filepath.Join(d.rootfs(), "etc", name), nil); err != nil {
			return fmt.Errorf("show /etc/%s: %w", name, err)
		}
	}
	return nil
}

// errUnmappable reports a file system whose owners the kernel cannot map.
var errUnmappable = errors.New("owners cannot be mapped")

// bind shows source, without what is mounted below it, at target, read-only and
// with the owners mapped through userns, if that is not nil.
func bind(source, target string, userns *os.File) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open_tree: %w", err)
	}
	defer unix.Close(tree)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
	if userns != nil {
		attr.Attr_set |= unix.MOUNT_ATTR_IDMAP
		attr.Userns_fd = uint64(userns.Fd())
	}
	switch err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); {
	// EINVAL: the file system cannot. EPERM: it belongs to another namespace.
	case userns != nil && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPERM)):
		return errUnmappable
	case err != nil:
		return fmt.Errorf("mount_setattr: %w", err)
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return nil
}

// copyTree shows a copy of source, which is small, in memory, at target. Its
// files belong to the ids from first on.
func copyTree(source, target string, first uint32) error {
	const flags = unix.MS_NOSUID | unix.MS_NODEV
	if err := unix.Mount("tmpfs", target, "tmpfs", flags, "mode=755,size=64m"); err != nil {
		return err
	}
	err := filepath.WalkDir(source, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(source, path)
		if err != nil {
			return err
		}
		return copyEntry(path, filepath.Join(target, rel), e, first)
	})
	if err != nil {
		return fmt.Errorf("copy %s: %w", source, err)
	}
	return unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|flags, "")
}

func copyEntry(from, to string, e fs.DirEntry, first uint32) error {
	info, err := e.Info()
	if err != nil {
		return err
	}
	switch info.Mode().Type() {
	case fs.ModeDir:
		if err := os.Mkdir(to, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	case fs.ModeSymlink:
		link, err := os.Readlink(from)
		if err != nil {
			return err
		}
		if err := os.Symlink(link, to); err != nil {
			return err
		}
	default:
		text, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		if err := os.WriteFile(to, text, 0o600); err != nil {
			return err
		}
	}
	owner := info.Sys().(*syscall.Stat_t)
	if err := os.Lchown(to, int(first+owner.Uid), int(first+owner.Gid)); err != nil {
		return err
	}
	if info.Mode().Type() == fs.ModeSymlink {
		return nil
	}
	return os.Chmod(to, info.Mode())
}

// userns maps the sandbox's ids to its range on the host.
type userns struct {
	file  *os.File // a user namespace
	first uint32   // the first id of the range
}

// Close lets go of the namespace, if there is one.
func (u userns) Close() {
	if u.file != nil {
		_ = u.file.Close() // nothing was written
	}
}

// openUserns returns a user namespace that maps the sandbox's ids to its range
// on the host. The kernel has no call for that: a namespace is made with a
// process, here one that is stopped before its program begins and then killed.
func openUserns(first uint32) (userns, error) {
	self, err := os.Executable()
	if err != nil {
		return userns{}, err
	}
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(first), Size: uidsEach}}
	var ns *os.File
	err = netns.OnThread(func() error { // the thread that traces must stay while it does
		cmd := exec.Cmd{
			Path: self,
			Args: []string{"userns"},
			Env:  []string{},
			SysProcAttr: &syscall.SysProcAttr{
				Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids,
				Ptrace: true, Pdeathsig: syscall.SIGKILL,
			},
		}
		if err := cmd.Start(); err != nil {
			return err
		}
		ns, err = os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
		killErr := cmd.Process.Kill()
		_, waitErr := cmd.Process.Wait()
		return errors.Join(err, killErr, waitErr)
	})
	if err != nil {
		return userns{}, fmt.Errorf("make a user namespace: %w", err)
	}
	return userns{ns, first}, nil
}
