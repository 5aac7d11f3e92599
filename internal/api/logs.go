package api

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
	"github.com/nestbox/nestbox/internal/guest"
)

// Headers and trailers of plain output.
const (
	headerStart = "X-Output-Start-Offset"
	headerEnd   = "X-Output-End-Offset"
	headerGaps  = "X-Output-Gaps"
)

// maxGaps bounds what headerGaps lists.
const maxGaps = 100

type logsInput struct {
	ProcessPath
	LogPlace
	Tail     int64  `query:"tail" minimum:"0" doc:"Begin so many bytes before the current end; not together with since or tail_lines"`
	Follow   bool   `query:"follow" doc:"Go on with what comes, until output_closed; otherwise the answer ends where the log stands now"`
	Lossless bool   `query:"lossless" doc:"While this client is connected the process waits for it, rather than that output is lost to it"`
	Stream   string `query:"stream" enum:"stdout,stderr,pty" doc:"Only this one; empty = all, in the order they were read"`
	Encoding string `query:"encoding" enum:"utf-8,base64" doc:"Of data in Server-Sent Events"`
	LastID   string `header:"Last-Event-ID" doc:"Where Server-Sent Events go on; wins over since"`
}

func (s *server) registerLogs() {
	op := registerRaw(s, s.raw, operation{
		id: "processLogs", method: http.MethodGet, path: "/v1/capsules/{id}/processes/{selector}/logs", tag: "Streams",
		summary: "Read the output of a process",
		about: "As plain bytes, each line after when it was read with `timestamps`, or as Server-Sent Events with `Accept: text/event-stream`: their data is a message of the process stream, their id where to resume.\n\n" +
			"Plain bytes begin at the offset in `X-Output-Start-Offset`. Output that is no longer kept cannot be shown among them: the trailer `X-Output-Gaps` " +
			"lists it as `from-to,…`, and `X-Output-End-Offset` (a header, or a trailer if the answer ends with the log) says where to resume. An answer that breaks off is cut " +
			"without its final chunk. The process does not wait for the client, unless `lossless=true`.",
		errors: capsuleErrors,
		sample: `curl -N -H "X-API-Key: $NESTBOX_API_KEY" "$NESTBOX_URL/v1/capsules/$CAPSULE/processes/web/logs?follow=true"`,
	}, s.logs)
	offset := func(what string) *huma.Header {
		return &huma.Header{Description: what, Schema: &huma.Schema{Type: huma.TypeInteger, Format: "int64"}}
	}
	op.Responses["200"].Content = binaryContent()
	op.Responses["200"].Content["text/event-stream"] = &huma.MediaType{
		Schema:  &huma.Schema{Type: huma.TypeString},
		Example: "id: 6\ndata: {\"type\":\"stdout\",\"data\":\"hello\\n\",\"offset\":0,\"end\":6}\n\n",
	}
	op.Responses["200"].Headers = map[string]*huma.Header{
		headerStart: offset("Offset of the first byte"),
		headerEnd:   offset("Where to resume"),
		headerGaps:  {Description: "Trailer: what was no longer kept", Schema: &huma.Schema{Type: huma.TypeString}},
	}
}

func (s *server) logs(w http.ResponseWriter, r *http.Request, in *logsInput) error {
	events := strings.Contains(r.Header.Get("Accept"), "text/event-stream")
	since, err := in.since(events)
	if err != nil {
		return err
	}
	sel, err := nestbox.ParseSelector(in.Selector)
	if err != nil {
		return err
	}
	reading, err := s.control.Processes.Attach(r.Context(), callerOf(r.Context()), in.ID, sel, guest.Attach{Since: since, Lossless: in.Lossless, Times: in.Timestamps}, nestbox.Stream(in.Stream))
	if err != nil {
		return err
	}
	defer func() { _ = reading.Close() }()
	log := reading.Process.Output
	t := &transcript{
		s: s, w: w, r: r, reading: reading, only: nestbox.Stream(in.Stream),
		follow: in.Follow || log.Closed, // a closed one ends by itself, and with its exit
		start:  max(reading.From, log.Start),
		end:    log.End,
	}
	if events {
		t.events(in.Encoding == encodingBase64)
	} else {
		t.plain()
	}
	return nil
}

// since combines the ways to say where to begin.
func (in *logsInput) since(events bool) (nestbox.Since, error) {
	if events && in.LastID != "" {
		in.Since, in.Tail, in.TailLines = in.LastID, 0, 0
	}
	since, err := in.place()
	if err == nil && (in.Since != "" || in.TailLines > 0) && in.Tail > 0 {
		err = nestbox.Errorf(nestbox.CodeInvalid, "since and tail, or tail_lines and tail, cannot be used together")
	}
	since.Tail = in.Tail
	return since, err
}

// transcript writes one reader's view of a log as an HTTP answer.
type transcript struct {
	s       *server
	w       http.ResponseWriter
	r       *http.Request
	reading *control.Reading
	only    nestbox.Stream
	follow  bool // to the end of the log for good, rather than to end
	start   int64
	end     int64
	at      int64       // offset that was reached
	tell    func(error) // why the log breaks off; nil = there is no way
	gaps    []string
}

