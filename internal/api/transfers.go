package api

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/door"
	"github.com/nestbox/nestbox/internal/guest"
)

// copyBuffer is the size of the pieces in which files are handed on.
const copyBuffer = 256 << 10

type putFileInput struct {
	CapsulePath
	Path        string `query:"path" required:"true" doc:"Absolute" example:"/root/a.txt"`
	Mode        string `query:"mode" doc:"Permission bits, in octal; empty = those of the file that is there, 0644 of a new one" example:"0755"`
	User        string `query:"user" doc:"Owner, also of directories that are made; empty = that of the file that is there, else root"`
	ModifiedAt  string `query:"modified_at" doc:"When it was modified: Unix seconds, which may have a fraction; empty = now" example:"1700000000.5"`
	Append      bool   `query:"append" doc:"Add to the end of the file, which readers see as it comes. An upload that breaks off adds nothing"`
	IfMatch     string `header:"If-Match" doc:"412 unless the file is there with one of these ETags; * = with any"`
	IfNoneMatch string `header:"If-None-Match" doc:"*: 412 if something is there"`
	// What cannot be kept must not look as if it were.
	IfUnmodifiedSince string `header:"If-Unmodified-Since" hidden:"true"`
	ContentRange      string `header:"Content-Range" hidden:"true"`
}

func (s *server) registerTransfers() {
	const (
		tag = "Files"
		dir = "/v1/capsules/{id}/files"
	)
	writeErrors := append([]int{http.StatusRequestEntityTooLarge, http.StatusInsufficientStorage}, capsuleErrors...)
	form := `curl -X POST -H "X-API-Key: $NESTBOX_API_KEY" -F path=/root/a.txt -F file=@a.txt "$NESTBOX_URL/v1/capsules/$CAPSULE/files/`
	for _, o := range []operation{
		{
			id: "writeFile", path: dir + "/write", summary: "Write a file of up to 100 MiB", sample: form + `write"`,
			about: "The parts `path` and `file` may come in either order. The file is replaced when all of it is there; missing parents are made.",
		},
		{
			id: "streamWriteFile", path: dir + "/stream/write", summary: "Write a file of any size", sample: form + `stream/write"`,
			about: "As writeFile, but a file whose `path` part comes first has no size limit.",
		},
	} {
		limit := s.cfg.MaxUploadBytes
		if o.id == "streamWriteFile" {
			limit = 0
		}
		o.method, o.tag, o.status, o.errors = http.MethodPost, tag, http.StatusNoContent, writeErrors
		op := registerRaw(s, s.raw, o, func(w http.ResponseWriter, r *http.Request, in *CapsulePath) error {
			return s.writeForm(w, r, in.ID, limit)
		})
		op.RequestBody = &huma.RequestBody{Required: true, Content: map[string]*huma.MediaType{"multipart/form-data": {Schema: formSchema()}}}
	}
	for _, o := range []operation{
		{id: "readFile", path: dir + "/read", summary: "Read a file"},
		{id: "streamReadFile", path: dir + "/stream/read", summary: "Read a file in chunks", about: "As readFile, but never with a Content-Length."},
	} {
		o.method, o.tag, o.request, o.errors = http.MethodPost, tag, pathBody{Path: "/root/a.txt"}, capsuleErrors
		op := registerRaw(s, s.json, o, func(w http.ResponseWriter, r *http.Request, in *pathInput) error {
			return s.sendFile(w, r, in.ID, in.Body.Path, o.id == "readFile")
		})
		op.Responses["200"].Content = binaryContent()
	}
	put := registerRaw(s, s.raw, operation{
		id: "uploadFile", method: http.MethodPut, path: dir, tag: tag, status: http.StatusNoContent,
		errors:  append([]int{http.StatusPreconditionFailed, http.StatusNotImplemented}, writeErrors...),
		summary: "Write a file from the plain body",
		about: "Of any size. The file is replaced when all of it is there; missing parents are made. An existing file keeps its owner and mode unless others are asked for. " +
			"The answer has the new file's `ETag` and `Last-Modified`.",
		sample: `curl -T a.txt -H "X-API-Key: $NESTBOX_API_KEY" "$NESTBOX_URL/v1/capsules/$CAPSULE/files?path=/root/a.txt"`,
	}, s.putFile)
	put.RequestBody = &huma.RequestBody{Required: true, Content: binaryContent()}
	s.registerDownload(dir)
}

