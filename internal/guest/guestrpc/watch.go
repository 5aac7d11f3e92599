package guestrpc

import (
	"context"
	"errors"
	"io"
	"strings"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"

	"github.com/nestbox/nestbox"
	guestv1 "github.com/nestbox/nestbox/gen/nestbox/guest/v1"
	"github.com/nestbox/nestbox/gen/nestbox/guest/v1/guestv1connect"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/rpcerr"
)

// WatchFiles implements guestv1connect.GuestServiceHandler.
func (h handler) WatchFiles(ctx context.Context, req *guestv1.WatchFilesRequest, stream guestv1connect.GuestServiceWatchFilesServerStream) error {
	watch, err := guestOf(ctx).Files().Watch(ctx, req.GetPath(), req.GetRecursive())
	if err != nil {
		return rpcerr.ToConnect(err)
	}
	defer watch.Close()
	if err := stream.Send(&guestv1.WatchFilesResponse{}); err != nil {
		return err
	}
	out := newOutflow(h.alive, func() error { return stream.Send(&guestv1.WatchFilesResponse{}) })
	defer out.stop()
	for {
		events, err := watch.Next(ctx)
		message := &guestv1.WatchFilesResponse{Done: errors.Is(err, io.EOF)}
		if err != nil && !message.Done {
			return rpcerr.ToConnect(err)
		}
		for _, e := range events {
			message.Events = append(message.Events, fileEventToWire(e))
		}
		if err := out.send(func() error { return stream.Send(message) }); err != nil || message.Done {
			return err
		}
	}
}

// Watch implements guest.Files.
func (f files) Watch(ctx context.Context, path string, recursive bool) (guest.FileWatch, error) {
	path = nestbox.TextOfPath(path)
	if err := f.client.need(ctx, guest.FeatureWatch); err != nil {
		return nil, err
	}
	call := procedure(guestv1connect.GuestServiceWatchFilesProcedure, connect.StreamTypeServer)
	in, err := f.client.openInflow(ctx, call, &guestv1.WatchFilesRequest{Path: path, Recursive: recursive}, &guestv1.WatchFilesResponse{})
	if err != nil {
		return nil, err
	}
	return &watch{inflow: in, path: path}, nil
}

// watch is a FileWatch over a stream of events.
type watch struct {
	*inflow
	path string
}

// Next implements guest.FileWatch.
func (w *watch) Next(ctx context.Context) ([]nestbox.FileEvent, error) {
	if w.err != nil {
		return nil, w.err
	}
	defer context.AfterFunc(ctx, func() { w.guard.cancel(ctx.Err()) })()
	defer w.guard.rest()
	for {
		w.guard.wait(w.limit)
		events, err := w.receive()
		if err == nil && len(events) == 0 {
			err = w.pass()
		}
		if err != nil {
			return nil, w.fail(ctx, err)
		}
		if len(events) > 0 {
			w.spoke()
			return events, nil
		}
	}
}

// receive returns the events of the next message. io.EOF: it was the last.
func (w *watch) receive() ([]nestbox.FileEvent, error) {
	if err := w.frame.receive(w.stream); err != nil {
		return nil, unexpectedEOF(err)
	}
	var message guestv1.WatchFilesResponse
	if err := proto.Unmarshal(w.frame.buf, &message); err != nil {
		return nil, err
	}
	if message.GetDone() {
		_ = w.frame.receive(w.stream) // the end of the stream, so that its connection can be used again
		return nil, io.EOF
	}
	if n := len(message.GetEvents()); n > guest.MaxWatchBatch {
		return nil, protocolError("%d events at once", n)
	}
	events := make([]nestbox.FileEvent, 0, len(message.GetEvents()))
	for _, e := range message.GetEvents() {
		if err := checkFileEvent(e); err != nil {
			return nil, err
		}
		events = append(events, fileEventFromWire(e))
	}
	return events, nil
}

// Close implements io.Closer. The server's watch ends with it.
func (w *watch) Close() error {
	if w.err == nil {
		w.err = nestbox.Errorf(nestbox.CodeCanceled, "the watch of %s is closed", w.path)
		w.end()
	}
	return nil
}

// fileEventTypes are those that there are.
var fileEventTypes = map[nestbox.FileEventType]bool{
	nestbox.FileCreate:   true,
	nestbox.FileWrite:    true,
	nestbox.FileRemove:   true,
	nestbox.FileRename:   true,
	nestbox.FileChmod:    true,
	nestbox.FileOverflow: true,
}

// maxWatchedPath: of a watched directory the path is no longer than may be, but
// what is in it has a name of its own.
const maxWatchedPath = nestbox.MaxPathBytes + 4*256

// checkFileEvent refuses what cannot be of any file.
func checkFileEvent(e *guestv1.FileEvent) error {
	switch {
	case !fileEventTypes[nestbox.FileEventType(e.GetType())]:
		return protocolError("%.80q is no type of an event", e.GetType())
	case !isWatchedPath(e.GetPath()) || e.GetTo() != "" && !isWatchedPath(e.GetTo()):
		return protocolError("an event of a path that cannot be")
	}
	return nil
}

func isWatchedPath(path string) bool {
	return strings.HasPrefix(path, "/") && len(path) <= maxWatchedPath
}

func fileEventToWire(e nestbox.FileEvent) *guestv1.FileEvent {
	return &guestv1.FileEvent{Type: string(e.Type), Path: e.Path, To: e.To, Directory: e.Directory}
}

func fileEventFromWire(e *guestv1.FileEvent) nestbox.FileEvent {
	return nestbox.FileEvent{Type: nestbox.FileEventType(e.GetType()), Path: e.GetPath(), To: e.GetTo(), Directory: e.GetDirectory()}
}
