package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/meter"
)

// readJSON reads the whole body of a JSON operation, within a limit of size
// and time, before huma sees it. huma's own limit of time would stay on the
// connection and end requests that take long by right.
func (s *server) readJSON(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := s.readBody(w, r, s.cfg.MaxJSONBytes)
		if err == nil && len(body) > 0 {
			if err = checkContentType(r.Header.Get("Content-Type")); err == nil {
				err = takeDecoded(r.Context(), body)
			}
			r.Header.Set("Content-Type", "application/json")
		}
		if err != nil {
			s.fail(w, r, err)
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		next.ServeHTTP(w, r)
	})
}

// readBody reads a body of at most limit bytes.
func (s *server) readBody(w http.ResponseWriter, r *http.Request, limit int64) (body []byte, err error) {
	tooLarge := nestbox.Errorf(nestbox.CodeTooLarge, "request body is larger than %d bytes", limit)
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Now().Add(s.cfg.BodyTimeout)) // best effort: recorders have none
	defer func() {
		if err == nil {
			_ = rc.SetReadDeadline(time.Time{})
		}
	}()
	if r.ContentLength > limit {
		refuse(r, r.Body)
		return nil, tooLarge
	}
	body, err = readAll(r.Context(), r.Body, limit)
	switch {
	case errors.Is(err, errLonger):
		discard(r.Body)
		return nil, tooLarge
	case nestbox.CodeOf(err) == nestbox.CodeInternal:
		return nil, unread("request body could not be read", err)
	}
	return body, err
}

// unread is the error of a body that could not be read. What a connection says of
// itself, with its addresses, is for the log.
func unread(what string, err error) error {
	why := err.Error()
	switch op := (*net.OpError)(nil); {
	case errors.Is(err, os.ErrDeadlineExceeded):
		why = "it came too slowly"
	case errors.As(err, &op):
		why = "the connection broke"
	}
	return &nestbox.Error{Code: nestbox.CodeInvalid, Message: what + ": " + why, Err: err}
}

var errLonger = errors.New("it is longer than it may be")

// readAll reads at most limit bytes, and takes them from the request's memory as
// they come. errLonger: there are more.
func readAll(ctx context.Context, r io.Reader, limit int64) ([]byte, error) {
	buf := make([]byte, 0, 4<<10)
	for {
		if len(buf) == cap(buf) {
			more := min(2*int64(cap(buf)), limit+1)
			if more > meter.Small {
				if err := meter.Take(ctx, more-int64(cap(buf))); err != nil {
					return nil, err
				}
			}
			buf = append(make([]byte, 0, more), buf...)
		}
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		switch {
		case int64(len(buf)) > limit:
			return nil, errLonger
		case errors.Is(err, io.EOF):
			return buf, nil
		case err != nil:
			return nil, err
		}
	}
}

// takeDecoded takes what JSON needs once it is decoded.
func takeDecoded(ctx context.Context, body []byte) error {
	const valueCost = 112 // of an element of any type, and of what it is turned into
	if need := 2*int64(len(body)) + valueCost*int64(countValues(body)); need > meter.Small {
		return meter.Take(ctx, need)
	}
	return nil
}

// refuse discards a body that is refused for its length alone, unless the
// client waits for a word before it sends it.
func refuse(r *http.Request, body io.Reader) {
	if r.Header.Get("Expect") == "" {
		discard(body)
	}
}

// discard reads on for a while, so that a client that is still sending gets to
// read the answer rather than a reset connection.
func discard(body io.Reader) {
	_, _ = io.CopyN(io.Discard, body, 32<<20)
}

// checkContentType refuses what is not meant as JSON. No content type, and the
// one that curl sends by itself, pass as JSON.
func checkContentType(contentType string) error {
	if contentType == "" {
		return nil
	}
	media, _, err := mime.ParseMediaType(contentType)
	if err != nil {
		media = contentType
	}
	if media == "application/json" || media == "application/x-www-form-urlencoded" || strings.HasSuffix(media, "+json") {
		return nil
	}
	return &errorBody{
		status: http.StatusUnsupportedMediaType,
		Detail: errorDetail{Code: "invalid_request", Message: fmt.Sprintf("Content-Type must be application/json, not %.80q", media)},
	}
}

// maxJSONValues bounds how many names and values one body has. Each costs many
// times its length once it is decoded.
const maxJSONValues = 1 << 16

// unmarshalJSON decodes strictly: text must be UTF-8, no object may have a name
// twice, and names have one casing. Its errors say where, in the words of the
// wire rather than of Go, and repeat no values: they may be secret.
func unmarshalJSON(data []byte, v any) error {
	if n := countValues(data); n > maxJSONValues {
		return fmt.Errorf("more than %d values in the JSON", maxJSONValues)
	}
	err := json.Unmarshal(data, v)
	if syntax, ok := errors.AsType[*jsontext.SyntacticError](err); ok {
		before := data[:min(int(syntax.ByteOffset), len(data))]
		line := bytes.Count(before, []byte("\n")) + 1
		column := len(before) - bytes.LastIndexByte(before, '\n')
		return fmt.Errorf("invalid JSON at line %d, column %d: %s%w", line, column, inside(syntax.JSONPointer), syntax.Err)
	}
	if wrong, ok := errors.AsType[*json.SemanticError](err); ok {
		return fmt.Errorf("%sa %s is of the wrong type or out of range", inside(wrong.JSONPointer), wrong.JSONKind)
	}
	return err
}

// inside says which part of a body an error is about.
func inside(p jsontext.Pointer) string {
	if p == "" {
		return ""
	}
	return fmt.Sprintf("%.80s: ", strings.ReplaceAll(strings.TrimPrefix(string(p), "/"), "/", "."))
}

// countValues returns how many names and values JSON has at most, without
// decoding it: what stands between its brackets, colons and commas.
func countValues(data []byte) int {
	n, quoted := 1, false
	for i := 0; i < len(data); i++ {
		switch c := data[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case !quoted && (c == ',' || c == ':' || c == '[' || c == '{'):
			n++
		}
	}
	return n
}

// decodeStrict decodes JSON that did not come through huma, with the checks
// that huma makes from T's tags.
func decodeStrict[T any](s *server, data []byte) (T, error) {
	var v T
	var loose any
	if err := unmarshalJSON(data, &loose); err != nil {
		return v, nestbox.Errorf(nestbox.CodeInvalid, "body: %w", err)
	}
	registry := s.open.OpenAPI().Components.Schemas
	path, res := huma.NewPathBuffer(nil, 0), &huma.ValidateResult{}
	path.Push("body")
	huma.Validate(registry, s.schemas(v)[0], path, huma.ModeWriteToServer, loose, res)
	if len(res.Errors) > 0 {
		return v, newHumaError(http.StatusBadRequest, "", res.Errors)
	}
	if err := unmarshalJSON(data, &v); err != nil {
		return v, nestbox.Errorf(nestbox.CodeInvalid, "body: %w", err)
	}
	return v, nil
}
