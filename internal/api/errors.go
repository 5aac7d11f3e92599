package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"syscall"

	"github.com/danielgtaylor/huma/v2"

	"github.com/nestbox/nestbox"
)

// errorBody is the body of every error, with the code names of Wrenn's API.
type errorBody struct {
	Detail errorDetail `json:"error"`
	status int
	cause  error // for the log
	logged bool  // already
}

type errorDetail struct {
	Code    string `json:"code" doc:"What kind of error it is, for programs" example:"not_found"`
	Message string `json:"message" doc:"What is wrong, for people" example:"capsule not found"`
	Detail  string `json:"detail,omitempty" enum:"no_such_program,not_executable,no_such_route" doc:"What is wrong more closely, for programs"`
}

func (e *errorBody) Error() string  { return e.Detail.Message }
func (e *errorBody) GetStatus() int { return e.status }

// failure is how a code looks on the wire.
type failure struct {
	status int
	code   string
}

// failures is the one table from codes to HTTP. An exhausted quota is 429; a
// full disk, also CodeExhausted, is 507: ENOSPC here, and diskFull of a capsule.
var failures = map[nestbox.Code]failure{
	nestbox.CodeInvalid:         {http.StatusBadRequest, "invalid_request"},
	nestbox.CodeUnauthenticated: {http.StatusUnauthorized, "unauthorized"},
	nestbox.CodeDenied:          {http.StatusForbidden, "forbidden"},
	nestbox.CodeNotFound:        {http.StatusNotFound, "not_found"},
	nestbox.CodeConflict:        {http.StatusConflict, "conflict"},
	nestbox.CodePrecondition:    {http.StatusPreconditionFailed, "precondition_failed"},
	nestbox.CodeInvalidState:    {http.StatusConflict, "invalid_state"},
	nestbox.CodeTooLarge:        {http.StatusRequestEntityTooLarge, "too_large"},
	nestbox.CodeExhausted:       {http.StatusTooManyRequests, "exhausted"},
	nestbox.CodeUnavailable:     {http.StatusServiceUnavailable, "host_unavailable"},
	nestbox.CodeTimeout:         {http.StatusGatewayTimeout, "timeout"},
	nestbox.CodeCanceled:        {statusClientClosedRequest, "canceled"},
	nestbox.CodeUnsupported:     {http.StatusNotImplemented, "unsupported"},
	nestbox.CodeGuest:           {http.StatusBadGateway, "agent_error"},
	nestbox.CodeInternal:        {http.StatusInternalServerError, "internal_error"},
}

// statusClientClosedRequest is nginx's status for a client that went away;
// nobody sees it but the log.
const statusClientClosedRequest = 499

// toBody turns any error into what the client sees. It is called once for each
// error, and logs what is the server's: the cause is for the operator.
func (s *server) toBody(ctx context.Context, err error) *errorBody {
	body := &errorBody{}
	if !errors.As(err, &body) {
		body = describeError(ctx, err)
	}
	if body.status < http.StatusInternalServerError || body.logged {
		return body
	}
	level := slog.LevelWarn
	if body.status == http.StatusInternalServerError || errors.Is(err, syscall.ENOSPC) {
		level = slog.LevelError
	}
	s.log.LogAttrs(ctx, level, "a request failed", requestAttr(ctx), slog.Int("status", body.status),
		slog.Any("error", err), slog.Any("cause", causeOf(err)))
	return body
}

func describeError(ctx context.Context, err error) *errorBody {
	code := nestbox.CodeOf(err)
	if code == nestbox.CodeInternal && ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return &errorBody{status: statusClientClosedRequest, Detail: errorDetail{Code: failures[nestbox.CodeCanceled].code, Message: "the client went away"}}
	}
	f, known := failures[code]
	if !known {
		f = failures[nestbox.CodeInternal]
	}
	if code == nestbox.CodeExhausted && errors.Is(err, syscall.ENOSPC) {
		f.status = http.StatusInsufficientStorage
	}
	return &errorBody{status: f.status, Detail: errorDetail{Code: f.code, Message: nestbox.MessageOf(err), Detail: string(nestbox.DetailOf(err))}}
}

// causeOf returns what the message of err does not say.
func causeOf(err error) error {
	if body := (*errorBody)(nil); errors.As(err, &body) {
		return body.cause
	}
	if e := (*nestbox.Error)(nil); errors.As(err, &e) {
		return e.Err
	}
	return nil
}

// fail answers a request of a route that huma does not serve.
func (s *server) fail(w http.ResponseWriter, r *http.Request, err error) {
	body := s.toBody(r.Context(), err)
	if body.status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", "Bearer")
	}
	h := w.Header()
	h.Del("Content-Length")
	h.Set("Content-Type", "application/json")
	w.WriteHeader(body.status)
	_ = json.NewEncoder(w).Encode(body) // the client went away: nobody is left to tell
}

// diskFull shows what a write to a full disk is: not a request too many.
func diskFull(err error) error {
	if nestbox.CodeOf(err) != nestbox.CodeExhausted {
		return err
	}
	return &errorBody{status: http.StatusInsufficientStorage, Detail: errorDetail{Code: "exhausted", Message: nestbox.MessageOf(err)}, cause: err}
}

func (s *server) notFound(w http.ResponseWriter, r *http.Request) {
	s.fail(w, r, nestbox.Errorf(nestbox.CodeNotFound, "no such route: %s %.200s", r.Method, r.URL.Path).Detailed(nestbox.DetailNoRoute))
}

func (s *server) methodNotAllowed(w http.ResponseWriter, r *http.Request) {
	allowed := s.methodsOf(r)
	w.Header().Set("Allow", strings.Join(allowed, ", "))
	s.fail(w, r, &errorBody{
		status: http.StatusMethodNotAllowed,
		Detail: errorDetail{Code: "invalid_request", Message: fmt.Sprintf("%s is not possible here; %s is", r.Method, strings.Join(allowed, " or "))},
	})
}

// configureHuma makes huma answer in our form and take field names as they are
// written. huma keeps this in package variables, so it is set once for all
// servers of the program.
var configureHuma = sync.OnceFunc(func() {
	huma.ValidateStrictCasing = true
	huma.NewError = func(status int, msg string, errs ...error) huma.StatusError {
		return newHumaError(status, msg, errs)
	}
})

// newHumaError turns what huma found wrong with a request into one message that
// says what and where, but repeats no values: they may be secret.
func newHumaError(status int, msg string, errs []error) *errorBody {
	switch {
	case status == http.StatusRequestEntityTooLarge:
		return &errorBody{status: status, Detail: errorDetail{Code: "too_large", Message: msg}}
	case status >= http.StatusInternalServerError:
		return &errorBody{status: status, Detail: errorDetail{Code: "internal_error", Message: "internal error"}}
	case status == http.StatusUnprocessableEntity:
		status = http.StatusBadRequest
	}
	const most = 5
	var what []string
	for _, err := range errs {
		if len(what) == most {
			what = append(what, fmt.Sprintf("and %d more", len(errs)-most))
			break
		}
		what = append(what, describe(err))
	}
	if len(what) > 0 {
		msg = strings.Join(what, "; ")
	}
	return &errorBody{status: status, Detail: errorDetail{Code: "invalid_request", Message: msg}}
}

func describe(err error) string {
	d := (*huma.ErrorDetail)(nil)
	if !errors.As(err, &d) {
		return err.Error()
	}
	if d.Location == "" {
		return d.Message
	}
	return d.Location + ": " + d.Message
}
