package nestbox

import (
	"errors"
	"fmt"
)

// Code says what kind of failure an Error is. It decides the HTTP status, the
// Connect code and the exit code of the CLI; one table in each of internal/api
// and internal/rpcerr does the mapping.
type Code string

// The codes. CodeInternal is the zero meaning: an error without a code is
// internal, and its text is never shown to a client.
const (
	CodeInvalid         Code = "invalid"         // the caller sent something that can never work
	CodeUnauthenticated Code = "unauthenticated" // no credential, or an unknown one
	CodeDenied          Code = "denied"          // known caller, not allowed
	CodeNotFound        Code = "not_found"       // no such thing, or not the caller's
	CodeConflict        Code = "conflict"        // clashes with something that exists
	CodePrecondition    Code = "precondition"    // not as the caller demanded that it be
	CodeInvalidState    Code = "invalid_state"   // exists, but not in a state that allows this
	CodeTooLarge        Code = "too_large"       // over a size limit
	CodeExhausted       Code = "exhausted"       // a quota or a resource is used up; try later or free some
	CodeUnavailable     Code = "unavailable"     // a host or a store cannot be reached now
	CodeTimeout         Code = "timeout"         // a time limit ran out
	CodeCanceled        Code = "canceled"        // the caller went away
	CodeUnsupported     Code = "unsupported"     // known, but not built or not possible on this host
	CodeGuest           Code = "guest"           // the capsule's daemon failed or cannot be reached
	CodeInternal        Code = "internal"        // a defect or an unexpected failure of ours
)

// Detail tells errors of one Code apart.
type Detail string

// The details: of a program that was to be started.
const (
	DetailNoProgram     Detail = "no_such_program" // there is none, or not what interprets it
	DetailNoRoute       Detail = "no_such_route"   // of the API: it is not the capsule or file that is missing
	DetailNotExecutable Detail = "not_executable"  // it cannot be executed, or not by that user
)

// DetailOf returns the detail of the first Error in err's chain.
func DetailOf(err error) Detail {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Detail
	}
	return ""
}

// Detailed returns the error with a detail.
func (e *Error) Detailed(d Detail) *Error {
	e.Detail = d
	return e
}

// Error is the error of every Nestbox operation that knows what went wrong.
type Error struct {
	Code    Code
	Detail  Detail // what is wrong more closely, where a program may want to know; "" = nothing more
	Message string // for the caller: says what is wrong and, if possible, what would be right
	Err     error  // the cause, for errors.Is and the log; may be nil
}

// Error returns the message. The text of the cause is not repeated: Errorf
// with %w makes it part of the message, and a cause set by hand stays private
// to the log.
func (e *Error) Error() string { return e.Message }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Errorf makes an Error. A %w verb sets its cause, whose text is then part of
// the message.
func Errorf(code Code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Message: err.Error(), Err: errors.Unwrap(err)}
}

// MessageOf returns what the caller may get to see of err: the message of the first
// Error in its chain, unless that is internal. What wraps it was meant for the log.
func MessageOf(err error) string {
	var e *Error
	if !errors.As(err, &e) || e.Code == CodeInternal {
		return "internal error"
	}
	return e.Message
}

// CodeOf returns the code of the first Error in err's chain, CodeInternal if
// there is none, and "" for nil.
func CodeOf(err error) Code {
	if err == nil {
		return ""
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return CodeInternal
}
