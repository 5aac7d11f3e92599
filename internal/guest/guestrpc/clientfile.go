package guestrpc

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"

	"github.com/nestbox/nestbox"
	guestv1 "github.com/nestbox/nestbox/gen/nestbox/guest/v1"
	"github.com/nestbox/nestbox/gen/nestbox/guest/v1/guestv1connect"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/meter"
)

// files are the files of a Client's guest.
type files struct{ client *Client }

var _ guest.Files = files{}

// Read implements guest.Files.
func (f files) Read(ctx context.Context, path string, from int64) (io.ReadCloser, nestbox.FileInfo, error) {
	path = nestbox.TextOfPath(path)
	if from > 0 {
		if err := f.client.need(ctx, guest.FeatureReadFrom); err != nil {
			return nil, nestbox.FileInfo{}, err
		}
	}
	if err := f.client.inStreams.take("streams"); err != nil {
		return nil, nestbox.FileInfo{}, err
	}
	if err := meter.Take(ctx, 2*fileChunk); err != nil { // the message, as it comes and as it is handed on
		f.client.inStreams.give()
		return nil, nestbox.FileInfo{}, err
	}
	ctx, g := f.client.guard(ctx)
	d := &download{client: f.client, ctx: ctx, guard: g, give: sync.OnceFunc(f.client.inStreams.give)}
	var first guestv1.ReadFileResponse
	err := d.open(f.client, &guestv1.ReadFileRequest{Path: path, From: from}, &first)
	if err != nil {
		_ = d.Close()
		return nil, nestbox.FileInfo{}, f.client.fromWire(err)
	}
	return d, fileFromWire(first.GetInfo()), nil
}

func (d *download) open(c *Client, req *guestv1.ReadFileRequest, first *guestv1.ReadFileResponse) (err error) {
	d.guard.wait(callIn)
	defer d.guard.rest()
	call := procedure(guestv1connect.GuestServiceReadFileProcedure, connect.StreamTypeServer)
	if d.stream, err = c.calls.CallServerStream(d.ctx, call, req); err == nil {
		err = d.stream.Receive(first)
	}
	if err != nil {
		return orContext(d.ctx, unexpectedEOF(err))
	}
	return checkFile(first.GetInfo())
}

