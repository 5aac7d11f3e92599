package envd

import (
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// owners knows the names of users and groups. It reads /etc/passwd and
// /etc/group again only when they have changed. The zero value is ready for
// use.
type owners struct {
	users  nameFile
	groups nameFile
}

// ownerNames are the names as they were at one time: a listing asks for them
// once and not for every entry.
type ownerNames struct{ users, groups map[uint32]string }

func (o *owners) names() ownerNames {
	return ownerNames{users: o.users.read("/etc/passwd"), groups: o.groups.read("/etc/group")}
}

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

// nameFile is a file with lines of the form name:password:number:….
type nameFile struct {
	mu    sync.Mutex
	mtime time.Time
	size  int64
	names map[uint32]string // replaced, never changed
}

// read returns the names by number; the first one counts. It returns the last
// ones known, or none, if the file cannot be read.
func (f *nameFile) read(path string) map[uint32]string {
	st, err := os.Stat(path)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil || f.names != nil && st.ModTime().Equal(f.mtime) && st.Size() == f.size {
		return f.names
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return f.names
	}
	names := map[uint32]string{}
	for line := range strings.Lines(string(content)) {
		fields := strings.SplitN(line, ":", 4)
		if len(fields) < 3 || fields[0] == "" {
			continue
		}
		id, err := strconv.ParseUint(fields[2], 10, 32)
		if _, known := names[uint32(id)]; err == nil && !known {
			names[uint32(id)] = validText(fields[0])
		}
	}
	f.names, f.mtime, f.size = names, st.ModTime(), st.Size()
	return names
}
