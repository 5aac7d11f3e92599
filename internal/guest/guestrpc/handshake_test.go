package guestrpc_test

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// older is a daemon from before process ids.
type older struct{ guest.Guest }

func (older) Ping(context.Context) (guest.Info, error) { return guest.Info{Version: "v0.0.1"}, nil }

// TestOlderDaemon: what a daemon lacks is refused with its version and never
// sent; everything else goes on working.
func TestOlderDaemon(t *testing.T) {
	t.Parallel()
	g := hop(t, hop(t, older{newMachine(t)})).Processes()
	p, _, err := g.Start(t.Context(), nestbox.ProcessSpec{Cmd: "sleep", Args: []string{"1000"}}, nil)
	require.NoError(t, err)
	byID := nestbox.Selector{ID: 1} // which the daemon behind it would know
	calls := map[string]func() error{
		"Get":        func() error { _, err := g.Get(t.Context(), byID); return err },
		"Wait":       func() error { _, err := g.Wait(t.Context(), byID); return err },
		"Attach":     func() error { _, err := g.Attach(t.Context(), byID, guest.Attach{}); return err },
		"WriteStdin": func() error { return g.WriteStdin(t.Context(), byID, nil, true) },
		"Signal":     func() error { return g.Signal(t.Context(), byID, 15) },
		"Kill":       func() error { _, err := g.Kill(t.Context(), byID, guest.Kill{}); return err },
		"no id":      func() error { _, err := g.Get(t.Context(), nestbox.Selector{}); return err },
	}
	for name, call := range calls {
		err := call()
		require.Equal(t, nestbox.CodeUnsupported, nestbox.CodeOf(err), "%s: %v", name, err)
		require.ErrorContains(t, err, "v0.0.1")
	}
	got, err := g.Get(t.Context(), nestbox.Selector{PID: p.PID})
	require.NoError(t, err)
	require.True(t, got.Running())
	_, err = g.Kill(t.Context(), nestbox.Selector{Tag: p.Tag}, guest.Kill{})
	require.NoError(t, err)
}
