package api

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"path"
	"strings"
	"unicode/utf16"

	"github.com/danielgtaylor/huma/v2"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// headerWarnings is a trailer: a JSON array of what could not be packed as it was.
const headerWarnings = "X-Archive-Warnings"

// maxTrailer bounds it, in bytes: clients do not take long ones.
const maxTrailer = 2 << 10

type getArchiveInput struct {
	CapsulePath
	Path        string `query:"path" required:"true" doc:"Absolute. One that ends in /. means what is in a directory" example:"/root/src"`
	Compression string `query:"compression" enum:"gzip,zstd" doc:"Empty = none"`
}

type putArchiveInput struct {
	CapsulePath
	Path                 string `query:"path" required:"true" doc:"Absolute: a directory, which is made if it is missing" example:"/root"`
	Owner                string `query:"owner" doc:"User who owns everything; empty = root"`
	CopyUIDGID           bool   `query:"copyUIDGID" doc:"Owners as in the archive, by their numbers"`
	NoOverwriteDirNonDir bool   `query:"noOverwriteDirNonDir" doc:"409 rather than that a file takes the place of a directory, or a directory that of a file"`
}

type unpackedBody struct {
	Entries  int64    `json:"entries" doc:"Files, directories and links"`
	Bytes    int64    `json:"bytes" doc:"Of content"`
	Warnings []string `json:"warnings" nullable:"false" doc:"What could not be made as it was"`
}

func (s *server) registerArchive() {
	const (
		tag = "Files"
		dir = "/v1/capsules/{id}/archive"
	)
	get := registerRaw(s, s.raw, operation{
		id: "getArchive", method: http.MethodGet, path: dir, tag: tag,
		summary: "Read a tree as a tar archive",
		about: "A file, a symlink itself, or a directory with all below it, under its own name; with `/.` at the end of the path, what is in the directory. " +
			"Modes, owners, times, symlinks, hard links and odd names are kept (POSIX pax format). What vanishes meanwhile is left out. " +
			"The trailer `X-Archive-Warnings`, a JSON array, tells what could not be packed as it was. An answer that breaks off is cut without its final chunk.",
		errors: append([]int{http.StatusNotImplemented}, capsuleErrors...),
		sample: `curl -H "X-API-Key: $NESTBOX_API_KEY" "$NESTBOX_URL/v1/capsules/$CAPSULE/archive?path=/root/src" | tar -x`,
	}, s.getArchive)
	get.Responses["200"].Content = archiveContent()
	get.Responses["200"].Headers = map[string]*huma.Header{
		headerWarnings: {Description: "Trailer", Schema: &huma.Schema{Type: huma.TypeString}},
	}
	put := registerRaw(s, s.raw, operation{
		id: "putArchive", method: http.MethodPut, path: dir, tag: tag, answer: unpackedBody{Entries: 3, Bytes: 1024, Warnings: []string{}},
		summary: "Unpack a tar archive into a directory",
		about: "Plain, or compressed by gzip or zstd, of any size. Nothing outside of the directory is made or changed: names that lead out of it are an error, as are " +
			"symlinks that do. A file that is there is replaced when the new one is whole. What was unpacked before an error stays, and the error says what that is.",
		errors: append([]int{http.StatusInsufficientStorage, http.StatusNotImplemented}, capsuleErrors...),
		sample: `tar -c src | curl -T - -H "X-API-Key: $NESTBOX_API_KEY" "$NESTBOX_URL/v1/capsules/$CAPSULE/archive?path=/root"`,
	}, s.putArchive)
	put.RequestBody = &huma.RequestBody{Required: true, Content: archiveContent()}
	put.Responses["200"].Content = s.jsonContent(unpackedBody{Entries: 3, Bytes: 1024, Warnings: []string{}})
}

func archiveContent() map[string]*huma.MediaType {
	return map[string]*huma.MediaType{"application/x-tar": {Schema: &huma.Schema{Type: huma.TypeString, Format: "binary"}}}
}

var archiveTypes = map[nestbox.Compression]string{
	"": "application/x-tar", nestbox.CompressionGzip: "application/gzip", nestbox.CompressionZstd: "application/zstd",
}

func (s *server) getArchive(w http.ResponseWriter, r *http.Request, in *getArchiveInput) error {
	files, err := s.files(r.Context(), callerOf(r.Context()), in.ID, in.Path)
	if err != nil {
		return err
	}
	opts := guest.PackOptions{Contents: strings.HasSuffix(in.Path, "/."), Compression: nestbox.Compression(in.Compression)}
	begun := false
	warnings, err := files.Pack(r.Context(), path.Clean(in.Path), opts, w, func() error {
		begun = true
		w.Header().Set("Content-Type", archiveTypes[opts.Compression])
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Trailer", headerWarnings)
		return http.NewResponseController(w).Flush()
	})
	switch {
	case err != nil && !begun:
		return err
	case err != nil:
		s.abort(r, "an archive broke off", err)
	case len(warnings) > 0:
		w.Header().Set(headerWarnings, warningsHeader(warnings))
	}
	return nil
}

// warningsHeader returns as many as there is room for, in ASCII.
func warningsHeader(warnings []string) string {
	list := []string{}
	text := ""
	for i, warning := range warnings {
		next := asciiJSON(append(list, warning))
		if len(next) > maxTrailer {
			return asciiJSON(append(list, fmt.Sprintf("and %d more", len(warnings)-i)))
		}
		list, text = append(list, warning), next
	}
	return text
}

func asciiJSON(list []string) string {
	raw, err := json.Marshal(list)
	if err != nil {
		return "[]" // strings can always be encoded
	}
	var b bytes.Buffer
	for _, r := range string(raw) {
		if r < 0x7f {
			b.WriteRune(r)
			continue
		}
		for _, unit := range utf16.Encode([]rune{r}) {
			fmt.Fprintf(&b, `\u%04x`, unit)
		}
	}
	return b.String()
}

func (s *server) putArchive(w http.ResponseWriter, r *http.Request, in *putArchiveInput) error {
	if in.Owner != "" && in.CopyUIDGID {
		return nestbox.Errorf(nestbox.CodeInvalid, "owner and copyUIDGID cannot be used together")
	}
	files, err := s.files(r.Context(), callerOf(r.Context()), in.ID, in.Path)
	if err != nil {
		return err
	}
	body := &source{ctx: r.Context(), Reader: s.patient(w, r)}
	done, err := files.Unpack(r.Context(), in.Path, body, guest.UnpackOptions{
		User: in.Owner, KeepOwners: in.CopyUIDGID, KeepKind: in.NoOverwriteDirNonDir,
	})
	if err := body.written(err); err != nil {
		return err
	}
	answer := unpackedBody{Entries: done.Entries, Bytes: done.Bytes, Warnings: append([]string{}, done.Warnings...)}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer) // the client may be gone
	return nil
}
