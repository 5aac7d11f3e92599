package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
)

// TestServerErrorsAreLoggedOnce: with the cause, which the client does not see.
func TestServerErrorsAreLoggedOnce(t *testing.T) {
	t.Parallel()
	for code, want := range map[nestbox.Code]string{
		nestbox.CodeGuest: "WARN", nestbox.CodeTimeout: "WARN", nestbox.CodeUnavailable: "WARN", nestbox.CodeInternal: "ERROR",
		nestbox.CodeExhausted: "ERROR", "no such code": "ERROR",
	} {
		r := newRig(t)
		cause := errors.New("dial tcp 10.1.2.3:4: " + string(code))
		if code == nestbox.CodeExhausted {
			cause = fmt.Errorf("%w: %w", cause, syscall.ENOSPC)
		}
		r.guest.procs.fails = &nestbox.Error{Code: code, Message: "what the client sees", Err: cause}
		for path, header := range map[string]string{"/v1/capsules/{id}/processes": "listed-1", "/v1/capsules/{id}/processes/x/logs": "logs-1"} {
			text := r.call(http.MethodGet, path, "", requestIDHeader, header).body
			require.NotContains(t, string(text), "10.1.2.3")
			var lines []string
			for line := range strings.Lines(r.log.String()) {
				if strings.Contains(line, "request_id="+header) && !strings.Contains(line, "level=DEBUG") {
					lines = append(lines, line)
				}
			}
			require.Len(t, lines, 1, code)
			require.Contains(t, lines[0], "level="+want)
			require.Contains(t, lines[0], "10.1.2.3")
		}
	}
}

func TestReady(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	require.JSONEq(t, `{"status":"ready"}`, string(r.call(http.MethodGet, "/ready", "", "X-API-Key", "").expect(http.StatusOK).body))
	r.host.away.Store(true)
	require.Eventually(t, func() bool { // an answer is given for a while
		a := r.call(http.MethodGet, "/ready", "")
		return a.res.StatusCode == http.StatusServiceUnavailable && strings.Contains(string(a.body), "not ready: the host does not answer")
	}, patience, 10*time.Millisecond)
	r.call(http.MethodGet, "/health", "").expect(http.StatusOK)
	require.Contains(t, r.log.String(), "not ready")
	require.NoError(t, r.store.Close())
	require.Eventually(t, func() bool {
		return strings.Contains(string(r.call(http.MethodGet, "/ready", "").body), "neither the database nor the host answers")
	}, patience, 10*time.Millisecond)
}

func TestHealthDocsAndDocument(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	var h health
	r.call(http.MethodGet, "/health", "", apiKeyHeader, "").expect(http.StatusOK).decode(&h)
	require.Equal(t, health{Status: "ok", Version: "1.2.3"}, h)
	require.Equal(t, string(openAPI), string(r.call(http.MethodGet, "/openapi.yaml", "", apiKeyHeader, "").expect(http.StatusOK).body))
	page := string(r.call(http.MethodGet, "/docs", "", apiKeyHeader, "").expect(http.StatusOK).body)
	require.Contains(t, page, "/v1/capsules/{id}/exec/stream")
	for _, foreign := range []string{"http://", "https://", "<script", "@import"} {
		require.NotContains(t, strings.ReplaceAll(page, "http://8080-", ""), foreign)
	}
}

func TestAuthentication(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	const path = "/v1/capsules/{id}"
	for name, c := range map[string]struct {
		header []string
		want   string // message; "" = let in
	}{
		"key":           {nil, ""},
		"E2B form":      {[]string{apiKeyHeader, "e2b_" + r.key[4:]}, ""},
		"bearer":        {[]string{apiKeyHeader, "", "Authorization", "Bearer " + r.key}, ""},
		"key wins":      {[]string{"Authorization", "Bearer nonsense"}, ""},
		"none":          {[]string{apiKeyHeader, ""}, "X-API-Key or Authorization: Bearer <token> required"},
		"empty bearer":  {[]string{apiKeyHeader, "", "Authorization", "Bearer "}, "X-API-Key or Authorization: Bearer <token> required"},
		"basic":         {[]string{apiKeyHeader, "", "Authorization", "Basic " + r.key}, "X-API-Key or Authorization: Bearer <token> required"},
		"wrong key":     {[]string{apiKeyHeader, "wrn_00000000000000000000000000000000"}, "invalid API key"},
		"wrong bearer":  {[]string{apiKeyHeader, "", "Authorization", "Bearer x"}, "invalid API key"},
		"bad key first": {[]string{apiKeyHeader, "x", "Authorization", "Bearer " + r.key}, "invalid API key"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := r.call(http.MethodGet, path, "", c.header...)
			if c.want == "" {
				got.expect(http.StatusOK)
				return
			}
			require.Equal(t, c.want, got.fails(http.StatusUnauthorized, "unauthorized"))
		})
	}
}

