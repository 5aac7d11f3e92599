package gvisor

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/cgroup"
	"github.com/nestbox/nestbox/internal/image"
	"github.com/nestbox/nestbox/internal/netns"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// Annotations that begin so set flags of runsc's boot command, which package
// runsc sees to. What a sandbox shows as its size goes this way: runsc takes it
// from a control group of its own making only.
const AnnotationBootFlag = "dev.nestbox.boot."

const (
	mib = 1 << 20
	// overhead is what gVisor itself needs of the memory of a sandbox's group.
	overhead = 32 * mib
	// The host's own limit must never be met before those inside: gVisor does not
	// survive that it cannot have a thread. Each process or thread inside may need
	// a thread that runs it on each of its CPUs, a process for those, and a thread
	// in gVisor's kernel.
	hostPidsEach = 4
	hostPidsMore = 512
	// envdPids is what envd needs.
	envdPids = 64
)

func limits(r nestbox.Resources) cgroup.Limits {
	return cgroup.Limits{
		MemoryBytes: memoryLimit(r.MemoryMB),
		Pids:        (r.PidsMax+envdPids)*(r.VCPUs+hostPidsEach) + hostPidsMore,
	}
}

// memoryLimit is what a sandbox of so many MiB may use, in bytes.
func memoryLimit(mb int) int64 { return int64(mb)*mib + overhead }

// capabilities are what root in a sandbox can do, and why.
var capabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", // be root towards files
	"CAP_SETUID", "CAP_SETGID", // start processes as another user
	"CAP_SETPCAP", "CAP_SETFCAP", // give capabilities up; package managers set them on files
	"CAP_KILL",       // end processes of any user
	"CAP_SYS_PTRACE", // find the processes of a tree by their environment; debuggers
	"CAP_NET_BIND_SERVICE",
	"CAP_SYS_CHROOT",
	"CAP_MKNOD", "CAP_AUDIT_WRITE", // package managers and su expect them
}

// ofEnvd is what envd can do besides. It is not in the bounding set, so that
// no program that envd starts has it: envd can fork when its children have used
// up the number of processes.
const ofEnvd = "CAP_SYS_RESOURCE"

// ownFiles are files of /etc that are the sandbox's own. They belong to its root
// on the host too: before Linux 6.3 the kernel cannot map owners on a tmpfs, which
// /run is.
var ownFiles = []string{"hostname", "hosts", "resolv.conf"}

// The other files of a bundle.
const (
	configFile = "config.json"
	pidFile    = "pid"
	logFile    = "runsc.log"
	panicFile  = "panic.log"
)

// writeBundle writes what runsc starts the sandbox from. It holds envd's token,
// and is for root's eyes only, as is the directory.
func (d *Driver) writeBundle(spec sandbox.Spec, firstUID uint32) error {
	spec.Hostname = cmp.Or(spec.Hostname, spec.ID)
	config, err := json.Marshal(d.ociSpec(spec, firstUID))
	if err != nil {
		return err
	}
	for name, file := range map[string]struct {
		text  string
		mode  os.FileMode
		owner uint32
	}{
		configFile:    {string(config), 0o600, 0},
		"hostname":    {spec.Hostname + "\n", 0o644, firstUID},
		"hosts":       {sandbox.Hosts(spec.Hostname), 0o644, firstUID},
		"resolv.conf": {d.resolvConf(), 0o644, firstUID},
	} {
		path := filepath.Join(d.bundle(spec.ID), name)
		if err := os.WriteFile(path, []byte(file.text), file.mode); err != nil {
			return err
		}
		if err := os.Chmod(path, file.mode); err != nil { // whatever the umask
			return err
		}
		if err := os.Chown(path, int(file.owner), int(file.owner)); err != nil {
			return err
		}
	}
	return nil
}

// resolvConf names the server that answers lookups: the egress, which takes those for
// any other server too.
func (d *Driver) resolvConf() string {
	if d.cfg.Egress == nil {
		return sandbox.ResolvConf("")
	}
	return sandbox.ResolvConf(netns.OuterAddr.String())
}

