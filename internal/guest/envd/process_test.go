package envd_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/envd"
	"github.com/nestbox/nestbox/internal/guest/guesttest"
)

func newGuest(t *testing.T) guest.Guest {
	e, err := envd.New(envd.Config{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, e.Close()) })
	return e
}

func TestProcesses(t *testing.T) {
	t.Parallel()
	guesttest.RunProcesses(t, newGuest)
}

func TestWatch(t *testing.T) {
	t.Parallel()
	guesttest.RunWatch(t, newGuest)
}
