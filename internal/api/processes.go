package api

import (
	"context"
	"encoding/base64"
	"net/http"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
	"github.com/nestbox/nestbox/internal/guest"
)

// Limits of what a request may wait for.
const (
	maxWait  = 5 * time.Minute
	maxGrace = time.Hour
)

// process is a process on the wire: Wrenn's pid, tag, cmd and args, and more.
type process struct {
	ID        string     `json:"id" doc:"Names this process for ever: an id is never used again in its capsule"`
	PID       int        `json:"pid"`
	Tag       string     `json:"tag"`
	Cmd       string     `json:"cmd"`
	Args      []string   `json:"args,omitempty"`
	ArgsCut   bool       `json:"args_cut,omitempty" doc:"args has only the first 4 KiB of the arguments: in a list, or because those of all processes were too large to be kept"`
	Cwd       string     `json:"cwd"`
	User      string     `json:"user"`
	State     string     `json:"state" enum:"running,exited"`
	Stdin     bool       `json:"stdin" doc:"Standard input is open for writing"`
	StartedAt time.Time  `json:"started_at"`
	EndedAt   *time.Time `json:"ended_at,omitempty"`
	ExitCode  *int       `json:"exit_code,omitempty" doc:"The same as exit.code"`
	Exit      *exit      `json:"exit,omitempty"`
	Terminal  *terminal  `json:"terminal,omitempty" doc:"As it is now"`
	Output    output     `json:"output"`
}

type exit struct {
	Code   int    `json:"code" doc:"Exit status, or 128 + the signal's number"`
	Signal string `json:"signal,omitempty" doc:"The signal that ended it"`
	Reason string `json:"reason" enum:"exited,signalled,killed,timeout,idle_timeout,oom"`
}

type output struct {
	Start  int64 `json:"start" doc:"Offset of the oldest byte that is kept"`
	End    int64 `json:"end" doc:"Offset after the newest byte"`
	Stdout int64 `json:"stdout_bytes"`
	Stderr int64 `json:"stderr_bytes"`
	Pty    int64 `json:"pty_bytes"`
	Closed bool  `json:"closed" doc:"No more can come"`
}

func toProcess(p nestbox.Process) process {
	out := process{
		ID: p.ID.String(), PID: p.PID, Tag: p.Tag, Cmd: p.Cmd, Args: p.Args, ArgsCut: p.ArgsCut, Cwd: p.Cwd, User: p.User,
		State: "running", Stdin: p.Stdin, StartedAt: p.StartedAt.UTC(), Terminal: toTerminal(p.Terminal),
		Output: output{Start: p.Output.Start, End: p.Output.End, Stdout: p.Output.Stdout, Stderr: p.Output.Stderr, Pty: p.Output.Pty, Closed: p.Output.Closed},
	}
	if p.Exit != nil {
		code := p.Exit.Code
		out.State, out.ExitCode, out.EndedAt = "exited", &code, optional(p.Exit.At.UTC())
		out.Exit = &exit{Code: code, Signal: p.Exit.Signal, Reason: string(p.Exit.Reason)}
	}
	return out
}

type processList struct {
	Processes   []process       `json:"processes" nullable:"false"`
	Descendants []systemProcess `json:"descendants,omitempty" doc:"All processes of the capsule, whoever started them, if that was asked for"`
}

// systemProcess is a process as the kernel has it, on the wire.
type systemProcess struct {
	PID         int             `json:"pid"`
	PPID        int             `json:"ppid" doc:"PID of its parent"`
	Process     string          `json:"process,omitempty" doc:"Id of the process that the API started and whose tree it is in"`
	User        string          `json:"user"`
	State       string          `json:"state" doc:"As in ps: R, S, D, T, Z, …"`
	Cmd         string          `json:"cmd" doc:"With its arguments, at most 1 KiB"`
	CPUMS       int64           `json:"cpu_ms" doc:"CPU time used, to 10 ms"`
	MemoryBytes int64           `json:"memory_bytes" doc:"Resident"`
	Ports       []listeningPort `json:"ports,omitempty" doc:"TCP ports that it listens on"`
}

type listeningPort struct {
	Port    uint16 `json:"port"`
	Address string `json:"address" doc:"0.0.0.0 or :: = any"`
}

func toSystemProcess(p nestbox.SystemProcess) systemProcess {
	out := systemProcess{
		PID: p.PID, PPID: p.PPID, User: p.User, State: p.State, Cmd: p.Cmd, CPUMS: p.CPU.Milliseconds(), MemoryBytes: p.Memory,
	}
	if p.Process != 0 {
		out.Process = p.Process.String()
	}
	for _, port := range p.Ports {
		out.Ports = append(out.Ports, listeningPort{port.Port, port.Address.String()})
	}
	return out
}

type listProcessesInput struct {
	CapsulePath
	All         bool `query:"all" doc:"Also those that have ended and are remembered"`
	Descendants bool `query:"descendants" doc:"Also tell of all processes of the capsule, such as those that the API's have started, with the ports they listen on"`
}

