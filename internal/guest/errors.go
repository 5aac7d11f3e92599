package guest

import (
	"context"
	"errors"

	"github.com/nestbox/nestbox"
)

// ContentError returns what Files.Write answers when the reader of the new
// content fails with err: err itself if it has a code, else CodeTimeout or
// CodeCanceled, since content ends early when its sender does.
func ContentError(err error) error {
	if e, ok := errors.AsType[*nestbox.Error](err); ok {
		return e
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return &nestbox.Error{Code: nestbox.CodeTimeout, Message: "time ran out before all of the content was there", Err: err}
	}
	return &nestbox.Error{Code: nestbox.CodeCanceled, Message: "the content ended before all of it was there", Err: err}
}

// ContextError is the end of ctx as the contract wants it: CodeTimeout or
// CodeCanceled.
func ContextError(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return &nestbox.Error{Code: nestbox.CodeTimeout, Message: "time ran out", Err: ctx.Err()}
	}
	return &nestbox.Error{Code: nestbox.CodeCanceled, Message: "canceled by the caller", Err: ctx.Err()}
}
