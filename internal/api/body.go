package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/danielgtaylor/huma/v2"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/nestbox/nestbox"
)

// readJSON reads the whole body of a JSON operation, within a limit of size
// and time, before huma sees it. huma's own limit of time would stay on the
// connection and end requests that take long by right.
func (s *server) readJSON(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := s.readBody(w, r, s.cfg.MaxJSONBytes)
		if err == nil && len(body) > 0 {
			err = checkJSON(r.Header.Get("Content-Type"), body)
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
func (s *server) readBody(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	tooLarge := nestbox.Errorf(nestbox.CodeTooLarge, "request body is larger than %d bytes", limit)
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Now().Add(s.cfg.BodyTimeout)) // best effort: recorders have none
	defer func() { _ = rc.SetReadDeadline(time.Time{}) }()
	if r.ContentLength > limit {
		refuse(r, r.Body)
		return nil, tooLarge
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, limit+1))
	switch {
	case err != nil:
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "request body could not be read: %w", err)
	case int64(len(body)) > limit:
		discard(r.Body)
		return nil, tooLarge
	}
	return body, nil
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
	_, _ = io.CopyN(io.Discard, body, 256<<20)
}

// checkJSON refuses what is not meant as JSON, and text that is not UTF-8,
// which decoding would quietly replace. No content type, and the one that curl
// sends by itself, pass as JSON.
func checkJSON(contentType string, body []byte) error {
	if contentType != "" {
		media, _, err := mime.ParseMediaType(contentType)
		if err != nil {
			media = contentType
		}
		if media != "application/json" && media != "application/x-www-form-urlencoded" && !strings.HasSuffix(media, "+json") {
			return &errorBody{
				status: http.StatusUnsupportedMediaType,
				Detail: errorDetail{"invalid_request", fmt.Sprintf("Content-Type must be application/json, not %.80q", media)},
			}
		}
	}
	if !utf8.Valid(body) {
		return nestbox.Errorf(nestbox.CodeInvalid, "body: not valid UTF-8 after byte %d", validPrefix(body))
	}
	return checkNames(body)
}

// checkNames refuses what JSON allows and nobody means: a name twice in one
// object, and half of a surrogate pair. Other errors are left to decoding.
func checkNames(body []byte) error {
	_, err := jsontext.NewDecoder(bytes.NewReader(body)).ReadValue()
	if syntax, ok := errors.AsType[*jsontext.SyntacticError](err); ok && json.Valid(body) {
		return nestbox.Errorf(nestbox.CodeInvalid, "body: %s: %w", syntax.JSONPointer, syntax.Err)
	}
	return nil
}

func validPrefix(b []byte) int {
	n := 0
	for n < len(b) {
		r, size := utf8.DecodeRune(b[n:])
		if r == utf8.RuneError && size == 1 {
			break
		}
		n += size
	}
	return n
}

// unmarshalJSON is json.Unmarshal with errors that say where, and in the words
// of the wire rather than of Go.
func unmarshalJSON(data []byte, v any) error {
	err := json.Unmarshal(data, v)
	if syntax := (*json.SyntaxError)(nil); errors.As(err, &syntax) {
		before := data[:min(int(syntax.Offset), len(data))]
		line := bytes.Count(before, []byte("\n")) + 1
		column := len(before) - bytes.LastIndexByte(before, '\n') - 1
		return fmt.Errorf("invalid JSON at line %d, column %d: %s", line, column, syntax)
	}
	if wrong := (*json.UnmarshalTypeError)(nil); errors.As(err, &wrong) {
		return fmt.Errorf("%s: %.80s is out of range or of the wrong type", wrong.Field, wrong.Value)
	}
	return err
}

// decodeStrict decodes JSON that did not come through huma, with the checks
// that huma makes from T's tags.
func decodeStrict[T any](s *server, data []byte) (T, error) {
	var v T
	var loose any
	if err := unmarshalJSON(data, &loose); err != nil {
		return v, nestbox.Errorf(nestbox.CodeInvalid, "body: %w", err)
	}
	if err := checkNames(data); err != nil {
		return v, err
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
