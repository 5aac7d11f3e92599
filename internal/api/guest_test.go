package api

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing/iotest"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// scriptedGuest is a guest.Guest in memory whose processes do what a test says.
type scriptedGuest struct {
	procs *scriptedProcesses
	files *scriptedFiles
}

func newScriptedGuest() *scriptedGuest {
	return &scriptedGuest{&scriptedProcesses{changed: make(chan struct{})}, &scriptedFiles{content: map[string]string{}}}
}

func (g *scriptedGuest) Ping(context.Context) (guest.Info, error) { return guest.Info{}, nil }
func (g *scriptedGuest) Processes() guest.Processes               { return g.procs }
func (g *scriptedGuest) Files() guest.Files                       { return g.files }
func (g *scriptedGuest) Dial(context.Context, uint16) (net.Conn, error) {
	return nil, nestbox.Errorf(nestbox.CodeUnavailable, "nothing listens")
}

// scriptedProcesses keeps records and logs. changed is closed, and made anew,
// with every change.
type scriptedProcesses struct {
	mu      sync.Mutex
	list    []*scripted
	changed chan struct{}
	stall   chan struct{} // if set, WriteStdin waits for it
	waits   int           // how often Wait looked
	fails   error         // if set, List and Get fail with it
}

type scripted struct {
	nestbox.Process
	attached guest.Attach // of Start
	events   []nestbox.OutputEvent
	dropped  int64 // offset of the oldest byte kept
	broken   error // what readers get instead of waiting
	stdin    []byte
	signals  []syscall.Signal
	kills    []guest.Kill
}

func (s *scriptedProcesses) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

func (p *scripted) named(sel nestbox.Selector) bool {
	return p.ID == sel.ID || p.PID == sel.PID || p.Tag == sel.Tag
}

// change finds a process and changes it.
func (s *scriptedProcesses) change(sel nestbox.Selector, do func(*scripted)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range slices.Backward(s.list) {
		if p.named(sel) {
			do(p)
			s.wake()
			return nil
		}
	}
	return nestbox.Errorf(nestbox.CodeNotFound, "process not found")
}