type getProcessInput struct {
	ProcessPath
	Wait string `query:"wait" doc:"Wait so long for its exit, up to 5m; the record is answered either way" example:"30s"`
}

type processOutput struct {
	Body process
}

type killProcessInput struct {
	ProcessPath
	Signal string `query:"signal" doc:"Sent first to the whole tree; empty = SIGKILL" example:"SIGTERM"`
	Grace  string `query:"grace" doc:"How long after the signal the rest gets SIGKILL, up to 1h; empty = 5s" example:"5s"`
}

type signalBody struct {
	Signal string `json:"signal" doc:"A signal's name, with or without SIG"`
}

type signalProcessInput struct {
	ProcessPath
	Body signalBody
}

type resizeBody struct {
	Rows int `json:"rows" minimum:"1" maximum:"4096"`
	Cols int `json:"cols" minimum:"1" maximum:"4096"`
}

type resizeInput struct {
	ProcessPath
	Body resizeBody
}

type stdinInput struct {
	ProcessPath
	EOF bool `query:"eof" doc:"Close standard input after a body of plain bytes"`
}

// stdinBody is the JSON form of input.
type stdinBody struct {
	Data     string `json:"data,omitempty"`
	Encoding string `json:"encoding,omitempty" enum:"utf-8,base64" doc:"Of data; empty = utf-8"`
	EOF      bool   `json:"eof,omitempty" doc:"Close standard input after data"`
}

func exampleProcess() process {
	return process{
		ID: "@3", PID: 7, Tag: "web", Cmd: "python3", Args: []string{"-m", "http.server", "8080"}, Cwd: "/root", User: "root",
		State: "running", StartedAt: exampleCapsule().CreatedAt, Output: output{End: 61, Stderr: 61},
	}
}

