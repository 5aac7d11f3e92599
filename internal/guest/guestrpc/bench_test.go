package guestrpc

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// flood is a reader of as much output as is asked for.
type flood struct {
	data []byte
	left int
	at   int64
}

func (f *flood) Next(ctx context.Context) (nestbox.OutputEvent, error) {
	if ctx.Err() != nil {
		return nestbox.OutputEvent{}, nestbox.Errorf(nestbox.CodeCanceled, "canceled: %w", ctx.Err())
	}
	f.left--
	switch {
	case f.left > 0:
		f.at += int64(len(f.data))
		return nestbox.OutputEvent{Kind: nestbox.EventData, Stream: nestbox.Stdout, Offset: f.at - int64(len(f.data)), Data: f.data}, nil
	case f.left == 0:
		return nestbox.OutputEvent{Kind: nestbox.EventExit, Offset: f.at, Exit: anExit()}, nil
	case f.left == -1:
		return nestbox.OutputEvent{Kind: nestbox.EventClosed, Offset: f.at}, nil
	}
	return nestbox.OutputEvent{}, io.EOF
}

func (f *flood) Close() error { return nil }

func benchmarkAttach(b *testing.B, size int) {
	g := &scripted{attach: func(context.Context, nestbox.Selector, guest.Attach) (guest.OutputReader, error) {
		return &flood{data: make([]byte, size), left: b.N + 1}, nil
	}}
	c := serve(b, g).client(b)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	b.ResetTimer()
	r, err := c.Processes().Attach(b.Context(), nestbox.Selector{PID: 1}, guest.Attach{})
	require.NoError(b, err)
	defer r.Close()
	var got int
	for {
		event, err := r.Next(b.Context())
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(b, err)
		got += len(event.Data)
	}
	require.Equal(b, b.N*size, got)
}

func BenchmarkAttach100B(b *testing.B)   { benchmarkAttach(b, 100) }
func BenchmarkAttach8KiB(b *testing.B)   { benchmarkAttach(b, 8<<10) }
func BenchmarkAttach256KiB(b *testing.B) { benchmarkAttach(b, 256<<10) }

func BenchmarkReadFile(b *testing.B) {
	const size = 256 << 20
	data := make([]byte, size)
	c := serve(b, &scripted{read: func(context.Context, string) (io.ReadCloser, nestbox.FileInfo, error) {
		return io.NopCloser(struct{ io.Reader }{bytes.NewReader(data)}), nestbox.FileInfo{Size: size}, nil
	}}).client(b)
	b.SetBytes(size)
	b.ReportAllocs()
	for b.Loop() {
		r, _, err := c.Files().Read(b.Context(), "/f", 0)
		require.NoError(b, err)
		n, err := io.Copy(io.Discard, r)
		require.NoError(b, err)
		require.EqualValues(b, size, n)
		require.NoError(b, r.Close())
	}
}

func BenchmarkWriteFile(b *testing.B) {
	const size = 256 << 20
	data := make([]byte, size)
	c := serve(b, &scripted{write: func(_ context.Context, _ string, r io.Reader, _ guest.WriteOptions) (nestbox.FileInfo, error) {
		n, err := io.Copy(io.Discard, r)
		return nestbox.FileInfo{Size: n}, err
	}}).client(b)
	b.SetBytes(size)
	b.ReportAllocs()
	for b.Loop() {
		info, err := c.Files().Write(b.Context(), "/f", bytes.NewReader(data), guest.WriteOptions{})
		require.NoError(b, err)
		require.EqualValues(b, size, info.Size)
	}
}

func BenchmarkPing(b *testing.B) {
	c := serve(b, &scripted{ping: func(context.Context) (guest.Info, error) { return guest.Info{}, nil }}).client(b)
	b.ReportAllocs()
	for b.Loop() {
		_, err := c.Ping(b.Context())
		require.NoError(b, err)
	}
}
