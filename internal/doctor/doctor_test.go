package doctor

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestThisMachine: the tests run where capsules do.
func TestThisMachine(t *testing.T) {
	t.Parallel()
	found := Examine(Config{Dir: filepath.Join(t.TempDir(), "state"), Platform: "systrap"})
	require.NoError(t, Err(found))
	require.NotEqual(t, Fail, Worst(found))
	names := map[string]bool{}
	for _, f := range found {
		require.NotEmpty(t, f.Detail, f.Check)
		names[f.Check] = true
	}
	require.Len(t, names, len(found), "each check has a name of its own")
}

// good is a machine that lacks nothing.
func good() (machine, map[string]string) {
	return machine{calls: calls{
			release:    func() (string, error) { return "6.1.0-56-amd64", nil },
			euid:       func() int { return 0 },
			groups:     func() error { return nil },
			namespaces: func() error { return nil },
			open:       func(string) error { return nil },
			disk: func(string) (unix.Statfs_t, error) {
				return unix.Statfs_t{Type: unix.EXT4_SUPER_MAGIC, Bsize: 4096, Bavail: 1 << 20, Files: 1 << 20, Ffree: 1 << 20}, nil
			},
			openFiles: func() (uint64, error) { return 1 << 20, nil },
			egress:    func() error { return nil },
		}}, map[string]string{
			"proc/self/status":                      "Name:\tx\nCapEff:\t000001ffffffffff\n",
			"proc/meminfo":                          "MemTotal:        8000000 kB\n",
			"proc/sys/vm/overcommit_memory":         "0\n",
			"proc/sys/kernel/yama/ptrace_scope":     "1\n",
			"proc/sys/kernel/seccomp/actions_avail": "kill_process kill_thread trap errno user_notif trace log allow\n",
			"proc/sys/user/max_user_namespaces":     "100000\n",
			"proc/sys/kernel/pid_max":               "4194304\n",
			"proc/sys/vm/max_map_count":             "65530\n",
			"proc/sys/fs/inotify/max_user_watches":  "65536\n",
			"sys/fs/cgroup/cgroup.controllers":      "cpu memory pids\n",
			"usr/bin/sh":                            "",
			"usr/bin/bash":                          "",
			"usr/bin/python3":                       "",
			"usr/bin/git":                           "",
		}
}

