package guestrpc

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/gen/nestbox/guest/v1/guestv1connect"
)

// What an answer may hold, in bytes on the wire. What is larger is refused
// before it is read.
const (
	maxSmall  = 64 << 10           // that a thing was done, or one file
	maxRecord = 2 << 20            // one process, with its arguments (nestbox.MaxSpecBytes)
	maxList   = 16 << 20           // all processes
	maxEvent  = maxData + 64<<10   // a message of an output stream
	maxChunk  = fileChunk + 64<<10 // of a file's content
	maxNames  = 2 * listChunkBytes // of a listing of files
	maxWatch  = 128 << 10          // the events of a watch that come at once
	maxWarned = 256 << 10          // what is told of an archive
)

// answerLimits are by procedure; others are maxSmall.
var answerLimits = map[string]int{
	guestv1connect.GuestServiceStartProcedure:       maxRecord,
	guestv1connect.GuestServiceGetProcedure:         maxRecord,
	guestv1connect.GuestServiceWaitProcedure:        maxRecord,
	guestv1connect.GuestServiceKillProcedure:        maxRecord,
	guestv1connect.GuestServiceKillBiggestProcedure: maxRecord,
	guestv1connect.GuestServiceListProcedure:        maxList,
	guestv1connect.GuestServiceTreeProcedure:        maxList,
	guestv1connect.GuestServiceAttachProcedure:      maxEvent,
	guestv1connect.GuestServiceReadFileProcedure:    maxChunk,
	guestv1connect.GuestServiceListFilesProcedure:   maxNames,
	guestv1connect.GuestServicePackFilesProcedure:   maxChunk,
	guestv1connect.GuestServiceUnpackFilesProcedure: maxWarned,
	guestv1connect.GuestServiceWatchFilesProcedure:  maxWatch,
}

func answerLimit(procedure string) int {
	if n, ok := answerLimits[procedure]; ok {
		return n
	}
	return maxSmall
}

// A capsule's budget: what all that goes on with one daemon may hold at a time.
const (
	maxCalls   = 512  // that are answered at once
	maxStreams = 1536 // output, files, connections to ports
	maxDials   = 64   // connections that are being made

	// largeAnswers is how many answers of more than maxSmall are read at a time,
	// each of which may need maxDecoded.
	largeAnswers = 4

	// maxDecoded bounds what a message is in memory: millions of empty elements
	// are short on the wire.
	maxDecoded = 32 << 20
)

// slots count what may go on at a time.
type slots chan struct{}

func newSlots(n int) slots { return make(slots, n) }

// take takes a slot, or returns CodeExhausted at once.
func (s slots) take(what string) error {
	select {
	case s <- struct{}{}:
		return nil
	default:
		return nestbox.Errorf(nestbox.CodeExhausted, "too many %s of this capsule at a time: %d", what, cap(s))
	}
}

// wait takes a slot when there is one, or returns why ctx has ended.
func (s slots) wait(ctx context.Context) error {
	select {
	case s <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// waitShort takes a slot when there is one, or returns CodeExhausted if there is
// none for so long.
func (s slots) waitShort(ctx context.Context, most time.Duration, what string) error {
	if err := s.take(what); err == nil {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, most, nestbox.Errorf(nestbox.CodeExhausted, "too many %s of this capsule at a time: %d", what, cap(s)))
	defer cancel()
	return s.wait(ctx)
}

func (s slots) give() { <-s }

var errOversize = errors.New("the answer is larger than it may be")

// boundedTransport bounds what is read of answers.
type boundedTransport struct {
	next  http.RoundTripper
	large slots
}

// RoundTrip implements http.RoundTripper.
func (t boundedTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	res, err := t.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	limit := answerLimit(r.URL.Path)
	if strings.HasPrefix(res.Header.Get("Content-Type"), "application/connect+") {
		res.Body = &envelopes{ReadCloser: res.Body, max: uint32(limit)}
	} else {
		res.Body = &boundedBody{ReadCloser: res.Body, ctx: r.Context(), left: int64(limit), large: t.large}
	}
	return res, nil
}

// boundedBody is the body of an answer that is one message.
type boundedBody struct {
	io.ReadCloser
	ctx   interface{ Done() <-chan struct{} }
	read  int64
	left  int64
	large slots
	held  bool // a slot of large
}

// Read implements io.Reader.
func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left < 0 {
		return 0, errOversize
	}
	if b.read >= maxSmall && !b.held {
		select {
		case b.large <- struct{}{}:
			b.held = true
		case <-b.ctx.Done():
			return 0, errOversize
		}
	}
	room := b.left + 1
	if !b.held {
		room = min(room, maxSmall-b.read)
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), room)])
	b.read += int64(n)
	if b.left -= int64(n); b.left < 0 {
		return 0, errOversize
	}
	return n, err
}

// Close implements io.Closer.
func (b *boundedBody) Close() error {
	if b.held {
		b.held = false
		b.large.give()
	}
	return b.ReadCloser.Close()
}

// envelopes is the body of an answer that is many messages. It lets no message
// pass that says that it is longer than it may be.
type envelopes struct {
	io.ReadCloser
	max    uint32
	prefix [5]byte // flags and length of the message
	have   int     // of the prefix
	rest   uint32  // of the message
}

// Read implements io.Reader.
func (e *envelopes) Read(p []byte) (int, error) {
	n, err := e.ReadCloser.Read(p)
	for at := 0; at < n; {
		if e.rest > 0 {
			step := min(n-at, int(e.rest))
			at, e.rest = at+step, e.rest-uint32(step)
			continue
		}
		step := copy(e.prefix[e.have:], p[at:n])
		at, e.have = at+step, e.have+step
		if e.have == len(e.prefix) {
			e.have, e.rest = 0, binary.BigEndian.Uint32(e.prefix[1:])
			if e.rest > e.max {
				return 0, errOversize
			}
		}
	}
	return n, err
}

// Costs of what is decoded, in bytes: about what Go needs.
const (
	elementCost = 32
	messageCost = 192
)

var errTooMany = errors.New("the message has too many elements")

// decodedSize returns about how many bytes a message needs once it is decoded,
// or an error if they are more than maxDecoded.
func decodedSize(raw []byte, message protoreflect.MessageDescriptor) (int, error) {
	budget := maxDecoded
	err := spend(raw, message, &budget)
	return maxDecoded - budget, err
}

func spend(raw []byte, message protoreflect.MessageDescriptor, budget *int) error {
	*budget -= messageCost
	fields := message.Fields()
	for len(raw) > 0 {
		number, kind, n := protowire.ConsumeTag(raw)
		if n < 0 {
			return protowire.ParseError(n)
		}
		raw = raw[n:]
		if n = protowire.ConsumeFieldValue(number, kind, raw); n < 0 {
			return protowire.ParseError(n)
		}
		*budget -= elementCost
		if kind == protowire.BytesType {
			value, _ := protowire.ConsumeBytes(raw)
			if field := fields.ByNumber(number); field != nil && field.Message() != nil {
				if err := spend(value, field.Message(), budget); err != nil {
					return err
				}
			} else {
				*budget -= len(value)
			}
		}
		if *budget < 0 {
			return fmt.Errorf("%w: %s", errTooMany, message.FullName())
		}
		raw = raw[n:]
	}
	return nil
}
