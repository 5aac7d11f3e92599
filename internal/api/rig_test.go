package api

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/hostagent"
	"github.com/nestbox/nestbox/internal/hostagent/hosttest"
	"github.com/nestbox/nestbox/internal/sandbox"
	"github.com/nestbox/nestbox/internal/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must happen.
const patience = 60 * time.Second

// memoryHost is a hostagent.Host whose capsules are guests that the test gives.
type memoryHost struct {
	hosttest.Networks

	newGuest func() guest.Guest
	mu       sync.Mutex
	guests   map[string]guest.Guest
	away     atomic.Bool
}

func (h *memoryHost) Info(context.Context) (hostagent.Info, error) {
	if h.away.Load() {
		return hostagent.Info{}, nestbox.Errorf(nestbox.CodeUnavailable, "away")
	}
	return hostagent.Info{HostInfo: nestbox.HostInfo{ID: nestbox.NewID(nestbox.PrefixHost), Templates: []string{nestbox.TemplateMinimal}}, Capabilities: []sandbox.Capability{sandbox.Egress}}, nil
}

func (h *memoryHost) Create(_ context.Context, id string, _ nestbox.CapsuleSpec) (hostagent.Status, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.guests[id] = h.newGuest()
	return hostagent.Status{ID: id, State: hostagent.StateRunning}, nil
}

func (h *memoryHost) Destroy(_ context.Context, id string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.guests, id)
	return nil
}

func (h *memoryHost) Get(_ context.Context, id string) (hostagent.Status, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.guests[id] == nil {
		return hostagent.Status{}, nestbox.Errorf(nestbox.CodeNotFound, "no such capsule")
	}
	return hostagent.Status{State: hostagent.StateRunning}, nil
}

func (h *memoryHost) List(context.Context) ([]hostagent.Status, error) { return nil, nil }

func (h *memoryHost) Guest(_ context.Context, id string) (guest.Guest, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if g := h.guests[id]; g != nil {
		return g, nil
	}
	return nil, nestbox.Errorf(nestbox.CodeNotFound, "no such capsule")
}

func (h *memoryHost) WatchDeaths(ctx context.Context, _ func(hostagent.Status)) error {
	<-ctx.Done()
	return ctx.Err()
}

// rig is the API over a real control plane and store, with a guest in memory.
type rig struct {
	t       testing.TB
	url     string
	key     string
	other   string // the key of another team
	capsule string
	guest   *scriptedGuest
	log     *logBuffer
	server  *httptest.Server
	control *control.Control
	host    *memoryHost
	store   *store.Store
}

func newRig(t testing.TB, adjust ...func(*Config)) *rig {
	t.Helper()
	g := newScriptedGuest()
	r := newRigOver(t, func() guest.Guest { return g }, adjust...)
	r.guest = g
	return r
}

func newRigOver(t testing.TB, newGuest func() guest.Guest, adjust ...func(*Config)) *rig {
	t.Helper()
	ctx := t.Context()
	r := &rig{t: t, log: &logBuffer{}}
	log := slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	st, err := store.Open(ctx, "sqlite:"+filepath.Join(t.TempDir(), "db"), log)
	require.NoError(t, err)
	r.store = st
	r.host = &memoryHost{newGuest: newGuest, guests: map[string]guest.Guest{}}
	ctl := control.New(control.Config{Store: st, Host: r.host, Log: log, Version: "test"})
	r.key, r.other = newKey(t, ctl), newKey(t, ctl)
	r.control = ctl
	cfg := Config{Control: ctl, Log: log, Version: "1.2.3", SpoolDir: t.TempDir()}
	for _, f := range adjust {
		f(&cfg)
	}
	r.server = httptest.NewServer(New(cfg))
	t.Cleanup(func() {
		r.server.CloseClientConnections()
		r.server.Close()
		require.NoError(t, st.Close())
	})
	r.url = r.server.URL
	var c capsule
	r.call(http.MethodPost, "/v1/capsules", `{}`).expect(http.StatusCreated).decode(&c)
	r.capsule = c.ID
	return r
}

