package guestrpc

import (
	"context"
	"io"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"

	"github.com/nestbox/nestbox"
	guestv1 "github.com/nestbox/nestbox/gen/nestbox/guest/v1"
	"github.com/nestbox/nestbox/gen/nestbox/guest/v1/guestv1connect"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/meter"
	"github.com/nestbox/nestbox/internal/rpcerr"
)

// PackFiles implements guestv1connect.GuestServiceHandler.
func (h handler) PackFiles(ctx context.Context, req *guestv1.PackFilesRequest, stream guestv1connect.GuestServicePackFilesServerStream) error {
	data := &guestv1.PackFilesResponse_Data{}
	message := &guestv1.PackFilesResponse{Message: data}
	empty := func() error { return stream.Send(&guestv1.PackFilesResponse{}) }
	var out *outflow // once it is known that there is something to pack
	defer func() { out.stop() }()
	send := writerFunc(func(p []byte) (int, error) {
		sent := 0
		for sent < len(p) {
			data.Data = p[sent:min(sent+fileChunk, len(p))]
			if err := out.send(func() error { return stream.Send(message) }); err != nil {
				return sent, err
			}
			sent += len(data.Data)
		}
		return sent, nil
	})
	opts := guest.PackOptions{Contents: req.GetContents(), Compression: nestbox.Compression(req.GetCompression())}
	warnings, err := guestOf(ctx).Files().Pack(ctx, req.GetPath(), opts, send, func() error {
		out = newOutflow(h.alive, empty)
		return out.send(empty)
	})
	if err != nil {
		return rpcerr.ToConnect(err)
	}
	result := &guestv1.PackFilesResponse{Message: &guestv1.PackFilesResponse_Result{Result: &guestv1.PackResult{Warnings: warnings}}}
	return out.send(func() error { return stream.Send(result) })
}

type writerFunc func(p []byte) (int, error)

// Write implements io.Writer.
func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// Pack implements guest.Files.
func (f files) Pack(ctx context.Context, path string, opts guest.PackOptions, w io.Writer, begin func() error) ([]string, error) {
	path = nestbox.TextOfPath(path)
	if err := f.client.need(ctx, guest.FeatureArchive); err != nil {
		return nil, err
	}
	if err := meter.Take(ctx, 2*fileChunk); err != nil { // the message, as it comes and as it is handed on
		return nil, err
	}
	call := procedure(guestv1connect.GuestServicePackFilesProcedure, connect.StreamTypeServer)
	req := &guestv1.PackFilesRequest{Path: path, Contents: opts.Contents, Compression: string(opts.Compression)}
	in, err := f.client.openInflow(ctx, call, req, &guestv1.PackFilesResponse{})
	if err != nil {
		return nil, err
	}
	defer in.end()
	if begin != nil {
		if err := begin(); err != nil {
			return nil, err
		}
	}
	defer context.AfterFunc(ctx, func() { in.guard.cancel(ctx.Err()) })()
	for {
		in.guard.wait(in.limit)
		warnings, last, data, err := in.packed()
		in.guard.rest() // while w is slow
		switch {
		case err != nil:
			return nil, in.fail(ctx, unexpectedEOF(err))
		case last:
			return warnings, nil
		}
		if _, err := w.Write(data); err != nil {
			return nil, err
		}
	}
}

// packed returns the data of the next message, or what the last one says.
func (f *inflow) packed() (warnings []string, last bool, data []byte, err error) {
	if err := f.frame.receive(f.stream); err != nil {
		return nil, false, nil, err
	}
	data, isData, err := f.frame.bytes(packFilesData)
	if err != nil {
		return nil, false, nil, err
	}
	if isData && len(data) > 0 {
		f.spoke()
		return nil, false, data, nil
	}
	var message guestv1.PackFilesResponse
	if err := proto.Unmarshal(f.frame.buf, &message); err != nil {
		return nil, false, nil, err
	}
	if message.GetResult() == nil {
		return nil, false, nil, f.pass()
	}
	warnings, err = checkWarnings(message.GetResult().GetWarnings())
	_ = f.frame.receive(f.stream) // the end of the stream, so that its connection can be used again
	return warnings, true, nil, err
}

// Bounds of what is told of an archive.
const (
	maxWarnings    = 128
	maxWarningText = 1 << 10
)

// checkWarnings returns what may be shown of them.
func checkWarnings(warnings []string) ([]string, error) {
	if len(warnings) > maxWarnings {
		return nil, protocolError("%d warnings", len(warnings))
	}
	for i, w := range warnings {
		warnings[i] = cleanText(w, maxWarningText)
	}
	return warnings, nil
}

// UnpackFiles implements guestv1connect.GuestServiceHandler.
func (handler) UnpackFiles(ctx context.Context, stream guestv1connect.GuestServiceUnpackFilesServerStream) (*guestv1.UnpackFilesResponse, error) {
	first, err := stream.Receive()
	if err != nil || first.GetHeader() == nil {
		return nil, rpcerr.ToConnect(nestbox.Errorf(nestbox.CodeInvalid, "an upload begins with a header"))
	}
	header := first.GetHeader()
	r := &uploadReader{ctx: ctx, receive: func() (uploadMessage, error) { return stream.Receive() }}
	done, err := guestOf(ctx).Files().Unpack(ctx, header.GetPath(), r, guest.UnpackOptions{
		User: header.GetUser(), KeepOwners: header.GetKeepOwners(), KeepKind: header.GetKeepKind(),
	})
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return &guestv1.UnpackFilesResponse{Entries: done.Entries, Bytes: done.Bytes, Warnings: done.Warnings}, nil
}

// Unpack implements guest.Files.
func (f files) Unpack(ctx context.Context, path string, r io.Reader, opts guest.UnpackOptions) (nestbox.Unpacked, error) {
	path = nestbox.TextOfPath(path)
	if err := f.client.need(ctx, guest.FeatureArchive); err != nil {
		return nestbox.Unpacked{}, err
	}
	data := &guestv1.UnpackFilesRequest_Data{}
	message := &guestv1.UnpackFilesRequest{Message: data}
	header := &guestv1.UnpackFilesHeader{Path: path, User: opts.User, KeepOwners: opts.KeepOwners, KeepKind: opts.KeepKind}
	var res guestv1.UnpackFilesResponse
	err := f.client.upload(ctx, guestv1connect.GuestServiceUnpackFilesProcedure, r, uploadMessages{
		header: &guestv1.UnpackFilesRequest{Message: &guestv1.UnpackFilesRequest_Header{Header: header}},
		data:   func(b []byte) any { data.Data = b; return message },
		done:   &guestv1.UnpackFilesRequest{Message: &guestv1.UnpackFilesRequest_Done{Done: true}},
		takes:  workIn, // little that is compressed may be much
	}, &res)
	if err != nil {
		return nestbox.Unpacked{}, err
	}
	if res.GetEntries() < 0 || res.GetBytes() < 0 {
		return nestbox.Unpacked{}, protocolError("fewer entries than none")
	}
	warnings, err := checkWarnings(res.GetWarnings())
	return nestbox.Unpacked{Entries: res.GetEntries(), Bytes: res.GetBytes(), Warnings: warnings}, err
}
