package api

import (
	"context"
	"io"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
)

// TestRemovedKeyEndsStreams: whatever a key let in ends with it, also what is
// still being sent.
func TestRemovedKeyEndsStreams(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	by, err := r.control.Keys.Authenticate(t.Context(), r.key)
	require.NoError(t, err)
	r.start("web")
	socket := r.dial(webStream)
	socket.expect(fields{"type": "start"})
	run := r.dial("/v1/capsules/{id}/exec/stream")
	run.send(`{"type":"start","cmd":"sleep","tag":"mine"}`)
	run.expect(fields{"type": "start"})

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	watching, stop := context.WithCancel(ctx)
	watched := make(chan error, 1)
	go func() { watched <- r.control.Keys.Watch(watching) }() // it sees also what began while the key was removed
	defer func() { stop(); <-watched }()
	follow, err := http.NewRequestWithContext(ctx, http.MethodGet, r.url+r.path(webLogs+"?follow=true"), nil)
	require.NoError(t, err)
	follow.Header.Set("X-API-Key", r.key)
	res, err := http.DefaultClient.Do(follow)
	require.NoError(t, err)
	defer res.Body.Close()
	content, feed := io.Pipe()
	defer feed.Close()
	upload, err := http.NewRequestWithContext(ctx, http.MethodPut, r.url+r.path("/v1/capsules/{id}/files?path=/f"), content)
	require.NoError(t, err)
	upload.ContentLength = 1 << 30 // so that a refusal does not wait for the rest
	upload.Header.Set("X-API-Key", r.key)
	uploaded := make(chan error, 1)
	go func() {
		res, err := http.DefaultClient.Do(upload)
		if err == nil {
			_ = res.Body.Close()
		}
		uploaded <- err
	}()
	_, err = feed.Write([]byte("some"))
	require.NoError(t, err)

	require.NoError(t, r.control.Keys.Delete(t.Context(), by.TeamID, by.KeyID))
	_, err = io.ReadAll(res.Body)
	require.Error(t, err, "a stream that is cut is no whole one")
	<-uploaded
	for _, p := range []*peer{socket, run} {
		_, _, err := p.conn.Read(ctx)
		require.Error(t, err)
	}
	require.Eventually(t, func() bool {
		p, err := r.guest.Processes().Get(ctx, nestbox.Selector{Tag: "mine"})
		return err == nil && !p.Running()
	}, patience, 1e6, "the process of a stream that was left")
	r.call(http.MethodGet, "/v1/capsules", "").fails(http.StatusUnauthorized, "unauthorized")
}
