package guestrpc

import (
	"syscall"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/nestbox/nestbox"
	guestv1 "github.com/nestbox/nestbox/gen/nestbox/guest/v1"
	"github.com/nestbox/nestbox/internal/guest"
)

func specToWire(s nestbox.ProcessSpec) *guestv1.ProcessSpec {
	out := &guestv1.ProcessSpec{
		Cmd:   s.Cmd,
		Args:  s.Args,
		Env:   s.Env,
		Cwd:   s.Cwd,
		User:  s.User,
		Tag:   s.Tag,
		Stdin: s.Stdin,
		Merge: s.Merge,

		OnConflict: string(s.OnConflict),
		RequestKey: s.RequestKey,
	}
	if s.Timeout != 0 {
		out.Timeout = durationpb.New(s.Timeout)
	}
	if s.IdleTimeout != 0 {
		out.IdleTimeout = durationpb.New(s.IdleTimeout)
	}
	out.Terminal = terminalToWire(s.Terminal)
	return out
}

func terminalToWire(t *nestbox.Terminal) *guestv1.Terminal {
	if t == nil {
		return nil
	}
	return &guestv1.Terminal{Rows: int32(t.Rows), Cols: int32(t.Cols), Term: t.Term}
}

func terminalFromWire(t *guestv1.Terminal) *nestbox.Terminal {
	if t == nil {
		return nil
	}
	return &nestbox.Terminal{Rows: int(t.GetRows()), Cols: int(t.GetCols()), Term: t.GetTerm()}
}

// streamToWire and streamFromWire give what they do not know as standard output.
func streamToWire(s nestbox.Stream) guestv1.Stream {
	switch s {
	case nestbox.Stderr:
		return guestv1.Stream_STREAM_STDERR
	case nestbox.Pty:
		return guestv1.Stream_STREAM_PTY
	}
	return guestv1.Stream_STREAM_STDOUT
}

func streamFromWire(s guestv1.Stream) nestbox.Stream {
	switch s {
	case guestv1.Stream_STREAM_STDERR:
		return nestbox.Stderr
	case guestv1.Stream_STREAM_PTY:
		return nestbox.Pty
	}
	return nestbox.Stdout
}

func specFromWire(s *guestv1.ProcessSpec) nestbox.ProcessSpec {
	return nestbox.ProcessSpec{
		Cmd:     s.GetCmd(),
		Args:    s.GetArgs(),
		Env:     s.GetEnv(),
		Cwd:     s.GetCwd(),
		User:    s.GetUser(),
		Tag:     s.GetTag(),
		Stdin:   s.GetStdin(),
		Merge:   s.GetMerge(),
		Timeout: s.GetTimeout().AsDuration(),

		IdleTimeout: s.GetIdleTimeout().AsDuration(),

		OnConflict: nestbox.TagConflict(s.GetOnConflict()),
		RequestKey: s.GetRequestKey(),

		Terminal: terminalFromWire(s.GetTerminal()),
	}
}

// checkText refuses a spec that Protocol Buffers cannot carry: its strings are
// UTF-8, although Linux's need not be.
func checkText(s nestbox.ProcessSpec) error {
	texts := append([]string{s.Cmd, s.Cwd, s.User, s.Tag}, s.Args...)
	if s.Terminal != nil {
		texts = append(texts, s.Terminal.Term)
	}
	for k, v := range s.Env {
		texts = append(texts, k, v)
	}
	for _, t := range texts {
		if !utf8.ValidString(t) {
			return nestbox.Errorf(nestbox.CodeInvalid, "%.80q is not valid UTF-8", t)
		}
	}
	return nil
}

func processToWire(p nestbox.Process) *guestv1.Process {
	return &guestv1.Process{
		Id:        uint64(p.ID),
		Pid:       int32(p.PID),
		Tag:       p.Tag,
		Cmd:       p.Cmd,
		Args:      p.Args,
		ArgsCut:   p.ArgsCut,
		Cwd:       p.Cwd,
		User:      p.User,
		Stdin:     p.Stdin,
		StartedAt: timeToWire(p.StartedAt),
		Exit:      exitToWire(p.Exit),
		Terminal:  terminalToWire(p.Terminal),
		Output: &guestv1.OutputState{
			Start:  p.Output.Start,
			End:    p.Output.End,
			Stdout: p.Output.Stdout,
			Stderr: p.Output.Stderr,
			Pty:    p.Output.Pty,
			Closed: p.Output.Closed,
		},
	}
}

func processFromWire(p *guestv1.Process) nestbox.Process {
	return nestbox.Process{
		ID:        nestbox.ProcessID(p.GetId()),
		PID:       int(p.GetPid()),
		Tag:       p.GetTag(),
		Cmd:       p.GetCmd(),
		Args:      p.GetArgs(),
		ArgsCut:   p.GetArgsCut(),
		Cwd:       p.GetCwd(),
		User:      p.GetUser(),
		Stdin:     p.GetStdin(),
		StartedAt: timeFromWire(p.GetStartedAt()),
		Exit:      exitFromWire(p.GetExit()),
		Terminal:  terminalFromWire(p.GetTerminal()),
		Output: nestbox.OutputState{
			Start:  p.GetOutput().GetStart(),
			End:    p.GetOutput().GetEnd(),
			Stdout: p.GetOutput().GetStdout(),
			Stderr: p.GetOutput().GetStderr(),
			Pty:    p.GetOutput().GetPty(),
			Closed: p.GetOutput().GetClosed(),
		},
	}
}

