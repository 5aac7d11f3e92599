package api

import (
	"context"
	"encoding/base64"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
	"github.com/nestbox/nestbox/internal/guest"
)

// The terminal of Wrenn's API: one WebSocket that starts a process in a terminal, or
// comes back to one. It is one more way to the same processes: all of it can be done with
// exec, stream, stdin and resize too.

// ptyTail is how much of what was shown is shown again to who comes back, in bytes: more
// than any screen.
const ptyTail = 64 << 10

// ptyPing is how often a quiet terminal's client gets a ping message, as in Wrenn's API.
const ptyPing = 30 * time.Second

type ptyInput struct{ CapsulePath }

// ptyStart is the first message: what to run, or with the type connect, where to come
// back to.
type ptyStart struct {
	Type  string            `json:"type" enum:"start,connect"`
	Cmd   string            `json:"cmd,omitempty" doc:"Empty = /bin/bash"`
	Args  []string          `json:"args,omitempty"`
	Rows  int               `json:"rows,omitempty" doc:"0 = 24"`
	Cols  int               `json:"cols,omitempty" doc:"0 = 80"`
	Term  string            `json:"term,omitempty" doc:"Empty = xterm-256color"`
	Envs  map[string]string `json:"envs,omitempty"`
	Cwd   string            `json:"cwd,omitempty"`
	User  string            `json:"user,omitempty"`
	Tag   string            `json:"tag,omitempty" doc:"For connect: a tag, PID or id of a process with a terminal. For start: empty = a new pty-<8 hex>"`
	Since *int64            `json:"since,omitempty" doc:"For connect: the end of the last output that was seen; left out = the last 64 KiB"`
}

// ptyMessage is any later message of a client.
type ptyMessage struct {
	Type string `json:"type" enum:"input,resize,kill,alive"`
	Data []byte `json:"data,omitempty" doc:"For input"`
	Rows int    `json:"rows,omitempty"`
	Cols int    `json:"cols,omitempty"`
}

// The messages of the server.
type (
	ptyStartedFrame struct {
		Type string `json:"type" enum:"started"`
		ID   string `json:"id"`
		Tag  string `json:"tag"`
		PID  int    `json:"pid"`
	}
	ptyOutputFrame struct {
		Type   string `json:"type" enum:"output"`
		Data   string `json:"data" doc:"Base64"`
		Offset int64  `json:"offset"`
		End    int64  `json:"end" doc:"Where to come back to after this message"`
	}
	ptyExitFrame struct {
		Type     string `json:"type" enum:"exit"`
		ExitCode int    `json:"exit_code"`
		Signal   string `json:"signal,omitempty"`
		Reason   string `json:"reason"`
	}
	ptyErrorFrame struct {
		Type  string `json:"type" enum:"error"`
		Data  string `json:"data"`
		Code  string `json:"code"`
		Fatal bool   `json:"fatal" doc:"The stream ends"`
	}
	ptyPingFrame struct {
		Type string `json:"type" enum:"ping"`
	}
)

func (s *server) registerPty() {
	op := registerRaw(s, s.open, operation{
		id: "openPty", method: http.MethodGet, path: "/v1/capsules/{id}/pty", tag: "Streams",
		summary: "Open a terminal over a WebSocket, or come back to one",
		about: "The first message is `{\"type\":\"start\",\"cmd\":\"/bin/bash\",\"cols\":80,\"rows\":24,…}`, or `{\"type\":\"connect\",\"tag\":…}` to come back " +
			"to a process with a terminal, which shows its last output again. Later ones are `{\"type\":\"input\",\"data\":\"<base64>\"}`, `{\"type\":\"resize\",\"cols\":…,\"rows\":…}` " +
			"and `{\"type\":\"kill\"}`. The server sends `started` {id, tag, pid}, `output` {data, offset, end}, `gap` {from, to}, `exit` {exit_code, signal, reason}, " +
			"`error` {data, code, fatal} and `ping`. The process goes on when the client leaves. It is one like any other: it is listed, killed and read like those.\n\n" +
			"Without a key in the handshake, the first message must be `{\"type\":\"auth\",\"token\":\"<API key>\"}` within 5 s.",
		status: http.StatusSwitchingProtocols, errors: []int{http.StatusUpgradeRequired},
		sample: `echo '{"type":"start","cmd":"/bin/sh","args":["-c","tty"]}' | websocat -n -H "X-API-Key: $NESTBOX_API_KEY" "$NESTBOX_WS/v1/capsules/$CAPSULE/pty"`,
	}, s.pty)
	fromServer := []any{ptyStartedFrame{}, ptyOutputFrame{}, gapFrame{}, ptyExitFrame{}, ptyErrorFrame{}, ptyPingFrame{}}
	s.describeSocket(op, fromServer, ptyStart{}, ptyMessage{})
}

func (s *server) pty(w http.ResponseWriter, r *http.Request, in *ptyInput) error {
	if err := checkStream(r, in.ID); err != nil {
		return err
	}
	k, caller := s.accept(w, r)
	if k == nil {
		return nil
	}
	k.errorOf = func(d errorDetail, fatal bool) any { return ptyErrorFrame{"error", d.Message, d.Code, fatal} }
	reading, err := k.openPty(caller, in.ID)
	if err != nil {
		k.fail(err)
		return nil
	}
	defer func() { _ = reading.Close() }()
	t := &ptySession{socket: k, caller: caller, capsule: in.ID, process: nestbox.Selector{ID: reading.Process.ID}}
	k.wg.Go(t.obey)
	k.wg.Go(t.ping)
	k.end(t.show(reading))
	return nil
}

