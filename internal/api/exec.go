package api

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
)

// defaultExecTimeout is Wrenn's, for foreground commands that set none.
const defaultExecTimeout = 30 * time.Second

// Command is what can be asked of a process by every way to start one.
type Command struct {
	Cmd        string            `json:"cmd" doc:"A path, or a name looked up in PATH"`
	Args       []string          `json:"args,omitempty" doc:"Arguments after the command's own name"`
	Envs       map[string]string `json:"envs,omitempty" doc:"Added to the environment"`
	Cwd        string            `json:"cwd,omitempty" doc:"Absolute; empty = the user's home"`
	User       string            `json:"user,omitempty" doc:"Name or number; empty = root"`
	Tag        string            `json:"tag,omitempty" doc:"A name, unique among the live processes; empty = a new proc-<8 hex>"`
	OnConflict string            `json:"on_conflict,omitempty" enum:"replace,return" doc:"What to do if a live process has the tag: end it (SIGTERM, after 5 s SIGKILL) and start, or start nothing and return it. Empty = 409"`
	TimeoutSec int               `json:"timeout_sec,omitempty" minimum:"0" maximum:"31536000" doc:"The whole process tree is killed after so many seconds. 0 = 30 in the foreground, none otherwise"`
	IdleSec    int               `json:"idle_timeout_sec,omitempty" minimum:"0" maximum:"31536000" doc:"The whole process tree is killed after so many seconds without output; 0 = never"`
	Merge      bool              `json:"merge,omitempty" doc:"Have standard error be standard output, so that what is written to both keeps its order: over two pipes nobody can tell. All of it is stdout then"`
	Stdin      stdinField        `json:"stdin,omitzero" doc:"true: keep standard input open for writing. Text, or {data, encoding} with base64, of a foreground command: its whole standard input. Otherwise it is /dev/null"`
	Terminal   *terminal         `json:"terminal,omitempty" doc:"Run it in a terminal, whose output is the one stream pty (stdout of a foreground command) and whose input is open"`
}

// terminal is a terminal on the wire.
type terminal struct {
	Rows int    `json:"rows,omitempty" minimum:"0" maximum:"4096" doc:"0 = 24"`
	Cols int    `json:"cols,omitempty" minimum:"0" maximum:"4096" doc:"0 = 80"`
	Term string `json:"term,omitempty" doc:"The variable TERM, unless envs has it; empty = xterm-256color"`
}

func (t *terminal) domain() *nestbox.Terminal {
	if t == nil {
		return nil
	}
	return &nestbox.Terminal{Rows: t.Rows, Cols: t.Cols, Term: t.Term}
}

func toTerminal(t *nestbox.Terminal) *terminal {
	if t == nil {
		return nil
	}
	return &terminal{Rows: t.Rows, Cols: t.Cols, Term: t.Term}
}

func (c Command) spec() nestbox.ProcessSpec {
	return nestbox.ProcessSpec{
		Cmd: c.Cmd, Args: c.Args, Env: c.Envs, Cwd: c.Cwd, User: c.User, Tag: c.Tag,
		OnConflict: nestbox.TagConflict(c.OnConflict),
		Timeout:    time.Duration(c.TimeoutSec) * time.Second, IdleTimeout: time.Duration(c.IdleSec) * time.Second,
		Stdin: c.Stdin.Open || c.Stdin.Data != nil, Merge: c.Merge, Terminal: c.Terminal.domain(),
	}
}

// stdinField is what a command is to do with standard input: false, true, the text
// itself, or an object that says how the text is encoded.
type stdinField struct {
	Open bool
	Data []byte // nil = none
}

// Schema implements huma.SchemaProvider.
func (stdinField) Schema(huma.Registry) *huma.Schema {
	return &huma.Schema{OneOf: []*huma.Schema{
		{Type: huma.TypeBoolean},
		{Type: huma.TypeString},
		{
			Type: huma.TypeObject, AdditionalProperties: false, Required: []string{"data"},
			Properties: map[string]*huma.Schema{
				"data":     {Type: huma.TypeString},
				"encoding": {Type: huma.TypeString, Enum: []any{"utf-8", encodingBase64}},
			},
		},
	}}
}

// UnmarshalJSON implements json.Unmarshaler.
func (f *stdinField) UnmarshalJSON(raw []byte) error {
	if json.Unmarshal(raw, &f.Open) == nil {
		return nil
	}
	var text string
	if json.Unmarshal(raw, &text) == nil {
		f.Data = []byte(text)
		return nil
	}
	var body struct{ Data, Encoding string }
	if err := json.Unmarshal(raw, &body); err != nil {
		return err
	}
	f.Data = []byte(body.Data)
	if body.Encoding != encodingBase64 {
		return nil
	}
	data, err := base64.StdEncoding.DecodeString(body.Data)
	f.Data = append([]byte{}, data...)
	return err
}

// MarshalJSON implements json.Marshaler, for examples.
func (f stdinField) MarshalJSON() ([]byte, error) {
	if f.Data != nil {
		return json.Marshal(string(f.Data))
	}
	return json.Marshal(f.Open)
}

type execBody struct {
	Command
	Background bool `json:"background,omitempty" doc:"Answer as soon as the program runs"`
}

type execInput struct {
	CapsulePath
	IdempotencyKey string `header:"Idempotency-Key" doc:"In the background: asking again with the same key starts nothing and answers with the same process, as long as it is remembered"`
	Body           execBody
}