func formSchema() *huma.Schema {
	return &huma.Schema{
		Type: huma.TypeObject,
		Properties: map[string]*huma.Schema{
			"path": {Type: huma.TypeString, Description: "Absolute", Examples: []any{"/root/a.txt"}},
			"file": {Type: huma.TypeString, Format: "binary"},
		},
		Required: []string{"path", "file"},
	}
}

// sendFile answers with the content of a file, as those operations do that are
// POST. What breaks off midway breaks off the connection.
func (s *server) sendFile(w http.ResponseWriter, r *http.Request, id, path string, sized bool) error {
	files, err := s.files(r.Context(), callerOf(r.Context()), id, path)
	if err != nil {
		return err
	}
	content, info, err := files.Read(r.Context(), path, 0)
	if err != nil {
		return err
	}
	defer func() { _ = content.Close() }()
	if !sized {
		info = nestbox.FileInfo{}
	}
	return s.sendContent(w, r, content, info)
}

// sendContent answers with content, which has the length that info says; 0 = it is
// not known.
func (s *server) sendContent(w http.ResponseWriter, r *http.Request, content io.Reader, info nestbox.FileInfo) error {
	// What cannot be read at all, as much of /proc, is said as an error should be.
	buf := make([]byte, copyBuffer)
	begun, err := readSome(content, buf)
	if err != nil {
		return err
	}
	fileHeader(w.Header())
	sized := info.Size > 0 // files of /proc are longer than they say
	if sized {
		w.Header().Set("Content-Length", strconv.FormatInt(info.Size, 10))
		begun = begun[:min(int64(len(begun)), info.Size)]
		content = io.LimitReader(content, info.Size-int64(len(begun)))
	}
	_, err = w.Write(begun)
	var n int64
	if err == nil {
		n, err = io.CopyBuffer(plainWriter{w}, content, buf)
	}
	if err == nil && sized && int64(len(begun))+n < info.Size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		s.abort(r, "file broke off", err)
	}
	return nil
}

// readSome returns the beginning of what r has, or why there is none; nothing is
// no error.
func readSome(r io.Reader, buf []byte) ([]byte, error) {
	for {
		n, err := r.Read(buf)
		if n > 0 || errors.Is(err, io.EOF) {
			return buf[:n], nil // an error comes again
		}
		if err != nil {
			return nil, err
		}
	}
}

// plainWriter hides ReadFrom, whose buffer is small.
type plainWriter struct{ io.Writer }

func (s *server) putFile(w http.ResponseWriter, r *http.Request, in *putFileInput) error {
	opts, err := in.options()
	if err != nil {
		return err
	}
	files, err := s.files(r.Context(), callerOf(r.Context()), in.ID, in.Path)
	if err != nil {
		return err
	}
	body := &source{ctx: r.Context(), Reader: s.patient(w, r), length: r.ContentLength}
	info, err := files.Write(r.Context(), in.Path, body, opts)
	if err := body.written(err); err != nil {
		return err
	}
	setVersion(w.Header(), info)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// options returns what the parameters and headers ask for.
func (in *putFileInput) options() (guest.WriteOptions, error) {
	opts := guest.WriteOptions{User: in.User, Append: in.Append}
	for name, value := range map[string]string{"If-Unmodified-Since": in.IfUnmodifiedSince, "Content-Range": in.ContentRange} {
		if value != "" {
			return opts, nestbox.Errorf(nestbox.CodeInvalid, "%s is not possible here; If-Match and append are", name)
		}
	}
	switch strings.TrimSpace(in.IfNoneMatch) {
	case "":
	case "*":
		opts.IfAbsent = true
	default:
		return opts, nestbox.Errorf(nestbox.CodeInvalid, "If-None-Match of a write must be *")
	}
	var err error
	if opts.Mode, err = parseMode(in.Mode); err != nil {
		return opts, err
	}
	if opts.ModifiedAt, err = parseSeconds(in.ModifiedAt); err != nil {
		return opts, err
	}
	opts.IfVersion, err = versionsOf(in.IfMatch)
	return opts, err
}

// parseSeconds reads Unix seconds that may have a fraction; "" = zero.
func parseSeconds(text string) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	whole, fraction, _ := strings.Cut(text, ".")
	sec, err := strconv.ParseInt(whole, 10, 64)
	nsec, fractionErr := strconv.ParseUint((fraction + "000000000")[:9], 10, 64)
	if err != nil || fractionErr != nil || len(fraction) > 9 || sec < 0 || sec > maxSeconds {
		return time.Time{}, nestbox.Errorf(nestbox.CodeInvalid, "modified_at must be Unix seconds, such as 1700000000.5, not %.40q", text)
	}
	return time.Unix(sec, int64(nsec)).UTC(), nil
}

