package envd

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nestbox/nestbox"
)

// account is a user of the machine.
type account struct {
	name   string
	uid    uint32
	gid    uint32
	home   string
	shell  string
	groups []uint32 // supplementary
}

// credential returns what a process needs to become the user's, or nil if it
// is that already.
func (a account) credential() *syscall.Credential {
	if int(a.uid) == os.Geteuid() && int(a.gid) == os.Getegid() {
		own, err := os.Getgroups()
		same := err == nil && !slices.ContainsFunc(own, func(g int) bool { return g != int(a.gid) && !slices.Contains(a.groups, uint32(g)) })
		if same && !slices.ContainsFunc(a.groups, func(g uint32) bool { return !slices.Contains(own, int(g)) }) {
			return nil
		}
	}
	return &syscall.Credential{Uid: a.uid, Gid: a.gid, Groups: a.groups}
}

// accounts reads the machine's users. The files are parsed when they have
// changed, not for every start.
type accounts struct {
	dir string // "/etc"

	mu     sync.Mutex
	passwd fileVersion
	group  fileVersion
	byName map[string]account
	byUID  map[uint32]account // the first of each number, as getpwuid(3) has it
	member map[string][]uint32
}

// fileVersion tells two versions of a file apart.
type fileVersion struct {
	modified time.Time
	size     int64
	inode    uint64
}

func newAccounts(dir string) *accounts { return &accounts{dir: dir} }

// find returns the account with a name or number; "" is root. CodeInvalid if
// there is none.
func (a *accounts) find(user string) (account, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.refresh()
	if user == "" {
		user = "root"
	}
	acc, ok := a.byName[user]
	if !ok {
		if uid, err := strconv.ParseUint(user, 10, 32); err == nil {
			acc, ok = a.byUID[uint32(uid)]
		}
	}
	switch {
	case ok:
		acc.groups = a.member[acc.name]
		return acc, nil
	case user == "root" || user == "0": // also on a machine without /etc/passwd
		return account{name: "root", home: "/root", shell: "/bin/sh"}, nil
	}
	return account{}, nestbox.Errorf(nestbox.CodeInvalid, "user %.80q does not exist in the capsule", user)
}

func (a *accounts) refresh() {
	passwd, group := filepath.Join(a.dir, "passwd"), filepath.Join(a.dir, "group")
	if v := versionOf(passwd); a.byName == nil || v != a.passwd {
		a.passwd = v
		a.byName, a.byUID = parsePasswd(passwd)
	}
	if v := versionOf(group); a.member == nil || v != a.group {
		a.group = v
		a.member = parseGroup(group)
	}
}

func versionOf(path string) fileVersion {
	info, err := os.Stat(path)
	if err != nil {
		return fileVersion{}
	}
	return fileVersion{info.ModTime(), info.Size(), inodeOf(info)}
}

func inodeOf(info fs.FileInfo) uint64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Ino
	}
	return 0
}

// parsePasswd reads passwd(5) and skips what it does not understand.
func parsePasswd(path string) (map[string]account, map[uint32]account) {
	byName, byUID := map[string]account{}, map[uint32]account{}
	for _, f := range records(path, 7) {
		uid, err1 := strconv.ParseUint(f[2], 10, 32)
		gid, err2 := strconv.ParseUint(f[3], 10, 32)
		if err1 != nil || err2 != nil || f[0] == "" {
			continue
		}
		acc := account{name: f[0], uid: uint32(uid), gid: uint32(gid), home: f[5], shell: f[6]}
		if acc.home == "" {
			acc.home = "/"
		}
		if acc.shell == "" {
			acc.shell = "/bin/sh"
		}
		if _, ok := byName[acc.name]; !ok {
			byName[acc.name] = acc
		}
		if _, ok := byUID[acc.uid]; !ok {
			byUID[acc.uid] = acc
		}
	}
	return byName, byUID
}

// parseGroup reads group(5) and returns the groups that each user is a member
// of.
func parseGroup(path string) map[string][]uint32 {
	member := map[string][]uint32{}
	for _, f := range records(path, 4) {
		gid, err := strconv.ParseUint(f[2], 10, 32)
		if err != nil {
			continue
		}
		for name := range strings.SplitSeq(f[3], ",") {
			if name = strings.TrimSpace(name); name != "" && !slices.Contains(member[name], uint32(gid)) {
				member[name] = append(member[name], uint32(gid))
			}
		}
	}
	return member
}

// records returns the lines of a file that have the given number of fields.
func records(path string, fields int) [][]string {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	var all [][]string
	for line := range strings.Lines(string(data)) {
		if f := strings.Split(strings.TrimSpace(line), ":"); len(f) == fields {
			all = append(all, f)
		}
	}
	return all
}
