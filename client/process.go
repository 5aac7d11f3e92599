package client

import (
	"context"
	"errors"
	"math"
	"net/http"
	"net/netip"
	"net/url"
	"time"

	"github.com/nestbox/nestbox"
)

// Processes are the processes of one capsule that were started through the
// API, dead ones included as long as they are remembered. A selector is a
// process id, which is never used again (nestbox.ProcessID.String), a PID in
// decimal, or a tag; the latter two mean the newest process that has it.
type Processes struct {
	c       *Client
	capsule string
}

// Start starts a process in the background and returns once its program has
// been exec'ed. Of the record, ID, PID and Tag are set, and what spec says.
//
// If the connection breaks while the answer is awaited, Start asks for the
// process by the tag it chose. With a tag in spec it cannot tell, and returns
// CodeUnavailable: the process may have been started or not. With a RequestKey the
// request is repeated, and starts one process however often it is.
func (p *Processes) Start(ctx context.Context, spec nestbox.ProcessSpec) (nestbox.Process, error) {
	own := false
	if spec.RequestKey == "" { // else asking again is enough
		spec, own = ownTag(spec)
	}
	body := execBodyOf(spec)
	body.Background = true
	var out struct {
		ID  wireID `json:"id"`
		PID int    `json:"pid"`
		Tag string `json:"tag"`
	}
	req := request{method: http.MethodPost, path: capsulePath(p.capsule, "/exec"), json: body}
	if spec.RequestKey != "" {
		req.header, req.repeatable = http.Header{"Idempotency-Key": {spec.RequestKey}}, true
	}
	res, err := p.c.send(ctx, req)
	if err == nil {
		err = decode(res, &out)
	}
	if err != nil {
		return p.startedAnyway(ctx, spec.Tag, own, err)
	}
	return nestbox.Process{
		ID: nestbox.ProcessID(out.ID), PID: out.PID, Tag: out.Tag, Cmd: spec.Cmd, Args: spec.Args, Cwd: spec.Cwd, User: spec.User, Stdin: spec.Stdin,
	}, nil
}

// ownTag makes sure that spec has a tag. own says that this client made it up,
// so that no other process can have it.
func ownTag(spec nestbox.ProcessSpec) (_ nestbox.ProcessSpec, own bool) {
	if spec.Tag != "" {
		return spec, false
	}
	spec.Tag = nestbox.NewTag()
	return spec, true
}

// lookFor is how long a process is looked for whose start got no answer, while
// the server is away.
const lookFor = 30 * time.Second

// startedAnyway looks for a process whose start got no answer.
func (p *Processes) startedAnyway(ctx context.Context, tag string, own bool, cause error) (nestbox.Process, error) {
	if !own || !ambiguous(cause) || ctx.Err() != nil {
		return nestbox.Process{}, cause
	}
	wait := newPauses(min(p.c.reconnectFor, lookFor))
	for {
		proc, err := p.Get(ctx, tag)
		if err == nil {
			return proc, nil
		}
		if !p.c.mayComeBack(ctx, p.capsule, err) || !wait.next(ctx) {
			return nestbox.Process{}, cause
		}
	}
}

// ambiguous reports whether err leaves open what became of the request: there
// was no answer, or one from something between here and the process.
func ambiguous(err error) bool {
	var e *Error
	if !errors.As(err, &e) {
		return false
	}
	switch e.Status {
	case 0, http.StatusOK, http.StatusAccepted, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return e.WireCode == "" || e.Err.Code == nestbox.CodeUnavailable || e.Err.Code == nestbox.CodeGuest
	}
	return false
}

// List returns the live processes, or with all also the remembered ones, in
// the order of their start.
func (p *Processes) List(ctx context.Context, all bool) ([]nestbox.Process, error) {
	q := url.Values{}
	if all {
		q.Set("all", "true")
	}
	var out struct {
		Processes []processBody `json:"processes"`
	}
	if err := p.c.call(ctx, http.MethodGet, capsulePath(p.capsule, "/processes"), q, nil, &out); err != nil {
		return nil, err
	}
	procs := make([]nestbox.Process, len(out.Processes))
	for i, b := range out.Processes {
		procs[i] = b.domain()
	}
	return procs, nil
}

