package envd

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"

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

// accounts reads the machine's users and groups. The files are parsed when they
// have changed, not for every start.
type accounts struct {
	dir       string // "/etc"
	user, cwd string // of processes that ask for none

	mu     sync.Mutex
	passwd fileVersion
	group  fileVersion
	byName map[string]account
	byUID  map[uint32]account // the first of each number, as getpwuid(3) has it
	member map[string][]uint32
	names  ownerNames // replaced, never changed
}

// ownerNames are the names of users and groups as they were at one time: a
// listing asks for them once and not for every entry.
type ownerNames struct{ users, groups map[uint32]string }

// user returns a user's name, or the number if it has none.
func (n ownerNames) user(uid uint32) string { return nameOrNumber(n.users, uid) }

// group returns a group's name, or the number if it has none.
func (n ownerNames) group(gid uint32) string { return nameOrNumber(n.groups, gid) }

func nameOrNumber(names map[uint32]string, id uint32) string {
	if name, ok := names[id]; ok {
		return name
	}
	return strconv.FormatUint(uint64(id), 10)
}

// fileVersion tells two versions of a file apart.
type fileVersion struct {
	modified time.Time
	size     int64
	inode    uint64
}

func newAccounts(dir string) *accounts { return &accounts{dir: dir} }

// find returns the account with a name or number; "" is root. CodeInvalid if
// there is none; CodeExhausted if the capsule has run out of what it takes to
// look.
func (a *accounts) find(name string) (account, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.refresh(); err != nil {
		return account{}, resourceError("look up the user", err)
	}
	if name == "" {
		name = "root"
	}
	acc, ok := a.byName[name]
	if !ok {
		if uid, err := strconv.ParseUint(name, 10, 32); err == nil {
			acc, ok = a.byUID[uint32(uid)]
		}
	}
	switch {
	case ok:
		acc.groups = a.member[acc.name]
		return acc, nil
	case name == "root" || name == "0": // also on a machine without /etc/passwd
		return account{name: "root", home: "/root", shell: "/bin/sh"}, nil
	}
	return account{}, nestbox.Errorf(nestbox.CodeInvalid, "user %.80q does not exist in the capsule", name)
}

// findToRun returns the account for a process: user or user:group, by name or number.
// Unlike find it also takes a number that has no account, which then is in the group
// root, as docker has it. A group that is given is the only one.
func (a *accounts) findToRun(name string) (account, error) {
	who, groupName, grouped := strings.Cut(name, ":")
	if grouped && who == "" {
		return account{}, nestbox.Errorf(nestbox.CodeInvalid, "user %.80q has no user before the colon", name)
	}
	acc, err := a.find(who)
	if nestbox.CodeOf(err) == nestbox.CodeInvalid && isID([]byte(who)) {
		uid, _ := strconv.ParseUint(who, 10, 32) // as isID has looked
		acc, err = account{name: who, uid: uint32(uid), home: "/", shell: "/bin/sh"}, nil
	}
	if err != nil || !grouped {
		return acc, err
	}
	acc.gid, err = a.findGroup(groupName)
	acc.groups = nil
	return acc, err
}

// findGroup returns the number of a group, by its name or number.
func (a *accounts) findGroup(name string) (uint32, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.refresh(); err != nil {
		return 0, resourceError("look up the group", err)
	}
	for gid, known := range a.names.groups {
		if known == name {
			return gid, nil
		}
	}
	if gid, err := strconv.ParseUint(name, 10, 32); err == nil && isID([]byte(name)) {
		return uint32(gid), nil
	}
	return 0, nestbox.Errorf(nestbox.CodeInvalid, "group %.80q does not exist in the capsule", name)
}

// owners returns the names of all users and groups.
func (a *accounts) owners() ownerNames {
	a.mu.Lock()
	defer a.mu.Unlock()
	_ = a.refresh() // else the names as they were
	return a.names
}

