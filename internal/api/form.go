package api

import (
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"os"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// formOverhead is more than a form can take beside its file.
const formOverhead = 1 << 20

// writeForm writes a file from a multipart form with the parts path and file.
// If path comes first, the file goes straight through; otherwise it is spooled
// to disk, never to memory. limit bounds the file; 0 = only if it is spooled.
func (s *server) writeForm(w http.ResponseWriter, r *http.Request, id string, limit int64) error {
	if _, err := s.control.Capsules.Guest(r.Context(), callerOf(r.Context()), id); err != nil {
		return err
	}
	media, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || media != "multipart/form-data" || params["boundary"] == "" {
		return &errorBody{
			status: http.StatusUnsupportedMediaType,
			Detail: errorDetail{Code: "invalid_request", Message: "Content-Type must be multipart/form-data with a boundary"},
		}
	}
	body := s.patient(w, r)
	if limit > 0 && r.ContentLength > limit+formOverhead {
		refuse(r, body)
		return fileTooLarge(limit)
	}
	u := &upload{s: s, r: r, id: id, limit: limit, parts: multipart.NewReader(body, params["boundary"])}
	defer u.cleanup()
	if err := u.run(); err != nil {
		if nestbox.CodeOf(err) == nestbox.CodeTooLarge {
			discard(body)
		}
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// upload is one multipart form on its way.
type upload struct {
	s     *server
	r     *http.Request
	id    string
	limit int64
	parts *multipart.Reader
	path  string
	spool *os.File // the file part, if it came first
}

func (u *upload) run() error {
	for {
		part, err := u.parts.NextPart()
		if errors.Is(err, io.EOF) {
			return u.missing()
		}
		if err != nil {
			return brokenForm(err)
		}
		switch part.FormName() {
		case "path":
			err = u.setPath(part)
		case "file":
			if u.path != "" {
				return u.write(&finalPart{part: u.limited(part, u.limit), rest: u.parts})
			}
			err = u.keep(part)
		default:
			err = nestbox.Errorf(nestbox.CodeInvalid, "unexpected form field %.80q: the fields are path and file", part.FormName())
		}
		if err != nil {
			return err
		}
		if u.path != "" && u.spool != nil {
			return u.write(&finalPart{part: u.spool, rest: u.parts})
		}
	}
}

func (u *upload) missing() error {
	if u.path == "" {
		return nestbox.Errorf(nestbox.CodeInvalid, "form field path is required")
	}
	return nestbox.Errorf(nestbox.CodeInvalid, "form field file is required")
}

func (u *upload) setPath(part *multipart.Part) error {
	b, err := io.ReadAll(io.LimitReader(part, nestbox.MaxPathBytes))
	if err != nil {
		return brokenForm(err)
	}
	if u.path != "" {
		return nestbox.Errorf(nestbox.CodeInvalid, "form field path was sent twice")
	}
	u.path = string(b)
	return nestbox.ValidatePath(u.path)
}

// keep spools the file part to disk.
func (u *upload) keep(part *multipart.Part) error {
	if u.spool != nil {
		return nestbox.Errorf(nestbox.CodeInvalid, "form field file was sent twice")
	}
	select {
	case u.s.spools <- struct{}{}:
	case <-u.r.Context().Done():
		return u.r.Context().Err()
	}
	f, err := os.CreateTemp(u.s.cfg.SpoolDir, "nestbox-upload-*")
	if err != nil {
		<-u.s.spools
		return fmt.Errorf("spool an upload: %w", err)
	}
	u.spool = f
	if err := os.Remove(f.Name()); err != nil { // gone with its last user, whatever happens
		return fmt.Errorf("spool an upload: %w", err)
	}
	src := &source{ctx: u.r.Context(), Reader: u.limited(part, u.s.cfg.MaxUploadBytes)}
	if _, err := io.CopyBuffer(plainWriter{f}, src, make([]byte, copyBuffer)); err != nil {
		if src.err != nil {
			return src.err
		}
		return fmt.Errorf("spool an upload: %w", err)
	}
	_, err = f.Seek(0, io.SeekStart)
	return err
}

func (u *upload) cleanup() {
	if u.spool != nil {
		_ = u.spool.Close()
		<-u.s.spools
	}
}

func (u *upload) write(from io.Reader) error {
	files, err := u.s.files(u.r.Context(), callerOf(u.r.Context()), u.id, u.path)
	if err != nil {
		return err
	}
	src := &source{ctx: u.r.Context(), Reader: from}
	_, err = files.Write(u.r.Context(), u.path, src, guest.WriteOptions{})
	return src.written(err)
}

// limited fails with CodeTooLarge after limit bytes; 0 = none.
func (u *upload) limited(r io.Reader, limit int64) io.Reader {
	if limit == 0 {
		return r
	}
	return &limitedReader{r: r, left: limit, limit: limit}
}

type limitedReader struct {
	r           io.Reader
	left, limit int64
}

func (l *limitedReader) Read(p []byte) (int, error) {
	if int64(len(p)) > l.left+1 {
		p = p[:l.left+1]
	}
	n, err := l.r.Read(p)
	if l.left -= int64(n); l.left < 0 {
		return 0, fileTooLarge(l.limit)
	}
	return n, err
}

// fileTooLarge has Wrenn's text.
func fileTooLarge(limit int64) error {
	return nestbox.Errorf(nestbox.CodeTooLarge, "file exceeds %d MB limit", limit>>20)
}

// finalPart is the last part of a form. It ends well only if the form does
// too, so that a form that is cut or goes on changes nothing.
type finalPart struct {
	part io.Reader
	rest *multipart.Reader
}

func (f *finalPart) Read(p []byte) (int, error) {
	n, err := f.part.Read(p)
	if !errors.Is(err, io.EOF) {
		return n, err
	}
	next, after := f.rest.NextPart()
	switch {
	case errors.Is(after, io.EOF):
		return n, io.EOF
	case after != nil:
		return n, brokenForm(after)
	default:
		return n, nestbox.Errorf(nestbox.CodeInvalid, "unexpected form field %.80q after path and file", next.FormName())
	}
}

func brokenForm(err error) error {
	return unread("the form is cut or malformed", err)
}
