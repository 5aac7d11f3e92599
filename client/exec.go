package client

import (
	"context"
	"encoding/base64"
	"errors"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/nestbox/nestbox"
)

// ExecResult is what became of a foreground command.
type ExecResult struct {
	ID             nestbox.ProcessID
	PID            int
	Stdout, Stderr []byte
	Exit           nestbox.Exit // At is not set
	Truncated      bool         // there was more output than is returned here
	Duration       time.Duration
}

// Exec runs a command and returns its output and how it ended, in one request.
// A status other than 0 is no error. Without a Timeout it is killed after 30 s;
// output is kept up to 32 MiB. For more of either, for input, and for output as
// it comes, use Command.
//
// If the connection breaks while the answer is awaited, Exec finds the process
// by the tag it chose and reads its output, unless spec has a tag.
func (h *Capsule) Exec(ctx context.Context, spec nestbox.ProcessSpec) (ExecResult, error) {
	if spec.Stdin {
		return ExecResult{}, nestbox.Errorf(nestbox.CodeInvalid, "Exec takes no standard input: use Command")
	}
	spec, own := ownTag(spec)
	began := time.Now()
	var out execResultBody
	err := h.c.call(ctx, http.MethodPost, h.path("/exec"), nil, execBodyOf(spec), &out)
	if err == nil {
		return out.result()
	}
	proc, err := h.Processes.startedAnyway(ctx, spec.Tag, own, err)
	if err != nil {
		return ExecResult{}, err
	}
	res, err := h.Processes.collect(ctx, proc)
	res.Duration = time.Since(began)
	return res, err
}

// maxCollect is how much output the server returns of a foreground command.
const maxCollect = 32 << 20

// collect reads all output of a process until its exit.
func (p *Processes) collect(ctx context.Context, proc nestbox.Process) (ExecResult, error) {
	s := p.streamOf(proc, 0, untilExit)
	defer s.Close()
	res := ExecResult{ID: proc.ID, PID: proc.PID}
	for {
		ev, err := s.Next(ctx)
		if errors.Is(err, io.EOF) {
			return res, nil
		}
		if err != nil {
			return res, err
		}
		switch ev.Kind {
		case nestbox.EventGap:
			return res, &GapError{From: ev.Offset, To: ev.To}
		case nestbox.EventExit:
			res.Exit = *ev.Exit
		case nestbox.EventData:
			dst := &res.Stdout
			if ev.Stream == nestbox.Stderr {
				dst = &res.Stderr
			}
			keep := min(len(ev.Data), maxCollect-len(res.Stdout)-len(res.Stderr))
			res.Truncated = res.Truncated || keep < len(ev.Data)
			*dst = append(*dst, ev.Data[:keep]...)
		}
	}
}

type execResultBody struct {
	ID         wireID `json:"id"`
	PID        int    `json:"pid"`
	Stdout     string `json:"stdout"`
	Stderr     string `json:"stderr"`
	ExitCode   int    `json:"exit_code"`
	DurationMS int64  `json:"duration_ms"`
	Encoding   string `json:"encoding"`
	Signal     string `json:"signal"`
	Reason     string `json:"reason"`
	Truncated  bool   `json:"truncated"`
}

func (b execResultBody) result() (ExecResult, error) {
	res := ExecResult{
		ID: nestbox.ProcessID(b.ID), PID: b.PID, Stdout: []byte(b.Stdout), Stderr: []byte(b.Stderr),
		Exit:      nestbox.Exit{Code: b.ExitCode, Signal: b.Signal, Reason: nestbox.ExitReason(b.Reason)},
		Truncated: b.Truncated, Duration: time.Duration(b.DurationMS) * time.Millisecond,
	}
	if b.Encoding != "base64" {
		return res, nil
	}
	var err1, err2 error
	res.Stdout, err1 = base64.StdEncoding.DecodeString(b.Stdout)
	res.Stderr, err2 = base64.StdEncoding.DecodeString(b.Stderr)
	if err := errors.Join(err1, err2); err != nil {
		return res, nestbox.Errorf(nestbox.CodeInternal, "the server's answer is not base64: %w", err)
	}
	return res, nil
}

// startStream starts a process and returns a stream of its output from the
// very first byte, which the process waits for as long as the connection that
// started it lasts. The process does not end with that connection.
func (p *Processes) startStream(ctx context.Context, spec nestbox.ProcessSpec, until string) (*Stream, error) {
	spec, own := ownTag(spec)
	conn, err := p.dialStart(ctx, until)
	if err != nil {
		return nil, err
	}
	s := &Stream{procs: p, until: until, hold: true, conn: conn}
	body := execBodyOf(spec)
	body.Type, body.Detach = frameStart, true
	if err := p.c.askStart(ctx, conn, body, s); err != nil {
		s.hangUp()
		proc, err := p.startedAnyway(ctx, spec.Tag, own, err)
		if err != nil {
			return nil, err
		}
		s.id, s.pid, s.tag = proc.ID, proc.PID, proc.Tag
	}
	return s, nil
}

// dialStart connects, with patience: nothing has been started yet.
func (p *Processes) dialStart(ctx context.Context, until string) (*streamConn, error) {
	q := url.Values{"encoding": {"base64"}, "until": {until}}
	wait := newPauses(p.c.retryFor)
	for {
		conn, err := p.c.dial(ctx, capsulePath(p.capsule, "/exec/stream"), q)
		var e *Error
		if err == nil || !errors.As(err, &e) || e.Status != 0 || !wait.next(ctx) {
			return conn, err
		}
	}
}

// askStart sends the command and waits until it runs.
func (c *Client) askStart(ctx context.Context, conn *streamConn, body execBody, s *Stream) error {
	if err := conn.write(ctx, body); err != nil {
		return firstError(ctx, c.connectionError(err, true))
	}
	f, err := conn.read(ctx)
	switch {
	case err != nil:
		return firstError(ctx, c.connectionError(err, true))
	case f.Type == frameError:
		return newError(0, f.Code, f.text()).detailed(f.Detail)
	case f.Type != frameStart:
		return nestbox.Errorf(nestbox.CodeInternal, "the server sent %.40q where start was expected", f.Type)
	}
	s.id, s.pid, s.tag = nestbox.ProcessID(f.ID), f.PID, f.Tag
	return nil
}