func (s *server) registerProcesses() {
	const (
		tag = "Processes"
		one = "/v1/capsules/{id}/processes/{selector}"
	)
	list := operation{
		id: "listProcesses", method: http.MethodGet, path: "/v1/capsules/{id}/processes", tag: tag,
		summary: "List processes that the API started",
		errors:  append([]int{http.StatusRequestEntityTooLarge, http.StatusNotImplemented}, capsuleErrors...),
	}
	register(s, list, s.listProcesses)
	s.documented(list).Responses["200"].Content = s.jsonContent(processList{Processes: []process{exampleProcess()}})
	register(s, operation{
		id: "getProcess", method: http.MethodGet, path: one, tag: tag,
		summary: "Get a process, or wait for its exit",
		answer:  exampleProcess(),
		errors:  capsuleErrors,
	}, s.getProcess)
	register(s, operation{
		id: "killProcess", method: http.MethodDelete, path: one, tag: tag,
		summary: "Kill a process and everything it started",
		about:   "Also descendants with a session of their own. Answers when none is left.",
		status:  http.StatusNoContent,
		errors:  capsuleErrors,
	}, s.killProcess)
	register(s, operation{
		id: "signalProcess", method: http.MethodPost, path: one + "/signal", tag: tag,
		summary: "Send a signal to a process and its process group",
		status:  http.StatusNoContent,
		request: signalBody{Signal: "SIGHUP"},
		errors:  capsuleErrors,
	}, s.signalProcess)
	register(s, operation{
		id: "resizeProcess", method: http.MethodPost, path: one + "/resize", tag: tag,
		summary: "Change the size of a process's terminal",
		about:   "Its programs are told (SIGWINCH).",
		status:  http.StatusNoContent,
		request: resizeBody{Rows: 40, Cols: 120},
		errors:  append([]int{http.StatusNotImplemented}, capsuleErrors...),
	}, s.resizeProcess)
	stdin := registerRaw(s, s.raw, operation{
		id: "writeStdin", method: http.MethodPost, path: one + "/stdin", tag: tag,
		summary: "Write to the standard input of a process",
		about: "Answers when all of it is written; waits while the pipe is full. The body is JSON, or with the content type " +
			"`application/octet-stream` the plain bytes. At most 4 MiB.",
		status: http.StatusNoContent,
		errors: append([]int{http.StatusRequestEntityTooLarge}, capsuleErrors...),
		sample: `curl -X POST -H "X-API-Key: $NESTBOX_API_KEY" "$NESTBOX_URL/v1/capsules/$CAPSULE/processes/web/stdin" \` +
			"\n  -H 'Content-Type: application/json' -d '{\"data\":\"hello\\n\",\"eof\":true}'",
	}, s.writeStdin)
	content := s.jsonContent(stdinBody{Data: "hello\n", EOF: true})
	content["application/octet-stream"] = binaryContent()["application/octet-stream"]
	stdin.RequestBody = &huma.RequestBody{Required: true, Content: content}
}

func (s *server) listProcesses(ctx context.Context, caller control.Caller, in *listProcessesInput) (*written, error) {
	procs, err := s.control.Processes.List(ctx, caller, in.ID, in.All)
	if err != nil {
		return nil, err
	}
	var tree []nestbox.SystemProcess
	if in.Descendants {
		if tree, err = s.control.Processes.Tree(ctx, caller, in.ID); err != nil {
			return nil, err
		}
	}
	return &written{Body: func(hc huma.Context) {
		w := beginJSON(hc, http.StatusOK)
		w.text("{")
		list(w, "processes", len(procs), func(i int) process { return toProcess(procs[i]) })
		if in.Descendants {
			w.text(",")
			list(w, "descendants", len(tree), func(i int) systemProcess { return toSystemProcess(tree[i]) })
		}
		w.text("}")
		_ = w.end() // the client may be gone
	}}, nil
}

func (s *server) getProcess(ctx context.Context, caller control.Caller, in *getProcessInput) (*processOutput, error) {
	wait, err := parseDuration("wait", in.Wait, maxWait)
	if err != nil {
		return nil, err
	}
	sel, err := nestbox.ParseSelector(in.Selector)
	if err != nil {
		return nil, err
	}
	p, err := s.control.Processes.Wait(ctx, caller, in.ID, sel, wait)
	if err != nil {
		return nil, err
	}
	return &processOutput{Body: toProcess(p)}, nil
}

func (s *server) killProcess(ctx context.Context, caller control.Caller, in *killProcessInput) (*nothing, error) {
	how, err := parseKill(in.Signal, in.Grace)
	if err != nil {
		return nil, err
	}
	sel, err := nestbox.ParseSelector(in.Selector)
	if err != nil {
		return nil, err
	}
	return nil, s.control.Processes.Kill(ctx, caller, in.ID, sel, how)
}

func parseKill(signal, grace string) (guest.Kill, error) {
	var how guest.Kill
	var err error
	if signal != "" {
		if how.Signal, err = nestbox.ParseSignal(signal); err != nil {
			return how, err
		}
	}
	how.Grace, err = parseDuration("grace", grace, maxGrace)
	return how, err
}

func (s *server) signalProcess(ctx context.Context, caller control.Caller, in *signalProcessInput) (*nothing, error) {
	sig, err := nestbox.ParseSignal(in.Body.Signal)
	if err != nil {
		return nil, err
	}
	sel, err := nestbox.ParseSelector(in.Selector)
	if err != nil {
		return nil, err
	}
	return nil, s.control.Processes.Signal(ctx, caller, in.ID, sel, sig)
}

func (s *server) resizeProcess(ctx context.Context, caller control.Caller, in *resizeInput) (*nothing, error) {
	sel, err := nestbox.ParseSelector(in.Selector)
	if err != nil {
		return nil, err
	}
	return nil, s.control.Processes.Resize(ctx, caller, in.ID, sel, in.Body.Rows, in.Body.Cols)
}

func (s *server) writeStdin(w http.ResponseWriter, r *http.Request, in *stdinInput) error {
	sel, err := nestbox.ParseSelector(in.Selector)
	if err != nil {
		return err
	}
	data, eof, err := s.readStdin(w, r, in.EOF)
	if err != nil {
		return err
	}
	if err := s.control.Processes.WriteStdin(r.Context(), callerOf(r.Context()), in.ID, sel, data, eof); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// readStdin reads the bytes to write in either form.
func (s *server) readStdin(w http.ResponseWriter, r *http.Request, eof bool) ([]byte, bool, error) {
	contentType := r.Header.Get("Content-Type")
	if strings.HasPrefix(contentType, "application/octet-stream") {
		data, err := s.readBody(w, r, nestbox.MaxStdin)
		return data, eof, err
	}
	raw, err := s.readBody(w, r, s.cfg.MaxJSONBytes)
	if err != nil {
		return nil, false, err
	}
	if len(raw) == 0 {
		return nil, false, nestbox.Errorf(nestbox.CodeInvalid, "request body is required")
	}
	if err := checkContentType(contentType); err != nil {
		return nil, false, err
	}
	if err := takeDecoded(r.Context(), raw); err != nil {
		return nil, false, err
	}
	body, err := decodeStrict[stdinBody](s, raw)
	if err != nil {
		return nil, false, err
	}
	data := []byte(body.Data)
	if body.Encoding == "base64" {
		if data, err = base64.StdEncoding.DecodeString(body.Data); err != nil {
			return nil, false, nestbox.Errorf(nestbox.CodeInvalid, "body.data: not valid base64: %w", err)
		}
	}
	if len(data) > nestbox.MaxStdin {
		return nil, false, nestbox.Errorf(nestbox.CodeTooLarge, "data is larger than %d bytes", nestbox.MaxStdin)
	}
	return data, body.EOF || eof, nil
}

// parseDuration reads a duration such as 30s, 500ms or 2m; plain digits are
// seconds. Empty is 0.
func parseDuration(name, v string, most time.Duration) (time.Duration, error) {
	if v == "" {
		return 0, nil
	}
	text := v
	if strings.Trim(v, "0123456789") == "" {
		text += "s"
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 || d > most {
		return 0, nestbox.Errorf(nestbox.CodeInvalid, "%s must be a duration like 30s between 0 and %s, not %.40q", name, most, v)
	}
	return d, nil
}