// refresh parses what has changed. It fails, and leaves what is known as it is,
// only when the machine has run out of something: files that are missing, or
// are none, have no entries.
func (a *accounts) refresh() error {
	passwd, group := filepath.Join(a.dir, "passwd"), filepath.Join(a.dir, "group")
	err := refreshFile(passwd, &a.passwd, a.byName == nil, user.ParsePasswd, a.setUsers, 2, 3)
	return errors.Join(err, refreshFile(group, &a.group, a.member == nil, user.ParseGroup, a.setGroups, 2))
}

func refreshFile[T any](path string, known *fileVersion, first bool, parse func(io.Reader) ([]T, error), set func([]T), numbers ...int) error {
	v, err := versionOf(path)
	if err != nil || !first && v == *known {
		return err
	}
	entries, err := readAccounts(path, parse, numbers...)
	if err != nil {
		return err
	}
	*known = v
	set(entries)
	return nil
}

// versionOf fails only as refresh does.
func versionOf(path string) (fileVersion, error) {
	info, err := os.Stat(path)
	switch {
	case outOf(err):
		return fileVersion{}, err
	case err != nil:
		return fileVersion{}, nil
	}
	return fileVersion{info.ModTime(), info.Size(), inodeOf(info)}, nil
}

func inodeOf(info fs.FileInfo) uint64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Ino
	}
	return 0
}

// setUsers takes over passwd(5). The first of each name and number counts.
func (a *accounts) setUsers(users []user.User) {
	a.byName, a.byUID = map[string]account{}, map[uint32]account{}
	a.names.users = map[uint32]string{}
	for _, u := range users {
		acc := account{name: u.Name, uid: uint32(u.Uid), gid: uint32(u.Gid), home: u.Home, shell: u.Shell}
		if acc.home == "" {
			acc.home = "/"
		}
		if acc.shell == "" {
			acc.shell = "/bin/sh"
		}
		if _, ok := a.byName[acc.name]; !ok {
			a.byName[acc.name] = acc
		}
		if _, ok := a.byUID[acc.uid]; !ok {
			a.byUID[acc.uid] = acc
			a.names.users[acc.uid] = strings.ToValidUTF8(acc.name, "\uFFFD")
		}
	}
}

// setGroups takes over group(5).
func (a *accounts) setGroups(groups []user.Group) {
	a.member, a.names.groups = map[string][]uint32{}, map[uint32]string{}
	for _, g := range groups {
		gid := uint32(g.Gid)
		if _, ok := a.names.groups[gid]; !ok {
			a.names.groups[gid] = strings.ToValidUTF8(g.Name, "\uFFFD")
		}
		for _, name := range g.List {
			name = strings.TrimSpace(name)
			if len(a.member[name]) < maxGroups && !slices.Contains(a.member[name], gid) {
				a.member[name] = append(a.member[name], gid)
			}
		}
	}
}

// Bounds of what is read: who is root inside can write anything there.
const (
	maxAccountFile = 4 << 20 // bytes
	maxGroups      = 1 << 10 // of one user
)

// readAccounts parses one of the two files; nothing if it is missing or no text
// file. It fails only as refresh does. The fields at numbers must be ids: the
// parser takes what is none for 0, which is root, so such lines are left out
// before.
func readAccounts[T any](path string, parse func(io.Reader) ([]T, error), numbers ...int) ([]T, error) {
	text, err := readAccountFile(path)
	if err != nil {
		if outOf(err) {
			return nil, err
		}
		return nil, nil
	}
	var sound bytes.Buffer
	for line := range bytes.Lines(text) {
		fields := bytes.Split(bytes.TrimSpace(line), []byte(":"))
		if len(fields[0]) > 0 && !slices.ContainsFunc(numbers, func(n int) bool { return n >= len(fields) || !isID(fields[n]) }) {
			sound.Write(append(bytes.TrimSpace(line), '\n'))
		}
	}
	all, err := parse(&sound)
	if err != nil {
		return nil, nil
	}
	return all, nil
}

func readAccountFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // it may be a FIFO
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(f, maxAccountFile))
}

// isID reports whether b is the number of a user or group. The largest of 32
// bits means "no change" to the kernel.
func isID(b []byte) bool {
	n, err := strconv.ParseUint(string(b), 10, 32)
	return err == nil && n < 1<<32-1
}
