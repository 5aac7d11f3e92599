package guestrpc

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/nestbox/nestbox"
	guestv1 "github.com/nestbox/nestbox/gen/nestbox/guest/v1"
	"github.com/nestbox/nestbox/gen/nestbox/guest/v1/guestv1connect"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/rpcerr"
)

// Start implements guestv1connect.GuestServiceHandler.
func (h handler) Start(ctx context.Context, req *guestv1.StartRequest, stream guestv1connect.GuestServiceStartServerStream) error {
	var attach *guest.Attach
	if req.GetAttach() != nil {
		how := attachFromWire(req.GetAttach())
		attach = &how
	}
	p, reader, err := guestOf(ctx).Processes().Start(ctx, specFromWire(req.GetSpec()), attach)
	if err != nil {
		return rpcerr.ToConnect(err)
	}
	if reader != nil {
		defer reader.Close()
	}
	started := &guestv1.StartResponse{Message: &guestv1.StartResponse_Started{Started: processToWire(p)}}
	if err := stream.Send(started); err != nil || reader == nil {
		return err
	}
	message := &guestv1.StartResponse{}
	return h.forward(ctx, reader, func(e *guestv1.OutputEvent) error {
		message.Message = &guestv1.StartResponse_Event{Event: e}
		return stream.Send(message)
	})
}

// Locate implements guestv1connect.GuestServiceHandler.
func (handler) Locate(ctx context.Context, req *guestv1.LocateRequest) (*guestv1.LocateResponse, error) {
	since := nestbox.Since{Lines: req.GetLines(), After: timeFromWire(req.GetAfter())}
	offset, err := guestOf(ctx).Processes().Locate(ctx, selectorFromWire(req.GetSelector()), since, nestbox.Stream(req.GetStream()))
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return &guestv1.LocateResponse{Offset: offset}, nil
}

// Attach implements guestv1connect.GuestServiceHandler.
func (h handler) Attach(ctx context.Context, req *guestv1.AttachRequest, stream guestv1connect.GuestServiceAttachServerStream) error {
	reader, err := guestOf(ctx).Processes().Attach(ctx, selectorFromWire(req.GetSelector()), attachFromWire(req.GetAttach()))
	if err != nil {
		return rpcerr.ToConnect(err)
	}
	defer reader.Close()
	message := &guestv1.AttachResponse{}
	if err := stream.Send(message); err != nil {
		return err
	}
	return h.forward(ctx, reader, func(e *guestv1.OutputEvent) error {
		message.Event = e
		return stream.Send(message)
	})
}

// forward sends what reader reads until its end, and a sign of life whenever
// nothing was sent for a while. Each message is on the wire when send returns,
// and send waits while the connection takes no more: that is how back-pressure
// reaches the reader.
//
// There is no limit on how long send may wait. A peer that is slow, but there,
// keeps its stream; one that is gone makes send fail: at once if its kernel
// says so, and otherwise when TCP gives up on it. (TCP_USER_TIMEOUT would find
// the latter sooner, but it also cuts off a peer whose window stays shut.)
func (h handler) forward(ctx context.Context, reader guest.OutputReader, send func(*guestv1.OutputEvent) error) error {
	out := newOutflow(h.alive, func() error {
		return send(&guestv1.OutputEvent{Event: &guestv1.OutputEvent_Alive_{Alive: &guestv1.OutputEvent_Alive{}}})
	})
	defer out.stop()
	var encoder eventEncoder
	for {
		event, err := reader.Next(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return rpcerr.ToConnect(err)
		}
		for len(event.Data) > maxData {
			head := event
			head.Data = event.Data[:maxData]
			if err := out.send(func() error { return send(encoder.encode(head)) }); err != nil {
				return err
			}
			event.Data = event.Data[maxData:]
			event.Offset += maxData
		}
		if err := out.send(func() error { return send(encoder.encode(event)) }); err != nil {
			return err
		}
	}
}

// outflow sends messages, and signs of life into the silence between them.
type outflow struct {
	mu      sync.Mutex // one message at a time
	alive   func() error
	every   time.Duration
	timer   *time.Timer
	stopped bool
}

func newOutflow(every time.Duration, alive func() error) *outflow {
	o := &outflow{alive: alive, every: every}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.timer = time.AfterFunc(every, o.sendAlive)
	return o
}

// stop returns when no message is being sent and none will be. o may be nil.
func (o *outflow) stop() {
	if o == nil {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.stopped = true
	o.timer.Stop()
}

func (o *outflow) send(send func() error) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	err := send()
	o.timer.Reset(o.every)
	return err
}

func (o *outflow) sendAlive() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.stopped {
		return
	}
	if o.alive() == nil { // else the connection is lost, and the request's context ends
		o.timer.Reset(o.every)
	}
}
