package hostile

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	guestv1 "github.com/nestbox/nestbox/gen/nestbox/guest/v1"
)

// zeros is what endless scripts send, so that they need no memory themselves.
var zeros = make([]byte, 64<<10)

const (
	unaryType  = "application/proto"
	streamType = "application/connect+proto"
)

func (p *peer) streams() bool { return p.req.Header.Get("Content-Type") == streamType }

// head begins an answer that ends with the connection.
func (p *peer) head(status, kind string) bool {
	_, err := fmt.Fprintf(p, "HTTP/1.1 %s\r\nContent-Type: %s\r\nConnection: close\r\n\r\n", status, kind)
	return err == nil
}

// message writes one message in the form of the call.
func (p *peer) message(raw []byte) bool {
	if p.streams() {
		prefix := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(raw)))
		if _, err := p.Write(prefix); err != nil {
			return false
		}
	}
	_, err := p.Write(raw)
	return err == nil
}

// end writes the last envelope of a stream.
func (p *peer) end() {
	if p.streams() {
		_, _ = p.Write([]byte{2, 0, 0, 0, 2, '{', '}'})
	}
}

// answer answers a call with messages and ends.
func (p *peer) answer(messages ...proto.Message) {
	kind := unaryType
	if p.streams() {
		kind = streamType
	}
	if !p.head("200 OK", kind) {
		return
	}
	for _, m := range messages {
		raw, err := proto.Marshal(m)
		if err != nil || !p.message(raw) {
			return
		}
	}
	p.end()
}

// raw answers with bytes for a message.
func (p *peer) raw(message []byte) {
	kind := unaryType
	if p.streams() {
		kind = streamType
	}
	if p.head("200 OK", kind) && p.message(message) {
		p.end()
	}
}

// flood writes what there is again and again until the other side is gone.
func (p *peer) flood(b []byte) {
	for {
		if _, err := p.Write(b); err != nil {
			return
		}
	}
}

// stay holds the connection until the test ends.
func (p *peer) stay() { <-p.quit }

func (p *peer) call() string { return p.req.URL.Path[strings.LastIndexByte(p.req.URL.Path, '/')+1:] }

// fail answers with an error of Connect.
func (p *peer) fail(status string, code, message, detail string) {
	body := map[string]any{"code": code, "message": message}
	if detail != "" {
		body["details"] = []map[string]any{{"type": "nestbox.Code", "value": base64.RawStdEncoding.EncodeToString([]byte(detail))}}
	}
	text, _ := json.Marshal(body)
	if p.streams() {
		text, _ = json.Marshal(map[string]any{"error": body})
		if p.head("200 OK", streamType) {
			_, _ = p.Write(append(binary.BigEndian.AppendUint32([]byte{2}, uint32(len(text))), text...))
		}
		return
	}
	if p.head(status, "application/json") {
		_, _ = p.Write(text)
	}
}

// elements is a message whose field has n empty elements.
func elements(number protowire.Number, n int) []byte {
	one := protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), nil)
	out := make([]byte, 0, n*len(one))
	for range n {
		out = append(out, one...)
	}
	return out
}

// aProcess is a record that is right, for scripts to spoil.
func aProcess(spoil func(*guestv1.Process)) *guestv1.Process {
	p := &guestv1.Process{
		Id: 1, Pid: 7, Tag: "web", Cmd: "sleep", Cwd: "/", User: "root",
		StartedAt: timestamppb.New(time.Unix(1_700_000_000, 0)), Output: &guestv1.OutputState{},
	}
	if spoil != nil {
		spoil(p)
	}
	return p
}