func TestForeignCapsuleIsNotFound(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start("web")
	for _, op := range newServer(Config{}).operations() {
		if !strings.Contains(op.Path, "{id}") || op.Responses["426"] != nil {
			continue
		}
		t.Run(op.OperationID, func(t *testing.T) {
			t.Parallel()
			body, contentType := validBody(t, op)
			path := strings.NewReplacer("{selector}", "web", "{port}", "80").Replace(op.Path)
			if slices.ContainsFunc(op.Parameters, func(p *huma.Param) bool { return p.In == "query" && p.Name == "path" }) {
				path += "?path=/x"
			}
			got := r.request(op.Method, path, strings.NewReader(body), apiKeyHeader, r.other, "Content-Type", contentType)
			if op.Method == http.MethodHead { // whose answers have no body
				got.expect(http.StatusNotFound)
				return
			}
			require.Equal(t, "capsule not found", got.fails(http.StatusNotFound, "not_found"))
		})
	}
	r.call(http.MethodGet, "/v1/capsules/{id}/processes/web", "").expect(http.StatusOK) // and nothing happened to it
}

func TestNoRoute(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	require.Contains(t, r.call(http.MethodGet, "/v1/capsule", "").fails(http.StatusNotFound, "not_found"), "/v1/capsule")
	require.Contains(t, string(r.call(http.MethodGet, "/v1/capsule", "").body), `"no_such_route"`)
	require.NotContains(t, string(r.call(http.MethodGet, "/v1/capsules/"+nestbox.NewID(nestbox.PrefixCapsule), "").body), "no_such_route")
	r.call(http.MethodGet, "/", "").fails(http.StatusNotFound, "not_found")
	got := r.call(http.MethodPut, "/v1/capsules/{id}", "")
	got.fails(http.StatusMethodNotAllowed, "invalid_request")
	require.Equal(t, "GET, DELETE", got.res.Header.Get("Allow"))
}

func TestRequestIDAndPanic(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	got := r.call(http.MethodPost, "/v1/capsules/{id}/exec", `{"cmd":"panic","background":true,"envs":{"TOKEN":"s3cret"}}`, requestIDHeader, "mine-1")
	require.Equal(t, "internal error", got.fails(http.StatusInternalServerError, "internal_error"))
	require.Equal(t, "mine-1", got.res.Header.Get(requestIDHeader))
	require.Contains(t, r.log.String(), "request_id=mine-1")
	require.Contains(t, r.log.String(), "as asked for")
	for _, bad := range []string{"a b", strings.Repeat("x", 65), "a\tb"} {
		id := r.call(http.MethodGet, "/health", "", requestIDHeader, bad).res.Header.Get(requestIDHeader)
		require.Len(t, id, 16)
	}
	require.NotContains(t, r.log.String(), r.key)
	require.NotContains(t, r.log.String(), "s3cret")
}

