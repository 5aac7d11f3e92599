package guestrpc

import (
	"context"
	"errors"
	"regexp"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/nestbox/nestbox"
	guestv1 "github.com/nestbox/nestbox/gen/nestbox/guest/v1"
	"github.com/nestbox/nestbox/internal/rpcerr"
)

// This file is where what a daemon says becomes ours: nothing of it is believed
// that cannot be.

// protocolError says that the daemon broke the contract.
func protocolError(format string, args ...any) error {
	e := nestbox.Errorf(nestbox.CodeGuest, format, args...)
	e.Message = "the capsule's daemon broke the protocol: " + e.Message
	return e
}

// guestCodes are the codes that a daemon may answer. Who is who, who has left and
// what is wrong with the server is not for it to say.
var guestCodes = map[nestbox.Code]bool{
	nestbox.CodeInvalid:      true,
	nestbox.CodeNotFound:     true,
	nestbox.CodeConflict:     true,
	nestbox.CodePrecondition: true,
	nestbox.CodeInvalidState: true,
	nestbox.CodeTooLarge:     true,
	nestbox.CodeExhausted:    true,
	nestbox.CodeUnavailable:  true,
	nestbox.CodeTimeout:      true,
	nestbox.CodeUnsupported:  true,
	nestbox.CodeGuest:        true,
}

var guestDetails = map[nestbox.Detail]bool{"": true, nestbox.DetailNoProgram: true, nestbox.DetailNotExecutable: true}

// maxErrorText bounds what is shown of a daemon's message.
const maxErrorText = 1 << 10

// fromWire returns what a call's error means to the caller.
func fromWire(err error) error {
	if _, known := err.(*nestbox.Error); known || err == nil {
		return err // it did not come from the daemon
	}
	if errors.Is(err, context.Canceled) { // the caller left, whatever came of it
		return rpcerr.FromConnect(err, nestbox.CodeGuest)
	}
	return believe(rpcerr.FromConnect(err, nestbox.CodeGuest))
}

// believe returns of a daemon's error what it may say.
func believe(err error) error {
	e, ok := err.(*nestbox.Error)
	if !ok || guestCodes[e.Code] && guestDetails[e.Detail] && len(e.Message) <= maxErrorText && printable(e.Message) {
		return err
	}
	clean := *e
	if !guestDetails[e.Detail] {
		clean.Detail = ""
	}
	clean.Message = cleanText(e.Message, maxErrorText)
	if !guestCodes[e.Code] {
		clean.Code, clean.Message = nestbox.CodeGuest, "the capsule's daemon failed: "+clean.Message
	}
	return &clean
}

func printable(s string) bool { return !strings.ContainsFunc(s, unprintable) }

func unprintable(r rune) bool {
	return r != '\n' && r != '\t' && unicode.IsControl(r) || r == utf8.RuneError
}

// cleanText returns s with at most most bytes, and nothing in it that a
// terminal or a log takes for more than text.
func cleanText(s string, most int) string {
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return strings.Map(func(r rune) rune {
		if unprintable(r) {
			return '\uFFFD'
		}
		return r
	}, s)
}

// Bounds of a daemon's words and numbers.
const (
	maxNameBytes    = 256 // of a user, a group or a version
	maxFeatureCount = 64
	maxPID          = 1<<31 - 1
	maxOffset       = 1 << 60
)

// Times that are possible; a capsule's clock may be wrong by years.
var (
	earliest = time.Date(1970, 1, 1, 0, 0, 0, 0, time.UTC)
	latest   = time.Date(2500, 1, 1, 0, 0, 0, 0, time.UTC)
)

func checkInfo(r *guestv1.PingResponse) error {
	if len(r.GetVersion()) > maxNameBytes || !printable(r.GetVersion()) || len(r.GetFeatures()) > maxFeatureCount {
		return protocolError("a version or features that cannot be")
	}
	return checkTime("the start of the daemon", r.GetStartedAt())
}

func checkTime(what string, t *timestamppb.Timestamp) error {
	if t == nil {
		return nil
	}
	if at := t.AsTime(); t.CheckValid() != nil || at.Before(earliest) || at.After(latest) {
		return protocolError("%s is no possible time", what)
	}
	return nil
}

// checkProcess refuses a record that cannot be of any process.
func checkProcess(p *guestv1.Process) error {
	switch {
	case p == nil:
		return protocolError("an answer without a process")
	case p.GetId() != 0 && !nestbox.ProcessID(p.GetId()).Valid():
		return protocolError("%d is no process id", p.GetId())
	case p.GetPid() <= 0:
		return protocolError("%d is no PID", p.GetPid())
	case !nestbox.ValidTag(p.GetTag()):
		return protocolError("%.80q is no tag", p.GetTag())
	case p.GetCmd() == "" || len(p.GetCmd()) > nestbox.MaxCmdBytes || len(p.GetCwd()) > maxPathText || len(p.GetUser()) > maxNameBytes:
		return protocolError("a process with a command, directory or user that cannot be")
	case len(p.GetArgs()) > nestbox.MaxArgs:
		return protocolError("a process with %d arguments", len(p.GetArgs()))
	case p.GetStartedAt() == nil:
		return protocolError("a process without a start")
	}
	if t := p.GetTerminal(); t != nil && terminalFromWire(t).Validate() != nil {
		return protocolError("a terminal that cannot be")
	}
	if err := checkTime("the start of a process", p.GetStartedAt()); err != nil {
		return err
	}
	if p.GetExit() != nil {
		if err := checkExit(p.GetExit()); err != nil {
			return err
		}
	}
	return checkOutput(p.GetOutput())
}

