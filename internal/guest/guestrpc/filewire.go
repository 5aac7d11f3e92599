package guestrpc

import (
	"unicode/utf8"

	"github.com/nestbox/nestbox"
	guestv1 "github.com/nestbox/nestbox/gen/nestbox/guest/v1"
)

// checkPath refuses a path that Protocol Buffers cannot carry.
func checkPath(path string) error {
	if !utf8.ValidString(path) {
		return nestbox.Errorf(nestbox.CodeInvalid, "path %.80q is not valid UTF-8", path)
	}
	return nil
}

func fileToWire(f nestbox.FileInfo) *guestv1.FileInfo {
	return &guestv1.FileInfo{
		Name:          f.Name,
		Path:          f.Path,
		Type:          string(f.Type),
		Size:          f.Size,
		Mode:          f.Mode,
		Owner:         f.Owner,
		Group:         f.Group,
		ModifiedAt:    timeToWire(f.ModifiedAt),
		SymlinkTarget: f.SymlinkTarget,
	}
}

func fileFromWire(f *guestv1.FileInfo) nestbox.FileInfo {
	return nestbox.FileInfo{
		Name:          f.GetName(),
		Path:          f.GetPath(),
		Type:          nestbox.FileType(f.GetType()),
		Size:          f.GetSize(),
		Mode:          f.GetMode(),
		Owner:         f.GetOwner(),
		Group:         f.GetGroup(),
		ModifiedAt:    timeFromWire(f.GetModifiedAt()),
		SymlinkTarget: f.GetSymlinkTarget(),
	}
}