// Tree returns all processes of the capsule, whoever started them, with the ports that
// they listen on.
func (p *Processes) Tree(ctx context.Context) ([]nestbox.SystemProcess, error) {
	var out struct {
		Descendants []systemProcessBody `json:"descendants"`
	}
	if err := p.c.call(ctx, http.MethodGet, capsulePath(p.capsule, "/processes"), url.Values{"descendants": {"true"}}, nil, &out); err != nil {
		return nil, err
	}
	tree := make([]nestbox.SystemProcess, len(out.Descendants))
	for i, b := range out.Descendants {
		tree[i] = b.domain()
	}
	return tree, nil
}

type systemProcessBody struct {
	PID         int    `json:"pid"`
	PPID        int    `json:"ppid"`
	Process     wireID `json:"process"`
	User        string `json:"user"`
	State       string `json:"state"`
	Cmd         string `json:"cmd"`
	CPUMS       int64  `json:"cpu_ms"`
	MemoryBytes int64  `json:"memory_bytes"`
	Ports       []struct {
		Port    uint16     `json:"port"`
		Address netip.Addr `json:"address"`
	} `json:"ports"`
}

func (b systemProcessBody) domain() nestbox.SystemProcess {
	p := nestbox.SystemProcess{
		PID: b.PID, PPID: b.PPID, Process: nestbox.ProcessID(b.Process), User: b.User, State: b.State, Cmd: b.Cmd,
		CPU: time.Duration(b.CPUMS) * time.Millisecond, Memory: b.MemoryBytes,
	}
	for _, port := range b.Ports {
		p.Ports = append(p.Ports, nestbox.ListeningPort{Port: port.Port, Address: port.Address})
	}
	return p
}

// Get returns one record. CodeNotFound if nothing is known by sel.
func (p *Processes) Get(ctx context.Context, sel string) (nestbox.Process, error) {
	return p.get(ctx, sel, nil)
}

func (p *Processes) get(ctx context.Context, sel string, q url.Values) (nestbox.Process, error) {
	path, err := p.path(sel, "")
	if err != nil {
		return nestbox.Process{}, err
	}
	var out processBody
	if err := p.c.call(ctx, http.MethodGet, path, q, nil, &out); err != nil {
		return nestbox.Process{}, err
	}
	return out.domain(), nil
}

// longPoll is how long one request of Wait waits for an exit.
const longPoll = 30 * time.Second

// Wait returns the record once the process has ended. It goes on through lost
// connections and restarts of the server, for as long as the Config allows.
func (p *Processes) Wait(ctx context.Context, sel string) (nestbox.Process, error) {
	var lost *pauses
	for {
		proc, err := p.get(ctx, sel, url.Values{"wait": {longPoll.String()}})
		switch {
		case err == nil && !proc.Running():
			return proc, nil
		case err == nil:
			lost = nil
			if proc.ID != 0 {
				sel = selector(proc.ID) // and no other one
			}
		case !p.c.mayComeBack(ctx, p.capsule, err):
			return nestbox.Process{}, err
		default:
			if lost == nil {
				lost = newPauses(p.c.patience(err))
			}
			if !lost.next(ctx) {
				return nestbox.Process{}, firstError(ctx, err)
			}
		}
	}
}

// firstError prefers the end of ctx over what it caused.
func firstError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return contextError(ctx)
	}
	return err
}

// mayComeBack reports whether what is in a capsule and cannot be reached because of
// err may be reachable later: the server or the host is away, or the capsule is
// known to be alive and merely not reachable.
func (c *Client) mayComeBack(ctx context.Context, capsule string, err error) bool {
	if ctx.Err() != nil {
		return false
	}
	switch nestbox.CodeOf(err) {
	case nestbox.CodeUnavailable, nestbox.CodeGuest, nestbox.CodeTimeout, nestbox.CodeInternal, nestbox.CodeExhausted, nestbox.CodeCanceled:
		return true
	case nestbox.CodeInvalidState:
		found, err := c.Capsules.Get(ctx, capsule)
		if err != nil {
			return nestbox.CodeOf(err) != nestbox.CodeNotFound && ctx.Err() == nil
		}
		return found.Info.State.Live() && found.Info.State != nestbox.StateStopping
	}
	return false
}