func checkOutput(o *guestv1.OutputState) error {
	if o == nil {
		return protocolError("a process without a log")
	}
	for _, n := range []int64{o.GetStart(), o.GetEnd(), o.GetStdout(), o.GetStderr(), o.GetPty()} {
		if n < 0 || n > maxOffset {
			return protocolError("%d is no offset", n)
		}
	}
	if o.GetStart() > o.GetEnd() || o.GetStdout()+o.GetStderr()+o.GetPty() != o.GetEnd() {
		return protocolError("the offsets of a log contradict each other")
	}
	return nil
}

var signalName = regexp.MustCompile(`^(SIG[A-Z0-9+-]{1,12})?$`)

var exitReasons = map[nestbox.ExitReason]bool{
	nestbox.ReasonExited:    true,
	nestbox.ReasonSignalled: true,
	nestbox.ReasonKilled:    true,
	nestbox.ReasonTimeout:   true,
	nestbox.ReasonIdle:      true,
	nestbox.ReasonOOM:       true,
}

// checkExit refuses an exit that says nothing: it must never look like success.
func checkExit(e *guestv1.Exit) error {
	switch {
	case e == nil || !exitReasons[nestbox.ExitReason(e.GetReason())]:
		return protocolError("an exit without a status")
	case e.GetCode() < 0 || e.GetCode() > 255:
		return protocolError("%d is no exit status", e.GetCode())
	case !signalName.MatchString(e.GetSignal()):
		return protocolError("%.40q is no signal", e.GetSignal())
	case e.GetAt() == nil:
		return protocolError("an exit without a time")
	}
	return checkTime("the exit of a process", e.GetAt())
}

// checkNamed refuses a record of another process than the one asked for.
func checkNamed(p *guestv1.Process, sel nestbox.Selector) error {
	if sel.ID != 0 && uint64(sel.ID) != p.GetId() ||
		sel.PID != 0 && int32(sel.PID) != p.GetPid() ||
		sel.Tag != "" && sel.Tag != p.GetTag() {
		return protocolError("an answer about another process than %s", sel)
	}
	return nil
}

// Kinds of directory entries.
var fileTypes = map[nestbox.FileType]bool{
	nestbox.FileTypeFile:      true,
	nestbox.FileTypeDirectory: true,
	nestbox.FileTypeSymlink:   true,
	nestbox.FileTypeOther:     true,
}

// checkFile refuses what cannot be of any file.
func checkFile(f *guestv1.FileInfo) error {
	switch {
	case f == nil || !fileTypes[nestbox.FileType(f.GetType())]:
		return protocolError("an answer without a file")
	case !strings.HasPrefix(f.GetPath(), "/") || len(f.GetPath()) > maxListedPath || len(f.GetName()) > maxPathText || len(f.GetSymlinkTarget()) > maxPathText:
		return protocolError("%.80q is no path", f.GetPath())
	case len(f.GetOwner()) > maxNameBytes || len(f.GetGroup()) > maxNameBytes:
		return protocolError("a file with an owner that cannot be")
	case f.GetSize() < 0 || f.GetMode() > 0o7777:
		return protocolError("a file with a size or mode that cannot be")
	}
	return checkTime("the time of a file", f.GetModifiedAt())
}

// Bounds of paths, whose every byte may be a character of four. A listing descends
// from a path by levels that have names of their own.
const (
	maxPathText   = 4 * nestbox.MaxPathBytes
	maxListedPath = maxPathText + 4*nestbox.MaxListDepth*256
)

// checkEvent refuses an event that does not follow what a reader has read: at is
// the offset that it reached, negative if it is not known yet.
func checkEvent(e nestbox.OutputEvent, at int64) error {
	if e.Offset < 0 || e.Offset > maxOffset {
		return protocolError("%d is no offset", e.Offset)
	}
	if at >= 0 && e.Offset != at {
		return protocolError("output goes on at %d, where %d is next", e.Offset, at)
	}
	switch e.Kind {
	case nestbox.EventData:
		if len(e.Data) == 0 {
			return protocolError("output without bytes")
		}
	case nestbox.EventGap:
		if e.To <= e.Offset || e.To > maxOffset {
			return protocolError("a gap from %d to %d", e.Offset, e.To)
		}
	}
	return nil
}
