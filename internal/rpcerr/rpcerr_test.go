package rpcerr

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect/v2"
	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
)

// codes are all of nestbox's.
var codes = []nestbox.Code{
	nestbox.CodeInvalid, nestbox.CodeUnauthenticated, nestbox.CodeDenied, nestbox.CodeNotFound,
	nestbox.CodeConflict, nestbox.CodePrecondition, nestbox.CodeInvalidState, nestbox.CodeTooLarge, nestbox.CodeExhausted,
	nestbox.CodeUnavailable, nestbox.CodeTimeout, nestbox.CodeCanceled, nestbox.CodeUnsupported,
	nestbox.CodeGuest, nestbox.CodeInternal,
}

// overWire returns err as a client gets it.
func overWire(t *testing.T, err error) error {
	t.Helper()
	var wire *connect.Error
	require.ErrorAs(t, err, &wire)
	require.False(t, wire.IsRemote())
	bare := connect.NewError(wire.Code(), wire.Message()).WithRemote()
	for _, d := range wire.Details() {
		bare = bare.WithDetail(d)
	}
	return bare
}

func requireError(t *testing.T, err error, code nestbox.Code) *nestbox.Error {
	t.Helper()
	var e *nestbox.Error
	require.ErrorAs(t, err, &e)
	require.Equal(t, code, e.Code, "%v", err)
	require.NotEmpty(t, e.Message)
	return e
}

func TestEveryCodeIsKept(t *testing.T) {
	t.Parallel()
	wires := map[connect.Code]bool{}
	for _, code := range codes {
		wire := ToConnect(fmt.Errorf("outer: %w", nestbox.Errorf(code, "what is wrong")))
		e := requireError(t, FromConnect(overWire(t, wire), nestbox.CodeGuest), code)
		require.Equal(t, "what is wrong", e.Message)
		wires[connect.CodeOf(wire)] = true
	}
	require.Len(t, wires, len(codes), "each code has a Connect code of its own")
	require.Len(t, toConnect, len(codes))
}

func TestNil(t *testing.T) {
	t.Parallel()
	require.NoError(t, ToConnect(nil))
	require.NoError(t, FromConnect(nil, nestbox.CodeGuest))
}

func TestNothingLeaks(t *testing.T) {
	t.Parallel()
	for _, err := range []error{
		errors.New("secret"),
		&nestbox.Error{Code: "made up", Message: "secret"},
		connect.NewError(connect.CodeNotFound, "secret").WithRemote(),
		&os.PathError{Op: "open", Path: "secret", Err: syscall.EIO},
	} {
		wire := ToConnect(err)
		require.NotContains(t, wire.Error(), "secret")
		require.ErrorIs(t, wire, err, "the cause stays for the log")
		e := requireError(t, FromConnect(overWire(t, wire), nestbox.CodeGuest), nestbox.CodeInternal)
		require.Equal(t, "internal error", e.Message)
	}
	require.Equal(t, nestbox.CodeTimeout, nestbox.CodeOf(FromConnect(overWire(t, ToConnect(context.DeadlineExceeded)), nestbox.CodeGuest)))
	require.Equal(t, nestbox.CodeCanceled, nestbox.CodeOf(FromConnect(overWire(t, ToConnect(context.Canceled)), nestbox.CodeGuest)))
}

func TestTransport(t *testing.T) {
	t.Parallel()
	reset := &net.OpError{Op: "read", Err: os.NewSyscallError("read", syscall.ECONNRESET)}
	for _, err := range []error{
		io.EOF,
		io.ErrUnexpectedEOF,
		reset,
		errors.New("dial 169.254.0.21: secret"),
		connect.NewError(connect.CodeUnavailable, "secret").WithCause(&net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}),
		connect.NewError(connect.CodeCanceled, "secret").WithCause(reset), // what Connect makes of a reset
		connect.NewError(connect.CodeInternal, "secret: protocol error"),
		connect.NewError(connect.CodeInvalidArgument, "secret: unmarshal"), // of an answer
		connect.NewError(connect.CodeUnavailable, "secret: 502").WithRemote(),
		connect.NewError(connect.CodeUnknown, "secret: panic").WithRemote(),
		connect.NewError(connect.CodeNotFound, "secret: no detail of ours").WithRemote(),
	} {
		for _, transport := range []nestbox.Code{nestbox.CodeGuest, nestbox.CodeUnavailable, nestbox.CodeInternal} {
			e := requireError(t, FromConnect(err, transport), transport)
			require.NotContains(t, e.Message, "secret")
			require.ErrorIs(t, e, err)
		}
	}
}

