package guestrpc

import (
	"context"
	"fmt"
	"io"
	"path"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/nestbox/nestbox"
	guestv1 "github.com/nestbox/nestbox/gen/nestbox/guest/v1"
	"github.com/nestbox/nestbox/internal/meter"
)

// frame is one message as it stands on the wire. Bulk data is received into a
// frame, and not into a generated message, which would be new every time: a
// stream of those keeps the garbage collector so busy that it runs at half the
// speed. Buffers are shared by all frames: one that waits for a message has none.
type frame struct{ buf []byte }

// frameBuffers are of different sizes, *[]byte.
var frameBuffers = sync.Pool{New: func() any { return new([]byte) }}

// maxPooled is the largest buffer that is kept for others.
const maxPooled = 1 << 20

// release gives the frame's buffer to others.
func (f *frame) release() {
	if buf := f.buf[:0]; cap(buf) > 0 && cap(buf) <= maxPooled {
		frameBuffers.Put(&buf)
	}
	f.buf = nil
}

// grow makes the frame n bytes long.
func (f *frame) grow(n int) {
	f.release()
	pooled := frameBuffers.Get().(*[]byte)
	f.buf = slices.Grow((*pooled)[:0], n)[:n]
}

// codec is the binary codec of Protocol Buffers, which also receives frames.
type codec struct{ *connectproto.BinaryCodec }

// UnmarshalRead implements connect.Codec.
func (codec) UnmarshalRead(ctx context.Context, src io.Reader, msg any) error {
	f, ok := msg.(*frame)
	if !ok {
		return unmarshal(ctx, src, msg)
	}
	sized, ok := src.(interface{ Len() int })
	if !ok {
		return fmt.Errorf("a frame of unknown size: %T", src)
	}
	n := sized.Len()
	f.grow(n)
	_, err := io.ReadFull(src, f.buf)
	return err
}

// unmarshal decodes a message that is not larger in memory than it may be. What
// it does not know it does not keep.
func unmarshal(ctx context.Context, src io.Reader, msg any) error {
	message, ok := msg.(proto.Message)
	if !ok {
		return fmt.Errorf("no message: %T", msg)
	}
	raw, err := readMessage(src)
	if err != nil {
		return err
	}
	size, err := decodedSize(raw, message.ProtoReflect().Descriptor())
	if err != nil {
		return err
	}
	if size > meter.Small {
		if err := meter.Take(ctx, int64(size)); err != nil {
			return err
		}
	}
	return proto.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(raw, message)
}

// readMessage reads all of src, which WithReadMaxBytes limits.
func readMessage(src io.Reader) ([]byte, error) {
	sized, ok := src.(interface{ Len() int })
	if !ok {
		return io.ReadAll(src)
	}
	raw := make([]byte, sized.Len())
	_, err := io.ReadFull(src, raw)
	return raw, err
}

// receive receives the next message of stream.
func (f *frame) receive(stream interface{ Receive(any) error }) error {
	f.release() // also since an empty message does not come by the codec
	return stream.Receive(f)
}

// bytes returns the value of the message's field of that number, and whether it
// has one. The value is part of the frame.
func (f *frame) bytes(number protowire.Number) ([]byte, bool, error) {
	var value []byte
	var found bool
	err := eachField(f.buf, func(n protowire.Number, v []byte, _ uint64) {
		if n == number {
			value, found = v, true
		}
	})
	return value, found, err
}

// eachField calls visit for each field of a message: with the value of one that
// has a length, or the number of one that is a varint. Others are passed over.
func eachField(message []byte, visit func(number protowire.Number, value []byte, varint uint64)) error {
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return protowire.ParseError(n)
		}
		message = message[n:]
		switch kind {
		case protowire.BytesType:
			var value []byte
			if value, n = protowire.ConsumeBytes(message); n >= 0 {
				visit(number, value, 0)
			}
		case protowire.VarintType:
			var varint uint64
			if varint, n = protowire.ConsumeVarint(message); n >= 0 {
				visit(number, nil, varint)
			}
		default:
			n = protowire.ConsumeFieldValue(number, kind, message)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		message = message[n:]
	}
	return nil
}

// Field numbers of guest.proto, for what is read without generated code.
const (
	startResponseEvent   = 2
	attachResponseEvent  = 1
	outputEventData      = 1
	outputDataStream     = 1
	outputDataOffset     = 2
	outputDataData       = 3
	outputDataAt         = 4
	readFileResponseData = 2
	uploadData           = 2 // of all messages that upload
	packFilesData        = 2
)

// decodeEvent reads an OutputEvent message. It returns false for an event that
// says nothing to a reader. The event's Data is part of message.
func decodeEvent(message []byte) (nestbox.OutputEvent, bool, error) {
	event := nestbox.OutputEvent{Kind: nestbox.EventData, Stream: nestbox.Stdout}
	var data []byte
	var isData bool
	err := eachField(message, func(number protowire.Number, value []byte, _ uint64) {
		if number == outputEventData {
			data, isData = value, true
		}
	})
	if err != nil {
		return nestbox.OutputEvent{}, false, err
	}
	if !isData {
		var other guestv1.OutputEvent
		if err := proto.Unmarshal(message, &other); err != nil {
			return nestbox.OutputEvent{}, false, err
		}
		return eventFromWire(&other)
	}
	var at int64
	err = eachField(data, func(number protowire.Number, value []byte, varint uint64) {
		switch number {
		case outputDataStream:
			event.Stream = streamFromWire(guestv1.Stream(varint))
		case outputDataAt:
			at = int64(varint)
		case outputDataOffset:
			event.Offset = int64(varint)
		case outputDataData:
			event.Data = value
		}
	})
	if at > 0 && at < latest.UnixMilli() {
		event.At = time.UnixMilli(at).UTC()
	}
	return event, true, err
}

// procedure names a procedure to the calls underneath the generated client.
func procedure(name string, kind connect.StreamType) connect.Spec {
	service := guestv1.File_nestbox_guest_v1_guest_proto.Services().ByName("GuestService")
	return connect.Spec{
		StreamType: kind,
		Schema:     service.Methods().ByName(protoreflect.Name(path.Base(name))),
		Procedure:  name,
	}
}