func exitToWire(e *nestbox.Exit) *guestv1.Exit {
	if e == nil {
		return nil
	}
	return &guestv1.Exit{
		Code:   int32(e.Code),
		Signal: e.Signal,
		Reason: string(e.Reason),
		At:     timeToWire(e.At),
	}
}

func exitFromWire(e *guestv1.Exit) *nestbox.Exit {
	if e == nil {
		return nil
	}
	return &nestbox.Exit{
		Code:   int(e.GetCode()),
		Signal: e.GetSignal(),
		Reason: nestbox.ExitReason(e.GetReason()),
		At:     timeFromWire(e.GetAt()),
	}
}

func timeToWire(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func timeFromWire(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func selectorToWire(s nestbox.Selector) *guestv1.Selector {
	switch {
	case s.ID != 0:
		return &guestv1.Selector{By: &guestv1.Selector_Id{Id: uint64(s.ID)}}
	case s.Tag != "":
		return &guestv1.Selector{By: &guestv1.Selector_Tag{Tag: s.Tag}}
	}
	return &guestv1.Selector{By: &guestv1.Selector_Pid{Pid: int32(s.PID)}}
}

func selectorFromWire(s *guestv1.Selector) nestbox.Selector {
	return nestbox.Selector{ID: nestbox.ProcessID(s.GetId()), PID: int(s.GetPid()), Tag: s.GetTag()}
}

func attachToWire(a guest.Attach) *guestv1.AttachOptions {
	return &guestv1.AttachOptions{
		Now:      a.Since.Now,
		Offset:   a.Since.Offset,
		Tail:     a.Since.Tail,
		Lossless: a.Lossless,
		Times:    a.Times,
	}
}

func attachFromWire(a *guestv1.AttachOptions) guest.Attach {
	return guest.Attach{
		Since:    nestbox.Since{Now: a.GetNow(), Offset: a.GetOffset(), Tail: a.GetTail()},
		Lossless: a.GetLossless(),
		Times:    a.GetTimes(),
	}
}

func killToWire(who *guestv1.Selector, how guest.Kill) *guestv1.KillRequest {
	return &guestv1.KillRequest{
		Selector: who,
		Signal:   int32(how.Signal),
		Grace:    durationpb.New(how.Grace),
	}
}

func killFromWire(r *guestv1.KillRequest) guest.Kill {
	return guest.Kill{Signal: syscall.Signal(r.GetSignal()), Grace: r.GetGrace().AsDuration()}
}

// eventFromWire returns an event other than data, for which see decodeEvent. It
// returns false for one that says nothing to a reader.
func eventFromWire(e *guestv1.OutputEvent) (nestbox.OutputEvent, bool, error) {
	switch e := e.GetEvent().(type) {
	case *guestv1.OutputEvent_Gap_:
		return nestbox.OutputEvent{Kind: nestbox.EventGap, Offset: e.Gap.GetFrom(), To: e.Gap.GetTo()}, true, nil
	case *guestv1.OutputEvent_Exit:
		if err := checkExit(e.Exit.GetExit()); err != nil {
			return nestbox.OutputEvent{}, false, err
		}
		return nestbox.OutputEvent{
			Kind:   nestbox.EventExit,
			Offset: e.Exit.GetOffset(),
			Exit:   exitFromWire(e.Exit.GetExit()),
		}, true, nil
	case *guestv1.OutputEvent_Closed_:
		return nestbox.OutputEvent{Kind: nestbox.EventClosed, Offset: e.Closed.GetOffset()}, true, nil
	}
	return nestbox.OutputEvent{}, false, nil
}

// eventEncoder makes the wire form of one reader's events. It is used again for
// every event: what it returned last is no longer valid then.
type eventEncoder struct {
	event   guestv1.OutputEvent
	wrapper guestv1.OutputEvent_Data_
	data    guestv1.OutputEvent_Data
}

// encode returns the wire form of e, which shares e's Data.
func (c *eventEncoder) encode(e nestbox.OutputEvent) *guestv1.OutputEvent {
	switch e.Kind {
	case nestbox.EventData:
		c.data.Stream, c.data.Offset, c.data.Data = streamToWire(e.Stream), e.Offset, e.Data
		if c.data.At = 0; !e.At.IsZero() {
			c.data.At = e.At.UnixMilli()
		}
		c.wrapper.Data = &c.data
		c.event.Event = &c.wrapper
	case nestbox.EventGap:
		c.event.Event = &guestv1.OutputEvent_Gap_{Gap: &guestv1.OutputEvent_Gap{From: e.Offset, To: e.To}}
	case nestbox.EventExit:
		c.event.Event = &guestv1.OutputEvent_Exit{
			Exit: &guestv1.OutputEvent_ExitEvent{Offset: e.Offset, Exit: exitToWire(e.Exit)},
		}
	case nestbox.EventClosed:
		c.event.Event = &guestv1.OutputEvent_Closed_{Closed: &guestv1.OutputEvent_Closed{Offset: e.Offset}}
	default:
		c.event.Event = nil
	}
	return &c.event
}

func infoToWire(i guest.Info) *guestv1.PingResponse {
	out := &guestv1.PingResponse{Version: i.Version, StartedAt: timeToWire(i.StartedAt)}
	for _, f := range i.Features {
		out.Features = append(out.Features, string(f))
	}
	return out
}

func infoFromWire(r *guestv1.PingResponse) guest.Info {
	info := guest.Info{Version: r.GetVersion(), StartedAt: timeFromWire(r.GetStartedAt())}
	for _, f := range r.GetFeatures() {
		info.Features = append(info.Features, guest.Feature(f))
	}
	return info
}