// about answers every call about a process with p, and streams with events.
func about(p *guestv1.Process, events ...*guestv1.OutputEvent) func(*peer) {
	return func(c *peer) {
		switch c.call() {
		case "Ping":
			c.answer(&guestv1.PingResponse{Version: "evil", Features: []string{"process-id"}})
		case "Start":
			messages := []proto.Message{&guestv1.StartResponse{Message: &guestv1.StartResponse_Started{Started: p}}}
			for _, e := range events {
				messages = append(messages, &guestv1.StartResponse{Message: &guestv1.StartResponse_Event{Event: e}})
			}
			c.answer(messages...)
		case "Attach":
			messages := []proto.Message{&guestv1.AttachResponse{}}
			for _, e := range events {
				messages = append(messages, &guestv1.AttachResponse{Event: e})
			}
			c.answer(messages...)
		case "List":
			c.answer(&guestv1.ListResponse{Processes: []*guestv1.Process{p}})
		case "Get":
			c.answer(&guestv1.GetResponse{Process: p})
		case "Wait":
			c.answer(&guestv1.WaitResponse{Process: p})
		case "Kill":
			c.answer(&guestv1.KillResponse{Process: p})
		default:
			c.answer()
		}
	}
}

// aFile answers every call about files with f.
func aboutFile(f *guestv1.FileInfo) func(*peer) {
	return func(c *peer) {
		switch c.call() {
		case "ReadFile":
			c.answer(&guestv1.ReadFileResponse{Message: &guestv1.ReadFileResponse_Info{Info: f}})
		case "WriteFile":
			_, _ = io.CopyN(io.Discard, c.req.Body, 16)
			c.answer(&guestv1.WriteFileResponse{Info: f})
		case "StatFile":
			c.answer(&guestv1.StatFileResponse{Info: f})
		case "Mkdir":
			c.answer(&guestv1.MkdirResponse{Info: f})
		case "ListFiles":
			c.answer(&guestv1.ListFilesResponse{Entries: []*guestv1.FileInfo{f}})
		default:
			about(aProcess(nil))(c)
		}
	}
}

func dataEvent(offset int64, text string) *guestv1.OutputEvent {
	return &guestv1.OutputEvent{Event: &guestv1.OutputEvent_Data_{Data: &guestv1.OutputEvent_Data{Offset: offset, Data: []byte(text)}}}
}

func exitEvent(offset int64, e *guestv1.Exit) *guestv1.OutputEvent {
	return &guestv1.OutputEvent{Event: &guestv1.OutputEvent_Exit{Exit: &guestv1.OutputEvent_ExitEvent{Offset: offset, Exit: e}}}
}

func closedEvent(offset int64) *guestv1.OutputEvent {
	return &guestv1.OutputEvent{Event: &guestv1.OutputEvent_Closed_{Closed: &guestv1.OutputEvent_Closed{Offset: offset}}}
}

func gapEvent(from, to int64) *guestv1.OutputEvent {
	return &guestv1.OutputEvent{Event: &guestv1.OutputEvent_Gap_{Gap: &guestv1.OutputEvent_Gap{From: from, To: to}}}
}

