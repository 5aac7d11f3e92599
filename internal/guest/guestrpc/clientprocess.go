package guestrpc

import (
	"context"
	"syscall"

	"connectrpc.com/connect/v2"

	"github.com/nestbox/nestbox"
	guestv1 "github.com/nestbox/nestbox/gen/nestbox/guest/v1"
	"github.com/nestbox/nestbox/gen/nestbox/guest/v1/guestv1connect"
	"github.com/nestbox/nestbox/internal/guest"
)

// processes are the processes of a Client's guest.
type processes struct{ client *Client }

var _ guest.Processes = processes{}

// Start implements guest.Processes.
func (p processes) Start(ctx context.Context, spec nestbox.ProcessSpec, attach *guest.Attach) (nestbox.Process, guest.OutputReader, error) {
	if err := checkText(spec); err != nil {
		return nestbox.Process{}, nil, err
	}
	for feature, asked := range map[guest.Feature]bool{
		guest.FeatureTerminal: spec.Terminal != nil, guest.FeatureMerge: spec.Merge, guest.FeatureIdleTimeout: spec.IdleTimeout > 0,
		guest.FeatureStartAgain: spec.OnConflict != "" || spec.RequestKey != "",
	} {
		if !asked {
			continue
		}
		if err := p.client.need(ctx, feature); err != nil {
			return nestbox.Process{}, nil, err
		}
	}
	req := &guestv1.StartRequest{Spec: specToWire(spec)}
	if attach != nil {
		req.Attach = attachToWire(*attach)
	}
	var first guestv1.StartResponse
	call := procedure(guestv1connect.GuestServiceStartProcedure, connect.StreamTypeServer)
	reader, err := p.client.openReader(ctx, call, req, startResponseEvent, &first)
	if err != nil {
		return nestbox.Process{}, nil, err
	}
	started := first.GetStarted()
	err = checkProcess(started)
	if err == nil {
		err = checkNamed(started, nestbox.Selector{Tag: spec.Tag})
	}
	if err != nil {
		_ = reader.Close()
		return nestbox.Process{}, nil, err
	}
	reader.at = 0
	if attach == nil {
		reader.finish()
		return processFromWire(started), nil, nil
	}
	return processFromWire(started), reader, nil
}

// Attach implements guest.Processes. Readers of one process share a stream.
func (p processes) Attach(ctx context.Context, sel nestbox.Selector, attach guest.Attach) (guest.OutputReader, error) {
	if attach.Since.Sought() {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "lines and times are to be located first")
	}
	if attach.Times {
		if err := p.client.need(ctx, guest.FeatureLocate); err != nil {
			return nil, err
		}
	}
	if since := attach.Since; sel.ID != 0 && !since.Now && since.Tail == 0 && !attach.Times {
		if err := p.client.need(ctx, guest.FeatureProcessID); err != nil {
			return nil, err
		}
		return p.client.hubs.attach(ctx, p.client, output{sel.ID, attach.Lossless}, since.Offset)
	}
	reader, err := p.client.attach(ctx, sel, attach)
	if err != nil {
		return nil, err
	}
	return reader, nil
}

// Locate implements guest.Processes.
func (p processes) Locate(ctx context.Context, sel nestbox.Selector, since nestbox.Since, stream nestbox.Stream) (int64, error) {
	if err := p.client.need(ctx, guest.FeatureLocate); err != nil {
		return 0, err
	}
	who, err := p.client.selector(ctx, sel)
	if err != nil {
		return 0, err
	}
	req := &guestv1.LocateRequest{Selector: who, Lines: since.Lines, After: timeToWire(since.After), Stream: string(stream)}
	res, err := call(ctx, p.client, callIn, p.client.rpc.Locate, req)
	if err != nil {
		return 0, err
	}
	if res.GetOffset() < 0 || res.GetOffset() > maxOffset {
		return 0, protocolError("%d is no offset", res.GetOffset())
	}
	return res.GetOffset(), nil
}

// attach attaches a reader with a stream of its own.
func (c *Client) attach(ctx context.Context, sel nestbox.Selector, attach guest.Attach) (*reader, error) {
	who, err := c.selector(ctx, sel)
	if err != nil {
		return nil, err
	}
	req := &guestv1.AttachRequest{Selector: who, Attach: attachToWire(attach)}
	call := procedure(guestv1connect.GuestServiceAttachProcedure, connect.StreamTypeServer)
	reader, err := c.openReader(ctx, call, req, attachResponseEvent, &guestv1.AttachResponse{})
	if err != nil {
		return nil, err
	}
	if since := attach.Since; !since.Now && since.Tail == 0 {
		reader.at = since.Offset
	}
	return reader, nil
}