// unexpectedEOF returns err, or io.ErrUnexpectedEOF for one that says that the
// stream ended, and for none.
func unexpectedEOF(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// download reads the content of a file. Only the message that says so is its
// end.
type download struct {
	client *Client
	ctx    context.Context //nolint:containedctx // of the whole download, as guest.Files has it
	stream connect.ClientStream
	guard  *guard
	give   func() // the slot
	frame  frame
	rest   []byte // of the frame
	err    error  // sticky
}

// Read implements io.Reader.
func (d *download) Read(p []byte) (int, error) {
	if err := d.fill(); err != nil {
		return 0, err
	}
	n := copy(p, d.rest)
	d.rest = d.rest[n:]
	return n, nil
}

// WriteTo implements io.WriterTo, to spare a copy.
func (d *download) WriteTo(w io.Writer) (int64, error) {
	var written int64
	for {
		if err := d.fill(); errors.Is(err, io.EOF) {
			return written, nil
		} else if err != nil {
			return written, err
		}
		n, err := w.Write(d.rest)
		written += int64(n)
		d.rest = d.rest[n:]
		if err != nil {
			return written, err
		}
	}
}

// fill makes rest longer than nothing, or returns why it cannot.
func (d *download) fill() error {
	for len(d.rest) == 0 && d.err == nil {
		d.guard.wait(callIn)
		err := d.frame.receive(d.stream)
		d.guard.rest()
		if err != nil {
			d.err = d.client.fromWire(orContext(d.ctx, unexpectedEOF(err)))
			continue
		}
		var isData bool
		if d.rest, isData, err = d.frame.bytes(readFileResponseData); err != nil {
			d.err = d.client.fromWire(err)
		} else if !isData {
			d.err = d.last()
		}
	}
	if len(d.rest) > 0 {
		return nil
	}
	return d.err
}

// last returns what the frame, which holds no data, says of the end.
func (d *download) last() error {
	var message guestv1.ReadFileResponse
	if err := proto.Unmarshal(d.frame.buf, &message); err != nil {
		return d.client.fromWire(err)
	}
	if !message.GetDone() {
		return d.client.fromWire(io.ErrUnexpectedEOF)
	}
	_ = d.frame.receive(d.stream) // the end of the stream, so that its connection can be used again
	return io.EOF
}

// Close implements io.Closer.
func (d *download) Close() error {
	if d.err == nil {
		d.err = nestbox.Errorf(nestbox.CodeCanceled, "the file is closed")
	}
	d.rest = nil
	d.frame.release()
	d.guard.release()
	if d.stream != nil {
		_ = d.stream.Close()
	}
	d.give()
	return nil
}

// Write implements guest.Files.
func (f files) Write(ctx context.Context, path string, r io.Reader, opts guest.WriteOptions) (nestbox.FileInfo, error) {
	path = nestbox.TextOfPath(path)
	header := writeOptionsToWire(opts)
	if header.Append || header.IfAbsent || len(header.IfVersion) > 0 {
		if err := f.client.need(ctx, guest.FeatureWriteOptions); err != nil {
			return nestbox.FileInfo{}, err
		}
	}
	header.Path = path
	if s, ok := r.(guest.Sized); ok && s.Len() >= 0 && s.Len() <= maxPut && f.client.need(ctx, guest.FeaturePutFile) == nil {
		return f.put(ctx, header, io.LimitReader(r, maxPut+1))
	}
	data := &guestv1.WriteFileRequest_Data{}
	message := &guestv1.WriteFileRequest{Message: data}
	var res guestv1.WriteFileResponse
	err := f.client.upload(ctx, guestv1connect.GuestServiceWriteFileProcedure, r, uploadMessages{
		header: &guestv1.WriteFileRequest{Message: &guestv1.WriteFileRequest_Header{Header: header}},
		data:   func(b []byte) any { data.Data = b; return message },
		done:   &guestv1.WriteFileRequest{Message: &guestv1.WriteFileRequest_Done{Done: true}},
		takes:  callIn,
	}, &res)
	if err == nil {
		err = checkFile(res.GetInfo())
	}
	if err != nil {
		return nestbox.FileInfo{}, err
	}
	return fileFromWire(res.GetInfo()), nil
}

// put writes a small file in one message: each one wakes the daemon, which takes long
// inside a sandbox.
func (f files) put(ctx context.Context, header *guestv1.WriteFileHeader, r io.Reader) (nestbox.FileInfo, error) {
	content, err := io.ReadAll(r)
	if err != nil {
		return nestbox.FileInfo{}, guest.ContentError(err)
	}
	if len(content) > maxPut {
		return nestbox.FileInfo{}, nestbox.Errorf(nestbox.CodeInvalid, "there is more content than was said")
	}
	res, err := call(ctx, f.client, callIn, f.client.rpc.PutFile, &guestv1.PutFileRequest{Header: header, Content: content})
	if err == nil {
		err = checkFile(res.GetInfo())
	}
	if err != nil {
		return nestbox.FileInfo{}, err
	}
	return fileFromWire(res.GetInfo()), nil
}

// uploadMessages are those of one procedure that takes content.
type uploadMessages struct {
	header any
	data   func([]byte) any // may return the same message every time
	done   any
	takes  time.Duration // that the server may need for one of data
}

// upload sends all of r to a procedure, whose answer is res.
func (c *Client) upload(ctx context.Context, name string, r io.Reader, m uploadMessages, res any) error {
	if err := c.inStreams.take("streams"); err != nil {
		return err
	}
	defer c.inStreams.give()
	callCtx, g := c.guard(ctx)
	defer g.release()
	g.wait(callIn)
	stream, err := c.calls.CallClientStream(callCtx, procedure(name, connect.StreamTypeClient))
	if err != nil {
		return c.fromWire(err)
	}
	defer stream.Close()
	err = stream.Send(m.header)
	var source content
	source.Reader = r
	defer context.AfterFunc(callCtx, source.stop)()
	// The answer is awaited meanwhile, because one that comes early, such as
	// that the disk is full, is lost if the connection breaks first.
	answer := make(chan error, 1)
	var early atomic.Bool
	go func() {
		err := stream.Receive(res)
		early.Store(callCtx.Err() == nil)
		source.stop()
		answer <- err
	}()
	if err == nil {
		err = send(stream, &source, m, g)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		err = orContext(callCtx, err)
		answered := early.Load()
		g.release()                      // what is not done is cut, and so changes nothing
		if first := <-answer; answered { // and that is why the source has stopped
			err = unexpectedEOF(first)
		}
		return c.fromWire(err)
	}
	// io.EOF means that the server reads no more: the answer says why.
	g.wait(workIn)
	if err := <-answer; err != nil {
		return c.fromWire(orContext(callCtx, unexpectedEOF(err)))
	}
	return nil
}

// content is what is uploaded.
type content struct {
	io.Reader
	ended   atomic.Bool // all of it was read
	stopped atomic.Bool // before that
}

// stop has the reader read no more.
func (c *content) stop() {
	if c.ended.Load() || c.stopped.Swap(true) {
		return
	}
	if s, ok := c.Reader.(guest.Stopper); ok {
		s.Stop()
	}
}

// send sends all of r. It returns io.EOF if the server reads no more. Only the
// server is waited for under guard: r is as slow as its sender.
func send(stream connect.ClientStream, r *content, m uploadMessages, g *guard) error {
	buf := make([]byte, minUpload) // it grows with a source that is fast
	for {
		g.rest()
		n, err := gather(r, buf)
		g.wait(m.takes)
		if n > 0 {
			if err := stream.Send(m.data(buf[:n])); err != nil {
				return err
			}
		}
		if n == len(buf) && n < fileChunk {
			buf = make([]byte, min(4*n, fileChunk))
		}
		switch {
		case err == io.EOF: // only this, bare, is a reader's end
			r.ended.Store(true)
			if err := stream.Send(m.done); err != nil {
				return err
			}
			return stream.CloseSend()
		case err != nil:
			return guest.ContentError(err)
		}
	}
}

// gather reads until there is enough for a message, or r ends or fails.
func gather(r io.Reader, buf []byte) (n int, err error) {
	for empty := 0; n < minUpload && err == nil; {
		var m int
		m, err = r.Read(buf[n:])
		n += m
		if m > 0 {
			empty = 0
		} else if empty++; empty == 100 && err == nil {
			err = io.ErrNoProgress
		}
	}
	return n, err
}

// Stat implements guest.Files.
func (f files) Stat(ctx context.Context, path string) (nestbox.FileInfo, error) {
	path = nestbox.TextOfPath(path)
	res, err := call(ctx, f.client, callIn, f.client.rpc.StatFile, &guestv1.StatFileRequest{Path: path})
	if err == nil {
		err = checkFile(res.GetInfo())
	}
	if err != nil {
		return nestbox.FileInfo{}, err
	}
	return fileFromWire(res.GetInfo()), nil
}

// List implements guest.Files.
func (f files) List(ctx context.Context, path string, depth int) ([]nestbox.FileInfo, error) {
	path = nestbox.TextOfPath(path)
	if err := f.client.inCalls.waitShort(ctx, f.client.looks.after+f.client.looks.in, "calls"); err != nil {
		return nil, err
	}
	defer f.client.inCalls.give()
	ctx, g := f.client.guard(ctx)
	defer g.release()
	depth = min(max(depth, 0), nestbox.MaxListDepth+1) // out of bounds either way, and an int32
	g.wait(workIn)
	stream, err := f.client.rpc.ListFiles(ctx, &guestv1.ListFilesRequest{Path: path, Depth: int32(depth)})
	if err != nil {
		return nil, f.client.fromWire(orContext(ctx, err))
	}
	defer stream.Close()
	l := &listing{entries: []nestbox.FileInfo{}}
	for {
		message, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return l.entries, nil
		}
		if err != nil {
			return nil, f.client.fromWire(orContext(ctx, err))
		}
		if err := l.add(ctx, message.GetEntries()); err != nil {
			return nil, err
		}
		g.wait(workIn)
	}
}

