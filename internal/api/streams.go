package api

import (
	"context"
	"encoding/base64"
	"errors"
	"io"
	"net/http"
	"sync"

	"github.com/coder/websocket"
	"github.com/danielgtaylor/huma/v2"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
	"github.com/nestbox/nestbox/internal/guest"
)

// Values of the encoding and until parameters.
const (
	encodingBase64 = "base64"
	untilExit      = "exit"
)

type StreamOptions struct {
	Encoding string `query:"encoding" enum:"utf-8,base64" doc:"Of data; base64 is exact for any bytes"`
	Until    string `query:"until" enum:"exit,closed" doc:"When the server closes the stream: after the exit frame, or (the default) after output_closed, which comes later if something that the process left behind holds its output"`
}

type execStreamInput struct {
	CapsulePath
	StreamOptions
}

type processStreamInput struct {
	ProcessPath
	StreamOptions
	LogPlace
	TailStream string `query:"tail_stream" enum:"stdout,stderr,pty" doc:"Count the lines of this one only"`
	Lossless   bool   `query:"lossless" doc:"While this client is connected the process waits for it, rather than that output is lost to it"`
}

// LogPlace is where in a log to begin, and how much to tell of it.
type LogPlace struct {
	Since      string `query:"since" doc:"Where to begin: start (the oldest byte kept), now, a byte offset, a duration such as 5m (what was read since then), or an RFC 3339 time; empty = start" example:"start"`
	TailLines  int64  `query:"tail_lines" minimum:"0" doc:"Begin so many lines before the current end, but not before since if that is a time"`
	Timestamps bool   `query:"timestamps" doc:"Tell when output was read, to 10 ms"`
}

// place returns what the parameters say.
func (p LogPlace) place() (nestbox.Since, error) {
	since, err := nestbox.ParseSince(p.Since)
	if err != nil || p.TailLines == 0 {
		return since, err
	}
	if p.Since != "" && since.After.IsZero() {
		return since, nestbox.Errorf(nestbox.CodeInvalid, "tail_lines goes with no since that is no time")
	}
	since.Lines = p.TailLines
	return since, nil
}

// execStreamStart is the first message of exec/stream.
type execStreamStart struct {
	Type string `json:"type" enum:"start"`
	Command
	Detach bool `json:"detach,omitempty" doc:"Let the process live on when the client leaves"`
}

// execStreamMessage is any later message of exec/stream.
type execStreamMessage struct {
	Type string `json:"type" enum:"stop,stdin,alive" doc:"alive does nothing but show that the client lives while it takes nothing"`
	Data string `json:"data,omitempty" doc:"For stdin"`
	EOF  bool   `json:"eof,omitempty" doc:"Close standard input after data"`

	Encoding string `json:"encoding,omitempty" enum:"base64,utf-8" doc:"Of data; empty = base64"`
}

// input returns the bytes for standard input.
func (m execStreamMessage) input() ([]byte, error) {
	if m.Encoding == "utf-8" {
		return []byte(m.Data), nil
	}
	data, err := base64.StdEncoding.DecodeString(m.Data)
	if err != nil {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "data is not valid base64; text needs \"encoding\":\"utf-8\"")
	}
	return data, nil
}

const frameDoc = "The server sends JSON messages: `start` {id, pid, tag, offset}, `stdout`, `stderr` and `pty` (of a terminal) {data, offset, end, and with `timestamps` at}, `gap` {from, to} for " +
	"output that is no longer kept, `exit` {exit_code, signal, reason, offset}, `output_closed` {offset}, `error` {data, code}; all but the last have the `id` of the process. " +
	"To resume, attach to the process with `since` = the last `end`; text that was cut in the middle of a rune while the other stream wrote may be repeated, base64 never is. " +
	"The server pings every 20 s; the stream has no time limit.\n\n" +
	"Without a key in the handshake, the first message must be `{\"type\":\"auth\",\"token\":\"<API key>\"}` within 5 s. " +
	"Errors other than a malformed request come as an `error` message after the upgrade."

