package api

import (
	"context"
	"io/fs"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
	"github.com/nestbox/nestbox/internal/guest"
)

// fileEntry is a directory entry on the wire, as Wrenn has it.
type fileEntry struct {
	Name          string `json:"name"`
	Path          string `json:"path"`
	Type          string `json:"type" enum:"file,directory,symlink" doc:"Devices, sockets and FIFOs are shown as file"`
	Size          int64  `json:"size"`
	Mode          uint32 `json:"mode" doc:"Permission bits, with setuid, setgid and sticky"`
	Permissions   string `json:"permissions" example:"-rw-r--r--"`
	Owner         string `json:"owner"`
	Group         string `json:"group"`
	ModifiedAt    int64  `json:"modified_at" doc:"Unix seconds"`
	SymlinkTarget string `json:"symlink_target,omitempty"`
}

func toFileEntry(f nestbox.FileInfo) fileEntry {
	kind := f.Type
	if kind == nestbox.FileTypeOther {
		kind = nestbox.FileTypeFile // SDKs know these three only
	}
	return fileEntry{
		Name: f.Name, Path: f.Path, Type: string(kind), Size: f.Size, Mode: f.Mode, Permissions: permissions(f),
		Owner: f.Owner, Group: f.Group, ModifiedAt: f.ModifiedAt.Unix(), SymlinkTarget: f.SymlinkTarget,
	}
}

// permissions returns the mode as Go prints it, which is what E2B's and
// Wrenn's daemons do.
func permissions(f nestbox.FileInfo) string {
	mode := fs.FileMode(f.Mode & 0o777)
	for bit, m := range map[uint32]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if f.Mode&bit != 0 {
			mode |= m
		}
	}
	switch f.Type {
	case nestbox.FileTypeDirectory:
		mode |= fs.ModeDir
	case nestbox.FileTypeSymlink:
		mode |= fs.ModeSymlink
	}
	return mode.String()
}

type pathBody struct {
	Path string `json:"path" doc:"Absolute"`
}

type pathInput struct {
	CapsulePath
	Body pathBody
}

type listFilesBody struct {
	Path  string `json:"path" doc:"Absolute"`
	Depth int    `json:"depth,omitempty" minimum:"0" maximum:"64" doc:"Levels to descend; 0 = 1"`
}

type listFilesInput struct {
	CapsulePath
	Body listFilesBody
}

type fileList struct {
	Entries []fileEntry `json:"entries" nullable:"false"`
}

type oneFile struct {
	Entry fileEntry `json:"entry"`
}

type entryOutput struct {
	Body oneFile
}

func exampleFile() fileEntry {
	return fileEntry{
		Name: "a.txt", Path: "/root/a.txt", Type: "file", Size: 5, Mode: 0o644, Permissions: "-rw-r--r--",
		Owner: "root", Group: "root", ModifiedAt: exampleCapsule().CreatedAt.Unix(),
	}
}

func (s *server) registerFiles() {
	const tag = "Files"
	path := pathBody{Path: "/root/a.txt"}
	list := operation{
		id: "listFiles", method: http.MethodPost, path: "/v1/capsules/{id}/files/list", tag: tag,
		summary: "List a directory", about: "Sorted by path. Symlinks are not followed. At most 100,000 entries, else 413.",
		request: listFilesBody{Path: "/root", Depth: 1},
		errors:  append([]int{http.StatusRequestEntityTooLarge}, capsuleErrors...),
	}
	register(s, list, s.listFiles)
	s.documented(list).Responses["200"].Content = s.jsonContent(fileList{Entries: []fileEntry{exampleFile()}})
	register(s, operation{
		id: "statFile", method: http.MethodPost, path: "/v1/capsules/{id}/files/stat", tag: tag,
		summary: "Describe a file or directory",
		request: path, answer: oneFile{exampleFile()}, errors: capsuleErrors,
	}, func(ctx context.Context, caller control.Caller, in *pathInput) (*entryOutput, error) {
		return s.entry(ctx, caller, in, func(f guest.Files) (nestbox.FileInfo, error) { return f.Stat(ctx, in.Body.Path) })
	})
	register(s, operation{
		id: "makeDirectory", method: http.MethodPost, path: "/v1/capsules/{id}/files/mkdir", tag: tag,
		summary: "Make a directory", about: "And its missing parents. 409 `conflict` if the path exists.",
		request: pathBody{Path: "/root/src"}, errors: append([]int{http.StatusInsufficientStorage}, capsuleErrors...),
		answer: oneFile{fileEntry{
			Name: "src", Path: "/root/src", Type: "directory", Size: 4096, Mode: 0o755, Permissions: "drwxr-xr-x",
			Owner: "root", Group: "root", ModifiedAt: exampleFile().ModifiedAt,
		}},
	}, func(ctx context.Context, caller control.Caller, in *pathInput) (*entryOutput, error) {
		return s.entry(ctx, caller, in, func(f guest.Files) (nestbox.FileInfo, error) { return f.Mkdir(ctx, in.Body.Path) })
	})
	register(s, operation{
		id: "removeFile", method: http.MethodPost, path: "/v1/capsules/{id}/files/remove", tag: tag,
		summary: "Remove a file, or a directory with all that is in it", about: "Nothing there is no error.",
		status: http.StatusNoContent, request: path, errors: capsuleErrors,
	}, s.removeFile)
}

func (s *server) listFiles(ctx context.Context, caller control.Caller, in *listFilesInput) (*written, error) {
	f, err := s.files(ctx, caller, in.ID, in.Body.Path)
	if err != nil {
		return nil, err
	}
	list, err := f.List(ctx, in.Body.Path, max(in.Body.Depth, 1))
	if err != nil {
		return nil, err
	}
	return &written{Body: func(hc huma.Context) {
		w := beginJSON(hc, http.StatusOK)
		array(w, "entries", len(list), func(i int) fileEntry { return toFileEntry(list[i]) })
		_ = w.end() // the client may be gone
	}}, nil
}

func (s *server) entry(ctx context.Context, caller control.Caller, in *pathInput, do func(guest.Files) (nestbox.FileInfo, error)) (*entryOutput, error) {
	f, err := s.files(ctx, caller, in.ID, in.Body.Path)
	if err != nil {
		return nil, err
	}
	info, err := do(f)
	if err != nil {
		return nil, diskFull(err)
	}
	return &entryOutput{Body: oneFile{toFileEntry(info)}}, nil
}

func (s *server) removeFile(ctx context.Context, caller control.Caller, in *pathInput) (*nothing, error) {
	f, err := s.files(ctx, caller, in.ID, in.Body.Path)
	if err != nil {
		return nil, err
	}
	return nil, f.Remove(ctx, in.Body.Path)
}
