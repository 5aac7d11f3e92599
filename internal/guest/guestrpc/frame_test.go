package guestrpc

import (
	"bytes"
	"context"
	"testing"

	"connectrpc.com/connect/v2/connectproto"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/nestbox/nestbox"
	guestv1 "github.com/nestbox/nestbox/gen/nestbox/guest/v1"
)

// received returns the frame of a message that was sent.
func received(t require.TestingT, message proto.Message) *frame {
	binary := codec{connectproto.NewBinaryCodec()}
	var wire bytes.Buffer
	require.NoError(t, binary.MarshalWrite(context.Background(), &wire, message))
	f := &frame{buf: []byte("what was there before")}
	require.NoError(t, binary.UnmarshalRead(context.Background(), &wire, f))
	return f
}

// TestFramesAreMessages requires that what is read without generated code is
// what generated code has written.
func TestFramesAreMessages(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		want := nestbox.OutputEvent{
			Kind:   nestbox.EventData,
			Stream: rapid.SampledFrom([]nestbox.Stream{nestbox.Stdout, nestbox.Stderr}).Draw(t, "stream"),
			Offset: rapid.Int64Min(0).Draw(t, "offset"),
			Data:   rapid.SliceOf(rapid.Byte()).Draw(t, "data"),
		}
		var encoder eventEncoder
		event := encoder.encode(want)
		for message, field := range map[proto.Message]protowire.Number{
			&guestv1.AttachResponse{Event: event}:                                       attachResponseEvent,
			&guestv1.StartResponse{Message: &guestv1.StartResponse_Event{Event: event}}: startResponseEvent,
		} {
			value, found, err := received(t, message).bytes(field)
			require.NoError(t, err)
			require.True(t, found)
			got, ok, err := decodeEvent(value)
			require.NoError(t, err)
			require.True(t, ok)
			require.True(t, bytes.Equal(want.Data, got.Data))
			got.Data = want.Data // nil or empty
			require.Equal(t, want, got)
		}
		for message, field := range map[proto.Message]protowire.Number{
			&guestv1.ReadFileResponse{Message: &guestv1.ReadFileResponse_Data{Data: want.Data}}: readFileResponseData,
			&guestv1.WriteFileRequest{Message: &guestv1.WriteFileRequest_Data{Data: want.Data}}: uploadData,
		} {
			value, found, err := received(t, message).bytes(field)
			require.NoError(t, err)
			require.True(t, found)
			require.True(t, bytes.Equal(want.Data, value))
		}
	})
	_, found, err := received(t, &guestv1.ReadFileResponse{Message: &guestv1.ReadFileResponse_Done{Done: true}}).bytes(readFileResponseData)
	require.NoError(t, err)
	require.False(t, found)
}

// TestGarbageFrames requires that no bytes of a peer are too much for the
// decoder.
func TestGarbageFrames(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		f := &frame{buf: rapid.SliceOf(rapid.Byte()).Draw(t, "bytes")}
		_, _, ours := f.bytes(1)
		generated := proto.Unmarshal(f.buf, &guestv1.AttachResponse{})
		if ours != nil {
			require.Error(t, generated, "generated code takes what we refuse")
		}
		_, _, _ = decodeEvent(f.buf)
	})
}