func (s *server) registerStreams() {
	const tag = "Streams"
	upgrade := []int{http.StatusUpgradeRequired}
	execOp := registerRaw(s, s.open, operation{
		id: "streamExec", method: http.MethodGet, path: "/v1/capsules/{id}/exec/stream", tag: tag,
		summary: "Run a command over a WebSocket",
		about: "The first message is `{\"type\":\"start\",\"cmd\":…,\"args\":…}` with the fields of the exec request and `detach`. Later ones are " +
			"`{\"type\":\"stop\"}`, which kills the process and everything it started, and `{\"type\":\"stdin\",\"data\":\"<base64>\",\"eof\":bool}`, with `\"encoding\":\"utf-8\"` for text. " +
			"Leaving before the `exit` message kills it too, unless `detach` was true. The process waits for a slow client rather than lose output. " +
			"There is no timeout unless `timeout_sec` is given.\n\n" + frameDoc,
		status: http.StatusSwitchingProtocols, errors: upgrade,
		sample: `echo '{"type":"start","cmd":"/bin/sh","args":["-c","echo hello"]}' | websocat -n -H "X-API-Key: $NESTBOX_API_KEY" "$NESTBOX_WS/v1/capsules/$CAPSULE/exec/stream"`,
	}, s.execStream)
	s.describeSocket(execOp, processFrames(), execStreamStart{}, execStreamMessage{})
	attachOp := registerRaw(s, s.open, operation{
		id: "streamProcess", method: http.MethodGet, path: "/v1/capsules/{id}/processes/{selector}/stream", tag: tag,
		summary: "Follow a process over a WebSocket",
		about: "Also one that has ended, as long as it is remembered. The client need not send anything. The process does not wait for the client, unless `lossless=true`: one that is too slow gets a `gap`. " +
			"Leaving does nothing to the process.\n\n" + frameDoc,
		status: http.StatusSwitchingProtocols, errors: upgrade,
		sample: `websocat -H "X-API-Key: $NESTBOX_API_KEY" "$NESTBOX_WS/v1/capsules/$CAPSULE/processes/web/stream?since=start"`,
	}, s.processStream)
	s.describeSocket(attachOp, processFrames())
	s.registerLogs()
	s.registerPty()
}

// describeSocket puts the messages of a WebSocket into the document, and the
// security that its handler sees to itself.
func (s *server) describeSocket(op *huma.Operation, fromServer []any, fromClient ...any) {
	op.Security = []map[string][]string{{schemeKey: {}}, {schemeBearer: {}}}
	op.Responses["401"] = errorResponse(http.StatusUnauthorized)
	messages := map[string]any{
		"server": s.schemas(fromServer...),
	}
	if len(fromClient) > 0 {
		messages["client"] = s.schemas(fromClient...)
	}
	op.Extensions["x-websocket-messages"] = messages
}

func processFrames() []any {
	return []any{startFrame{}, outputFrame{}, gapFrame{}, exitFrame{}, closedFrame{}, errorFrame{}}
}

func (s *server) processStream(w http.ResponseWriter, r *http.Request, in *processStreamInput) error {
	since, err := in.place()
	if err != nil {
		return err
	}
	sel, err := nestbox.ParseSelector(in.Selector)
	if err != nil {
		return err
	}
	if err := checkStream(r, in.ID); err != nil {
		return err
	}
	k, caller := s.accept(w, r)
	if k == nil {
		return nil
	}
	reading, err := s.control.Processes.Attach(k.ctx, caller, in.ID, sel, guest.Attach{Since: since, Lossless: in.Lossless, Times: in.Timestamps}, nestbox.Stream(in.TailStream))
	if err != nil {
		k.fail(err)
		return nil
	}
	defer func() { _ = reading.Close() }()
	k.wg.Go(k.discard)
	_, err = k.forward(reading, in.StreamOptions)
	k.end(err)
	return nil
}

