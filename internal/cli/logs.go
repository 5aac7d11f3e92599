package cli

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

// limited is a context that ends after d, if d is not 0.
func limited(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if d <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, d)
}

// logFlags are the flags of nestbox logs.
type logFlags struct {
	since, stream string
	lines, bytes  int64
	how           client.Attach
	follow        bool
}

func newLogs(a *app) *cobra.Command {
	var l logFlags
	cmd := &cobra.Command{
		Use:   "logs <capsule> <process>…",
		Short: "Print what processes have written",
		Long: `Print what processes, named by their tags, ids or PIDs, have written to stdout and
stderr. Positions count the bytes of both together; output that is no longer kept is
reported on standard error. With several processes each line begins with the name of
its own.`,
		Example: `  nestbox logs -f -n 20 cl-4f web
  nestbox logs -t --since 5m cl-4f web worker`,
		Args:              usual,
		ValidArgsFunction: a.completeProcess,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := l.check(cmd); err != nil {
				return err
			}
			capsule, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.logs(cmd.Context(), capsule, args[1:], l)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&l.follow, "follow", "f", false, "go on with what comes, until the processes and all that hold their output have ended")
	f.StringVar(&l.since, "since", "start", "where to begin: start (the oldest byte kept), now, how long ago (5m), a time (2026-01-02T15:04:05Z), or a position in bytes")
	f.Int64VarP(&l.lines, "tail", "n", 0, "only the last so many lines")
	f.Int64Var(&l.bytes, "tail-bytes", 0, "only the last so many bytes")
	f.BoolVarP(&l.how.Times, "timestamps", "t", false, "put before each line when it was read")
	f.StringVar(&l.stream, "stream", "", "only stdout, only stderr, or only pty")
	f.BoolVar(&l.how.Lossless, "lossless", false, "have the process wait for us rather than lose output")
	cmd.MarkFlagsMutuallyExclusive("tail", "tail-bytes")
	cmd.MarkFlagsMutuallyExclusive("since", "tail-bytes")
	return cmd
}

// check reads the flags.
func (l *logFlags) check(cmd *cobra.Command) error {
	since, err := nestbox.ParseSince(l.since)
	if err != nil {
		return err
	}
	if l.lines < 0 || l.bytes < 0 {
		return nestbox.Errorf(nestbox.CodeInvalid, "--tail and --tail-bytes are not negative")
	}
	switch {
	case cmd.Flags().Changed("tail-bytes"):
		since = nestbox.Since{Tail: l.bytes, Now: l.bytes == 0}
	case cmd.Flags().Changed("tail") && since.After.IsZero() && cmd.Flags().Changed("since"):
		return nestbox.Errorf(nestbox.CodeInvalid, "--tail goes with a --since that is a time or a duration only")
	case cmd.Flags().Changed("tail") && l.lines == 0:
		since = nestbox.Since{Now: true}
	case cmd.Flags().Changed("tail"):
		since.Lines = l.lines
	}
	switch s := nestbox.Stream(l.stream); s {
	case "", nestbox.Stdout, nestbox.Stderr, nestbox.Pty:
		l.how.LinesOf = s
	default:
		return nestbox.Errorf(nestbox.CodeInvalid, "--stream is stdout, stderr or pty, not %q", l.stream)
	}
	l.how.Since = since
	return nil
}

// logs prints the logs of processes, one after the other, or with follow at the same
// time.
func (a *app) logs(ctx context.Context, capsule *client.Capsule, names []string, l logFlags) error {
	var turn sync.Mutex
	printer := func(name string) *logPrinter {
		p := &logPrinter{a: a, turn: &turn, only: nestbox.Stream(l.stream), name: name}
		if len(names) > 1 {
			p.prefix = name + " | "
		}
		return p
	}
	if !l.follow {
		return forEach(names, func(name string) error { return a.log(ctx, capsule, name, l, printer(name)) })
	}
	ends := make([]chan error, len(names))
	for i, name := range names {
		ends[i] = make(chan error, 1)
		go func() { ends[i] <- a.log(ctx, capsule, name, l, printer(name)) }()
	}
	i := -1
	return forEach(names, func(string) error { i++; return <-ends[i] })
}

