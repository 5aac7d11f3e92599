package guestrpc

import (
	"context"
	"net/netip"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/nestbox/nestbox"
	guestv1 "github.com/nestbox/nestbox/gen/nestbox/guest/v1"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/rpcerr"
)

// Tree implements guestv1connect.GuestServiceHandler.
func (handler) Tree(ctx context.Context, _ *guestv1.TreeRequest) (*guestv1.TreeResponse, error) {
	tree, err := guestOf(ctx).Processes().Tree(ctx)
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	res := &guestv1.TreeResponse{}
	for _, p := range tree {
		res.Processes = append(res.Processes, systemProcessToWire(p))
	}
	return res, nil
}

// Tree implements guest.Processes.
func (p processes) Tree(ctx context.Context) ([]nestbox.SystemProcess, error) {
	if err := p.client.need(ctx, guest.FeatureTree); err != nil {
		return nil, err
	}
	res, err := call(ctx, p.client, callIn, p.client.rpc.Tree, &guestv1.TreeRequest{})
	if err != nil {
		return nil, err
	}
	tree := make([]nestbox.SystemProcess, len(res.GetProcesses()))
	for i, one := range res.GetProcesses() {
		if err := checkSystemProcess(one); err != nil {
			return nil, err
		}
		tree[i] = systemProcessFromWire(one)
	}
	return tree, nil
}

func systemProcessToWire(p nestbox.SystemProcess) *guestv1.SystemProcess {
	out := &guestv1.SystemProcess{
		Pid: int32(p.PID), Ppid: int32(p.PPID), Process: uint64(p.Process), User: p.User, State: p.State, Cmd: p.Cmd,
		Cpu: durationpb.New(p.CPU), Memory: p.Memory,
	}
	for _, port := range p.Ports {
		out.Ports = append(out.Ports, &guestv1.ListeningPort{Port: uint32(port.Port), Address: port.Address.AsSlice()})
	}
	return out
}

func systemProcessFromWire(p *guestv1.SystemProcess) nestbox.SystemProcess {
	out := nestbox.SystemProcess{
		PID: int(p.GetPid()), PPID: int(p.GetPpid()), Process: nestbox.ProcessID(p.GetProcess()), User: p.GetUser(), State: p.GetState(), Cmd: p.GetCmd(),
		CPU: p.GetCpu().AsDuration(), Memory: p.GetMemory(),
	}
	for _, port := range p.GetPorts() {
		addr, _ := netip.AddrFromSlice(port.GetAddress()) // as checkSystemProcess has looked
		out.Ports = append(out.Ports, nestbox.ListeningPort{Port: uint16(port.GetPort()), Address: addr})
	}
	return out
}

// Bounds of one process of a tree.
const (
	maxTreeCmd   = 4 << 10
	maxTreePorts = 4096
)

// checkSystemProcess refuses what cannot be of any process.
func checkSystemProcess(p *guestv1.SystemProcess) error {
	switch {
	case p.GetPid() <= 0 || p.GetPpid() < 0:
		return protocolError("%d, with the parent %d, is no PID", p.GetPid(), p.GetPpid())
	case p.GetProcess() != 0 && !nestbox.ProcessID(p.GetProcess()).Valid():
		return protocolError("%d is no process id", p.GetProcess())
	case len(p.GetUser()) > maxNameBytes || len(p.GetState()) > utf8.UTFMax || len(p.GetCmd()) > maxTreeCmd:
		return protocolError("a process with a user, state or command that cannot be")
	case p.GetCpu().CheckValid() != nil || p.GetCpu().AsDuration() < 0 || p.GetMemory() < 0 || len(p.GetPorts()) > maxTreePorts:
		return protocolError("a process with numbers that cannot be")
	}
	for _, port := range p.GetPorts() {
		if _, ok := netip.AddrFromSlice(port.GetAddress()); !ok || port.GetPort() == 0 || port.GetPort() > 1<<16-1 {
			return protocolError("%d is no port", port.GetPort())
		}
	}
	return nil
}
