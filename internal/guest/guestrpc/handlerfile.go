package guestrpc

import (
	"bytes"
	"context"
	"errors"
	"io"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"

	"github.com/nestbox/nestbox"
	guestv1 "github.com/nestbox/nestbox/gen/nestbox/guest/v1"
	"github.com/nestbox/nestbox/gen/nestbox/guest/v1/guestv1connect"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/rpcerr"
)

// ReadFile implements guestv1connect.GuestServiceHandler.
func (handler) ReadFile(ctx context.Context, req *guestv1.ReadFileRequest, stream guestv1connect.GuestServiceReadFileServerStream) error {
	content, info, err := guestOf(ctx).Files().Read(ctx, req.GetPath(), req.GetFrom())
	if err != nil {
		return rpcerr.ToConnect(err)
	}
	defer content.Close()
	first := &guestv1.ReadFileResponse{Message: &guestv1.ReadFileResponse_Info{Info: fileToWire(info)}}
	if err := stream.Send(first); err != nil {
		return err
	}
	// A small file needs no large buffer, but one that seems empty may be of
	// /proc and longer.
	buf := make([]byte, min(max(info.Size+1, 16<<10), fileChunk))
	data := &guestv1.ReadFileResponse_Data{}
	message := &guestv1.ReadFileResponse{Message: data}
	for {
		n, err := content.Read(buf)
		if n > 0 {
			data.Data = buf[:n]
			if err := stream.Send(message); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return stream.Send(&guestv1.ReadFileResponse{Message: &guestv1.ReadFileResponse_Done{Done: true}})
		}
		if err != nil {
			return rpcerr.ToConnect(err)
		}
	}
}

// WriteFile implements guestv1connect.GuestServiceHandler.
func (handler) WriteFile(ctx context.Context, stream guestv1connect.GuestServiceWriteFileServerStream) (*guestv1.WriteFileResponse, error) {
	first, err := stream.Receive()
	if err != nil || first.GetHeader() == nil {
		return nil, rpcerr.ToConnect(nestbox.Errorf(nestbox.CodeInvalid, "an upload begins with a header"))
	}
	header := first.GetHeader()
	info, err := guestOf(ctx).Files().Write(ctx, header.GetPath(), &uploadReader{ctx: ctx, receive: func() (uploadMessage, error) { return stream.Receive() }}, writeOptionsFromWire(header))
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return &guestv1.WriteFileResponse{Info: fileToWire(info)}, nil
}

// PutFile implements guestv1connect.GuestServiceHandler.
func (handler) PutFile(ctx context.Context, req *guestv1.PutFileRequest) (*guestv1.PutFileResponse, error) {
	info, err := guestOf(ctx).Files().Write(ctx, req.GetHeader().GetPath(), bytes.NewReader(req.GetContent()), writeOptionsFromWire(req.GetHeader()))
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return &guestv1.PutFileResponse{Info: fileToWire(info)}, nil
}

// reuseUploads is an interceptor that receives uploads into one frame each: the
// data of a message is valid until the next one is received.
func reuseUploads(next connect.ServerFunc) connect.ServerFunc {
	return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
		switch spec.Procedure {
		case guestv1connect.GuestServiceWriteFileProcedure, guestv1connect.GuestServiceUnpackFilesProcedure:
			stream = &uploadStream{ServerStream: stream}
		}
		return next(ctx, spec, stream)
	}
}

type uploadStream struct {
	connect.ServerStream
	frame frame
}

// Receive implements connect.ServerStream.
func (u *uploadStream) Receive(msg any) error {
	message, ok := msg.(proto.Message)
	if !ok {
		return u.ServerStream.Receive(msg)
	}
	if err := u.frame.receive(u.ServerStream); err != nil {
		return err
	}
	data, isData, err := u.frame.bytes(uploadData)
	switch {
	case err != nil:
		return err
	case !isData:
		return proto.Unmarshal(u.frame.buf, message)
	}
	switch message := msg.(type) {
	case *guestv1.WriteFileRequest:
		message.Message = &guestv1.WriteFileRequest_Data{Data: data}
	case *guestv1.UnpackFilesRequest:
		message.Message = &guestv1.UnpackFilesRequest_Data{Data: data}
	}
	return nil
}

