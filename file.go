package nestbox

import (
	"fmt"
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

// FileInfo describes a directory entry itself, never what a symlink points to. Its
// paths are as PathText has them.
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

// Version returns a text that changes when the content does, as far as size and
// modification time tell.
func (f FileInfo) Version() string {
	return fmt.Sprintf("%x-%x", f.ModifiedAt.UnixNano(), f.Size)
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
	case len(p) >= 4*MaxPathBytes, len(PathBytes(p)) >= MaxPathBytes:
		return Errorf(CodeInvalid, "path is longer than %d bytes", MaxPathBytes-1)
	case strings.ContainsRune(p, 0):
		return Errorf(CodeInvalid, "path contains a NUL byte")
	case !strings.HasPrefix(p, "/"):
		return Errorf(CodeInvalid, "path %.80q is not absolute", p)
	}
	return nil
}

// FileEventType is what has happened to a watched file.
type FileEventType string

// The types.
const (
	// FileCreate: it is new, or was moved here from where nothing is watched.
	FileCreate FileEventType = "create"
	// FileWrite: its content was changed, or all of it replaced through the API.
	FileWrite FileEventType = "write"
	// FileRemove: it is gone.
	FileRemove FileEventType = "remove"
	// FileRename: it has another name now, To, or is where nothing is watched.
	FileRename FileEventType = "rename"
	// FileChmod: its mode, owner or times were changed.
	FileChmod FileEventType = "chmod"
	// FileOverflow: more happened than is kept for a reader that is slow. What it
	// was is lost, so that the files have to be looked at again.
	FileOverflow FileEventType = "overflow"
)

// FileEvent is one change below a watched path.
type FileEvent struct {
	Type      FileEventType
	Path      string // below the path that is watched, as that was asked for; of an overflow it is that path
	To        string // of a rename: the new path, if it is watched too
	Directory bool   // it is a directory
}

// Compression is how an archive is compressed; "" = not at all.
type Compression string

// The compressions. What is unpacked says itself how it is compressed.
const (
	CompressionGzip Compression = "gzip"
	CompressionZstd Compression = "zstd"
)

// Unpacked is what came of unpacking an archive.
type Unpacked struct {
	Entries  int64    // files, directories and links
	Bytes    int64    // of content
	Warnings []string // what could not be made as it was, at most about a hundred
}
