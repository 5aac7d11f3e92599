package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"runtime/debug"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"

	"github.com/nestbox/nestbox"
)

// requestIDHeader names a request in the answer and in the log. A client may
// choose it.
const requestIDHeader = "X-Request-Id"

var requestIDPattern = regexp.MustCompile(`^[a-zA-Z0-9._-]{1,64}$`)

type requestIDKey struct{}

func requestAttr(ctx context.Context) slog.Attr {
	id, _ := ctx.Value(requestIDKey{}).(string)
	return slog.String("request_id", id)
}

// observe gives each request an id, logs its outcome and answers for a handler
// that panics.
func (s *server) observe(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		id := r.Header.Get(requestIDHeader)
		if !requestIDPattern.MatchString(id) {
			id = nestbox.RandomHex(8)
		}
		w.Header().Set(requestIDHeader, id)
		r = r.WithContext(context.WithValue(r.Context(), requestIDKey{}, id))
		ww := middleware.NewWrapResponseWriter(w, r.ProtoMajor)
		defer func() {
			s.log.LogAttrs(r.Context(), slog.LevelDebug, "request", requestAttr(r.Context()),
				slog.String("method", r.Method), slog.String("path", r.URL.Path), slog.Int("status", ww.Status()),
				slog.Int("bytes", ww.BytesWritten()), slog.Duration("duration", time.Since(start)))
		}()
		defer func() {
			if v := recover(); v != nil {
				s.recovered(ww, r, v)
			}
		}()
		next.ServeHTTP(ww, r)
	})
}

// recovered answers for a handler that panicked. If a part of the answer is
// already out, the connection is broken off, so that nobody takes it for whole.
func (s *server) recovered(w middleware.WrapResponseWriter, r *http.Request, v any) {
	if err, ok := v.(error); ok && errors.Is(err, http.ErrAbortHandler) {
		panic(v)
	}
	s.log.LogAttrs(r.Context(), slog.LevelError, "panic", requestAttr(r.Context()),
		slog.Any("panic", v), slog.String("stack", string(debug.Stack())))
	if w.Status() != 0 {
		panic(http.ErrAbortHandler)
	}
	s.fail(w, r, &errorBody{
		status: http.StatusInternalServerError, logged: true,
		Detail: errorDetail{Code: "internal_error", Message: "internal error"},
	})
}

// abort breaks off an answer that cannot be completed, so that the client sees
// an error and not an end.
func (s *server) abort(r *http.Request, what string, err error) {
	if r.Context().Err() == nil {
		s.log.LogAttrs(r.Context(), slog.LevelWarn, what, requestAttr(r.Context()), slog.Any("error", fmt.Errorf("%w", err)))
	}
	panic(http.ErrAbortHandler)
}

// methodsOf returns the methods that the request's path has a route for.
func (s *server) methodsOf(r *http.Request) []string {
	var found []string
	path := r.URL.RawPath
	if path == "" {
		path = r.URL.Path
	}
	for _, m := range []string{http.MethodGet, http.MethodPut, http.MethodPost, http.MethodDelete} {
		if s.root.Match(chi.NewRouteContext(), m, path) {
			found = append(found, m)
		}
	}
	return found
}