// List implements guest.Processes.
func (p processes) List(ctx context.Context, all bool) ([]nestbox.Process, error) {
	res, err := call(ctx, p.client, callIn, p.client.rpc.List, &guestv1.ListRequest{All: all})
	if err != nil {
		return nil, err
	}
	for _, proc := range res.GetProcesses() {
		if err := checkProcess(proc); err != nil {
			return nil, err
		}
	}
	out := make([]nestbox.Process, len(res.GetProcesses()))
	for i, proc := range res.GetProcesses() {
		out[i] = processFromWire(proc)
	}
	return out, nil
}

// Get implements guest.Processes.
func (p processes) Get(ctx context.Context, sel nestbox.Selector) (nestbox.Process, error) {
	who, err := p.client.selector(ctx, sel)
	if err != nil {
		return nestbox.Process{}, err
	}
	res, err := call(ctx, p.client, callIn, p.client.rpc.Get, &guestv1.GetRequest{Selector: who})
	if err != nil {
		return nestbox.Process{}, err
	}
	return answered(res.GetProcess(), sel, false)
}

// Wait implements guest.Processes.
func (p processes) Wait(ctx context.Context, sel nestbox.Selector) (nestbox.Process, error) {
	who, err := p.client.selector(ctx, sel)
	if err != nil {
		return nestbox.Process{}, err
	}
	res, err := longCall(ctx, p.client, p.client.rpc.Wait, &guestv1.WaitRequest{Selector: who})
	if err != nil {
		return nestbox.Process{}, err
	}
	return answered(res.GetProcess(), sel, true)
}

// WriteStdin implements guest.Processes.
func (p processes) WriteStdin(ctx context.Context, sel nestbox.Selector, data []byte, eof bool) error {
	if len(data) > nestbox.MaxStdin {
		return nestbox.Errorf(nestbox.CodeTooLarge, "more than %d bytes for standard input at once", nestbox.MaxStdin)
	}
	who, err := p.client.selector(ctx, sel)
	if err != nil {
		return err
	}
	_, err = longCall(ctx, p.client, p.client.rpc.WriteStdin, &guestv1.WriteStdinRequest{Selector: who, Data: data, Eof: eof})
	return err
}

// Signal implements guest.Processes.
func (p processes) Signal(ctx context.Context, sel nestbox.Selector, sig syscall.Signal) error {
	who, err := p.client.selector(ctx, sel)
	if err != nil {
		return err
	}
	_, err = call(ctx, p.client, callIn, p.client.rpc.Signal, &guestv1.SignalRequest{Selector: who, Signal: int32(sig)})
	return err
}

// Resize implements guest.Processes.
func (p processes) Resize(ctx context.Context, sel nestbox.Selector, rows, cols int) error {
	if err := p.client.need(ctx, guest.FeatureTerminal); err != nil {
		return err
	}
	who, err := p.client.selector(ctx, sel)
	if err != nil {
		return err
	}
	_, err = call(ctx, p.client, callIn, p.client.rpc.Resize, &guestv1.ResizeRequest{Selector: who, Rows: int32(rows), Cols: int32(cols)})
	return err
}

// Kill implements guest.Processes.
func (p processes) Kill(ctx context.Context, sel nestbox.Selector, how guest.Kill) (nestbox.Process, error) {
	who, err := p.client.selector(ctx, sel)
	if err != nil {
		return nestbox.Process{}, err
	}
	res, err := call(ctx, p.client, max(how.Grace, guest.DefaultGrace)+killIn, p.client.rpc.Kill, killToWire(who, how))
	if err != nil {
		return nestbox.Process{}, err
	}
	return answered(res.GetProcess(), sel, true)
}

// KillBiggest implements guest.Processes.
func (p processes) KillBiggest(ctx context.Context, used int64) (guest.Victim, error) {
	if err := p.client.need(ctx, guest.FeatureKillBiggest); err != nil {
		return guest.Victim{}, err
	}
	res, err := call(ctx, p.client, callIn, p.client.rpc.KillBiggest, &guestv1.KillBiggestRequest{Used: used})
	if err != nil {
		return guest.Victim{}, err
	}
	v := guest.Victim{Memory: max(res.GetMemory(), 0)}
	if res.GetProcess() != nil {
		v.Process, err = answered(res.GetProcess(), nestbox.Selector{}, false)
	}
	return v, err
}

// answered returns the record of an answer, if it can be believed: ended says
// that the call answers only when the process has.
func answered(p *guestv1.Process, sel nestbox.Selector, ended bool) (nestbox.Process, error) {
	if err := checkProcess(p); err != nil {
		return nestbox.Process{}, err
	}
	if err := checkNamed(p, sel); err != nil {
		return nestbox.Process{}, err
	}
	if ended && p.GetExit() == nil {
		return nestbox.Process{}, protocolError("the end of a process without its exit")
	}
	return processFromWire(p), nil
}