func TestCallersOwnEnd(t *testing.T) {
	t.Parallel()
	for _, err := range []error{
		context.Canceled,
		connect.NewError(connect.CodeCanceled, "x").WithCause(context.Canceled),
		connect.NewError(connect.CodeCanceled, "x").WithCause(net.ErrClosed),
	} {
		requireError(t, FromConnect(err, nestbox.CodeGuest), nestbox.CodeCanceled)
	}
	for _, err := range []error{
		context.DeadlineExceeded,
		connect.NewError(connect.CodeDeadlineExceeded, "x").WithCause(context.DeadlineExceeded),
		connect.NewError(connect.CodeDeadlineExceeded, "x").WithCause(os.ErrDeadlineExceeded),
	} {
		requireError(t, FromConnect(err, nestbox.CodeGuest), nestbox.CodeTimeout)
	}
}

func TestDialersErrorIsKept(t *testing.T) {
	t.Parallel()
	own := nestbox.Errorf(nestbox.CodeInvalidState, "capsule is not running")
	err := connect.NewError(connect.CodeUnavailable, "x").WithCause(&net.OpError{Op: "dial", Err: own})
	require.Equal(t, own, FromConnect(err, nestbox.CodeGuest))
}

// TestConnectsOwnVerdicts are what Connect's server says before a handler runs.
func TestConnectsOwnVerdicts(t *testing.T) {
	t.Parallel()
	for code, want := range map[connect.Code]nestbox.Code{
		connect.CodeInvalidArgument:   nestbox.CodeInvalid,
		connect.CodeResourceExhausted: nestbox.CodeTooLarge,
		connect.CodeUnimplemented:     nestbox.CodeUnsupported,
		connect.CodeUnauthenticated:   nestbox.CodeUnauthenticated,
	} {
		requireError(t, FromConnect(connect.NewError(code, "why").WithRemote(), nestbox.CodeGuest), want)
		requireError(t, FromConnect(connect.NewError(code, "").WithRemote(), nestbox.CodeGuest), want)
	}
	unauthenticated := connect.NewError(connect.CodeUnauthenticated, "HTTP status 401 Unauthorized")
	requireError(t, FromConnect(unauthenticated, nestbox.CodeGuest), nestbox.CodeUnauthenticated)
}

// TestFutureCode gets a code that this version does not know.
func TestFutureCode(t *testing.T) {
	t.Parallel()
	err := connect.NewError(connect.CodeInvalidArgument, "why").WithRemote().
		WithDetail(&connect.ErrorDetail{Type: detailType, Value: []byte("future")})
	requireError(t, FromConnect(err, nestbox.CodeGuest), nestbox.CodeInvalid)
}

func TestHTTP(t *testing.T) {
	t.Parallel()
	for _, code := range codes {
		w := httptest.NewRecorder()
		r := httptest.NewRequest(http.MethodPost, "/tunnel/80", nil)
		WriteHTTP(w, r, nestbox.Errorf(code, "what is \"wrong\""))
		res := w.Result()
		require.GreaterOrEqual(t, res.StatusCode, 400)
		e := requireError(t, ReadHTTP(res, nestbox.CodeGuest), code)
		require.Equal(t, "what is \"wrong\"", e.Message)
	}
	for _, body := range []string{"", "<html>", `{"code":5}`, `{"code":"not_found","details":[{"type":"nestbox.Code","value":"%"}]}`, `[`, "{}"} {
		res := &http.Response{Body: io.NopCloser(strings.NewReader(body))}
		requireError(t, ReadHTTP(res, nestbox.CodeGuest), nestbox.CodeGuest)
	}
}