func (a *app) log(ctx context.Context, capsule *client.Capsule, name string, l logFlags, out *logPrinter) error {
	proc, err := capsule.Processes.Get(ctx, name)
	if err != nil {
		return err
	}
	if l.how.Since == (nestbox.Since{}) && proc.Output.Start > 0 {
		a.reportGap(0, proc.Output.Start)
	}
	stream, err := capsule.Processes.Attach(ctx, proc.ID.String(), l.how)
	if err != nil {
		return err
	}
	defer stream.Close()
	if _, err := stream.Begin(ctx); err != nil {
		return err
	}
	for l.follow || stream.Offset() < proc.Output.End {
		ev, err := stream.Next(ctx)
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			if !l.follow && ev.Kind == nestbox.EventData {
				ev.Data = ev.Data[:max(0, min(int64(len(ev.Data)), proc.Output.End-ev.Offset))]
			}
			err = out.print(ev)
		}
		if err != nil {
			return err
		}
	}
	return out.flush()
}

// logPrinter prints the events of a log. Lines that have a prefix are printed whole.
type logPrinter struct {
	a      *app
	turn   *sync.Mutex    // of all that print
	only   nestbox.Stream // "" = all
	name   string
	prefix string

	inLine bool
	line   []byte // that has begun; only with a prefix
	buf    []byte
}

// maxLine is how long a line is held back until it is whole, in bytes.
const maxLine = 64 << 10

// stampFormat is RFC 3339, to the millisecond and as wide for every time.
const stampFormat = "2006-01-02T15:04:05.000Z07:00 "

func (p *logPrinter) print(ev nestbox.OutputEvent) error {
	switch {
	case ev.Kind == nestbox.EventData && p.only != "" && ev.Stream != p.only:
		return nil
	case p.a.json:
		p.turn.Lock()
		defer p.turn.Unlock()
		return p.a.printEvent(p.name, ev)
	case ev.Kind == nestbox.EventGap:
		p.a.reportGap(ev.Offset, ev.To)
		return nil
	case ev.Kind != nestbox.EventData:
		return nil
	}
	if p.prefix == "" && ev.At.IsZero() {
		return p.write(ev.Data)
	}
	p.buf = append(p.buf[:0], p.line...)
	for line := range bytes.Lines(ev.Data) {
		if !p.inLine {
			p.buf = append(p.buf, p.prefix...)
			if !ev.At.IsZero() {
				p.buf = ev.At.UTC().AppendFormat(p.buf, stampFormat)
			}
		}
		p.buf = append(p.buf, line...)
		p.inLine = line[len(line)-1] != '\n'
	}
	whole := len(p.buf)
	if p.prefix != "" && p.inLine {
		if whole = bytes.LastIndexByte(p.buf, '\n') + 1; len(p.buf)-whole > maxLine {
			whole = len(p.buf)
		}
	}
	p.line = append(p.line[:0], p.buf[whole:]...)
	return p.write(p.buf[:whole])
}

// flush prints what is left at the end.
func (p *logPrinter) flush() error {
	if len(p.line) == 0 {
		return nil
	}
	return p.write(append(p.line, '\n'))
}

func (p *logPrinter) write(b []byte) error {
	p.turn.Lock()
	defer p.turn.Unlock()
	_, err := p.a.Out.Write(b)
	return err
}

// eventJSON is an event of a log for programs, one in a line.
type eventJSON struct {
	Process  string     `json:"process"`
	Type     string     `json:"type"` // stdout, stderr, pty, gap, exit or output_closed
	Offset   int64      `json:"offset"`
	End      int64      `json:"end"`
	At       *time.Time `json:"at,omitempty"`
	Data     string     `json:"data,omitempty"`
	Encoding string     `json:"encoding,omitempty"` // base64, if data is no text
	Exit     *exitJSON  `json:"exit,omitempty"`
}

func (a *app) printEvent(process string, ev nestbox.OutputEvent) error {
	v := eventJSON{Process: process, Type: string(ev.Kind), Offset: ev.Offset, End: ev.End(), At: optional(ev.At)}
	switch ev.Kind {
	case nestbox.EventData:
		v.Type, v.Data = string(ev.Stream), string(ev.Data)
		if !utf8.Valid(ev.Data) {
			v.Data, v.Encoding = base64.StdEncoding.EncodeToString(ev.Data), "base64"
		}
	case nestbox.EventExit:
		v.Exit = &exitJSON{ev.Exit.Code, ev.Exit.Signal, string(ev.Exit.Reason)}
	case nestbox.EventClosed:
		v.Type = "output_closed"
	}
	enc := json.NewEncoder(a.Out)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

func (a *app) reportGap(from, to int64) {
	a.warn("%d bytes of output are no longer kept: %d to %d", to-from, from, to)
}