// Start does what the command says: exit with args[0] after writing args[1:],
// run until it is killed, or one of the ways to fail.
func (s *scriptedProcesses) Start(_ context.Context, spec nestbox.ProcessSpec, attach *guest.Attach) (nestbox.Process, guest.OutputReader, error) {
	if err := spec.Validate(); err != nil {
		return nestbox.Process{}, nil, err
	}
	switch spec.Cmd {
	case "missing":
		return nestbox.Process{}, nil, nestbox.Errorf(nestbox.CodeInvalid, "missing: no such program")
	case "many":
		return nestbox.Process{}, nil, nestbox.Errorf(nestbox.CodeExhausted, "no more processes can be started")
	case "panic":
		panic("as asked for")
	}
	if spec.Tag == "" {
		spec.Tag = nestbox.NewTag()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.list {
		if p.Tag == spec.Tag && p.Running() {
			return nestbox.Process{}, nil, nestbox.Errorf(nestbox.CodeConflict, "tag is taken")
		}
	}
	p := &scripted{Process: nestbox.Process{
		ID: nestbox.ProcessID(len(s.list) + 11), PID: len(s.list) + 1, Tag: spec.Tag, Cmd: spec.Cmd, Args: spec.Args, Cwd: spec.Cwd, User: "root",
		Stdin: spec.Stdin, StartedAt: time.Now(),
	}}
	s.list = append(s.list, p)
	switch spec.Cmd {
	case "echo":
		p.write(nestbox.Stdout, strings.Join(spec.Args, " ")+"\n")
		p.exit(nestbox.Exit{Reason: nestbox.ReasonExited})
		p.closed()
	case "timeout":
		p.write(nestbox.Stderr, "so far")
		p.exit(nestbox.Exit{Code: 137, Signal: "SIGKILL", Reason: nestbox.ReasonTimeout})
		p.closed()
	case "binary":
		p.write(nestbox.Stdout, "\xff\x00")
		p.write(nestbox.Stderr, "text")
		p.exit(nestbox.Exit{Reason: nestbox.ReasonExited})
		p.closed()
	}
	s.wake()
	if attach == nil {
		return p.Process, nil, nil
	}
	p.attached = *attach
	return p.Process, s.reader(p, attach.Since), nil
}

func (p *scripted) write(stream nestbox.Stream, text string) {
	p.events = append(p.events, nestbox.OutputEvent{Kind: nestbox.EventData, Stream: stream, Offset: p.Output.End, Data: []byte(text)})
	p.Output.End += int64(len(text))
	if stream == nestbox.Stdout {
		p.Output.Stdout += int64(len(text))
	} else {
		p.Output.Stderr += int64(len(text))
	}
}

func (p *scripted) exit(e nestbox.Exit) {
	e.At = time.Now()
	p.Exit = &e
	p.events = append(p.events, nestbox.OutputEvent{Kind: nestbox.EventExit, Offset: p.Output.End, Exit: &e})
}

func (p *scripted) closed() {
	p.Output.Closed = true
	p.events = append(p.events, nestbox.OutputEvent{Kind: nestbox.EventClosed, Offset: p.Output.End})
}

// drop forgets the output before an offset.
func (p *scripted) drop(to int64) { p.dropped, p.Output.Start = to, to }

func (s *scriptedProcesses) List(_ context.Context, all bool) ([]nestbox.Process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fails != nil {
		return nil, s.fails
	}
	var out []nestbox.Process
	for _, p := range s.list {
		if all || p.Running() {
			out = append(out, p.Process)
		}
	}
	return out, nil
}

func (s *scriptedProcesses) Get(_ context.Context, sel nestbox.Selector) (p nestbox.Process, err error) {
	if s.fails != nil {
		return p, s.fails
	}
	err = s.change(sel, func(found *scripted) { p = found.Process })
	return p, err
}

func (s *scriptedProcesses) Wait(ctx context.Context, sel nestbox.Selector) (nestbox.Process, error) {
	for {
		s.mu.Lock()
		changed := s.changed
		s.waits++
		s.mu.Unlock()
		p, err := s.peek(sel)
		if err != nil || !p.Running() {
			return p, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return p, nestbox.Errorf(nestbox.CodeTimeout, "%w", ctx.Err())
		}
	}
}

// peek is Get without a wake-up.
func (s *scriptedProcesses) peek(sel nestbox.Selector) (nestbox.Process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range slices.Backward(s.list) {
		if p.named(sel) {
			return p.Process, nil
		}
	}
	return nestbox.Process{}, nestbox.Errorf(nestbox.CodeNotFound, "process not found")
}

// Locate knows the last line only.
func (s *scriptedProcesses) Locate(ctx context.Context, sel nestbox.Selector, since nestbox.Since, stream nestbox.Stream) (int64, error) {
	p, err := s.Get(ctx, sel)
	if since.Lines == 1 && stream == "" {
		return p.Output.End - 4, err
	}
	return 0, nestbox.Errorf(nestbox.CodeUnsupported, "not scripted")
}

func (s *scriptedProcesses) Tree(context.Context) ([]nestbox.SystemProcess, error) {
	return []nestbox.SystemProcess{{PID: 7, PPID: 1, Process: 3, User: "root", State: "S", Cmd: "python3 -m http.server", CPU: time.Second, Memory: 4096, Ports: []nestbox.ListeningPort{{Port: 8000, Address: netip.IPv4Unspecified()}}}}, nil
}

func (s *scriptedProcesses) Attach(_ context.Context, sel nestbox.Selector, attach guest.Attach) (r guest.OutputReader, err error) {
	err = s.change(sel, func(p *scripted) { r = s.reader(p, attach.Since) })
	return r, err
}

func (s *scriptedProcesses) WriteStdin(ctx context.Context, sel nestbox.Selector, b []byte, eof bool) error {
	if s.stall != nil {
		select {
		case <-s.stall:
		case <-ctx.Done():
			return nestbox.Errorf(nestbox.CodeCanceled, "%w", ctx.Err())
		}
	}
	closed := false
	err := s.change(sel, func(p *scripted) {
		closed = !p.Stdin
		if !closed {
			p.stdin, p.Stdin = append(p.stdin, b...), !eof
		}
	})
	if err == nil && closed {
		err = nestbox.Errorf(nestbox.CodeInvalidState, "standard input is not open")
	}
	return err
}

func (s *scriptedProcesses) Resize(_ context.Context, sel nestbox.Selector, rows, cols int) error {
	return s.change(sel, func(p *scripted) { p.Terminal = &nestbox.Terminal{Rows: rows, Cols: cols} })
}

func (s *scriptedProcesses) Signal(_ context.Context, sel nestbox.Selector, sig syscall.Signal) error {
	return s.change(sel, func(p *scripted) { p.signals = append(p.signals, sig) })
}

func (s *scriptedProcesses) KillBiggest(context.Context, int64) (guest.Victim, error) {
	return guest.Victim{}, nestbox.Errorf(nestbox.CodeUnsupported, "not scripted")
}

func (s *scriptedProcesses) Kill(_ context.Context, sel nestbox.Selector, how guest.Kill) (p nestbox.Process, err error) {
	err = s.change(sel, func(found *scripted) {
		found.kills = append(found.kills, how)
		if found.Running() {
			found.exit(nestbox.Exit{Code: 137, Signal: "SIGKILL", Reason: nestbox.ReasonKilled})
			found.closed()
		}
		p = found.Process
	})
	return p, err
}

// scriptedReader is a cursor over the events of one process.
type scriptedReader struct {
	procs *scriptedProcesses
	p     *scripted
	next  int
	at    int64
	ended bool
}

func (s *scriptedProcesses) reader(p *scripted, since nestbox.Since) *scriptedReader {
	return &scriptedReader{procs: s, p: p, at: sinceOffset(since, p.Output)}
}

func sinceOffset(since nestbox.Since, log nestbox.OutputState) int64 {
	switch {
	case since.Now:
		return log.End
	case since.Tail > 0:
		return max(log.Start, log.End-since.Tail)
	case since.Offset > 0:
		return since.Offset
	}
	return log.Start
}

func (r *scriptedReader) Next(ctx context.Context) (nestbox.OutputEvent, error) {
	for {
		r.procs.mu.Lock()
		changed, broken := r.procs.changed, r.p.broken
		ev, ok := r.take()
		r.procs.mu.Unlock()
		switch {
		case ok:
			return ev, nil
		case broken != nil:
			return ev, broken
		case r.ended:
			return ev, io.EOF
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ev, nestbox.Errorf(nestbox.CodeCanceled, "%w", ctx.Err())
		}
	}
}

func (r *scriptedReader) take() (nestbox.OutputEvent, bool) {
	if r.at < r.p.dropped {
		ev := nestbox.OutputEvent{Kind: nestbox.EventGap, Offset: r.at, To: r.p.dropped}
		r.at = r.p.dropped
		return ev, true
	}
	for ; r.next < len(r.p.events); r.next++ {
		ev := r.p.events[r.next]
		if ev.Kind == nestbox.EventData {
			if ev.End() <= r.at {
				continue
			}
			ev.Data = ev.Data[max(0, r.at-ev.Offset):]
			ev.Offset = max(r.at, ev.Offset)
			r.at = ev.End()
		}
		r.ended = ev.Kind == nestbox.EventClosed
		r.next++
		return ev, true
	}
	return nestbox.OutputEvent{}, false
}

func (r *scriptedReader) Close() error { return nil }

// scriptedFiles are files in memory, with some of a kind of their own.
type scriptedFiles struct {
	mu      sync.Mutex
	content map[string]string
	watch   guest.FileWatch // of every path that there is
	written string          // with which options, the last time
}

func (f *scriptedFiles) Read(_ context.Context, path string, from int64) (io.ReadCloser, nestbox.FileInfo, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	content, ok := f.content[path]
	if !ok {
		return nil, nestbox.FileInfo{}, nestbox.Errorf(nestbox.CodeNotFound, "%s: no such file or directory", path)
	}
	info := f.info(path)
	switch path {
	case "/proc/cpuinfo":
		info.Size = 0
	case "/shrinks":
		info.Size++
	case "/proc/1/mem":
		return io.NopCloser(iotest.ErrReader(nestbox.Errorf(nestbox.CodeGuest, "/proc/1/mem: input/output error"))), info, nil
	}
	return io.NopCloser(strings.NewReader(content[min(from, int64(len(content))):])), info, nil
}

func (f *scriptedFiles) info(path string) nestbox.FileInfo {
	kind := nestbox.FileTypeFile
	if path == "/dev/null" {
		kind = nestbox.FileTypeOther
	}
	return nestbox.FileInfo{
		Name: path[strings.LastIndexByte(path, '/')+1:], Path: path, Type: kind, Size: int64(len(f.content[path])),
		Mode: 0o4755, Owner: "root", Group: "root", ModifiedAt: time.Unix(1700000000, 0),
	}
}

func (f *scriptedFiles) Write(_ context.Context, path string, r io.Reader, opts guest.WriteOptions) (nestbox.FileInfo, error) {
	var b bytes.Buffer
	if path == "/full" {
		return nestbox.FileInfo{}, nestbox.Errorf(nestbox.CodeExhausted, "no space left on device")
	}
	if _, err := b.ReadFrom(r); err != nil {
		return nestbox.FileInfo{}, nestbox.Errorf(nestbox.CodeGuest, "write: %v", err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.content[path], f.written = b.String(), fmt.Sprintf("%+v", opts)
	return f.info(path), nil
}

// lastWrite returns the options of the last Write.
func (f *scriptedFiles) lastWrite() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.written
}

func (f *scriptedFiles) Stat(_ context.Context, path string) (nestbox.FileInfo, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.content[path]; !ok {
		return nestbox.FileInfo{}, nestbox.Errorf(nestbox.CodeNotFound, "%s: no such file or directory", path)
	}
	return f.info(path), nil
}

func (f *scriptedFiles) List(_ context.Context, path string, _ int) ([]nestbox.FileInfo, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []nestbox.FileInfo
	for name := range f.content {
		if strings.HasPrefix(name, path) {
			out = append(out, f.info(name))
		}
	}
	return out, nil
}

func (f *scriptedFiles) Mkdir(_ context.Context, path string) (nestbox.FileInfo, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.content[path]; ok {
		return nestbox.FileInfo{}, nestbox.Errorf(nestbox.CodeConflict, "%s exists", path)
	}
	f.content[path] = ""
	return f.info(path), nil
}

func (f *scriptedFiles) Remove(_ context.Context, path string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.content, path)
	return nil
}

func (f *scriptedFiles) Watch(_ context.Context, path string, _ bool) (guest.FileWatch, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.content[path]; !ok {
		return nil, nestbox.Errorf(nestbox.CodeNotFound, "no such file or directory: %s", path)
	}
	return f.watch, nil
}

// Pack packs one file, which is all that there is below a path.
func (f *scriptedFiles) Pack(_ context.Context, path string, _ guest.PackOptions, w io.Writer, begin func() error) ([]string, error) {
	content, ok := f.get(path)
	if !ok {
		return nil, nestbox.Errorf(nestbox.CodeNotFound, "no such file or directory: %s", path)
	}
	if err := begin(); err != nil {
		return nil, err
	}
	if _, err := io.WriteString(w, content); err != nil {
		return nil, err
	}
	if path == "/breaks" {
		return nil, nestbox.Errorf(nestbox.CodeGuest, "input/output error")
	}
	return []string{"of " + path}, nil
}

// Unpack keeps the archive as it is.
func (f *scriptedFiles) Unpack(ctx context.Context, path string, r io.Reader, opts guest.UnpackOptions) (nestbox.Unpacked, error) {
	info, err := f.Write(ctx, path, r, guest.WriteOptions{})
	return nestbox.Unpacked{Entries: 1, Bytes: info.Size, Warnings: []string{fmt.Sprintf("%+v", opts)}}, err
}

// get returns what a file holds.
func (f *scriptedFiles) get(path string) (string, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	content, ok := f.content[path]
	return content, ok
}
