// Package hostrpc carries hostagent.Host over Connect: NewHandler serves a
// Host, and Client, which calls one, is itself a Host. The guests of its
// capsules travel beside it, by internal/guest/guestrpc, with the capsule's id
// in the header Nestbox-Capsule.
//
// It may import generated code, and no store, control or driver.
package hostrpc

import (
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/nestbox/nestbox"
	hostv1 "github.com/nestbox/nestbox/gen/nestbox/host/v1"
	"github.com/nestbox/nestbox/internal/hostagent"
)

// capsuleHeader names the capsule whose guest a GuestService call is for.
const capsuleHeader = "Nestbox-Capsule"

func specToWire(s hostagent.Spec) *hostv1.Spec {
	return &hostv1.Spec{
		Id:       s.ID,
		Template: s.Template,
		Resources: &hostv1.Resources{
			Vcpus:    int32(s.Resources.VCPUs),
			MemoryMb: int32(s.Resources.MemoryMB),
			DiskMb:   int32(s.Resources.DiskMB),
			PidsMax:  int32(s.Resources.PidsMax),
		},
	}
}

func specFromWire(s *hostv1.Spec) hostagent.Spec {
	r := s.GetResources()
	return hostagent.Spec{
		ID:       s.GetId(),
		Template: s.GetTemplate(),
		Resources: nestbox.Resources{
			VCPUs:    int(r.GetVcpus()),
			MemoryMB: int(r.GetMemoryMb()),
			DiskMB:   int(r.GetDiskMb()),
			PidsMax:  int(r.GetPidsMax()),
		},
	}
}

func statusToWire(s hostagent.Status) *hostv1.Status {
	return &hostv1.Status{
		Spec:      specToWire(s.Spec),
		State:     string(s.State),
		Reason:    s.Reason,
		CreatedAt: timestamppb.New(s.CreatedAt),
	}
}

func statusFromWire(s *hostv1.Status) hostagent.Status {
	return hostagent.Status{
		Spec:      specFromWire(s.GetSpec()),
		State:     hostagent.State(s.GetState()),
		Reason:    s.GetReason(),
		CreatedAt: s.GetCreatedAt().AsTime(),
	}
}
