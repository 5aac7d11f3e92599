package api

import (
	"context"
	"net/http"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
	"github.com/nestbox/nestbox/internal/door"
)

const apiKeyHeader = "X-API-Key"

// errNoCredential has Wrenn's text.
var errNoCredential = nestbox.Errorf(nestbox.CodeUnauthenticated, "X-API-Key or Authorization: Bearer <token> required")

// credential returns the API key of a request: X-API-Key wins over
// Authorization: Bearer.
func credential(h http.Header) (secret string, ok bool) {
	if key := h.Get(apiKeyHeader); key != "" {
		return key, true
	}
	scheme, token, _ := strings.Cut(h.Get("Authorization"), " ")
	if token = strings.TrimSpace(token); strings.EqualFold(scheme, "Bearer") && token != "" {
		return token, true
	}
	return "", false
}

type callerKey struct{}

func callerOf(ctx context.Context) control.Caller {
	c, _ := ctx.Value(callerKey{}).(control.Caller)
	return c
}

// authenticate lets nobody pass without a valid API key.
func (s *server) authenticate(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		secret, ok := credential(r.Header)
		if !ok {
			s.fail(w, r, errNoCredential)
			return
		}
		caller, err := s.control.Keys.Authenticate(r.Context(), secret)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		ctx, leave, err := s.admit(r.Context(), caller, essential(r))
		if err != nil {
			s.fail(w, r, err)
			return
		}
		defer leave()
		// A body that is being read does not see the end of a context.
		rc := http.NewResponseController(w)
		defer context.AfterFunc(ctx, func() {
			_ = rc.SetReadDeadline(time.Now())
			door.CutBody(ctx)
		})()
		next.ServeHTTP(w, r.WithContext(context.WithValue(ctx, callerKey{}, caller)))
	})
}

// admit lets a known caller in, until leave is called, the context that it
// returns ends with the caller's key, or the server refuses: CodeExhausted.
func (s *server) admit(ctx context.Context, caller control.Caller, essential bool) (_ context.Context, leave func(), err error) {
	release, err := door.Admit(ctx, caller.TeamID, essential)
	if err != nil {
		return nil, nil, err
	}
	ctx, done := s.control.Keys.Hold(ctx, caller)
	ctx, giveBack := s.memory.Begin(ctx, caller.TeamID)
	return ctx, func() { giveBack(); done(); release() }, nil
}

// essential reports whether a request is for what must work while everything
// else is saturated: to see what there is, and to end it.
func essential(r *http.Request) bool {
	const capsules, one = "/v1/capsules", "/v1/capsules/{id}"
	switch pattern := chi.RouteContext(r.Context()).RoutePattern(); r.Method {
	case http.MethodGet:
		return pattern == capsules || pattern == one || pattern == one+"/processes"
	case http.MethodDelete:
		return pattern == one || pattern == one+"/processes/{selector}"
	}
	return false
}
