// Package apitest runs the whole API in a test: the real HTTP handler, control
// plane and SQLite store, over capsules that are real envds in this process,
// on this machine's own files and without any isolation. It is for tests only.
package apitest

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http/httptest"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/api"
	"github.com/nestbox/nestbox/internal/control"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/envd"
	"github.com/nestbox/nestbox/internal/guest/outputlog"
	"github.com/nestbox/nestbox/internal/hostagent"
	"github.com/nestbox/nestbox/internal/hostagent/hosttest"
	"github.com/nestbox/nestbox/internal/sandbox"
	"github.com/nestbox/nestbox/internal/store"
)

// Server is a running server.
type Server struct {
	URL string
	Key string // of a team of its own

	t      testing.TB
	ctl    *control.Control
	server *httptest.Server
	conns  *connections
}

// Start starts a server, which ends with the test.
func Start(t testing.TB) *Server {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	db, err := store.Open(t.Context(), "sqlite:"+filepath.Join(t.TempDir(), "nestbox.db"), log)
	require.NoError(t, err)
	host := &host{t: t, envds: map[string]*envd.Envd{}}
	s := &Server{t: t, ctl: control.New(control.Config{Store: db, Host: host, Log: log, Version: nestbox.Version})}
	secret, _, err := s.ctl.Keys.EnsureFirst(t.Context())
	require.NoError(t, err)
	s.Key = secret
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s.serve(listener)
	t.Cleanup(func() {
		s.Stop()
		host.close()
		require.NoError(t, db.Close())
	})
	return s
}

func (s *Server) serve(listener net.Listener) {
	s.conns = &connections{Listener: listener, open: map[net.Conn]bool{}}
	s.server = httptest.NewUnstartedServer(api.New(api.Config{
		Control: s.ctl,
		Version: nestbox.Version,
		PortURL: func(_ context.Context, id string, port uint16, token string) string {
			return "http://port.test/?token=" + token
		},
	}))
	_ = s.server.Listener.Close()
	s.server.Listener = s.conns
	s.server.Start()
	s.URL = s.server.URL
}

// Cut breaks all connections, in the middle of whatever they carry.
func (s *Server) Cut() { s.conns.cut() }

// Stop breaks all connections and refuses new ones. Capsules go on.
func (s *Server) Stop() {
	_ = s.conns.Close()
	s.conns.cut()
	s.server.Close()
}

// Restart is Stop and Resume.
func (s *Server) Restart() {
	s.t.Helper()
	s.Stop()
	s.Resume()
}

// Resume starts a new server after Stop, at the same address.
func (s *Server) Resume() {
	s.t.Helper()
	var listener net.Listener
	require.Eventually(s.t, func() (ok bool) { // some connection may go out from the same port meanwhile
		var err error
		listener, err = net.Listen("tcp", s.conns.Addr().String())
		return err == nil
	}, time.Minute, 10*time.Millisecond)
	s.serve(listener)
}

// connections is a listener that remembers what it accepted, also connections
// that became WebSockets.
type connections struct {
	net.Listener

	mu   sync.Mutex
	open map[net.Conn]bool
}

func (c *connections) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open[conn] = true
	return conn, nil
}

func (c *connections) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for conn := range c.open {
		_ = conn.Close()
	}
	clear(c.open)
}

// host is a hostagent.Host whose capsules are envds in this process.
type host struct {
	hosttest.Networks

	t     testing.TB
	mu    sync.Mutex
	envds map[string]*envd.Envd
}

func (h *host) Info(context.Context) (hostagent.Info, error) {
	return hostagent.Info{HostInfo: nestbox.HostInfo{ID: nestbox.NewID(nestbox.PrefixHost), Templates: []string{nestbox.TemplateMinimal}}, Capabilities: []sandbox.Capability{sandbox.Egress}}, nil
}

func (h *host) Create(_ context.Context, id string, _ nestbox.CapsuleSpec) (hostagent.Status, error) {
	e, err := envd.New(envd.Config{Version: nestbox.Version, Limits: envd.Limits{Output: outputlog.Limits{Dir: h.t.TempDir()}}})
	if err != nil {
		return hostagent.Status{}, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.envds[id] = e
	return hostagent.Status{ID: id, State: hostagent.StateRunning}, nil
}

func (h *host) Destroy(ctx context.Context, id string) error {
	h.mu.Lock()
	e := h.envds[id]
	delete(h.envds, id)
	h.mu.Unlock()
	if e == nil {
		return nil
	}
	return destroy(ctx, e)
}

// destroy ends everything in a capsule.
func destroy(ctx context.Context, e *envd.Envd) error {
	procs, err := e.Processes().List(ctx, true)
	for _, p := range procs {
		_, killErr := e.Processes().Kill(ctx, nestbox.Selector{PID: p.PID}, guest.Kill{})
		if nestbox.CodeOf(killErr) != nestbox.CodeNotFound {
			err = errors.Join(err, killErr)
		}
	}
	return errors.Join(err, e.Close())
}

func (h *host) Get(_ context.Context, id string) (hostagent.Status, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.envds[id] == nil {
		return hostagent.Status{}, nestbox.Errorf(nestbox.CodeNotFound, "no such capsule")
	}
	return hostagent.Status{State: hostagent.StateRunning}, nil
}

func (h *host) List(context.Context) ([]hostagent.Status, error) { return nil, nil }

func (h *host) Guest(_ context.Context, id string) (guest.Guest, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if e := h.envds[id]; e != nil {
		return e, nil
	}
	return nil, nestbox.Errorf(nestbox.CodeNotFound, "no such capsule")
}

func (h *host) WatchDeaths(ctx context.Context, _ func(hostagent.Status)) error {
	<-ctx.Done()
	return ctx.Err()
}

func (h *host) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, e := range h.envds {
		if err := destroy(context.Background(), e); err != nil {
			h.t.Errorf("destroy a capsule: %v", err)
		}
	}
}