// checkStream refuses what is refused before the upgrade.
func checkStream(r *http.Request, id string) error {
	if !nestbox.ValidID(nestbox.PrefixCapsule, id) && !nestbox.ValidCapsuleName(id) {
		return nestbox.Errorf(nestbox.CodeInvalid, "invalid capsule ID")
	}
	return checkUpgrade(r)
}

// forward sends a log as frames. It reports whether the exit frame was sent.
func (k *socket) forward(reading *control.Reading, o StreamOptions) (exited bool, err error) {
	p := reading.Process
	if err := k.send(startFrame{"start", p.ID.String(), p.PID, p.Tag, reading.From}); err != nil {
		return false, err
	}
	frames := newFramer(p.ID, o.Encoding == encodingBase64, "", func(frame any, _ int64) error { return k.send(frame) })
	for {
		ev, err := reading.Next(k.ctx)
		if errors.Is(err, io.EOF) {
			return exited, nil
		}
		last := ev.Kind == nestbox.EventExit && o.Until == untilExit
		if err == nil && last {
			err = frames.flush()
		}
		if err == nil {
			err = frames.event(ev)
		}
		if err != nil {
			return exited, err
		}
		exited = exited || ev.Kind == nestbox.EventExit
		if last {
			return exited, nil
		}
	}
}

// end closes the socket after a stream that err (nil = its end) stopped.
func (k *socket) end(err error) {
	if err != nil {
		k.fail(err)
		return
	}
	k.close(websocket.StatusNormalClosure)
}

func (s *server) execStream(w http.ResponseWriter, r *http.Request, in *execStreamInput) error {
	if err := checkStream(r, in.ID); err != nil {
		return err
	}
	k, caller := s.accept(w, r)
	if k == nil {
		return nil
	}
	if err := s.control.Capsules.Ping(k.ctx, caller, in.ID); err != nil { // before the client says what to run
		k.fail(err)
		return nil
	}
	start, err := k.receiveStart()
	if err != nil {
		k.fail(err)
		return nil
	}
	run, err := s.control.Processes.Run(k.ctx, caller, in.ID, start.spec(), start.Detach)
	if err != nil {
		k.fail(err)
		return nil
	}
	defer func() { _ = run.Close() }()
	k.wg.Go(func() { k.obey(run) })
	exited, err := k.forward(&run.Reading, in.StreamOptions)
	left := !exited && k.gone() // by itself, not because we close
	k.end(err)
	if left {
		run.Abandon(r.Context())
	}
	return nil
}

// receiveStart waits for the message that says what to run.
func (k *socket) receiveStart() (execStreamStart, error) {
	msg, ok := <-k.in
	if !ok {
		return execStreamStart{}, context.Cause(k.ctx)
	}
	defer k.done(msg)
	start, err := decodeStrict[execStreamStart](k.s, msg)
	if err != nil {
		return start, err
	}
	if start.Stdin.Data != nil {
		return start, nestbox.Errorf(nestbox.CodeInvalid, "stdin is true here, and written with stdin messages")
	}
	return start, start.spec().Validate()
}

// stdinBacklog is how many messages of input may wait while the process does
// not read. Then the client has to wait.
const stdinBacklog = 1

// obey carries out the client's messages until it leaves. Input goes through a
// queue of its own, so that stop is heard while the process does not read.
func (k *socket) obey(run *control.Run) {
	stdin := make(chan execStreamMessage, stdinBacklog)
	var writer sync.WaitGroup
	writer.Go(func() {
		for m := range stdin {
			data, err := m.input()
			if err == nil {
				err = run.WriteStdin(k.ctx, data, m.EOF)
			}
			if err != nil && k.ctx.Err() == nil {
				k.sendError(err)
			}
		}
	})
	for raw := range k.in {
		m, err := decodeStrict[execStreamMessage](k.s, raw)
		k.done(raw)
		switch {
		case err != nil:
			k.sendError(err)
		case m.Type == "stop":
			if err := run.Kill(k.ctx); err != nil {
				k.sendError(err)
			}
		case m.Type == "stdin":
			select {
			case stdin <- m:
			case <-k.ctx.Done():
			}
		}
	}
	close(stdin)
	writer.Wait()
}