// patienceWithFailures bounds how long a server is asked again that answers,
// but fails: it may be in the middle of a restart, or have a defect, or the
// capsule does not answer it.
const patienceWithFailures = 30 * time.Second

// patience returns how long to go on after err.
func (c *Client) patience(err error) time.Duration {
	switch nestbox.CodeOf(err) {
	case nestbox.CodeInternal, nestbox.CodeExhausted, nestbox.CodeCanceled, nestbox.CodeTimeout:
		return min(c.reconnectFor, patienceWithFailures)
	}
	return c.reconnectFor
}

// Kill says how to end a process and everything it started.
type Kill struct {
	Signal string        // sent first, such as "TERM"; "" = SIGKILL
	Grace  time.Duration // how long after Signal what is left gets SIGKILL; 0 = the server's default of 5 s
}

// Kill ends a process and everything it started, and returns when none of it
// is left. Killing what has ended already is no error.
func (p *Processes) Kill(ctx context.Context, sel string, how Kill) error {
	path, err := p.path(sel, "")
	if err != nil {
		return err
	}
	q := url.Values{}
	if how.Signal != "" {
		q.Set("signal", how.Signal)
	}
	if how.Grace > 0 {
		q.Set("grace", how.Grace.String())
	}
	return p.c.call(ctx, http.MethodDelete, path, q, nil, nil)
}

// Signal sends a signal, by name, to a process and its process group.
// CodeInvalid: no such signal. CodeInvalidState: the process has ended.
func (p *Processes) Signal(ctx context.Context, sel, signal string) error {
	path, err := p.path(sel, "/signal")
	if err != nil {
		return err
	}
	return p.c.call(ctx, http.MethodPost, path, nil, map[string]string{"signal": signal}, nil)
}

// Resize changes the size of a process's terminal, of which its programs are told.
// CodeInvalidState: it has none, or has ended.
func (p *Processes) Resize(ctx context.Context, sel string, rows, cols int) error {
	path, err := p.path(sel, "/resize")
	if err != nil {
		return err
	}
	return p.c.call(ctx, http.MethodPost, path, nil, map[string]int{"rows": rows, "cols": cols}, nil)
}

// WriteStdin writes data to a process's standard input and then closes it if
// eof. It waits while the pipe is full. It is never repeated by itself:
// CodeUnavailable means that some, all or none of it may have arrived.
// CodeInvalidState: standard input is not open.
func (p *Processes) WriteStdin(ctx context.Context, sel string, data []byte, eof bool) error {
	path, err := p.path(sel, "/stdin")
	if err != nil {
		return err
	}
	for {
		part := data[:min(len(data), nestbox.MaxStdin)]
		data = data[len(part):]
		if err := p.writeStdin(ctx, path, part, eof && len(data) == 0); err != nil || len(data) == 0 {
			return err
		}
	}
}

func (p *Processes) writeStdin(ctx context.Context, path string, part []byte, eof bool) error {
	r := request{
		method: http.MethodPost, path: path, data: append([]byte{}, part...),
		header:     http.Header{"Content-Type": {octetStream}},
		repeatable: len(part) == 0, // closing it twice does no harm
		ask:        len(part) > 0,  // typing goes on while a server restarts
	}
	if eof {
		r.query = url.Values{"eof": {"true"}}
	}
	res, err := p.c.send(ctx, r)
	if err != nil {
		return err
	}
	return decode(res, nil)
}

func (p *Processes) path(sel, rest string) (string, error) {
	s, err := nestbox.ParseSelector(sel)
	if err != nil {
		return "", err
	}
	return capsulePath(p.capsule, "/processes/"+url.PathEscape(s.String())+rest), nil
}

const octetStream = "application/octet-stream"