// maxSeconds is the end of the year 2499: what lies behind it no file is believed
// to have.
const maxSeconds = 16725225599

func parseMode(text string) (uint32, error) {
	if text == "" {
		return 0, nil
	}
	mode, err := strconv.ParseUint(text, 8, 32)
	if err != nil || mode > 0o7777 {
		return 0, nestbox.Errorf(nestbox.CodeInvalid, "mode must be octal, up to 7777, not %.40q", text)
	}
	return uint32(mode), nil
}

// source is what a file is written from. It remembers its own failure, which
// says more than that of the write that it made fail.
type source struct {
	io.Reader
	ctx    context.Context //nolint:containedctx // of the request
	length int64           // that it is said to have; 0 or less = not known
	err    error

	mu      sync.Mutex
	stopped *time.Timer // not nil once it was stopped
	done    bool
}

// Len implements guest.Sized, as long as nothing was read.
func (s *source) Len() int {
	if s.length <= 0 {
		return -1
	}
	return int(s.length)
}

// restIn is how long a body that nobody wants any more may go on coming: a client
// that is cut off at once would not see the answer.
const restIn = 500 * time.Millisecond

// Stop implements guest.Stopper.
func (s *source) Stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped == nil && !s.done {
		s.stopped = time.AfterFunc(restIn, func() { door.CutBody(s.ctx) })
	}
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	if err != nil && err != io.EOF {
		if nestbox.CodeOf(err) == nestbox.CodeInternal {
			err = unread("upload broke off", err)
		}
		s.err = err
	}
	return n, err
}

// written returns why a write from the source failed, if it did.
func (s *source) written(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done = true
	if s.stopped != nil {
		s.stopped.Stop()
	}
	if err != nil && s.err != nil && s.stopped == nil {
		return s.err
	}
	return diskFull(err)
}

// patient returns the body with a time limit for each read, so that an upload
// may take long but not stall for ever.
func (s *server) patient(w http.ResponseWriter, r *http.Request) io.Reader {
	return &patientReader{ctx: r.Context(), body: r.Body, rc: http.NewResponseController(w), timeout: s.cfg.BodyTimeout}
}

type patientReader struct {
	ctx     context.Context //nolint:containedctx // of the request
	body    io.Reader
	rc      *http.ResponseController
	timeout time.Duration
}

func (p *patientReader) Read(b []byte) (int, error) {
	_ = p.rc.SetReadDeadline(time.Now().Add(p.timeout)) // best effort: recorders have none
	if p.ctx.Err() != nil {                             // whose end has set a deadline that this has replaced
		return 0, p.ctx.Err()
	}
	n, err := p.body.Read(b)
	switch {
	case errors.Is(err, io.EOF):
		_ = p.rc.SetReadDeadline(time.Time{})
	case err != nil:
		_ = p.rc.SetReadDeadline(time.Now()) // the server would wait for the rest of it
	}
	return n, err
}
