package api

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/nestbox/nestbox"
)

// recorder collects frames.
type recorder struct {
	frames []any
	resume []int64
}

func (r *recorder) send(frame any, at int64) error {
	if _, ok := frame.(encodedFrame); ok { // as a client sees it
		var buf bytes.Buffer
		var out outputFrame
		if err := encodeFrame(&buf, frame); err != nil {
			return err
		}
		if err := json.Unmarshal(buf.Bytes(), &out); err != nil {
			return err
		}
		frame = out
	}
	r.frames = append(r.frames, frame)
	r.resume = append(r.resume, at)
	return nil
}

func data(stream nestbox.Stream, offset int64, b string) nestbox.OutputEvent {
	return nestbox.OutputEvent{Kind: nestbox.EventData, Stream: stream, Offset: offset, Data: []byte(b)}
}

func TestFramerHoldsBackRunes(t *testing.T) {
	t.Parallel()
	closed := nestbox.OutputEvent{Kind: nestbox.EventClosed, Offset: 99}
	exited := nestbox.OutputEvent{Kind: nestbox.EventExit, Offset: 2, Exit: &nestbox.Exit{Reason: nestbox.ReasonExited}}
	for name, c := range map[string]struct {
		events []nestbox.OutputEvent
		want   []any
	}{
		"whole": {
			[]nestbox.OutputEvent{data("stdout", 0, "a€b")},
			[]any{outputFrame{"stdout", "@7", "a€b", 0, 5, ""}},
		},
		"cut, then the rest": {
			[]nestbox.OutputEvent{data("stdout", 0, "a\xe2\x82"), data("stdout", 3, "\xacb")},
			[]any{outputFrame{"stdout", "@7", "a", 0, 1, ""}, outputFrame{"stdout", "@7", "€", 1, 4, ""}, outputFrame{"stdout", "@7", "b", 4, 5, ""}},
		},
		"byte by byte": {
			[]nestbox.OutputEvent{data("stdout", 0, "\xe2"), data("stdout", 1, "\x82"), data("stdout", 2, "\xac")},
			[]any{outputFrame{"stdout", "@7", "€", 0, 3, ""}},
		},
		"the other stream between": {
			[]nestbox.OutputEvent{data("stdout", 0, "\xe2\x82"), data("stderr", 2, "err"), data("stdout", 5, "\xac")},
			[]any{outputFrame{"stderr", "@7", "err", 2, 0, ""}, outputFrame{"stdout", "@7", "€", 0, 6, ""}},
		},
		"never completed": {
			[]nestbox.OutputEvent{data("stdout", 0, "\xe2\x82"), data("stdout", 2, "\xe2\x82\xac")},
			[]any{outputFrame{"stdout", "@7", "\xe2\x82", 0, 2, ""}, outputFrame{"stdout", "@7", "€", 2, 5, ""}},
		},
		"at the end": {
			[]nestbox.OutputEvent{data("stderr", 0, "\xf0\x9f"), closed},
			[]any{outputFrame{"stderr", "@7", "\xf0\x9f", 0, 2, ""}, closedFrame{"output_closed", "@7", 99}},
		},
		"across the exit of the leader": {
			[]nestbox.OutputEvent{data("stdout", 0, "\xe2\x82"), exited, data("stdout", 2, "\xac")},
			[]any{exitFrame{"exit", "@7", 0, "", "exited", 2}, outputFrame{"stdout", "@7", "€", 0, 3, ""}},
		},
		"before a gap": {
			[]nestbox.OutputEvent{data("stdout", 0, "\xe2"), {Kind: nestbox.EventGap, Offset: 1, To: 7}},
			[]any{outputFrame{"stdout", "@7", "\xe2", 0, 1, ""}, gapFrame{"gap", "@7", 1, 7, 1}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var got recorder
			f := newFramer(7, false, "", got.send)
			for _, ev := range c.events {
				require.NoError(t, f.event(ev))
			}
			require.Equal(t, c.want, got.frames)
		})
	}
}

func TestFramerOnlyOneStream(t *testing.T) {
	t.Parallel()
	var got recorder
	f := newFramer(7, true, nestbox.Stderr, got.send)
	require.NoError(t, f.event(data("stdout", 0, "out")))
	require.NoError(t, f.event(data("stderr", 3, "err")))
	require.Equal(t, []any{outputFrame{"stderr", "@7", base64.StdEncoding.EncodeToString([]byte("err")), 3, 6, ""}}, got.frames)
}

// Any bytes, cut anywhere into events of two streams: text frames join to what
// the whole stream looks like as text and never cut a rune, base64 frames join
// to the bytes, no frame is large, and resuming at a frame's end loses nothing.
func TestFramerProperty(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		asBase64 := rapid.Bool().Draw(t, "base64")
		piece := rapid.OneOf(
			rapid.SliceOfN(rapid.Byte(), 0, 8),
			rapid.Map(rapid.String(), func(s string) []byte { return []byte(s) }),
			rapid.Map(rapid.IntRange(0, 3), func(n int) []byte { return bytes.Repeat([]byte("€\xff"), n*maxFrameData/5) }),
		)
		var got recorder
		f := newFramer(7, asBase64, "", got.send)
		sent := map[nestbox.Stream][]byte{}
		offset := int64(0)
		for range rapid.IntRange(0, 20).Draw(t, "events") {
			stream := rapid.SampledFrom([]nestbox.Stream{nestbox.Stdout, nestbox.Stderr}).Draw(t, "stream")
			b := piece.Draw(t, "data")
			require.NoError(t, f.event(nestbox.OutputEvent{Kind: nestbox.EventData, Stream: stream, Offset: offset, Data: b}))
			sent[stream] = append(sent[stream], b...)
			offset += int64(len(b))
		}
		require.NoError(t, f.event(nestbox.OutputEvent{Kind: nestbox.EventClosed, Offset: offset}))
		received := map[nestbox.Stream]string{}
		for i, frame := range got.frames {
			out, ok := frame.(outputFrame)
			if !ok {
				continue
			}
			require.Equal(t, out.End, got.resume[i])
			received[nestbox.Stream(out.Type)] += wireText(t, out, asBase64)
		}
		for stream, b := range sent {
			want := string(b)
			if !asBase64 {
				want = asText(b)
			}
			require.Equal(t, want, received[stream])
		}
		require.Equal(t, offset, got.resume[len(got.resume)-1])
	})
}

// wireText returns a frame's data as a client sees it.
func wireText(t *rapid.T, frame outputFrame, asBase64 bool) string {
	if asBase64 {
		b, err := base64.StdEncoding.DecodeString(frame.Data)
		require.NoError(t, err)
		require.LessOrEqual(t, len(b), maxFrameData)
		return string(b)
	}
	require.LessOrEqual(t, len(frame.Data), maxFrameData)
	var buf bytes.Buffer
	require.NoError(t, encodeFrame(&buf, frame))
	var back outputFrame
	require.NoError(t, json.Unmarshal(buf.Bytes(), &back))
	require.True(t, utf8.ValidString(back.Data))
	return back.Data
}

// asText is what JSON makes of bytes that may not be UTF-8.
func asText(b []byte) string {
	var out []rune
	for len(b) > 0 {
		r, n := utf8.DecodeRune(b)
		out = append(out, r)
		b = b[n:]
	}
	return string(out)
}
