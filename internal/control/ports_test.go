package control

import (
	"context"
	"encoding/base64"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/sandbox"
)

func TestPortTokens(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		c, other := w.create(t), w.create(t)
		signed, err := w.Ports.Sign(ctx, w.me, c.ID, openPort, 0)
		require.NoError(t, err)
		require.Equal(t, w.clock.Now().Add(time.Hour), signed.Expires)
		token := signed.Token
		authorize := func(id string, port uint16, token string) error {
			_, err := w.Ports.Authorize(ctx, id, port, PortCredential{Tokens: []string{token}})
			return err
		}
		require.NoError(t, authorize(c.ID, openPort, token))
		w.restart() // the secret is in the store
		require.NoError(t, authorize(c.ID, openPort, token))

		for name, err := range map[string]error{
			"none":            authorize(c.ID, openPort, ""),
			"another port":    authorize(c.ID, openPort+1, token),
			"another capsule": authorize(other.ID, openPort, token),
			"not base64":      authorize(c.ID, openPort, "!"),
			"short":           authorize(c.ID, openPort, token[:20]),
			"long":            authorize(c.ID, openPort, token+"AAAA"),
		} {
			require.Equal(t, nestbox.CodeUnauthenticated, nestbox.CodeOf(err), name)
		}
		raw, err := base64.RawURLEncoding.DecodeString(token)
		require.NoError(t, err)
		for i := range raw { // also one that was made to expire later
			raw[i] ^= 1
			requireCode(t, nestbox.CodeUnauthenticated, authorize(c.ID, openPort, base64.RawURLEncoding.EncodeToString(raw)))
			raw[i] ^= 1
		}
		w.clock.advance(time.Hour - time.Second)
		require.NoError(t, authorize(c.ID, openPort, token))
		w.clock.advance(time.Second)
		requireCode(t, nestbox.CodeUnauthenticated, authorize(c.ID, openPort, token))
	})
}

func TestPortKeys(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := t.Context()
	c := w.create(t)
	_, mine, err := w.Keys.Create(ctx, w.me.TeamID, "")
	require.NoError(t, err)
	_, foreign, err := w.Keys.Create(ctx, w.newTeam(t).TeamID, "")
	require.NoError(t, err)
	signed, err := w.Ports.Sign(ctx, w.me, c.ID, openPort, time.Millisecond)
	require.NoError(t, err)
	authorize := func(id string, cred PortCredential) error {
		_, err := w.Ports.Authorize(ctx, id, openPort, cred)
		return err
	}

	require.NoError(t, authorize(c.ID, PortCredential{APIKeys: []string{mine}}))
	require.NoError(t, authorize(c.ID, PortCredential{APIKeys: []string{mine}, Tokens: []string{"bad"}}))
	require.NoError(t, authorize(c.ID, PortCredential{APIKeys: []string{foreign}, Tokens: []string{"bad", signed.Token}}), "one of both is enough")
	requireCode(t, nestbox.CodeNotFound, authorize(c.ID, PortCredential{APIKeys: []string{foreign}}))
	requireCode(t, nestbox.CodeNotFound, authorize(nestbox.NewID(nestbox.PrefixCapsule), PortCredential{APIKeys: []string{mine}}))
	requireCode(t, nestbox.CodeUnauthenticated, authorize(c.ID, PortCredential{}))
	requireCode(t, nestbox.CodeUnauthenticated, authorize(c.ID, PortCredential{APIKeys: []string{"wrn_x"}}))
	requireCode(t, nestbox.CodeInvalid, authorize("cl-x", PortCredential{APIKeys: []string{mine}}))
}