// execBody is what starts a process, in all its forms.
type execBody struct {
	Type       string            `json:"type,omitempty"` // of a message, over a WebSocket
	Cmd        string            `json:"cmd"`
	Args       []string          `json:"args,omitempty"`
	Envs       map[string]string `json:"envs,omitempty"`
	Cwd        string            `json:"cwd,omitempty"`
	User       string            `json:"user,omitempty"`
	Tag        string            `json:"tag,omitempty"`
	TimeoutSec int               `json:"timeout_sec,omitempty"`
	IdleSec    int               `json:"idle_timeout_sec,omitempty"`
	OnConflict string            `json:"on_conflict,omitempty"`
	Merge      bool              `json:"merge,omitempty"`
	Stdin      bool              `json:"stdin,omitempty"`
	Terminal   *terminalBody     `json:"terminal,omitempty"`
	Background bool              `json:"background,omitempty"`
	Detach     bool              `json:"detach,omitempty"`   // over a WebSocket
	Encoding   string            `json:"encoding,omitempty"` // over a WebSocket
}

func execBodyOf(s nestbox.ProcessSpec) execBody {
	return execBody{
		Cmd: s.Cmd, Args: s.Args, Envs: s.Env, Cwd: nestbox.PathText(s.Cwd), User: s.User, Tag: s.Tag, Stdin: s.Stdin, OnConflict: string(s.OnConflict),
		TimeoutSec: int(math.Ceil(s.Timeout.Seconds())), IdleSec: int(math.Ceil(s.IdleTimeout.Seconds())), Merge: s.Merge, Terminal: terminalBodyOf(s.Terminal),
	}
}

type terminalBody struct {
	Rows int    `json:"rows,omitempty"`
	Cols int    `json:"cols,omitempty"`
	Term string `json:"term,omitempty"`
}

func terminalBodyOf(t *nestbox.Terminal) *terminalBody {
	if t == nil {
		return nil
	}
	return &terminalBody{Rows: t.Rows, Cols: t.Cols, Term: t.Term}
}

func (b *terminalBody) domain() *nestbox.Terminal {
	if b == nil {
		return nil
	}
	return &nestbox.Terminal{Rows: b.Rows, Cols: b.Cols, Term: b.Term}
}

type processBody struct {
	ID        wireID    `json:"id"`
	PID       int       `json:"pid"`
	Tag       string    `json:"tag"`
	Cmd       string    `json:"cmd"`
	Args      []string  `json:"args"`
	ArgsCut   bool      `json:"args_cut"`
	Cwd       string    `json:"cwd"`
	User      string    `json:"user"`
	Stdin     bool      `json:"stdin"`
	StartedAt time.Time `json:"started_at"`
	EndedAt   time.Time `json:"ended_at"`
	Exit      *exitBody `json:"exit"`

	Terminal *terminalBody `json:"terminal"`

	Output struct {
		Start       int64 `json:"start"`
		End         int64 `json:"end"`
		StdoutBytes int64 `json:"stdout_bytes"`
		StderrBytes int64 `json:"stderr_bytes"`
		PtyBytes    int64 `json:"pty_bytes"`
		Closed      bool  `json:"closed"`
	} `json:"output"`
}

type exitBody struct {
	Code   int    `json:"code"`
	Signal string `json:"signal"`
	Reason string `json:"reason"`
}

func (b processBody) domain() nestbox.Process {
	proc := nestbox.Process{
		ID: nestbox.ProcessID(b.ID), PID: b.PID, Tag: b.Tag, Cmd: b.Cmd, Args: b.Args, ArgsCut: b.ArgsCut, Cwd: nestbox.PathBytes(b.Cwd), User: b.User, Stdin: b.Stdin, StartedAt: b.StartedAt,
		Terminal: b.Terminal.domain(),
		Output: nestbox.OutputState{
			Start: b.Output.Start, End: b.Output.End,
			Stdout: b.Output.StdoutBytes, Stderr: b.Output.StderrBytes, Pty: b.Output.PtyBytes, Closed: b.Output.Closed,
		},
	}
	if b.Exit != nil {
		proc.Exit = &nestbox.Exit{Code: b.Exit.Code, Signal: b.Exit.Signal, Reason: nestbox.ExitReason(b.Exit.Reason), At: b.EndedAt}
	}
	return proc
}

// selector returns the selector that means this process and no other.
func selector(id nestbox.ProcessID) string { return id.String() }

// wireID is a process id in JSON.
type wireID nestbox.ProcessID

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *wireID) UnmarshalText(text []byte) error {
	if len(text) == 0 { // of a capsule that is older than process ids
		return nil
	}
	parsed, err := nestbox.ParseProcessID(string(text))
	*id = wireID(parsed)
	return err
}
