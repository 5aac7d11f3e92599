package api

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/nestbox/nestbox"
)

// maxFrameData bounds the output in one frame, so that a message is smaller
// than the 32 KiB that some WebSocket clients take at most by default, as base64
// and as text unless most of it needs escapes.
const maxFrameData = 16 << 10

// The frames of a stream. They are the messages of a WebSocket and the data of
// Server-Sent Events.
type (
	startFrame struct {
		Type string `json:"type" enum:"start"`
		ID   string `json:"id" doc:"The process's id, as in every frame but error"`
		PID  int    `json:"pid"`
		Tag  string `json:"tag"`

		Offset int64 `json:"offset" doc:"Where the stream begins in the log"`
	}
	outputFrame struct {
		Type   string `json:"type" enum:"stdout,stderr,pty"`
		ID     string `json:"id"`
		Data   string `json:"data" doc:"Text, never cut inside a rune, or base64 if that was asked for"`
		Offset int64  `json:"offset" doc:"Of the first byte of data"`
		End    int64  `json:"end" doc:"Where to resume after this frame"`
		At     string `json:"at,omitempty" doc:"When it was read, to 10 ms, if that was asked for"`
	}
	gapFrame struct {
		Type   string `json:"type" enum:"gap"`
		ID     string `json:"id"`
		From   int64  `json:"from" doc:"First byte that is no longer kept"`
		To     int64  `json:"to" doc:"First byte that is kept"`
		Offset int64  `json:"offset" doc:"The same as from"`
	}
	exitFrame struct {
		Type     string `json:"type" enum:"exit"`
		ID       string `json:"id"`
		ExitCode int    `json:"exit_code" doc:"Exit status, or 128 + the signal's number"`
		Signal   string `json:"signal,omitempty"`
		Reason   string `json:"reason" enum:"exited,signalled,killed,timeout,idle_timeout,oom"`
		Offset   int64  `json:"offset" doc:"Where the log stood"`
	}
	closedFrame struct {
		Type   string `json:"type" enum:"output_closed"`
		ID     string `json:"id"`
		Offset int64  `json:"offset" doc:"End of the log, for good"`
	}
	errorFrame struct {
		Type string `json:"type" enum:"error"`
		Data string `json:"data" doc:"What went wrong"`
		Code string `json:"code" doc:"As in the body of an error"`

		Detail string `json:"detail,omitempty" doc:"As in the body of an error"`
	}
)

// encodedFrame is an outputFrame whose data becomes base64 as it is written,
// which costs half of what it costs by way of a string.
type encodedFrame struct {
	id          string
	stream      nestbox.Stream
	data        []byte // valid until it is sent
	offset, end int64
	at          string
}

func (f encodedFrame) write(buf *bytes.Buffer) {
	fmt.Fprintf(buf, `{"type":%q,"id":%q,"data":"`, f.stream, f.id)
	buf.Grow(base64.StdEncoding.EncodedLen(len(f.data)))
	buf.Write(base64.StdEncoding.AppendEncode(buf.AvailableBuffer(), f.data))
	fmt.Fprintf(buf, `","offset":%d,"end":%d`, f.offset, f.end)
	if f.at != "" {
		fmt.Fprintf(buf, `,"at":%q`, f.at)
	}
	buf.WriteByte('}')
}