// TestFindings spoils one thing of a good machine at a time.
func TestFindings(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		check  func(machine, Config) Finding
		spoil  func(m *machine, files map[string]string)
		cfg    Config
		status Status
		detail string
		fix    string
	}{
		"old kernel": {check: kernel, spoil: func(m *machine, _ map[string]string) {
			m.release = func() (string, error) { return "5.10.0-30-amd64", nil }
		}, status: Fail, detail: "5.10.0-30", fix: "5.12"},
		"odd kernel name":      {check: kernel, spoil: func(m *machine, _ map[string]string) { m.release = func() (string, error) { return "custom", nil } }, status: OK, detail: "custom"},
		"no root":              {check: privileges, spoil: func(m *machine, _ map[string]string) { m.euid = func() int { return 1000 } }, status: Fail, detail: "user 1000", fix: "root"},
		"few capabilities":     {check: privileges, spoil: func(_ *machine, f map[string]string) { f["proc/self/status"] = "CapEff:\t00000000a80425fb\n" }, status: Fail, detail: "CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_SYS_PTRACE", fix: "privileged"},
		"no CAP_SYS_RESOURCE":  {check: privileges, spoil: func(_ *machine, f map[string]string) { f["proc/self/status"] = "CapEff:\t000001fffeffffff\n" }, status: Warn, detail: "CAP_SYS_RESOURCE"},
		"no /proc":             {check: privileges, spoil: func(_ *machine, f map[string]string) { delete(f, "proc/self/status") }, status: Warn, fix: "/proc"},
		"no control groups":    {check: controlGroups, spoil: func(m *machine, _ map[string]string) { m.groups = func() error { return errors.New("no pids") } }, status: Fail, detail: "no pids", fix: "cgroup_enable=memory"},
		"control groups v1":    {check: controlGroups, spoil: func(_ *machine, f map[string]string) { delete(f, "sys/fs/cgroup/cgroup.controllers") }, status: OK, detail: "version 1"},
		"namespaces off":       {check: namespaces, spoil: func(_ *machine, f map[string]string) { f["proc/sys/user/max_user_namespaces"] = "0" }, status: Fail, detail: "user", fix: "sysctl -w user.max_user_namespaces"},
		"few namespaces":       {check: namespaces, spoil: func(_ *machine, f map[string]string) { f["proc/sys/user/max_net_namespaces"] = "64" }, status: Warn, detail: "net", fix: "sysctl -w user.max_net_namespaces"},
		"forbidden namespaces": {check: namespaces, spoil: func(m *machine, _ map[string]string) { m.namespaces = func() error { return unix.EPERM } }, status: Fail, detail: "not permitted", fix: "privileged"},
		"no KVM":               {check: platform, spoil: func(m *machine, _ map[string]string) { m.open = func(string) error { return unix.ENOENT } }, cfg: Config{Platform: "kvm"}, status: Fail, detail: "/dev/kvm", fix: "systrap"},
		"no KVM is needed":     {check: platform, spoil: func(m *machine, _ map[string]string) { m.open = func(string) error { return unix.ENOENT } }, cfg: Config{Platform: "systrap"}, status: OK, detail: "systrap"},
		"no ptrace":            {check: platform, spoil: func(_ *machine, f map[string]string) { f["proc/sys/kernel/yama/ptrace_scope"] = "3" }, status: Fail, detail: "ptrace", fix: "reboot"},
		"no seccomp":           {check: platform, spoil: func(_ *machine, f map[string]string) { f["proc/sys/kernel/seccomp/actions_avail"] = "errno" }, status: Fail, detail: "seccomp"},
		"little memory":        {check: memory, spoil: func(_ *machine, f map[string]string) { f["proc/meminfo"] = "MemTotal: 500000 kB\n" }, status: Warn, detail: "488 MiB"},
		"no overcommitment":    {check: memory, spoil: func(_ *machine, f map[string]string) { f["proc/sys/vm/overcommit_memory"] = "2" }, status: Warn, fix: "vm.overcommit_memory=0"},
		"nearly full disk":     {check: disk, spoil: spoilDisk(func(s *unix.Statfs_t) { s.Bavail = 1 }), status: Warn, detail: "0 MiB", fix: "room"},
		"read-only disk":       {check: disk, spoil: spoilDisk(func(s *unix.Statfs_t) { s.Flags = unix.ST_RDONLY }), status: Fail, detail: "read-only"},
		"NFS":                  {check: disk, spoil: spoilDisk(func(s *unix.Statfs_t) { s.Type = unix.NFS_SUPER_MAGIC }), status: Fail, detail: "NFS", fix: "local disk"},
		"tmpfs":                {check: disk, spoil: spoilDisk(func(s *unix.Statfs_t) { s.Type = unix.TMPFS_MAGIC }), status: Warn, detail: "reboot"},
		"no inodes":            {check: disk, spoil: spoilDisk(func(s *unix.Statfs_t) { s.Ffree = 3 }), status: Warn, detail: "only 3 more files"},
		"no inodes at all":     {check: disk, spoil: spoilDisk(func(s *unix.Statfs_t) { s.Files, s.Ffree = 0, 0 }), status: OK, detail: "4096 MiB"}, // btrfs has none
		"no disk": {check: disk, spoil: func(m *machine, _ map[string]string) {
			m.disk = func(string) (s unix.Statfs_t, _ error) { return s, unix.EIO }
		}, status: Fail, detail: "input/output"},
		"no state directory": {check: stateDir, cfg: Config{Dir: "/nonexistent/x"}, status: OK, detail: "will be made"},
		"no directory":       {check: stateDir, cfg: Config{Dir: "/proc/version"}, status: Fail, detail: "no directory"},
		"few open files":     {check: openFiles, spoil: func(m *machine, _ map[string]string) { m.openFiles = func() (uint64, error) { return 1024, nil } }, status: Warn, detail: "1024", fix: "LimitNOFILE"},
		"few PIDs":           {check: kernelLimits, spoil: func(_ *machine, f map[string]string) { f["proc/sys/kernel/pid_max"] = "32768" }, status: Warn, detail: "32768", fix: "sysctl -w kernel.pid_max=100000"},
		"few maps":           {check: kernelLimits, spoil: func(_ *machine, f map[string]string) { f["proc/sys/vm/max_map_count"] = "1000" }, status: Warn, fix: "vm.max_map_count"},
		"few watches":        {check: kernelLimits, spoil: func(_ *machine, f map[string]string) { f["proc/sys/fs/inotify/max_user_watches"] = "128" }, status: Warn, fix: "fs.inotify.max_user_watches"},
		"TPROXY":             {check: network, cfg: Config{Egress: true}, status: OK, detail: "works"},
		"no TPROXY":          {check: network, cfg: Config{Egress: true}, spoil: func(m *machine, _ map[string]string) { m.egress = func() error { return unix.ENOENT } }, status: Fail, fix: "--egress deny"},
		"no TPROXY, no need": {check: network, spoil: func(m *machine, _ map[string]string) { m.egress = func() error { return unix.ENOENT } }, status: Warn, fix: "nft_tproxy"},
		"no programs":        {check: template, spoil: func(_ *machine, f map[string]string) { delete(f, "usr/bin/git"); delete(f, "usr/bin/python3") }, status: Warn, detail: "git, python3", fix: "apt-get install git python3"},
		"no shell":           {check: template, spoil: func(_ *machine, f map[string]string) { delete(f, "usr/bin/sh") }, status: Fail, detail: "/bin/sh"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m, files := good()
			if c.cfg.Platform == "" {
				c.cfg.Platform = "systrap"
			}
			if c.cfg.Dir == "" {
				c.cfg.Dir = t.TempDir()
			}
			look := func() Finding {
				m.root = t.TempDir()
				for path, text := range files {
					require.NoError(t, os.MkdirAll(filepath.Join(m.root, filepath.Dir(path)), 0o700))
					require.NoError(t, os.WriteFile(filepath.Join(m.root, path), []byte(text), 0o600))
				}
				return c.check(m, c.cfg)
			}
			if c.spoil != nil {
				require.Equal(t, OK, look().Status, "before it is spoilt")
				c.spoil(&m, files)
			}
			f := look()
			require.Equal(t, c.status, f.Status, f.String())
			require.Contains(t, f.Detail, c.detail)
			require.Contains(t, f.Fix, c.fix)
			require.Equal(t, c.status == Fail, Err([]Finding{f}) != nil)
		})
	}
}

func spoilDisk(f func(*unix.Statfs_t)) func(*machine, map[string]string) {
	return func(m *machine, _ map[string]string) {
		before := m.disk
		m.disk = func(path string) (unix.Statfs_t, error) {
			s, err := before(path)
			f(&s)
			return s, err
		}
	}
}

func TestWorst(t *testing.T) {
	t.Parallel()
	of := func(all ...Status) (found []Finding) {
		for _, s := range all {
			found = append(found, Finding{Check: "c", Status: s, Detail: string(s), Fix: "do"})
		}
		return found
	}
	require.Equal(t, OK, Worst(nil))
	require.Equal(t, Warn, Worst(of(OK, Warn, OK)))
	require.Equal(t, Fail, Worst(of(Warn, Fail, Warn)))
	err := Err(of(OK, Fail, Warn, Fail))
	require.Equal(t, 2, strings.Count(err.Error(), "c: fail; to mend it: do"))
}
