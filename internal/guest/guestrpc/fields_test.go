package guestrpc

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/fieldtest"
	"github.com/nestbox/nestbox/internal/guest"
)

// TestEveryFieldTravels: a field that is added to a type of the contract and
// forgotten on the wire fails here.
func TestEveryFieldTravels(t *testing.T) {
	t.Parallel()

	spec := fieldtest.Fill[nestbox.ProcessSpec](t)
	require.Equal(t, spec, specFromWire(overWire(t, specToWire(spec))))

	p := fieldtest.Fill[nestbox.Process](t)
	require.Equal(t, p, processFromWire(overWire(t, processToWire(p))))

	file := fieldtest.Fill[nestbox.FileInfo](t)
	require.Equal(t, file, fileFromWire(overWire(t, fileToWire(file))))

	write := fieldtest.Fill[guest.WriteOptions](t)
	require.Equal(t, write, writeOptionsFromWire(overWire(t, writeOptionsToWire(write))))

	system := fieldtest.Fill[nestbox.SystemProcess](t)
	require.Equal(t, system, systemProcessFromWire(overWire(t, systemProcessToWire(system))))

	event := fieldtest.Fill[nestbox.FileEvent](t)
	require.Equal(t, event, fileEventFromWire(overWire(t, fileEventToWire(event))))

	attach := fieldtest.Fill[guest.Attach](t)
	attach.Since.Lines, attach.Since.After = 0, time.Time{} // are for Locate
	require.Equal(t, attach, attachFromWire(overWire(t, attachToWire(attach))))

	info := fieldtest.Fill[guest.Info](t)
	require.Equal(t, info, infoFromWire(overWire(t, infoToWire(info))))

	how := fieldtest.Fill[guest.Kill](t)
	require.Equal(t, how, killFromWire(overWire(t, killToWire(nil, how))))

	for _, sel := range []nestbox.Selector{{ID: 1}, {PID: 2}, {Tag: "t"}, {}} {
		require.Equal(t, sel, selectorFromWire(overWire(t, selectorToWire(sel))))
	}
}

func overWire[M proto.Message](t *testing.T, m M) M {
	t.Helper()
	raw, err := proto.Marshal(m)
	require.NoError(t, err)
	back, ok := m.ProtoReflect().New().Interface().(M)
	require.True(t, ok)
	require.NoError(t, proto.Unmarshal(raw, back))
	return back
}