func newKey(t testing.TB, ctl *control.Control) string {
	t.Helper()
	team, err := ctl.Keys.CreateTeam(t.Context(), "team")
	require.NoError(t, err)
	_, secret, err := ctl.Keys.Create(t.Context(), team.ID, "key")
	require.NoError(t, err)
	return secret
}

// path fills in the rig's capsule.
func (r *rig) path(p string) string { return strings.ReplaceAll(p, "{id}", r.capsule) }

// newRequest makes a request with the rig's key, unless a header says
// otherwise; an empty header is left out.
func (r *rig) newRequest(method, path string, body io.Reader, header ...string) *http.Request {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.t.Context(), method, r.url+r.path(path), body)
	require.NoError(r.t, err)
	req.Header.Set(apiKeyHeader, r.key)
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
		if header[i+1] == "" {
			req.Header.Del(header[i])
		}
	}
	return req
}

// request sends a request and reads the whole answer.
func (r *rig) request(method, path string, body io.Reader, header ...string) *answer {
	r.t.Helper()
	res, err := r.server.Client().Do(r.newRequest(method, path, body, header...))
	require.NoError(r.t, err)
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	return &answer{t: r.t, res: res, body: b, err: err}
}

// call sends JSON; "" is no body.
func (r *rig) call(method, path, body string, header ...string) *answer {
	r.t.Helper()
	if body == "" {
		return r.request(method, path, nil, header...)
	}
	return r.request(method, path, strings.NewReader(body), append([]string{"Content-Type", "application/json"}, header...)...)
}

// start starts a scripted process that does nothing by itself.
func (r *rig) start(tag string) {
	r.t.Helper()
	r.call(http.MethodPost, "/v1/capsules/{id}/exec", `{"cmd":"quiet","background":true,"stdin":true,"tag":"`+tag+`"}`).expect(http.StatusAccepted)
}

// script changes a scripted process.
func (r *rig) script(tag string, do func(*scripted)) {
	r.t.Helper()
	require.NoError(r.t, r.guest.procs.change(nestbox.Selector{Tag: tag}, do))
}

// see waits until a scripted process is as it should be.
func (r *rig) see(tag string, ok func(*scripted) bool) {
	r.t.Helper()
	deadline := time.After(patience)
	for {
		r.guest.procs.mu.Lock()
		changed := r.guest.procs.changed
		found := false
		for _, p := range r.guest.procs.list {
			found = found || p.Tag == tag && ok(p)
		}
		r.guest.procs.mu.Unlock()
		if found {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			require.Fail(r.t, "the process did not become what it should", tag)
		}
	}
}

type answer struct {
	t    testing.TB
	res  *http.Response
	body []byte
	err  error // of reading the body
}

func (a *answer) expect(status int) *answer {
	a.t.Helper()
	require.NoError(a.t, a.err)
	require.Equal(a.t, status, a.res.StatusCode, "%s %s: %s", a.res.Request.Method, a.res.Request.URL, a.body)
	return a
}

func (a *answer) decode(v any) {
	a.t.Helper()
	dec := json.NewDecoder(bytes.NewReader(a.body))
	dec.DisallowUnknownFields()
	require.NoError(a.t, dec.Decode(v), "%s", a.body)
}

// fails checks status and code of an error and returns its message.
func (a *answer) fails(status int, code string) string {
	a.t.Helper()
	a.expect(status)
	require.Equal(a.t, "application/json", a.res.Header.Get("Content-Type"))
	require.NotEmpty(a.t, a.res.Header.Get(requestIDHeader))
	var body struct {
		Error *struct{ Code, Message, Detail string } `json:"error"`
	}
	a.decode(&body)
	require.NotNil(a.t, body.Error, "%s", a.body)
	require.Equal(a.t, code, body.Error.Code, "%s", a.body)
	require.NotEmpty(a.t, body.Error.Message)
	return body.Error.Message
}

// logBuffer is a log that tests may read.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}