func TestPortBounds(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := t.Context()
	c := w.create(t)
	_, key, err := w.Keys.Create(ctx, w.me.TeamID, "")
	require.NoError(t, err)
	for port, code := range map[uint16]nestbox.Code{0: nestbox.CodeInvalid, sandbox.EnvdPort: nestbox.CodeDenied} {
		_, err := w.Ports.Sign(ctx, w.me, c.ID, port, 0)
		requireCode(t, code, err)
		_, err = w.Ports.Authorize(ctx, c.ID, port, PortCredential{APIKeys: []string{key}})
		requireCode(t, code, err)
		_, err = w.Ports.Dial(ctx, c.ID, port)
		requireCode(t, code, err)
	}
	const week = 7 * 24 * time.Hour
	signed, err := w.Ports.Sign(ctx, w.me, c.ID, 65535, week)
	require.NoError(t, err)
	require.Equal(t, w.clock.Now().Add(week), signed.Expires)
	_, err = w.Ports.Sign(ctx, w.me, c.ID, 65535, week+time.Second)
	requireCode(t, nestbox.CodeInvalid, err)
}

func TestDial(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := t.Context()
	c := w.create(t)
	conn, err := w.Ports.Dial(ctx, c.ID, openPort)
	require.NoError(t, err)
	require.NoError(t, conn.Close())
	_, err = w.Ports.Dial(ctx, c.ID, openPort+1)
	requireCode(t, nestbox.CodeUnavailable, err)
	_, err = w.Ports.Dial(ctx, nestbox.NewID(nestbox.PrefixCapsule), openPort)
	requireCode(t, nestbox.CodeNotFound, err)
	require.NoError(t, w.Capsules.Destroy(ctx, w.me, c.ID))
	_, err = w.Ports.Dial(ctx, c.ID, openPort)
	requireCode(t, nestbox.CodeInvalidState, err)
}

// TestPublicPort: a port that its owner makes public needs no credential, and what goes
// on over it ends when it is made private again.
func TestPublicPort(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		c, other := w.create(t), w.newTeam(t)
		settings := nestbox.PortSettings{Public: true, HostHeader: "localhost:80"}
		requireCode(t, nestbox.CodeNotFound, w.Ports.Set(ctx, other, c.ID, openPort, settings))
		_, err := w.Ports.Settings(ctx, other, c.ID, openPort)
		requireCode(t, nestbox.CodeNotFound, err)
		requireCode(t, nestbox.CodeDenied, w.Ports.Set(ctx, w.me, c.ID, sandbox.EnvdPort, settings))
		requireCode(t, nestbox.CodeInvalid, w.Ports.Set(ctx, w.me, c.ID, 0, settings))
		requireCode(t, nestbox.CodeInvalid, w.Ports.Set(ctx, w.me, c.ID, openPort, nestbox.PortSettings{HostHeader: "a b"}))
		require.NoError(t, w.Ports.Set(ctx, w.me, c.ID, openPort, settings))
		w.restart()

		entry, err := w.Ports.Authorize(ctx, c.ID, openPort, PortCredential{APIKeys: []string{"wrn_x"}})
		require.NoError(t, err)
		require.Equal(t, w.me.TeamID, entry.TeamID)
		require.Empty(t, entry.KeyID)
		require.Equal(t, settings, entry.Settings)
		_, err = w.Ports.Authorize(ctx, c.ID, openPort+1, PortCredential{})
		requireCode(t, nestbox.CodeUnauthenticated, err)

		held, release := w.Ports.Hold(ctx, entry)
		defer release()
		require.NoError(t, held.Err())
		require.NoError(t, w.Ports.Set(ctx, w.me, c.ID, openPort, nestbox.PortSettings{Public: true}), "it still is")
		require.NoError(t, held.Err())
		require.NoError(t, w.Ports.Set(ctx, w.me, c.ID, openPort, nestbox.PortSettings{}))
		requireCode(t, nestbox.CodeUnauthenticated, context.Cause(held))
		late, release := w.Ports.Hold(ctx, entry) // authorized before, and going on after
		defer release()
		requireCode(t, nestbox.CodeUnauthenticated, context.Cause(late))
		_, err = w.Ports.Authorize(ctx, c.ID, openPort, PortCredential{})
		requireCode(t, nestbox.CodeUnauthenticated, err)
	})
}
