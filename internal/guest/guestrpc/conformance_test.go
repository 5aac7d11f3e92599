package guestrpc_test

import (
	"context"
	"net"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/envd"
	"github.com/nestbox/nestbox/internal/guest/guestrpc"
	"github.com/nestbox/nestbox/internal/guest/guesttest"
)

// hop serves g over TCP and returns a client of it.
func hop(t *testing.T, g guest.Guest) guest.Guest {
	t.Helper()
	const token = "secret"
	ctx, cutTunnels := context.WithCancel(context.Background())
	server := &http.Server{
		Handler:     guestrpc.RequireToken(token, guestrpc.NewHandler(func(*http.Request) (guest.Guest, error) { return g, nil })),
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	client := guestrpc.NewClient(guestrpc.ClientConfig{
		Dial: func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", listener.Addr().String())
		},
		Header: http.Header{guestrpc.TokenHeader: {token}},
	})
	t.Cleanup(func() {
		client.Close()
		cutTunnels()
		require.NoError(t, server.Close())
		require.ErrorIs(t, <-served, http.ErrServerClosed)
	})
	return client
}

// newMachine returns an envd of this machine.
func newMachine(t *testing.T) guest.Guest {
	t.Helper()
	machine, err := envd.New(envd.Config{Version: "test"})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, machine.Close()) })
	return machine
}

// The guests under test: a client of envd, and a client of a client of it, as
// the control plane has.
var guests = map[string]func(t *testing.T) guest.Guest{
	"OneHop":  func(t *testing.T) guest.Guest { return hop(t, newMachine(t)) },
	"TwoHops": func(t *testing.T) guest.Guest { return hop(t, hop(t, newMachine(t))) },
}

func TestFiles(t *testing.T) {
	t.Parallel()
	for name, newGuest := range guests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			guesttest.RunFiles(t, newGuest)
		})
	}
}

// TestProcesses takes two hops, which are one hop twice: the suite is long.
func TestProcesses(t *testing.T) {
	t.Parallel()
	guesttest.RunProcesses(t, guests["TwoHops"])
}

func TestWatch(t *testing.T) {
	t.Parallel()
	guesttest.RunWatch(t, guests["TwoHops"])
}

func TestDial(t *testing.T) {
	t.Parallel()
	for name, newGuest := range guests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			guesttest.RunDial(t, newGuest)
		})
	}
}

func TestPing(t *testing.T) {
	t.Parallel()
	for name, newGuest := range guests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			info, err := newGuest(t).Ping(t.Context())
			require.NoError(t, err)
			require.Equal(t, "test", info.Version)
			require.False(t, info.StartedAt.IsZero())
		})
	}
}
