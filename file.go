package nestbox

import (
	"strings"
	"time"
)

// FileType is what a directory entry is.
type FileType string

// The types. Devices, sockets and FIFOs are FileTypeOther.
const (
	FileTypeFile      FileType = "file"
	FileTypeDirectory FileType = "directory"
	FileTypeSymlink   FileType = "symlink"
	FileTypeOther     FileType = "other"
)

// FileInfo describes a directory entry itself, never what a symlink points to.
type FileInfo struct {
	Name          string
	Path          string // absolute, as asked for: symlinks on the way are not resolved
	Type          FileType
	Size          int64
	Mode          uint32 // permission bits with setuid, setgid and sticky
	Owner         string // name, or number if it has none
	Group         string
	ModifiedAt    time.Time
	SymlinkTarget string // of a symlink, as stored
}

// MaxPathBytes is Linux's PATH_MAX.
const MaxPathBytes = 4096

// MaxListDepth bounds how deep one listing descends; MaxListEntries how much it
// returns.
const (
	MaxListDepth   = 64
	MaxListEntries = 100_000
)

// ValidatePath reports, as CodeInvalid, a path that cannot be meant: not
// absolute, too long, or with a NUL byte.
func ValidatePath(p string) error {
	switch {
	case p == "":
		return Errorf(CodeInvalid, "path is required")
	case len(p) >= MaxPathBytes:
		return Errorf(CodeInvalid, "path is longer than %d bytes", MaxPathBytes-1)
	case strings.ContainsRune(p, 0):
		return Errorf(CodeInvalid, "path contains a NUL byte")
	case !strings.HasPrefix(p, "/"):
		return Errorf(CodeInvalid, "path %.80q is not absolute", p)
	}
	return nil
}