// encodeFrame writes a frame as one line of JSON without its end.
func encodeFrame(buf *bytes.Buffer, frame any) error {
	if f, ok := frame.(encodedFrame); ok {
		f.write(buf)
		return nil
	}
	enc := json.NewEncoder(buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(frame); err != nil {
		return err
	}
	buf.Truncate(buf.Len() - 1)
	return nil
}

// framer turns the events of an output log into frames.
type framer struct {
	id     string                          // of the process
	base64 bool                            // data is base64, cut anywhere
	only   nestbox.Stream                  // "" = all
	send   func(frame any, at int64) error // at is where to resume after the frame
	held   map[nestbox.Stream]heldRune
	at     string // of the output that is being sent
}

// heldRune is the beginning of a rune whose rest has not come yet.
type heldRune struct {
	offset int64
	bytes  []byte // shorter than utf8.UTFMax
}

func newFramer(id nestbox.ProcessID, base64 bool, only nestbox.Stream, send func(any, int64) error) *framer {
	return &framer{id: id.String(), base64: base64, only: only, send: send, held: map[nestbox.Stream]heldRune{}}
}

// timeOf returns when output was read, as it is shown; "" if nobody asked.
func timeOf(ev nestbox.OutputEvent) string {
	if ev.At.IsZero() {
		return ""
	}
	return ev.At.UTC().Format(time.RFC3339Nano)
}

// event sends what ev amounts to. An error is one of sending.
func (f *framer) event(ev nestbox.OutputEvent) error {
	switch ev.Kind {
	case nestbox.EventData:
		if f.only != "" && ev.Stream != f.only {
			return nil
		}
		if f.base64 {
			return f.encoded(ev.Stream, ev.Offset, ev.Data, timeOf(ev))
		}
		f.at = timeOf(ev)
		return f.text(ev.Stream, ev.Offset, ev.Data)
	case nestbox.EventGap:
		if err := f.flush(); err != nil {
			return err
		}
		return f.send(gapFrame{"gap", f.id, ev.Offset, ev.To, ev.Offset}, ev.To)
	case nestbox.EventExit:
		return f.send(exitFrame{"exit", f.id, ev.Exit.Code, ev.Exit.Signal, string(ev.Exit.Reason), ev.Offset}, f.resume(ev.Offset))
	case nestbox.EventClosed:
		if err := f.flush(); err != nil {
			return err
		}
		return f.send(closedFrame{"output_closed", f.id, ev.Offset}, ev.Offset)
	}
	return nil
}

func (f *framer) encoded(stream nestbox.Stream, offset int64, data []byte, at string) error {
	for len(data) > 0 {
		n := min(len(data), maxFrameData)
		end := offset + int64(n)
		if err := f.send(encodedFrame{f.id, stream, data[:n], offset, end, at}, end); err != nil {
			return err
		}
		offset, data = end, data[n:]
	}
	return nil
}

// text sends data up to its last whole rune and holds back the rest. What is
// no UTF-8 is not held back; the encoding of JSON makes it U+FFFD.
func (f *framer) text(stream nestbox.Stream, offset int64, data []byte) error {
	if held, ok := f.held[stream]; ok {
		for len(data) > 0 && !utf8.FullRune(held.bytes) && !utf8.RuneStart(data[0]) {
			held.bytes = append(held.bytes, data[0])
			offset, data = offset+1, data[1:]
		}
		if len(data) == 0 && !utf8.FullRune(held.bytes) {
			f.held[stream] = held
			return nil
		}
		delete(f.held, stream)
		if err := f.sendText(stream, held.offset, held.bytes, offset); err != nil {
			return err
		}
	}
	for whole := nestbox.SplitUTF8(data); whole > 0; {
		n := whole
		if n > maxFrameData {
			n = nestbox.SplitUTF8(data[:maxFrameData])
		}
		if err := f.sendText(stream, offset, data[:n], offset+int64(n)); err != nil {
			return err
		}
		offset, data, whole = offset+int64(n), data[n:], whole-n
	}
	if len(data) > 0 {
		f.held[stream] = heldRune{offset, bytes.Clone(data)}
	}
	return nil
}

func (f *framer) sendText(stream nestbox.Stream, offset int64, data []byte, end int64) error {
	end = f.resume(end)
	return f.send(outputFrame{string(stream), f.id, string(data), offset, end, f.at}, end)
}

// resume returns where to resume so that nothing is lost: before what is held
// back of the other stream. Only then does a resumed stream repeat something.
func (f *framer) resume(at int64) int64 {
	for _, held := range f.held {
		at = min(at, held.offset)
	}
	return at
}

// flush sends what is held back, since its rest will never come.
func (f *framer) flush() error {
	for _, stream := range []nestbox.Stream{nestbox.Stdout, nestbox.Stderr, nestbox.Pty} {
		held, ok := f.held[stream]
		if !ok {
			continue
		}
		delete(f.held, stream)
		if err := f.sendText(stream, held.offset, held.bytes, held.offset+int64(len(held.bytes))); err != nil {
			return err
		}
	}
	return nil
}