// scripts are the ways to be hostile. None of them may make a command look as
// if it had ended well.
func scripts() map[string]func(*peer) {
	processes, features, unknowns := elements(1, 7<<20), elements(3, 2<<20), elements(1000, 3<<20)
	arguments := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), elements(4, 900<<10))
	impossible := &timestamppb.Timestamp{Seconds: math.MaxInt64 / 2, Nanos: -5}
	all := map[string]func(*peer){
		"silent":           (*peer).stay,
		"reads nothing":    func(p *peer) { p.stay() },
		"endless headers":  func(p *peer) { _, _ = io.WriteString(p, "HTTP/1.1 200 OK\r\n"); p.flood([]byte("X-A: b\r\n")) },
		"one endless line": func(p *peer) { _, _ = io.WriteString(p, "HTTP/1.1 200 OK\r\nX-A: "); p.flood(zeros) },
		"endless 100s":     func(p *peer) { p.flood([]byte("HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")) },
		"garbage":          func(p *peer) { p.flood([]byte{0xff, 0x00, 0x13, 0x37}) },
		"ends at once":     func(*peer) {},
		"ends in headers":  func(p *peer) { _, _ = io.WriteString(p, "HTTP/1.1 200 OK\r\nContent-Ty") },
		"promises more": func(p *peer) {
			_, _ = io.WriteString(p, "HTTP/1.1 200 OK\r\nContent-Type: application/proto\r\nContent-Length: 99999999\r\n\r\nx")
			p.stay()
		},
		"redirects": func(p *peer) {
			_, _ = io.WriteString(p, "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")
		},
		"upgrades": func(p *peer) {
			_, _ = io.WriteString(p, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n")
			p.flood(zeros)
		},
		"slow": func(p *peer) {
			for _, c := range []byte("HTTP/1.1 200 OK\r\nContent-Type: application/connect+proto\r\n\r\n" + strings.Repeat("\x00", 1000)) {
				if _, err := p.Write([]byte{c}); err != nil {
					return
				}
				select {
				case <-time.After(200 * time.Millisecond):
				case <-p.quit:
					return
				}
			}
		},
		"endless body": func(p *peer) {
			if p.head("200 OK", map[bool]string{true: streamType, false: unaryType}[p.streams()]) {
				p.flood(zeros) // for a stream: empty messages without end
			}
		},
		"endless signs of life": func(p *peer) {
			if p.call() == "Ping" {
				about(aProcess(nil))(p)
				return
			}
			raw, _ := proto.Marshal(&guestv1.AttachResponse{Event: &guestv1.OutputEvent{Event: &guestv1.OutputEvent_Alive_{Alive: &guestv1.OutputEvent_Alive{}}}})
			if p.head("200 OK", streamType) {
				for p.message(raw) {
				}
			}
		},
		"a message of 4 GiB": func(p *peer) {
			if p.head("200 OK", streamType) {
				_, _ = p.Write([]byte{0, 0xff, 0xff, 0xff, 0xff})
				p.flood(zeros)
			}
		},
		"end in a message": func(p *peer) {
			if p.head("200 OK", streamType) {
				_, _ = p.Write([]byte{0, 0, 0, 1, 0, 1, 2})
			}
		},
		"compressed": func(p *peer) {
			if p.head("200 OK\r\nContent-Encoding: gzip\r\nConnect-Content-Encoding: gzip", streamType) {
				p.flood(append([]byte{1, 0, 0, 0xff, 0xff}, zeros[:0xffff]...))
			}
		},
		"millions of processes": func(p *peer) { p.raw(processes) },
		"millions of arguments": func(p *peer) {
			p.raw(arguments)
		},
		"millions of features":    func(p *peer) { p.raw(features) },
		"millions of unknowns":    func(p *peer) { p.raw(unknowns) },
		"deep groups":             func(p *peer) { p.raw([]byte(strings.Repeat("\x0b", 60<<10))) },
		"an empty process":        about(&guestv1.Process{}),
		"no process":              about(nil),
		"wrong id":                about(aProcess(func(p *guestv1.Process) { p.Id = 99; p.Tag = "other"; p.Pid = 99 })),
		"an impossible id":        about(aProcess(func(p *guestv1.Process) { p.Id = math.MaxUint64 })),
		"a PID of 0":              about(aProcess(func(p *guestv1.Process) { p.Pid = 0 })),
		"a huge tag":              about(aProcess(func(p *guestv1.Process) { p.Tag = strings.Repeat("t", 1<<20) })),
		"a tag with controls":     about(aProcess(func(p *guestv1.Process) { p.Tag = "\x1b[2J" })),
		"an impossible start":     about(aProcess(func(p *guestv1.Process) { p.StartedAt = impossible })),
		"impossible offsets":      about(aProcess(func(p *guestv1.Process) { p.Output = &guestv1.OutputState{Start: 5, End: -1, Stdout: math.MinInt64} })),
		"an exit without status":  about(aProcess(func(p *guestv1.Process) { p.Exit = &guestv1.Exit{} }), exitEvent(0, nil)),
		"an exit of 0 by itself":  about(aProcess(nil), exitEvent(0, &guestv1.Exit{}), closedEvent(0)),
		"an unknown reason":       about(aProcess(nil), exitEvent(0, &guestv1.Exit{Reason: "fine", At: timestamppb.Now()})),
		"an impossible status":    about(aProcess(nil), exitEvent(0, &guestv1.Exit{Reason: "exited", Code: -1 << 31, At: timestamppb.Now()})),
		"ends without an exit":    about(aProcess(nil), dataEvent(0, "x"), closedEvent(1)),
		"just ends":               about(aProcess(nil), dataEvent(0, "x")),
		"goes back":               about(aProcess(nil), dataEvent(0, "x"), dataEvent(0, "y")),
		"jumps":                   about(aProcess(nil), dataEvent(1<<40, "x")),
		"negative offset":         about(aProcess(nil), dataEvent(-1, "x")),
		"a gap backwards":         about(aProcess(nil), gapEvent(0, -5)),
		"empty data":              about(aProcess(nil), dataEvent(0, "")),
		"a file of no kind":       aboutFile(&guestv1.FileInfo{Name: "f", Path: "/f", Type: "door"}),
		"a file of negative size": aboutFile(&guestv1.FileInfo{Name: "f", Path: "/f", Type: "file", Size: -1}),
		"a relative path":         aboutFile(&guestv1.FileInfo{Name: "f", Path: "../f", Type: "file"}),
		"an impossible mtime":     aboutFile(&guestv1.FileInfo{Name: "f", Path: "/f", Type: "file", ModifiedAt: impossible}),
		"a huge error":            func(p *peer) { p.fail("404 Not Found", "not_found", strings.Repeat("e", 1<<20), "not_found") },
		"an error with controls":  func(p *peer) { p.fail("404 Not Found", "not_found", "\x1b[31m\x00\r\n", "not_found") },
		"an endless file": func(p *peer) {
			if p.call() != "ReadFile" {
				about(aProcess(nil))(p)
				return
			}
			raw, _ := proto.Marshal(&guestv1.ReadFileResponse{Message: &guestv1.ReadFileResponse_Info{Info: &guestv1.FileInfo{Name: "f", Path: "/f", Type: "file"}}})
			if p.head("200 OK", streamType) && p.message(raw) {
				chunk, _ := proto.Marshal(&guestv1.ReadFileResponse{Message: &guestv1.ReadFileResponse_Data{Data: zeros}})
				for p.message(chunk) {
				}
			}
		},
		"endless output": func(p *peer) {
			if p.call() != "Start" {
				about(aProcess(nil))(p)
				return
			}
			raw, _ := proto.Marshal(&guestv1.StartResponse{Message: &guestv1.StartResponse_Started{Started: aProcess(nil)}})
			if p.head("200 OK", streamType) && p.message(raw) {
				for at := int64(0); ; at += int64(len(zeros)) {
					chunk, _ := proto.Marshal(&guestv1.StartResponse{Message: &guestv1.StartResponse_Event{Event: dataEvent(at, string(zeros))}})
					if !p.message(chunk) {
						return
					}
				}
			}
		},
	}
	for _, code := range []string{"canceled", "unknown", "internal", "unauthenticated", "permission_denied", "data_loss", "aborted", "no_such_code", "-1"} {
		all["code "+code] = func(p *peer) { p.fail("500 Internal Server Error", code, "evil", "") }
	}
	for _, detail := range []string{"unauthenticated", "denied", "internal", "canceled", "no_such_code"} {
		all["detail "+detail] = func(p *peer) { p.fail("401 Unauthorized", "unauthenticated", "evil", detail) }
	}
	for _, status := range []string{"401 Unauthorized", "403 Forbidden", "404 Not Found", "429 Too Many Requests", "500 Internal Server Error", "204 No Content", "999 X"} {
		all["status "+status] = func(p *peer) {
			if p.head(status, "text/html") {
				_, _ = io.WriteString(p, "<html>")
			}
		}
	}
	return all
}
