package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// What is needed, and what is little.
const (
	minKernelMajor, minKernelMinor = 5, 12 // mount_setattr(2), which maps the owners of files
	littleMemoryMB                 = 1024
	littleDiskMB                   = 2048
	fewInodes                      = 10_000
	fewOpenFiles                   = 65_536
	fewPIDs                        = 100_000 // the host's threads of a capsule are tens
	fewMaps                        = 65_530
	fewWatches                     = 8_192 // one for each capsule
	fewNamespaces                  = 10_000
)

func kernel(m machine, _ Config) Finding {
	release, err := m.release()
	if err != nil {
		return fail(err.Error(), "")
	}
	detail := "Linux " + release + ", " + runtime.GOARCH
	if runtime.GOARCH != "amd64" {
		return fail(detail, "use an x86-64 machine")
	}
	parts := strings.FieldsFunc(release, func(r rune) bool { return r < '0' || r > '9' })
	if len(parts) >= 2 {
		major, _ := strconv.Atoi(parts[0])
		minor, _ := strconv.Atoi(parts[1])
		if major < minKernelMajor || major == minKernelMajor && minor < minKernelMinor {
			return fail(detail, fmt.Sprintf("install a kernel of version %d.%d or newer", minKernelMajor, minKernelMinor))
		}
	}
	return ok(detail)
}

// neededCapabilities are bits of capabilities(7).
var neededCapabilities = map[string]int{
	"CAP_CHOWN": unix.CAP_CHOWN, "CAP_DAC_OVERRIDE": unix.CAP_DAC_OVERRIDE, "CAP_FOWNER": unix.CAP_FOWNER,
	"CAP_KILL": unix.CAP_KILL, "CAP_SETGID": unix.CAP_SETGID, "CAP_SETUID": unix.CAP_SETUID,
	"CAP_NET_ADMIN": unix.CAP_NET_ADMIN, "CAP_SYS_CHROOT": unix.CAP_SYS_CHROOT,
	"CAP_SYS_PTRACE": unix.CAP_SYS_PTRACE, "CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN,
}

func privileges(m machine, _ Config) Finding {
	if id := m.euid(); id != 0 {
		return fail(fmt.Sprintf("this is user %d; capsules need namespaces, mounts and control groups", id), "run it as root")
	}
	bits, err := strconv.ParseUint(m.field("proc/self/status", "CapEff:"), 16, 64)
	if err != nil {
		return warn("the capabilities of this process cannot be read", "mount /proc")
	}
	var missing []string
	for name, bit := range neededCapabilities {
		if bits&(1<<bit) == 0 {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		return fail("root, but without "+list(missing), "run it outside a container, or in a privileged one")
	}
	if bits&(1<<unix.CAP_SYS_RESOURCE) == 0 {
		return warn("root, but without CAP_SYS_RESOURCE: when the host's memory runs out, the server is no safer than other programs", "add the capability")
	}
	return ok("root")
}

func controlGroups(m machine, _ Config) Finding {
	if err := m.groups(); err != nil {
		return fail(err.Error(), "mount them, with the controllers cpu, memory and pids: boot with systemd, or in a container give it a control group root of its own; a memory controller that is off at boot takes cgroup_enable=memory")
	}
	if m.read("sys/fs/cgroup/cgroup.controllers") != "" {
		return ok("version 2")
	}
	return ok("version 1")
}

func namespaces(m machine, _ Config) Finding {
	const sysctl = "sysctl -w user.max_%s_namespaces=100000"
	few := ""
	for _, kind := range []string{"user", "mnt", "net", "pid", "ipc", "uts"} {
		most, found := m.number("proc/sys/user/max_" + kind + "_namespaces")
		switch {
		case found && most == 0:
			return fail(kind+" namespaces are switched off", fmt.Sprintf(sysctl, kind))
		case found && most < fewNamespaces:
			few = kind
		}
	}
	if err := m.namespaces(); err != nil {
		return fail("they cannot be made: "+err.Error(), "allow user, mount, network, PID, IPC and UTS namespaces; in a container run it privileged")
	}
	if few != "" {
		return warn("the machine may have few "+few+" namespaces, and a capsule needs several", fmt.Sprintf(sysctl, few))
	}
	return ok("of all kinds")
}

func platform(m machine, cfg Config) Finding {
	switch cfg.Platform {
	case "kvm":
		if err := m.open("/dev/kvm"); err != nil {
			return fail("/dev/kvm: "+err.Error(), "load the module kvm_intel or kvm_amd, allow nested virtualisation in the hypervisor, or use --platform systrap")
		}
	default:
		if m.read("proc/sys/kernel/yama/ptrace_scope") == "3" {
			return fail("the kernel forbids ptrace for everybody (kernel.yama.ptrace_scope is 3, which only a reboot can lower)", "set kernel.yama.ptrace_scope to 1 in /etc/sysctl.d and reboot")
		}
		if !strings.Contains(" "+m.read("proc/sys/kernel/seccomp/actions_avail")+" ", " trap ") {
			return fail("the kernel has no seccomp filters that trap", "use a kernel with CONFIG_SECCOMP_FILTER")
		}
	}
	return ok(cfg.Platform)
}

// network looks for what the way of capsules out needs.
func network(m machine, cfg Config) Finding {
	err := m.egress()
	const fix = "load the kernel modules nf_tables and nft_tproxy"
	switch {
	case err == nil:
		return ok("TPROXY works")
	case cfg.Egress:
		return fail("capsules could reach nothing outside: "+err.Error(), fix+", or start with --egress deny")
	}
	return warn("capsules reach nothing outside, also if their create asks for it: "+err.Error(), fix)
}

func memory(m machine, _ Config) Finding {
	text, _, _ := strings.Cut(m.field("proc/meminfo", "MemTotal:"), " ")
	kB, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return warn("its size cannot be read", "mount /proc")
	}
	detail := fmt.Sprintf("%d MiB", kB>>10)
	if m.read("proc/sys/vm/overcommit_memory") == "2" {
		return warn(detail+", and the kernel never overcommits it: sandboxes, which reserve much and use little, may not start", "sysctl -w vm.overcommit_memory=0")
	}
	if kB>>10 < littleMemoryMB {
		return warn(detail+" is little: a capsule has 512 MiB by default", "")
	}
	return ok(detail)
}