// each calls do with the events up to the end. A log that breaks off breaks
// off the answer.
func (t *transcript) each(do func(nestbox.OutputEvent) error) {
	t.at = t.start
	for t.follow || t.at < t.end {
		ev, err := t.reading.Next(t.r.Context())
		if errors.Is(err, io.EOF) {
			return
		}
		if err == nil {
			ev = t.cut(ev)
			t.at = max(t.at, ev.End())
			err = do(ev)
		}
		if err != nil {
			if t.tell != nil {
				t.tell(err)
			}
			t.s.abort(t.r, "output of a process broke off", err)
		}
	}
}

// cut takes away what is beyond the end of an answer that does not follow.
func (t *transcript) cut(ev nestbox.OutputEvent) nestbox.OutputEvent {
	if !t.follow && ev.Kind == nestbox.EventData && ev.End() > t.end {
		ev.Data = ev.Data[:max(0, t.end-ev.Offset)]
	}
	return ev
}

func (t *transcript) plain() {
	h := t.w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set(headerStart, strconv.FormatInt(t.start, 10))
	h.Set("Trailer", headerGaps)
	if t.follow {
		h.Add("Trailer", headerEnd)
	} else {
		h.Set(headerEnd, strconv.FormatInt(max(t.start, t.end), 10))
	}
	var stamps stamper
	flush := http.NewResponseController(t.w).Flush
	_ = flush()
	t.each(func(ev nestbox.OutputEvent) error {
		switch {
		case ev.Kind == nestbox.EventGap:
			t.gap(ev)
		case ev.Kind == nestbox.EventData && (t.only == "" || t.only == ev.Stream):
			if _, err := t.w.Write(stamps.stamp(ev)); err != nil {
				return err
			}
			return flush()
		}
		return nil
	})
	if t.follow {
		h.Set(headerEnd, strconv.FormatInt(t.at, 10))
	}
	if len(t.gaps) > 0 {
		h.Set(headerGaps, strings.Join(t.gaps, ","))
	}
}

// stamper puts before each line of output when its beginning was read, if events say
// that.
type stamper struct {
	inLine bool
	buf    []byte
}

// stampFormat is RFC 3339, to the millisecond and as wide for every time.
const stampFormat = "2006-01-02T15:04:05.000Z07:00 "

// stamp returns the data of an event, valid until the next call.
func (s *stamper) stamp(ev nestbox.OutputEvent) []byte {
	if ev.At.IsZero() {
		return ev.Data
	}
	s.buf = s.buf[:0]
	for line := range bytes.Lines(ev.Data) {
		if !s.inLine {
			s.buf = ev.At.UTC().AppendFormat(s.buf, stampFormat)
		}
		s.buf = append(s.buf, line...)
		s.inLine = line[len(line)-1] != '\n'
	}
	return s.buf
}

func (t *transcript) gap(ev nestbox.OutputEvent) {
	switch {
	case len(t.gaps) < maxGaps:
		t.gaps = append(t.gaps, fmt.Sprintf("%d-%d", ev.Offset, ev.To))
	case len(t.gaps) == maxGaps:
		t.gaps = append(t.gaps, "...")
	}
}

// events writes Server-Sent Events.
func (t *transcript) events(base64 bool) {
	out := beginEvents(t.w)
	stop := out.keepAlive(t.s.cfg.EventInterval)
	defer stop()
	frames := newFramer(t.reading.Process.ID, base64, t.only, out.event)
	t.tell = func(err error) {
		body := describeError(t.r.Context(), err)
		_ = frames.flush()
		_ = out.event(errorFrame{"error", body.Detail.Message, body.Detail.Code, body.Detail.Detail}, t.at)
	}
	t.each(frames.event)
	_ = frames.flush() // the client may be gone
}

// eventWriter writes events and comments, by several goroutines.
type eventWriter struct {
	mu    sync.Mutex
	w     io.Writer
	flush func() error
	buf   bytes.Buffer
}

// beginEvents begins an answer of Server-Sent Events, so that the client knows.
func beginEvents(w http.ResponseWriter) *eventWriter {
	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Accel-Buffering", "no") // nginx
	e := &eventWriter{w: w, flush: http.NewResponseController(w).Flush}
	_ = e.comment() // the next event finds out that the client is gone
	return e
}

// data writes events that have no id.
func (e *eventWriter) data(frames ...any) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.buf.Reset()
	for _, frame := range frames {
		e.buf.WriteString("data: ")
		if err := encodeFrame(&e.buf, frame); err != nil {
			return err
		}
		e.buf.WriteString("\n\n")
	}
	return e.write()
}

func (e *eventWriter) event(frame any, at int64) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.buf.Reset()
	fmt.Fprintf(&e.buf, "id: %d\ndata: ", at)
	if err := encodeFrame(&e.buf, frame); err != nil {
		return err
	}
	e.buf.WriteString("\n\n")
	return e.write()
}

func (e *eventWriter) comment() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.buf.Reset()
	e.buf.WriteString(": ping\n\n")
	return e.write()
}

func (e *eventWriter) write() error {
	if _, err := e.w.Write(e.buf.Bytes()); err != nil {
		return err
	}
	return e.flush()
}

// keepAlive writes comments, which keep a quiet stream alive through proxies,
// until stop is called, which waits for the last one.
func (e *eventWriter) keepAlive(interval time.Duration) (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		ticker := time.NewTicker(interval)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				_ = e.comment() // the next event finds out that the client is gone
			case <-quit:
				return
			}
		}
	}()
	return func() { close(quit); <-done }
}