// openPty carries out the first message.
func (k *socket) openPty(caller control.Caller, id string) (*control.Reading, error) {
	if err := k.s.control.Capsules.Ping(k.ctx, caller, id); err != nil { // before the client says what to run
		return nil, err
	}
	raw, ok := <-k.in
	if !ok {
		return nil, context.Cause(k.ctx)
	}
	defer k.done(raw)
	start, err := decodeStrict[ptyStart](k.s, raw)
	if err != nil {
		return nil, err
	}
	if start.Type == "connect" {
		return k.comeBack(caller, id, start)
	}
	spec := start.spec()
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	p, err := k.s.control.Processes.Start(context.WithoutCancel(k.ctx), caller, id, spec) // none is started that nobody knows of
	if err != nil {
		return nil, err
	}
	return k.s.control.Processes.Attach(k.ctx, caller, id, nestbox.Selector{ID: p.ID}, guest.Attach{}, "")
}

func (m ptyStart) spec() nestbox.ProcessSpec {
	spec := nestbox.ProcessSpec{
		Cmd: m.Cmd, Args: m.Args, Env: m.Envs, Cwd: m.Cwd, User: m.User, Tag: m.Tag,
		Terminal: &nestbox.Terminal{Rows: m.Rows, Cols: m.Cols, Term: m.Term},
	}
	if spec.Cmd == "" {
		spec.Cmd = "/bin/bash"
	}
	if spec.Tag == "" {
		spec.Tag = "pty-" + nestbox.RandomHex(4)
	}
	return spec
}

func (k *socket) comeBack(caller control.Caller, id string, m ptyStart) (*control.Reading, error) {
	sel, err := nestbox.ParseSelector(m.Tag)
	if err != nil {
		return nil, err
	}
	since := nestbox.Since{Tail: ptyTail}
	if m.Since != nil {
		since = nestbox.Since{Offset: *m.Since}
	}
	reading, err := k.s.control.Processes.Attach(k.ctx, caller, id, sel, guest.Attach{Since: since}, "")
	if err != nil {
		return nil, err
	}
	if reading.Process.Terminal == nil {
		return nil, errors.Join(nestbox.Errorf(nestbox.CodeInvalidState, "process %s has no terminal", sel), reading.Close())
	}
	if m.Rows > 0 && m.Cols > 0 && reading.Process.Running() {
		if err := k.s.control.Processes.Resize(k.ctx, caller, id, nestbox.Selector{ID: reading.Process.ID}, m.Rows, m.Cols); err != nil {
			k.sendError(err)
		}
	}
	return reading, nil
}

// ptySession is a client in front of a terminal.
type ptySession struct {
	*socket
	caller  control.Caller
	capsule string
	process nestbox.Selector
}

// show sends the output up to the exit.
func (t *ptySession) show(reading *control.Reading) error {
	p := reading.Process
	if err := t.send(ptyStartedFrame{"started", p.ID.String(), p.Tag, p.PID}); err != nil {
		return err
	}
	for {
		ev, err := reading.Next(t.ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch ev.Kind {
		case nestbox.EventData:
			err = t.showData(ev)
		case nestbox.EventGap:
			err = t.send(gapFrame{"gap", p.ID.String(), ev.Offset, ev.To, ev.Offset})
		case nestbox.EventExit:
			return t.send(ptyExitFrame{"exit", ev.Exit.Code, ev.Exit.Signal, string(ev.Exit.Reason)})
		}
		if err != nil {
			return err
		}
	}
}

func (t *ptySession) showData(ev nestbox.OutputEvent) error {
	for data, at := ev.Data, ev.Offset; len(data) > 0; {
		n := min(len(data), maxFrameData)
		end := at + int64(n)
		if err := t.send(ptyOutputFrame{"output", base64.StdEncoding.EncodeToString(data[:n]), at, end}); err != nil {
			return err
		}
		data, at = data[n:], end
	}
	return nil
}

// ping shows a client that cannot see the WebSocket's own pings that the server lives.
func (t *ptySession) ping() {
	tick := time.NewTicker(ptyPing)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if t.send(ptyPingFrame{"ping"}) != nil {
				return
			}
		case <-t.ctx.Done():
			return
		}
	}
}

// obey carries out the client's messages until it leaves. Input goes through a queue of
// its own, so that the others are heard while the program does not read.
func (t *ptySession) obey() {
	input := make(chan []byte, stdinBacklog)
	var writer sync.WaitGroup
	writer.Go(func() {
		for data := range input {
			t.report(t.s.control.Processes.WriteStdin(t.ctx, t.caller, t.capsule, t.process, data, false))
		}
	})
	for raw := range t.in {
		m, err := decodeStrict[ptyMessage](t.s, raw)
		t.done(raw)
		switch {
		case err != nil:
			t.sendError(err)
		case m.Type == "input":
			select {
			case input <- m.Data:
			case <-t.ctx.Done():
			}
		case m.Type == "resize":
			t.report(t.s.control.Processes.Resize(t.ctx, t.caller, t.capsule, t.process, m.Rows, m.Cols))
		case m.Type == "kill":
			t.report(t.s.control.Processes.Kill(context.WithoutCancel(t.ctx), t.caller, t.capsule, t.process, guest.Kill{}))
		}
	}
	close(input)
	writer.Wait()
}

// report tells the client of an error, if it is still there.
func (t *ptySession) report(err error) {
	if err != nil && t.ctx.Err() == nil {
		t.sendError(err)
	}
}
