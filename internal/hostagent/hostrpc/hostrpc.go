// Package hostrpc carries hostagent.Host over Connect: NewHandler serves a
// Host, and Client, which calls one, is itself a Host. The guests of its
// capsules travel beside it, by internal/guest/guestrpc, with the capsule's id
// in the header Nestbox-Capsule.
//
// It may import generated code, and no store, control or driver.
package hostrpc

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/nestbox/nestbox"
	hostv1 "github.com/nestbox/nestbox/gen/nestbox/host/v1"
	"github.com/nestbox/nestbox/internal/hostagent"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// capsuleHeader names the capsule whose guest a GuestService call is for.
const capsuleHeader = "Nestbox-Capsule"

func specToWire(s nestbox.CapsuleSpec) *hostv1.CapsuleSpec {
	var network *hostv1.NetworkPolicy
	if s.Network != nil {
		network = policyToWire(*s.Network)
	}
	return &hostv1.CapsuleSpec{
		Network:  network,
		Template: s.Template,
		Resources: &hostv1.Resources{
			Vcpus:    int32(s.Resources.VCPUs),
			MemoryMb: int32(s.Resources.MemoryMB),
			DiskMb:   int32(s.Resources.DiskMB),
			PidsMax:  int32(s.Resources.PidsMax),
		},
		TimeoutSec: int64(s.TimeoutSec),
		Metadata:   s.Metadata,
		Name:       s.Name,
		Hostname:   s.Hostname,
		Env:        s.Env,
		Image:      s.Image,
		Defaults: &hostv1.ImageDefaults{
			Env: s.Defaults.Env, User: s.Defaults.User, Cwd: s.Defaults.Cwd,
			Entrypoint: s.Defaults.Entrypoint, Cmd: s.Defaults.Cmd, Labels: s.Defaults.Labels,
		},
	}
}

func specFromWire(s *hostv1.CapsuleSpec) nestbox.CapsuleSpec {
	r, d := s.GetResources(), s.GetDefaults()
	var network *nestbox.NetworkPolicy
	if s.GetNetwork() != nil {
		network = new(policyFromWire(s.GetNetwork()))
	}
	return nestbox.CapsuleSpec{
		Template: s.GetTemplate(),
		Resources: nestbox.Resources{
			VCPUs:    int(r.GetVcpus()),
			MemoryMB: int(r.GetMemoryMb()),
			DiskMB:   int(r.GetDiskMb()),
			PidsMax:  int(r.GetPidsMax()),
		},
		TimeoutSec: int(s.GetTimeoutSec()),
		Metadata:   s.GetMetadata(),
		Name:       s.GetName(),
		Hostname:   s.GetHostname(),
		Env:        s.GetEnv(),
		Network:    network,
		Image:      s.GetImage(),
		Defaults: nestbox.ImageDefaults{
			Env: d.GetEnv(), User: d.GetUser(), Cwd: d.GetCwd(),
			Entrypoint: d.GetEntrypoint(), Cmd: d.GetCmd(), Labels: d.GetLabels(),
		},
	}
}

func statusToWire(s hostagent.Status) *hostv1.Status {
	return &hostv1.Status{
		Id:                s.ID,
		State:             string(s.State),
		Reason:            s.Reason,
		CreatedAt:         timeToWire(s.CreatedAt),
		UnresponsiveSince: timeToWire(s.UnresponsiveSince),
	}
}

func statusFromWire(s *hostv1.Status) hostagent.Status {
	return hostagent.Status{
		ID:                s.GetId(),
		State:             hostagent.State(s.GetState()),
		Reason:            s.GetReason(),
		CreatedAt:         timeFromWire(s.GetCreatedAt()),
		UnresponsiveSince: timeFromWire(s.GetUnresponsiveSince()),
	}
}

// timeToWire returns nil for no time.
func timeToWire(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func timeFromWire(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func infoToWire(i hostagent.Info) *hostv1.InfoResponse {
	out := &hostv1.InfoResponse{
		Id:        i.ID,
		Driver:    i.Driver,
		Version:   i.Version,
		Cpus:      int32(i.CPUs),
		MemoryMb:  int32(i.MemoryMB),
		Templates: i.Templates,
		StartedAt: timeToWire(i.StartedAt),
	}
	for _, c := range i.Capabilities {
		out.Capabilities = append(out.Capabilities, string(c))
	}
	return out
}

func infoFromWire(r *hostv1.InfoResponse) hostagent.Info {
	info := hostagent.Info{
		HostInfo: nestbox.HostInfo{
			ID:        r.GetId(),
			Driver:    r.GetDriver(),
			Version:   r.GetVersion(),
			CPUs:      int(r.GetCpus()),
			MemoryMB:  int(r.GetMemoryMb()),
			Templates: r.GetTemplates(),
		},
		StartedAt: timeFromWire(r.GetStartedAt()),
	}
	for _, c := range r.GetCapabilities() {
		info.Capabilities = append(info.Capabilities, sandbox.Capability(c))
	}
	return info
}
