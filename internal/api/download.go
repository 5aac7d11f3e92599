package api

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"

	"github.com/danielgtaylor/huma/v2"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

type getFileInput struct {
	CapsulePath
	Path string `query:"path" required:"true" doc:"Absolute" example:"/root/a.txt"`
}

func (s *server) registerDownload(path string) {
	const sample = `"X-API-Key: $NESTBOX_API_KEY" "$NESTBOX_URL/v1/capsules/$CAPSULE/files?path=/root/a.txt"`
	get := operation{
		id: "downloadFile", method: http.MethodGet, path: path, tag: "Files", summary: "Read a file",
		about: "With `Range`, a part of it (206). `ETag` and `Last-Modified` tell its version, for `If-Range`, `If-Match`, `If-None-Match`, " +
			"`If-Modified-Since` and `If-Unmodified-Since` (304 or 412), as RFC 9110 has it. Files of the kernel's, such as those of /proc, have no version and no parts.",
		errors: append([]int{http.StatusPreconditionFailed, http.StatusRequestedRangeNotSatisfiable}, capsuleErrors...),
		sample: "curl -H " + sample,
	}
	head := get
	head.id, head.method, head.summary, head.about = "headFile", http.MethodHead, "Describe a file as if it were read", "As downloadFile, without the content."
	head.sample = "curl -I -H " + sample
	for _, o := range []operation{get, head} {
		op := registerRaw(s, s.raw, o, s.getFile)
		op.Responses["200"].Headers = map[string]*huma.Header{
			"ETag":          {Schema: &huma.Schema{Type: huma.TypeString}},
			"Last-Modified": {Schema: &huma.Schema{Type: huma.TypeString}},
		}
		if o.method == http.MethodGet {
			op.Responses["200"].Content = binaryContent()
			op.Responses["206"] = &huma.Response{Description: http.StatusText(http.StatusPartialContent), Content: binaryContent()}
		}
		op.Responses["304"] = &huma.Response{Description: http.StatusText(http.StatusNotModified)}
	}
}

// getFile answers with a file, or a part of it.
func (s *server) getFile(w http.ResponseWriter, r *http.Request, in *getFileInput) error {
	files, err := s.files(r.Context(), callerOf(r.Context()), in.ID, in.Path)
	if err != nil {
		return err
	}
	file, err := openRanged(r.Context(), files, in.Path)
	if err != nil {
		return err
	}
	defer file.close()
	if file.info.Size == 0 && len(file.begun) > 0 { // of /proc, and longer than it says
		return s.sendContent(w, r, io.MultiReader(bytes.NewReader(file.begun), file.content), nestbox.FileInfo{})
	}
	fileHeader(w.Header())
	setVersion(w.Header(), file.info)
	answer := &fileAnswer{ResponseWriter: w}
	http.ServeContent(answer, r, "", file.info.ModifiedAt, file)
	if file.err != nil {
		s.abort(r, "file broke off", file.err)
	}
	switch answer.refused {
	case 0:
		return nil
	case http.StatusPreconditionFailed:
		return nestbox.Errorf(nestbox.CodePrecondition, "%s is not of the version that was asked for", in.Path)
	default:
		return &errorBody{status: answer.refused, Detail: errorDetail{Code: "invalid_request", Message: "there is no such part of " + in.Path}}
	}
}

// fileHeader sets what every answer that is a file's content has.
func fileHeader(h http.Header) {
	h.Set("Content-Type", "application/octet-stream")
	h.Set("X-Content-Type-Options", "nosniff")
}

// setVersion tells of which version a file is.
func setVersion(h http.Header, info nestbox.FileInfo) {
	h.Set("ETag", `"`+info.Version()+`"`)
	h.Set("Last-Modified", info.ModifiedAt.UTC().Format(http.TimeFormat))
}

// versionsOf returns those that an If-Match names.
func versionsOf(ifMatch string) ([]string, error) {
	var versions []string
	for tag := range strings.SplitSeq(ifMatch, ",") {
		tag = strings.TrimSpace(tag)
		switch bare := strings.Trim(tag, `"`); {
		case tag == "":
		case tag == "*", tag == `"`+bare+`"`:
			versions = append(versions, bare)
		default:
			return nil, nestbox.Errorf(nestbox.CodeInvalid, "If-Match must be *, or ETags as they were answered, not %.80q", tag)
		}
	}
	if len(versions) > guest.MaxVersions {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "If-Match has more than %d ETags", guest.MaxVersions)
	}
	return versions, nil
}