// uploadReader reads the content of an upload. Only the message that says so
// is its end.
type uploadReader struct {
	ctx     context.Context //nolint:containedctx // of the call
	receive func() (uploadMessage, error)
	rest    []byte // of the last message
	err     error  // sticky
}

// uploadMessage is a message of an upload after the first.
type uploadMessage interface {
	GetData() []byte
	GetDone() bool
}

// Stop implements guest.Stopper.
func (u *uploadReader) Stop() { cutRequest(u.ctx) }

// Read implements io.Reader.
func (u *uploadReader) Read(p []byte) (int, error) {
	if err := u.fill(); err != nil {
		return 0, err
	}
	n := copy(p, u.rest)
	u.rest = u.rest[n:]
	return n, nil
}

// WriteTo implements io.WriterTo, to spare a copy.
func (u *uploadReader) WriteTo(w io.Writer) (int64, error) {
	var written int64
	for {
		if err := u.fill(); errors.Is(err, io.EOF) {
			return written, nil
		} else if err != nil {
			return written, err
		}
		n, err := w.Write(u.rest)
		written += int64(n)
		u.rest = u.rest[n:]
		if err != nil {
			return written, err
		}
	}
}

// fill makes rest longer than nothing, or returns why it cannot.
func (u *uploadReader) fill() error {
	for len(u.rest) == 0 && u.err == nil {
		message, err := u.receive()
		switch {
		case errors.Is(err, io.EOF):
			u.err = guest.ContentError(io.ErrUnexpectedEOF)
		case err != nil:
			u.err = guest.ContentError(err)
		case message.GetDone():
			u.err = io.EOF
		default:
			u.rest = message.GetData()
		}
	}
	if len(u.rest) > 0 {
		return nil
	}
	return u.err
}

// StatFile implements guestv1connect.GuestServiceHandler.
func (handler) StatFile(ctx context.Context, req *guestv1.StatFileRequest) (*guestv1.StatFileResponse, error) {
	info, err := guestOf(ctx).Files().Stat(ctx, req.GetPath())
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return &guestv1.StatFileResponse{Info: fileToWire(info)}, nil
}

// ListFiles implements guestv1connect.GuestServiceHandler.
func (handler) ListFiles(ctx context.Context, req *guestv1.ListFilesRequest, stream guestv1connect.GuestServiceListFilesServerStream) error {
	entries, err := guestOf(ctx).Files().List(ctx, req.GetPath(), int(req.GetDepth()))
	if err != nil {
		return rpcerr.ToConnect(err)
	}
	for len(entries) > 0 {
		message := &guestv1.ListFilesResponse{}
		for size := 0; len(entries) > 0 && len(message.Entries) < listChunk && size < listChunkBytes; entries = entries[1:] {
			message.Entries = append(message.Entries, fileToWire(entries[0]))
			size += proto.Size(message.Entries[len(message.Entries)-1])
		}
		if err := stream.Send(message); err != nil {
			return err
		}
	}
	return nil
}

// Mkdir implements guestv1connect.GuestServiceHandler.
func (handler) Mkdir(ctx context.Context, req *guestv1.MkdirRequest) (*guestv1.MkdirResponse, error) {
	info, err := guestOf(ctx).Files().Mkdir(ctx, req.GetPath())
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return &guestv1.MkdirResponse{Info: fileToWire(info)}, nil
}

// RemoveFile implements guestv1connect.GuestServiceHandler.
func (handler) RemoveFile(ctx context.Context, req *guestv1.RemoveFileRequest) (*guestv1.RemoveFileResponse, error) {
	if err := guestOf(ctx).Files().Remove(ctx, req.GetPath()); err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return &guestv1.RemoveFileResponse{}, nil
}
