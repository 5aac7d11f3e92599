// Package rpcerr maps errors to and from Connect, in one place for every RPC
// service of Nestbox.
//
// A *nestbox.Error keeps its exact code and its message over the wire. The
// text of any other error stays on the side where it happened.
//
// It may import the root package and Connect only.
package rpcerr

import (
	"context"
	"errors"
	"syscall"

	"connectrpc.com/connect/v2"

	"github.com/nestbox/nestbox"
)

// detailType names the error detail that carries the exact nestbox.Code as
// plain text: Connect has fewer codes than we have, and makes errors of its
// own, which have no such detail.
const detailType = "nestbox.Code"

// moreType is that of the detail that carries a nestbox.Detail.
const moreType = "nestbox.Detail"

var toConnect = map[nestbox.Code]connect.Code{
	nestbox.CodeInvalid:         connect.CodeInvalidArgument,
	nestbox.CodeUnauthenticated: connect.CodeUnauthenticated,
	nestbox.CodeDenied:          connect.CodePermissionDenied,
	nestbox.CodeNotFound:        connect.CodeNotFound,
	nestbox.CodeConflict:        connect.CodeAlreadyExists,
	nestbox.CodePrecondition:    connect.CodeAborted,
	nestbox.CodeInvalidState:    connect.CodeFailedPrecondition,
	nestbox.CodeTooLarge:        connect.CodeOutOfRange,
	nestbox.CodeExhausted:       connect.CodeResourceExhausted,
	nestbox.CodeUnavailable:     connect.CodeUnavailable,
	nestbox.CodeTimeout:         connect.CodeDeadlineExceeded,
	nestbox.CodeCanceled:        connect.CodeCanceled,
	nestbox.CodeUnsupported:     connect.CodeUnimplemented,
	nestbox.CodeGuest:           connect.CodeUnknown,
	nestbox.CodeInternal:        connect.CodeInternal,
}

// fromBare maps what Connect itself says, as opposed to our handlers: that a
// message is garbage or too large, that there is no such procedure. Any other
// bare code means that the peer is not well, or is not ours.
var fromBare = map[connect.Code]nestbox.Code{
	connect.CodeInvalidArgument:   nestbox.CodeInvalid,
	connect.CodeResourceExhausted: nestbox.CodeTooLarge,
	connect.CodeUnimplemented:     nestbox.CodeUnsupported,
	connect.CodeUnauthenticated:   nestbox.CodeUnauthenticated,
	connect.CodeDeadlineExceeded:  nestbox.CodeTimeout,
	connect.CodeCanceled:          nestbox.CodeCanceled,
}

// ToConnect returns err as a handler is to return it. An error that is neither
// a *nestbox.Error nor a context's becomes CodeInternal without its text, and so
// does one with a code that does not exist. It
// returns nil for nil.
func ToConnect(err error) error {
	if err == nil {
		return nil
	}
	code, message := nestbox.CodeInternal, "internal error"
	var detail nestbox.Detail
	if e, ok := errors.AsType[*nestbox.Error](err); ok {
		if _, known := toConnect[e.Code]; known {
			code, message, detail = e.Code, e.Message, e.Detail
		}
	} else if c := contextCode(err); c != "" {
		code, message = c, contextMessage(c)
	}
	wire := connect.NewError(toConnect[code], message).
		WithDetail(&connect.ErrorDetail{Type: detailType, Value: []byte(code)}).
		WithCause(err)
	if detail != "" {
		wire = wire.WithDetail(&connect.ErrorDetail{Type: moreType, Value: []byte(detail)})
	}
	return wire
}

// FromConnect returns an error of a Connect client as a *nestbox.Error: the
// one that the peer's handler returned; CodeCanceled or CodeTimeout if the
// caller's context ended; otherwise one with the code transport, because the
// peer failed, could not be reached, or was lost. A *nestbox.Error in err's
// chain, such as one of the dialer, is returned as it is. It returns nil for
// nil.
func FromConnect(err error, transport nestbox.Code) error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*nestbox.Error](err); ok {
		return e
	}
	wire, ok := errors.AsType[*connect.Error](err)
	if ok && wire.IsRemote() {
		return fromPeer(wire, transport)
	}
	if code := contextCode(err); code != "" {
		return &nestbox.Error{Code: code, Message: contextMessage(code), Err: err}
	}
	// Connect takes a connection that the peer has reset for a cancelled call.
	reset := errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
	if ok && !reset {
		switch code := fromBare[wire.Code()]; code {
		case nestbox.CodeCanceled, nestbox.CodeTimeout:
			return &nestbox.Error{Code: code, Message: contextMessage(code), Err: err}
		case nestbox.CodeUnauthenticated, nestbox.CodeTooLarge:
			return &nestbox.Error{Code: code, Message: wire.Message(), Err: err}
		}
	}
	return Lost(err, transport)
}

// Lost returns the error of a peer that failed, could not be reached, or was lost:
// IsLost tells. The cause, with its inner addresses, is for the log.
func Lost(cause error, transport nestbox.Code) error {
	return &nestbox.Error{Code: transport, Message: lostMessage(transport), Err: &lost{cause}}
}

// IsLost reports whether err is of a peer that failed, could not be reached, or was
// lost, as opposed to one that answered with an error.
func IsLost(err error) bool {
	_, is := errors.AsType[*lost](err)
	return is
}

type lost struct{ cause error }

func (l *lost) Error() string { return l.cause.Error() }
func (l *lost) Unwrap() error { return l.cause }

func fromPeer(wire *connect.Error, transport nestbox.Code) error {
	var e *nestbox.Error
	var detail nestbox.Detail
	for _, d := range wire.Details() {
		code := nestbox.Code(d.Value)
		switch _, known := toConnect[code]; {
		case d.Type == detailType && known && e == nil:
			e = &nestbox.Error{Code: code, Message: wire.Message(), Err: wire}
		case d.Type == moreType:
			detail = nestbox.Detail(d.Value)
		}
	}
	if e != nil {
		return e.Detailed(detail)
	}
	code, ok := fromBare[wire.Code()]
	if !ok {
		return Lost(wire, transport)
	}
	message := wire.Message()
	if message == "" {
		message = wire.Code().String()
	}
	return &nestbox.Error{Code: code, Message: message, Err: wire}
}

func contextCode(err error) nestbox.Code {
	switch {
	case errors.Is(err, context.Canceled):
		return nestbox.CodeCanceled
	case errors.Is(err, context.DeadlineExceeded):
		return nestbox.CodeTimeout
	}
	return ""
}

func contextMessage(code nestbox.Code) string {
	if code == nestbox.CodeTimeout {
		return "the request's time limit ran out"
	}
	return "the request was canceled"
}

// lostMessage says what a lost connection means to the caller.
func lostMessage(transport nestbox.Code) string {
	switch transport {
	case nestbox.CodeGuest:
		return "the capsule's daemon failed or cannot be reached"
	case nestbox.CodeUnavailable:
		return "the host failed or cannot be reached"
	}
	return "the other side failed or cannot be reached"
}