// listing collects the entries of a listing, within limits.
type listing struct {
	entries []nestbox.FileInfo
	bytes   int
	empty   int // messages without any
}

// Limits of a listing, beside nestbox.MaxListEntries.
const (
	maxListingBytes  = 64 << 20
	maxEmptyMessages = 100
	entryCost        = 256 // bytes of one in memory, beside its names
)

func (l *listing) add(ctx context.Context, entries []*guestv1.FileInfo) error {
	if len(entries) == 0 {
		if l.empty++; l.empty > maxEmptyMessages {
			return protocolError("a listing without end")
		}
	}
	if len(l.entries)+len(entries) > nestbox.MaxListEntries {
		return nestbox.Errorf(nestbox.CodeTooLarge, "more than %d entries", nestbox.MaxListEntries)
	}
	if err := meter.Take(ctx, int64(len(entries))*entryCost); err != nil {
		return err
	}
	for _, e := range entries {
		if err := checkFile(e); err != nil {
			return err
		}
		if l.bytes += proto.Size(e); l.bytes > maxListingBytes {
			return nestbox.Errorf(nestbox.CodeTooLarge, "the names of the entries are longer than %d bytes", maxListingBytes)
		}
		l.entries = append(l.entries, fileFromWire(e))
	}
	return nil
}

// Mkdir implements guest.Files.
func (f files) Mkdir(ctx context.Context, path string) (nestbox.FileInfo, error) {
	path = nestbox.TextOfPath(path)
	res, err := call(ctx, f.client, callIn, f.client.rpc.Mkdir, &guestv1.MkdirRequest{Path: path})
	if err == nil {
		err = checkFile(res.GetInfo())
	}
	if err != nil {
		return nestbox.FileInfo{}, err
	}
	return fileFromWire(res.GetInfo()), nil
}

// Remove implements guest.Files.
func (f files) Remove(ctx context.Context, path string) error {
	path = nestbox.TextOfPath(path)
	_, err := call(ctx, f.client, workIn, f.client.rpc.RemoveFile, &guestv1.RemoveFileRequest{Path: path})
	return err
}