// fileAnswer is what http.ServeContent writes to. An error, whose text would not
// be JSON, is kept from the client, to be answered otherwise.
type fileAnswer struct {
	http.ResponseWriter
	refused int // its status
}

// WriteHeader implements http.ResponseWriter.
func (a *fileAnswer) WriteHeader(status int) {
	if status >= http.StatusBadRequest {
		a.refused = status
		return
	}
	a.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (a *fileAnswer) Write(p []byte) (int, error) {
	if a.refused != 0 {
		return len(p), nil
	}
	return a.ResponseWriter.Write(p)
}

// ReadFrom implements io.ReaderFrom, with a larger buffer than others.
func (a *fileAnswer) ReadFrom(r io.Reader) (int64, error) {
	return io.CopyBuffer(plainWriter{a}, r, make([]byte, copyBuffer))
}

// rangedFile is a file of a capsule that can be read from anywhere.
type rangedFile struct {
	open func(from int64) (io.ReadCloser, nestbox.FileInfo, error)
	info nestbox.FileInfo

	begun   []byte        // the file's first bytes
	content io.ReadCloser // nil = closed
	at      int64         // of the next byte of content
	want    int64         // of the next byte that is wanted
	err     error         // sticky
}

// openRanged opens a file. What cannot be read at all, as much of /proc, is an
// error here.
func openRanged(ctx context.Context, files guest.Files, path string) (*rangedFile, error) {
	f := &rangedFile{open: func(from int64) (io.ReadCloser, nestbox.FileInfo, error) { return files.Read(ctx, path, from) }}
	var err error
	if f.content, f.info, err = f.open(0); err != nil {
		return nil, err
	}
	f.begun, err = readSome(f.content, make([]byte, min(max(f.info.Size, 4<<10), firstRead)))
	if err != nil {
		f.close()
		return nil, err
	}
	f.at = int64(len(f.begun))
	return f, nil
}

const (
	firstRead = 64 << 10 // of a file, at most, before the answer begins
	skipMost  = 1 << 20  // of a file that is read on rather than opened elsewhere
)

// Seek implements io.Seeker.
func (f *rangedFile) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += f.want
	case io.SeekEnd:
		offset += f.info.Size
	}
	if offset < 0 {
		return 0, errors.New("an offset before the file")
	}
	f.want = offset
	return offset, nil
}

// Read implements io.Reader.
func (f *rangedFile) Read(p []byte) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	if f.want < int64(len(f.begun)) {
		n := copy(p, f.begun[f.want:])
		f.want += int64(n)
		return n, nil
	}
	if f.want >= f.info.Size {
		return 0, io.EOF
	}
	if f.err = f.goTo(f.want); f.err != nil {
		return 0, f.err
	}
	n, err := f.content.Read(p)
	f.at, f.want = f.at+int64(n), f.want+int64(n)
	if errors.Is(err, io.EOF) && f.want < f.info.Size {
		err = io.ErrUnexpectedEOF // it has become shorter
	}
	if err != nil && err != io.EOF {
		f.err = err
	}
	return n, err
}

// goTo makes want the next byte of content.
func (f *rangedFile) goTo(want int64) error {
	if f.content == nil || want < f.at || want > f.at+skipMost {
		f.close()
		content, info, err := f.open(want)
		f.at = want
		if nestbox.CodeOf(err) == nestbox.CodeUnsupported { // by an older daemon
			content, info, err = f.open(0)
			f.at = 0
		}
		if err != nil {
			return err
		}
		f.content = content
		if info.Version() != f.info.Version() {
			return nestbox.Errorf(nestbox.CodeConflict, "the file was changed while it was read")
		}
	}
	n, err := io.CopyN(io.Discard, f.content, want-f.at)
	f.at += n
	return err
}

func (f *rangedFile) close() {
	if f.content != nil {
		_ = f.content.Close()
		f.content = nil
	}
}
