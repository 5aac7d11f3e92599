package hostrpc

import (
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/nestbox/nestbox"
	hostv1 "github.com/nestbox/nestbox/gen/nestbox/host/v1"
	"github.com/nestbox/nestbox/internal/fieldtest"
	"github.com/nestbox/nestbox/internal/hostagent"
)

// TestEveryFieldTravels: a setting that is added to a capsule and forgotten on
// the wire fails here.
func TestEveryFieldTravels(t *testing.T) {
	t.Parallel()
	spec := fieldtest.Fill[nestbox.CapsuleSpec](t)
	raw, err := proto.Marshal(specToWire(spec))
	require.NoError(t, err)
	specBack := &hostv1.CapsuleSpec{}
	require.NoError(t, proto.Unmarshal(raw, specBack))
	require.Equal(t, spec, specFromWire(specBack))

	status := fieldtest.Fill[hostagent.Status](t)
	raw, err = proto.Marshal(statusToWire(status))
	require.NoError(t, err)
	statusBack := &hostv1.Status{}
	require.NoError(t, proto.Unmarshal(raw, statusBack))
	require.Equal(t, status, statusFromWire(statusBack))

	info := fieldtest.Fill[hostagent.Info](t)
	raw, err = proto.Marshal(infoToWire(info))
	require.NoError(t, err)
	infoBack := &hostv1.InfoResponse{}
	require.NoError(t, proto.Unmarshal(raw, infoBack))
	require.Equal(t, info, infoFromWire(infoBack))

	report := fieldtest.Fill[nestbox.NetworkReport](t)
	raw, err = proto.Marshal(reportToWire(report))
	require.NoError(t, err)
	reportBack := &hostv1.NetworkResponse{}
	require.NoError(t, proto.Unmarshal(raw, reportBack))
	require.Equal(t, report, reportFromWire(reportBack))
}
