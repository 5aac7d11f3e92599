package api

import (
	"context"
	"net/http"
	"strings"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
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
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, caller)))
	})
}
