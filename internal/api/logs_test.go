package api

import (
	"bufio"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
)

const webLogs = "/v1/capsules/{id}/processes/web/logs"

func TestLogs(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start("web")
	r.script("web", func(p *scripted) { p.write("stdout", "out\xff"); p.write("stderr", "err"); p.write("stdout", "more") })
	for query, c := range map[string]struct{ want, start, end string }{
		"":                      {"out\xfferrmore", "0", "11"},
		"?since=start":          {"out\xfferrmore", "0", "11"},
		"?since=2":              {"t\xfferrmore", "2", "11"},
		"?tail=6":               {"rrmore", "5", "11"},
		"?tail=600":             {"out\xfferrmore", "0", "11"},
		"?since=now":            {"", "11", "11"},
		"?since=11":             {"", "11", "11"},
		"?since=50":             {"", "50", "50"},
		"?stream=stderr":        {"err", "0", "11"},
		"?stream=stdout":        {"out\xffmore", "0", "11"},
		"?stream=stdout&tail=2": {"re", "9", "11"},
	} {
		got := r.call(http.MethodGet, webLogs+query, "").expect(http.StatusOK)
		require.Equal(t, c.want, string(got.body), query)
		require.Equal(t, c.start, got.res.Header.Get(headerStart), query)
		require.Equal(t, c.end, got.res.Header.Get(headerEnd), query)
		require.Equal(t, "application/octet-stream", got.res.Header.Get("Content-Type"))
		require.Empty(t, got.res.Trailer.Get(headerGaps))
	}
}

func TestLogsFollow(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start("web")
	res, err := r.server.Client().Do(r.newRequest(http.MethodGet, webLogs+"?follow=true", nil)) // answers before there is output
	require.NoError(t, err)
	defer func() { require.NoError(t, res.Body.Close()) }()
	for _, text := range []string{"one", "two"} {
		r.script("web", func(p *scripted) { p.write("stdout", text) })
		b := make([]byte, len(text))
		_, err = io.ReadFull(res.Body, b) // each piece comes without the next
		require.NoError(t, err)
		require.Equal(t, text, string(b))
	}
	r.script("web", func(p *scripted) {
		p.exit(nestbox.Exit{Reason: nestbox.ReasonExited})
		p.write("stderr", "last")
		p.closed()
	})
	b, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	require.Equal(t, "last", string(b))
	require.Equal(t, "10", res.Trailer.Get(headerEnd))
	require.Empty(t, res.Trailer.Get(headerGaps))
}

func TestLogsGap(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start("web")
	r.script("web", func(p *scripted) { p.write("stdout", "0123456789"); p.drop(4) })
	got := r.call(http.MethodGet, webLogs+"?since=1", "").expect(http.StatusOK)
	require.Equal(t, "456789", string(got.body))
	require.Equal(t, "4", got.res.Header.Get(headerStart))
	require.Equal(t, "1-4", got.res.Trailer.Get(headerGaps))
}

// An answer that cannot be completed does not look complete.
func TestLogsBreak(t *testing.T) {
	t.Parallel()
	for _, accept := range []string{"*/*", "text/event-stream"} {
		r := newRig(t)
		r.start("web")
		r.script("web", func(p *scripted) {
			p.write("stdout", "x")
			p.broken = nestbox.Errorf(nestbox.CodeGuest, "the daemon does not answer")
		})
		got := r.call(http.MethodGet, webLogs+"?follow=true", "", "Accept", accept)
		require.Error(t, got.err)
		require.Contains(t, string(got.body), "x")
	}
}

func TestEvents(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start("web")
	r.script("web", func(p *scripted) {
		p.write("stdout", "one\n")
		p.write("stderr", "two")
		p.exit(nestbox.Exit{Code: 1, Reason: nestbox.ReasonExited})
		p.closed()
	})
	const tail = "id: 7\ndata: {\"type\":\"exit\",\"id\":\"@11\",\"exit_code\":1,\"reason\":\"exited\",\"offset\":7}\n\n" +
		"id: 7\ndata: {\"type\":\"output_closed\",\"id\":\"@11\",\"offset\":7}\n\n"
	const two = "id: 7\ndata: {\"type\":\"stderr\",\"id\":\"@11\",\"data\":\"two\",\"offset\":4,\"end\":7}\n\n"
	const one = "id: 4\ndata: {\"type\":\"stdout\",\"id\":\"@11\",\"data\":\"one\\n\",\"offset\":0,\"end\":4}\n\n"
	for name, c := range map[string]struct {
		query  string
		header []string
		want   string
	}{
		"from the start": {"?follow=true", nil, one + two + tail},
		"ends by itself": {"", nil, one + two + tail},
		"resumed":        {"?since=0&tail=5", []string{"Last-Event-ID", "4"}, two + tail},
		"one stream":     {"?stream=stderr", nil, two + tail},
		"base64":         {"?since=4&encoding=base64", nil, strings.Replace(two, "two", "dHdv", 1) + tail},
	} {
		got := r.call(http.MethodGet, webLogs+c.query, "", append(c.header, "Accept", "text/event-stream")...).expect(http.StatusOK)
		require.Equal(t, ": ping\n\n"+c.want, string(got.body), name)
		require.Equal(t, "text/event-stream", got.res.Header.Get("Content-Type"))
	}
	r.call(http.MethodGet, webLogs, "", "Accept", "text/event-stream", "Last-Event-ID", "x").fails(http.StatusBadRequest, "invalid_request")
}

func TestEventsWithoutFollowEnd(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start("web")
	r.script("web", func(p *scripted) { p.write("stdout", "x\xe2") }) // the beginning of a rune
	got := r.call(http.MethodGet, webLogs, "", "Accept", "text/event-stream").expect(http.StatusOK)
	require.Contains(t, string(got.body), `"data":"x","offset":0,"end":1}`)
	require.Contains(t, string(got.body), `"data":"\ufffd","offset":1,"end":2}`)
}

func TestEventsKeepAlive(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(c *Config) { c.EventInterval = time.Millisecond })
	r.start("web")
	res, err := r.server.Client().Do(r.newRequest(http.MethodGet, webLogs+"?follow=true", nil, "Accept", "text/event-stream"))
	require.NoError(t, err)
	defer func() { require.NoError(t, res.Body.Close()) }()
	b := make([]byte, len(": ping\n\n")*5)
	_, err = io.ReadFull(res.Body, b)
	require.NoError(t, err)
	require.Equal(t, strings.Repeat(": ping\n\n", 5), string(b))
}

// A client that leaves ends its stream on the server, which goleak sees.
func TestEventsClientLeaves(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start("web")
	res, err := r.server.Client().Do(r.newRequest(http.MethodGet, webLogs+"?follow=true", nil, "Accept", "text/event-stream"))
	require.NoError(t, err)
	line, err := bufio.NewReader(res.Body).ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, ": ping\n", line)
	require.NoError(t, res.Body.Close())
	require.Eventually(t, func() bool { return strings.Contains(r.log.String(), "path="+r.path(webLogs)) }, patience, time.Millisecond)
	r.see("web", (*scripted).running)
}
