package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"

	"github.com/nestbox/nestbox"
)

// Error is a failed request. It wraps the *nestbox.Error that tells what went
// wrong: nestbox.CodeOf and errors.As work through it.
type Error struct {
	Status   int    // HTTP status; 0 if there was no answer, or the error came over a stream
	WireCode string // code as the API wrote it, such as "not_found"; may be empty
	Err      *nestbox.Error

	unsent bool // the request surely did not reach the server
}

// Error returns the message of the API.
func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns the *nestbox.Error.
func (e *Error) Unwrap() error { return e.Err }

// wireCodes is how the API's code names translate. Codes that are not here are
// judged by the HTTP status.
var wireCodes = map[string]nestbox.Code{
	"invalid_request":     nestbox.CodeInvalid,
	"unauthorized":        nestbox.CodeUnauthenticated,
	"forbidden":           nestbox.CodeDenied,
	"not_found":           nestbox.CodeNotFound,
	"conflict":            nestbox.CodeConflict,
	"precondition_failed": nestbox.CodePrecondition,
	"invalid_state":       nestbox.CodeInvalidState,
	"too_large":           nestbox.CodeTooLarge,
	"exhausted":           nestbox.CodeExhausted,
	"no_hosts_available":  nestbox.CodeExhausted,
	"host_unavailable":    nestbox.CodeUnavailable,
	"timeout":             nestbox.CodeTimeout,
	"canceled":            nestbox.CodeCanceled,
	"unsupported":         nestbox.CodeUnsupported,
	"agent_error":         nestbox.CodeGuest,
	"internal_error":      nestbox.CodeInternal,
}

// statusCodes is how a status translates whose body has no code known here,
// as when it comes from a proxy.
var statusCodes = map[int]nestbox.Code{
	http.StatusBadRequest:            nestbox.CodeInvalid,
	http.StatusUnauthorized:          nestbox.CodeUnauthenticated,
	http.StatusForbidden:             nestbox.CodeDenied,
	http.StatusNotFound:              nestbox.CodeNotFound,
	http.StatusMethodNotAllowed:      nestbox.CodeUnsupported,
	http.StatusRequestTimeout:        nestbox.CodeTimeout,
	http.StatusConflict:              nestbox.CodeConflict,
	http.StatusPreconditionFailed:    nestbox.CodePrecondition,
	http.StatusRequestEntityTooLarge: nestbox.CodeTooLarge,
	http.StatusUnprocessableEntity:   nestbox.CodeInvalid,
	http.StatusTooManyRequests:       nestbox.CodeExhausted,
	http.StatusNotImplemented:        nestbox.CodeUnsupported,
	http.StatusBadGateway:            nestbox.CodeUnavailable,
	http.StatusServiceUnavailable:    nestbox.CodeUnavailable,
	http.StatusGatewayTimeout:        nestbox.CodeTimeout,
	http.StatusInsufficientStorage:   nestbox.CodeExhausted,
}

// maxErrorBody is how much of an error answer is read.
const maxErrorBody = 64 << 10

// responseError reads an answer that is no success.
func responseError(res *http.Response) error {
	var body struct {
		Error struct {
			Code    string         `json:"code"`
			Message string         `json:"message"`
			Detail  nestbox.Detail `json:"detail"`
		} `json:"error"`
	}
	raw, _ := io.ReadAll(io.LimitReader(res.Body, maxErrorBody))
	if err := json.Unmarshal(raw, &body); err != nil || body.Error.Message == "" {
		return newError(res.StatusCode, body.Error.Code, fmt.Sprintf("server answered %s: %s", res.Status, firstLine(raw)))
	}
	return newError(res.StatusCode, body.Error.Code, body.Error.Message).detailed(body.Error.Detail)
}

func (e *Error) detailed(d nestbox.Detail) *Error {
	e.Err.Detail = d
	return e
}

// newError makes the error for an HTTP status (0 = none) and a wire code.
func newError(status int, wireCode, message string) *Error {
	code, ok := wireCodes[wireCode]
	if !ok {
		code, ok = statusCodes[status]
	}
	if status == http.StatusNotImplemented {
		code = nestbox.CodeUnsupported // "agent_error" too, in the API this one is compatible with
	}
	if !ok {
		code = nestbox.CodeInternal
	}
	return &Error{Status: status, WireCode: wireCode, Err: &nestbox.Error{Code: code, Message: message}}
}

func firstLine(b []byte) string {
	line, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
	return fmt.Sprintf("%.200q", line)
}

// connectionError is what a request ends with that got no answer.
func (c *Client) connectionError(err error, sent bool) *Error {
	message := fmt.Sprintf("cannot reach %s: %v", c.base.Redacted(), rootCause(err))
	if sent {
		message = fmt.Sprintf("the connection to %s broke before the answer came, so the request may or may not have been carried out: %v",
			c.base.Redacted(), rootCause(err))
	}
	return &Error{unsent: !sent, Err: &nestbox.Error{Code: nestbox.CodeUnavailable, Message: message, Err: err}}
}

// rootCause strips the method and URL that net/http puts before the cause.
func rootCause(err error) error {
	for {
		next := errors.Unwrap(err)
		if _, ok := err.(interface{ Timeout() bool }); next == nil || !ok {
			return err
		}
		if _, ok := err.(*net.OpError); ok {
			return err
		}
		err = next
	}
}

// notSent reports whether a failed request surely did not reach the server:
// there was no connection.
func notSent(err error) bool {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return true
	}
	var dns *net.DNSError
	return errors.As(err, &dns)
}
