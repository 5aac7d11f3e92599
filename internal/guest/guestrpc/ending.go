package guestrpc

import (
	"errors"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/rpcerr"
)

// settleIn is how long after a connection was lost it may become known that the
// capsule has come to its end, which is then the better answer.
const settleIn = 500 * time.Millisecond

// fromWire returns what a call's error means to the caller.
func (c *Client) fromWire(err error) error { return c.explain(fromWire(err)) }

// explain returns why the client was closed, rather than what came of it.
func (c *Client) explain(err error) error {
	switch {
	case rpcerr.IsLost(err):
		c.settle()
	case nestbox.CodeOf(err) != nestbox.CodeCanceled && !errors.Is(err, errFrozen):
		return err // it was answered
	}
	return orContext(c.life, err)
}

// settle waits for the end of the client, but not for long.
func (c *Client) settle() {
	timer := time.NewTimer(settleIn)
	defer timer.Stop()
	select {
	case <-c.life.Done():
	case <-timer.C:
	}
}

// errFrozen marks what calls to a frozen daemon end with.
var errFrozen = errors.New("frozen")

// errUnresponsive is what looks at a daemon end with when it shows no life.
var errUnresponsive = &nestbox.Error{
	Code: nestbox.CodeTimeout, Message: "capsule is unresponsive: its daemon does not answer", Err: errFrozen,
}

// unresponsive is errUnresponsive, with the time since when.
func (c *Client) unresponsive() error {
	since := c.pulse.frozenSince()
	if since.IsZero() {
		return errUnresponsive
	}
	e := *errUnresponsive
	e.Message = "capsule is unresponsive: its daemon has not answered since " + since.UTC().Format(time.RFC3339)
	return &e
}