// execResult is the answer of a foreground command.
type execResult struct {
	SandboxID  string `json:"sandbox_id"`
	Cmd        string `json:"cmd"`
	ID         string `json:"id" doc:"The process's id"`
	PID        int    `json:"pid"`
	Stdout     string `json:"stdout,omitempty" required:"true"` // written apart
	Stderr     string `json:"stderr,omitempty" required:"true"`
	ExitCode   int    `json:"exit_code" doc:"Exit status, or 128 + the signal's number"`
	DurationMS int64  `json:"duration_ms"`
	Encoding   string `json:"encoding" enum:"utf-8,base64" doc:"Of stdout and stderr: base64 if either is not UTF-8"`
	Signal     string `json:"signal,omitempty" doc:"The signal that ended it"`
	Reason     string `json:"reason" enum:"exited,signalled,killed,timeout,idle_timeout,oom"`
	Truncated  bool   `json:"truncated,omitempty" doc:"There was more output than is returned here (32 MiB)"`
}

// execStarted is the answer of a background command.
type execStarted struct {
	SandboxID string `json:"sandbox_id"`
	Cmd       string `json:"cmd"`
	ID        string `json:"id" doc:"The process's id, which is never used again in its capsule"`
	PID       int    `json:"pid"`
	Tag       string `json:"tag"`
}

func (s *server) registerExec() {
	o := operation{
		id: "execCommand", method: http.MethodPost, path: "/v1/capsules/{id}/exec", tag: "Processes",
		summary: "Run a command",
		about: "In the foreground the answer (200) comes when the command has ended. One that runs into its timeout answers 200 too, " +
			"with `reason` `timeout`, `exit_code` 137 and the output so far; its whole process tree is killed. If the client goes away, the command runs on.\n\n" +
			"In the background the answer (202) comes as soon as the program runs; a program that cannot be started is 400.",
		request: execBody{Command: Command{Cmd: "python3", Args: []string{"-m", "http.server", "8080"}, Tag: "web"}, Background: true},
		errors:  append([]int{http.StatusTooManyRequests}, capsuleErrors...),
	}
	register(s, o, s.exec)
	op := s.documented(o)
	op.Responses["200"].Content = s.jsonContent(execResult{
		SandboxID: exampleCapsule().ID, Cmd: "echo", ID: "@3", PID: 7, Stdout: "hello\n", DurationMS: 3, Encoding: "utf-8", Reason: "exited",
	})
	accepted := errorResponse(http.StatusAccepted)
	accepted.Content = s.jsonContent(execStarted{SandboxID: exampleCapsule().ID, Cmd: "python3", ID: "@3", PID: 7, Tag: "web"})
	op.Responses["202"] = accepted
}

func (s *server) exec(ctx context.Context, caller control.Caller, in *execInput) (*written, error) {
	spec := in.Body.spec()
	spec.RequestKey = in.IdempotencyKey
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	input := in.Body.Stdin.Data
	if len(input) > nestbox.MaxStdin {
		return nil, nestbox.Errorf(nestbox.CodeTooLarge, "body.stdin is larger than %d bytes", nestbox.MaxStdin)
	}
	if in.Body.Background && input != nil {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "body.stdin: in the background standard input is true, and written with POST …/processes/{selector}/stdin")
	}
	if spec.RequestKey != "" && !in.Body.Background {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "Idempotency-Key goes with background: true, whose process is there to be found again")
	}
	id, err := s.idOf(ctx, caller, in.ID)
	if err != nil {
		return nil, err
	}
	if in.Body.Background {
		return s.execBackground(ctx, caller, id, spec)
	}
	if spec.Timeout == 0 {
		spec.Timeout = defaultExecTimeout
	}
	stdout, stderr := s.answers.New(caller.TeamID), s.answers.New(caller.TeamID)
	done := func() { _ = errors.Join(stdout.Close(), stderr.Close()) } // nobody reads them any more
	res, err := s.control.Processes.Exec(ctx, caller, id, spec, input, stdout, stderr)
	if err != nil {
		done()
		return nil, err
	}
	return &written{Body: func(hc huma.Context) {
		defer done()
		out := execResult{
			SandboxID: id, Cmd: spec.Cmd, ID: res.Process.ID.String(), PID: res.Process.PID,
			DurationMS: res.Duration.Milliseconds(), Truncated: res.Truncated, Encoding: "utf-8",
		}
		if !stdout.UTF8() || !stderr.UTF8() {
			out.Encoding = encodingBase64
		}
		if exit := res.Process.Exit; exit != nil {
			out.ExitCode, out.Signal, out.Reason = exit.Code, exit.Signal, string(exit.Reason)
		}
		w := beginJSON(hc, http.StatusOK)
		w.object(out, member{"stdout", stdout}, member{"stderr", stderr})
		_ = w.end() // the client may be gone
	}}, nil
}

func (s *server) execBackground(ctx context.Context, caller control.Caller, id string, spec nestbox.ProcessSpec) (*written, error) {
	p, err := s.control.Processes.Start(ctx, caller, id, spec)
	if err != nil {
		return nil, err
	}
	return &written{Body: func(hc huma.Context) {
		w := beginJSON(hc, http.StatusAccepted)
		w.value(execStarted{SandboxID: id, Cmd: p.Cmd, ID: p.ID.String(), PID: p.PID, Tag: p.Tag})
		_ = w.end() // the client may be gone
	}}, nil
}