// File systems that a state directory should not be on (statfs(2)).
var (
	overNetwork = map[int64]string{unix.NFS_SUPER_MAGIC: "NFS", unix.SMB_SUPER_MAGIC: "SMB", unix.CIFS_SUPER_MAGIC: "CIFS", unix.SMB2_SUPER_MAGIC: "SMB"}
	inMemory    = map[int64]string{unix.TMPFS_MAGIC: "tmpfs", unix.RAMFS_MAGIC: "ramfs"}
)

func disk(m machine, cfg Config) Finding {
	at := existing(cfg.Dir)
	stat, err := m.disk(at)
	if err != nil {
		return fail(at+": "+err.Error(), "choose another --dir")
	}
	freeMB := stat.Bavail * uint64(stat.Bsize) >> 20
	detail := fmt.Sprintf("%d MiB are free at %s", freeMB, at)
	switch kind := stat.Type; {
	case stat.Flags&unix.ST_RDONLY != 0:
		return fail(at+" is read-only", "mount it for writing, or choose another --dir")
	case overNetwork[kind] != "":
		return fail(at+" is "+overNetwork[kind]+", on which neither SQLite nor the layers of capsules are safe", "choose a --dir on a local disk")
	case inMemory[kind] != "":
		return warn(at+" is "+inMemory[kind]+": all state is in memory, and lost at a reboot", "choose a --dir on a disk")
	case freeMB < littleDiskMB:
		return warn(detail, "make room, or choose a --dir on a larger disk")
	case stat.Files > 0 && stat.Ffree < fewInodes:
		return warn(fmt.Sprintf("only %d more files fit at %s", stat.Ffree, at), "remove files")
	}
	return ok(detail)
}

// existing returns the nearest directory around a path that is there.
func existing(path string) string {
	for {
		if _, err := os.Stat(path); err == nil || path == filepath.Dir(path) {
			return path
		}
		path = filepath.Dir(path)
	}
}

func stateDir(_ machine, cfg Config) Finding {
	dir, err := OpenStateDir(cfg.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return ok(cfg.Dir + " will be made")
	}
	if err != nil {
		return fail(err.Error(), "")
	}
	_ = dir.Close()
	return ok(cfg.Dir)
}

func openFiles(m machine, _ Config) Finding {
	most, err := m.openFiles()
	if err != nil {
		return warn(err.Error(), "")
	}
	if most < fewOpenFiles {
		return warn(fmt.Sprintf("a process may have %d, of which clients' connections take two fifths", most), "raise it: LimitNOFILE=1048576 in the systemd unit, or ulimit -n 1048576")
	}
	return ok(strconv.FormatUint(most, 10))
}

func kernelLimits(m machine, _ Config) Finding {
	for _, limit := range []struct {
		name string
		few  int64
		what string
	}{
		{"kernel.pid_max", fewPIDs, "a capsule has tens of threads on the host"},
		{"kernel.threads-max", fewPIDs, "a capsule has tens of threads on the host"},
		{"vm.max_map_count", fewMaps, "a sandbox maps memory in many pieces"},
		{"fs.inotify.max_user_watches", fewWatches, "each capsule is watched by one"},
	} {
		n, found := m.number("proc/sys/" + strings.ReplaceAll(limit.name, ".", "/"))
		if found && n < limit.few {
			return warn(fmt.Sprintf("%s is %d: %s", limit.name, n, limit.what), fmt.Sprintf("sysctl -w %s=%d", limit.name, limit.few))
		}
	}
	return ok("enough")
}

// template looks for what the template minimal is made of.
func template(m machine, _ Config) Finding {
	if _, err := os.Stat(filepath.Join(m.root, "usr/bin/sh")); err != nil {
		if _, err := os.Stat(filepath.Join(m.root, "bin/sh")); err != nil {
			return fail("there is no /bin/sh, and capsules are made of the host's programs", "use a Debian-like system")
		}
	}
	var missing []string
	for _, program := range []string{"bash", "python3", "git"} {
		if _, err := os.Stat(filepath.Join(m.root, "usr/bin", program)); err != nil {
			missing = append(missing, program)
		}
	}
	if len(missing) > 0 {
		return warn("capsules will be without "+list(missing)+", since they are made of the host's programs", "apt-get install "+strings.Join(missing, " "))
	}
	return ok("minimal, of the host's programs")
}

func list(names []string) string {
	slices.Sort(names)
	return strings.Join(names, ", ")
}