func TestCapsules(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	created := r.call(http.MethodPost, "/v1/capsules",
		`{"template":"minimal","vcpus":2,"memory_mb":0,"disk_mb":-1,"pids_max":64,"timeout_sec":60,"metadata":{"a":"b"}}`).expect(http.StatusCreated)
	var c capsule
	created.decode(&c)
	require.Equal(t, "running", c.Status)
	require.Equal(t, []int{2, 512, 5120, 64, 60}, []int{c.VCPUs, c.MemoryMB, c.DiskMB, c.PidsMax, c.TimeoutSec})
	require.Equal(t, map[string]string{"a": "b"}, c.Metadata)
	var raw map[string]any
	require.NoError(t, json.Unmarshal(created.body, &raw))
	require.Regexp(t, `^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$`, raw["created_at"])

	r.call(http.MethodPost, "/v1/capsules", "").expect(http.StatusCreated) // no body at all
	var page []capsule
	first := r.call(http.MethodGet, "/v1/capsules?limit=2", "").expect(http.StatusOK)
	first.decode(&page)
	require.Len(t, page, 2)
	next := first.res.Header.Get("X-Next-Cursor")
	require.NotEmpty(t, next)
	last := r.call(http.MethodGet, "/v1/capsules?cursor="+next, "").expect(http.StatusOK)
	last.decode(&page)
	require.Len(t, page, 1)
	require.Equal(t, r.capsule, page[0].ID)
	require.Empty(t, last.res.Header.Get("X-Next-Cursor"))
	require.Equal(t, "[]\n", string(r.call(http.MethodGet, "/v1/capsules", "", apiKeyHeader, r.other).expect(http.StatusOK).body))

	r.call(http.MethodPost, "/v1/capsules/{id}/ping", "").expect(http.StatusNoContent)
	for range 2 {
		r.call(http.MethodDelete, "/v1/capsules/{id}", "").expect(http.StatusNoContent)
	}
	r.call(http.MethodGet, "/v1/capsules/{id}", "").expect(http.StatusOK).decode(&c)
	require.Equal(t, "stopped", c.Status)
	r.call(http.MethodGet, "/v1/capsules", "").expect(http.StatusOK).decode(&page)
	require.Len(t, page, 2)
	r.call(http.MethodGet, "/v1/capsules?all=true", "").expect(http.StatusOK).decode(&page)
	require.Len(t, page, 3)
	require.Equal(t, "capsule is stopped", r.call(http.MethodPost, "/v1/capsules/{id}/ping", "").fails(http.StatusConflict, "invalid_state"))
	require.Equal(t, "capsule is stopped",
		r.call(http.MethodPost, "/v1/capsules/{id}/exec", `{"cmd":"echo"}`).fails(http.StatusConflict, "invalid_state"))
	unknown := "/v1/capsules/cl-0000000000000000000000000"
	require.Equal(t, "capsule not found", r.call(http.MethodGet, unknown, "").fails(http.StatusNotFound, "not_found"))
	r.call(http.MethodDelete, unknown, "").fails(http.StatusNotFound, "not_found")
	require.Equal(t, "template not found", r.call(http.MethodPost, "/v1/capsules", `{"template":"nope"}`).fails(http.StatusNotFound, "not_found"))
}

func TestSecondsAndOptional(t *testing.T) {
	t.Parallel()
	require.Nil(t, optional(seconds(time.Time{})))
	b, err := json.Marshal(seconds(time.Date(2026, 1, 2, 3, 4, 5, 999, time.FixedZone("x", 3600))))
	require.NoError(t, err)
	require.Equal(t, `"2026-01-02T02:04:05Z"`, string(bytes.TrimSpace(b)))
}

// TestCreateAgain: a create that is asked for again with the same key makes nothing.
func TestCreateAgain(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	create := func(body string) *answer {
		return r.request(http.MethodPost, "/v1/capsules", strings.NewReader(body), apiKeyHeader, r.key, "Content-Type", "application/json", "Idempotency-Key", "k")
	}
	var first, second capsule
	got := create(`{"metadata":{"a":"b"}}`)
	got.expect(http.StatusCreated).decode(&first)
	require.Empty(t, got.res.Header.Get("Idempotent-Replayed"))
	got = create(`{"metadata":{"a":"b"}}`)
	got.expect(http.StatusCreated).decode(&second)
	require.Equal(t, "true", got.res.Header.Get("Idempotent-Replayed"))
	require.Equal(t, first.ID, second.ID)
	create(`{"metadata":{"a":"c"}}`).fails(http.StatusConflict, "conflict")
}
