package client

import (
	"fmt"

	"github.com/nestbox/nestbox"
)

// ExitError says that a process ended in another way than with status 0.
type ExitError struct {
	nestbox.Exit
	Stderr []byte // the beginning of standard error, from Cmd.Output
}

// Error says how the process ended, in the words of os/exec.
func (e *ExitError) Error() string {
	s := fmt.Sprintf("exit status %d", e.Code)
	if e.Signal != "" {
		s = "signal: " + e.Signal
	}
	switch e.Reason {
	case nestbox.ReasonTimeout:
		return s + " (its time limit ran out)"
	case nestbox.ReasonIdle:
		return s + " (it wrote nothing for too long)"
	case nestbox.ReasonOOM:
		return s + " (the capsule ran out of memory)"
	case nestbox.ReasonKilled:
		return s + " (killed)"
	}
	return s
}

func exitError(exit *nestbox.Exit, stderr *prefixWriter) error {
	if exit == nil || (exit.Code == 0 && exit.Signal == "") {
		return nil
	}
	e := &ExitError{Exit: *exit}
	if stderr != nil {
		e.Stderr = stderr.buf.Bytes()
	}
	return e
}

// GapError says that output was lost because it was not kept long enough: the
// bytes [From, To) of the output log.
type GapError struct{ From, To int64 }

// Error says what is missing.
func (e *GapError) Error() string {
	return fmt.Sprintf("%d bytes of output were lost: bytes %d to %d were no longer kept when they were to be read", e.To-e.From, e.From, e.To)
}
