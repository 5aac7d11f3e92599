package guestrpc

import (
	"github.com/nestbox/nestbox"
	guestv1 "github.com/nestbox/nestbox/gen/nestbox/guest/v1"
	"github.com/nestbox/nestbox/internal/guest"
)

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

func writeOptionsToWire(o guest.WriteOptions) *guestv1.WriteFileHeader {
	return &guestv1.WriteFileHeader{
		Mode:       o.Mode,
		User:       o.User,
		ModifiedAt: timeToWire(o.ModifiedAt),
		Append:     o.Append,
		IfAbsent:   o.IfAbsent,
		IfVersion:  o.IfVersion,
	}
}

func writeOptionsFromWire(h *guestv1.WriteFileHeader) guest.WriteOptions {
	return guest.WriteOptions{
		Mode:       h.GetMode(),
		User:       h.GetUser(),
		ModifiedAt: timeFromWire(h.GetModifiedAt()),
		Append:     h.GetAppend(),
		IfAbsent:   h.GetIfAbsent(),
		IfVersion:  h.GetIfVersion(),
	}
}