// ociSpec describes the sandbox (OCI runtime specification 1.2, as far as
// gVisor reads it).
func (d *Driver) ociSpec(spec sandbox.Spec, firstUID uint32) *specs.Spec {
	r := spec.Resources
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: firstUID, Size: uidsEach}}
	oci := &specs.Spec{
		Version:  "1.2.0",
		Hostname: spec.Hostname,
		Root:     &specs.Root{Path: d.rootfs()},
		Process: &specs.Process{
			Args: []string{image.EnvdPath, "--max-pids=" + strconv.Itoa(r.PidsMax)},
			Cwd:  "/",
			Env:  environ(spec.Env),
			Capabilities: &specs.LinuxCapabilities{
				Bounding:    capabilities,
				Effective:   append(slices.Clone(capabilities), ofEnvd),
				Permitted:   append(slices.Clone(capabilities), ofEnvd),
				Inheritable: []string{ofEnvd},
			},
			Rlimits: []specs.POSIXRlimit{
				// Of each user, in case one gets around envd's limit of them all, and with
				// room for envd's own threads.
				{Type: "RLIMIT_NPROC", Soft: uint64(r.PidsMax) + envdPids, Hard: uint64(r.PidsMax) + envdPids},
				{Type: "RLIMIT_NOFILE", Soft: 1 << 20, Hard: 1 << 20},
			},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"ro", "nosuid", "nodev", "noexec"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup2", Source: "cgroup2", Options: []string{"rw", "nosuid", "nodev", "noexec"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755", "size=64k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts"},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "nodev", "mode=1777", fmt.Sprintf("size=%dm", max(r.MemoryMB/2, 1))}},
		},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace}, {Type: specs.CgroupNamespace},
				{Type: specs.NetworkNamespace, Path: d.netns.Inner(spec.ID)},
				{Type: specs.UserNamespace},
			},
			UIDMappings: ids,
			GIDMappings: ids,
		},
		Annotations: map[string]string{
			AnnotationBootFlag + "cpu-num":      strconv.Itoa(r.VCPUs),
			AnnotationBootFlag + "total-memory": strconv.Itoa(r.MemoryMB * mib),
		},
	}
	if spec.Root.EROFS != "" {
		d.startFromEROFS(oci, spec)
	}
	if spec.Root.Upper != "" {
		oci.Annotations["dev.gvisor.tar.rootfs.upper"] = rootUpper
	}
	return oci
}

// startFromEROFS has gVisor read the root from a file itself. The files of the sandbox
// that mountDir shows are written by envd then.
func (d *Driver) startFromEROFS(oci *specs.Spec, spec sandbox.Spec) {
	const hint = "dev.gvisor.spec.rootfs."
	oci.Root.Path = rootEmpty
	oci.Annotations[hint+"source"] = rootImage
	oci.Annotations[hint+"type"] = "erofs"
	oci.Annotations[hint+"overlay"] = "dir=" + rootLayer
	oci.Annotations[hint+"options"] = fmt.Sprintf("size=%dm", spec.Resources.DiskMB)
	// This also has gVisor start a gofer, without which it fails: google/gvisor#13529.
	oci.Mounts = append(oci.Mounts, specs.Mount{Destination: image.EnvdPath, Type: "bind", Source: rootEnvd, Options: []string{"ro", "nosuid", "nodev"}})
	oci.Process.Args = append(oci.Process.Args, "--hostname="+spec.Hostname)
	if d.cfg.Egress != nil {
		oci.Process.Args = append(oci.Process.Args, "--nameserver="+netns.OuterAddr.String())
	}
}

// environ lists the variables in a fixed order. The path is for envd alone: it
// chooses that of the processes it starts.
func environ(env map[string]string) []string {
	list := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
	for _, name := range slices.Sorted(maps.Keys(env)) {
		list = append(list, name+"="+env[name])
	}
	return list
}
