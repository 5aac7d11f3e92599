package egress

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/durable"
)

// Service is the egress process of a host: it holds the Gateways of its capsules,
// and goes on when the server that asked for them is gone. What it is to do is on disk
// before it says so, and a Service that comes after one that was killed does the same;
// between the two nothing gets out.
type Service struct {
	cfg  Config
	dir  string
	lock *os.File

	watchers atomic.Int64  // servers that are there
	idle     chan struct{} // closed when nobody needs the Service any more
	endOnce  sync.Once

	work sync.Mutex // held while a Gateway is opened or closed, which takes milliseconds

	mu       sync.Mutex
	capsules map[string]*served
}

func (s *Service) capsule(id string) *served {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.capsules[id]
}

// hold puts a capsule in its place; nil = none.
func (s *Service) hold(id string, c *served) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c == nil {
		delete(s.capsules, id)
	} else {
		s.capsules[id] = c
	}
}

// served is one capsule of a Service.
type served struct {
	namespace string
	gateway   *Gateway // nil = it is closed: its state cannot be carried out

	mu     sync.Mutex
	policy nestbox.NetworkPolicy
	report nestbox.NetworkReport // without its Policy; of Recent the last maxRecent that have ended
}

// capsuleState is what is on disk of a capsule.
type capsuleState struct {
	Version   int                   `json:"version"` // stateVersion
	ID        string                `json:"id"`
	Namespace string                `json:"namespace"` // the path of the outer one
	Policy    nestbox.NetworkPolicy `json:"policy"`
}

const (
	stateVersion = 1
	stateEnd     = ".json"
	socketFile   = "socket"
	lockFile     = "lock"
	maxRecent    = 100 // flows
	maxState     = 1 << 20

	// firstServer is how long a Service without capsules waits for a server.
	firstServer = 5 * time.Second

	settingsHeader = "Nestbox-Egress-Settings"
)

// ErrServed is of a directory in which another Service works.
var ErrServed = errors.New("another egress process works on this directory")

// NewService takes up what is in dir, which it makes if need be. One Service at a time
// works on a directory: ErrServed.
func NewService(cfg Config, dir string) (*Service, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrServed
		}
		return nil, errors.Join(err, lock.Close())
	}
	s := &Service{cfg: cfg, dir: dir, lock: lock, idle: make(chan struct{}), capsules: map[string]*served{}}
	s.cfg.Counted = s.counted
	if err := s.load(); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return s, nil
}

// load opens the Gateways of what is on disk. One that cannot be opened stays closed.
func (s *Service) load() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(s.dir, e.Name())
		if durable.Leftover(e.Name()) {
			_ = os.Remove(path)
			continue
		}
		id, ok := strings.CutSuffix(e.Name(), stateEnd)
		if !ok {
			continue
		}
		state, err := readState(path, id)
		if err != nil {
			s.cfg.Log.Error("a capsule's egress stays closed: its state cannot be read", "capsule", id, "error", err)
			continue
		}
		if _, err := os.Stat(state.Namespace); errors.Is(err, os.ErrNotExist) { // the capsule is gone
			_ = os.Remove(path)
			continue
		}
		c := &served{namespace: state.Namespace, policy: state.Policy}
		s.hold(id, c)
		if c.gateway, err = Open(s.cfg, id, state.Namespace, state.Policy); err != nil {
			s.cfg.Log.Error("a capsule's egress stays closed", "capsule", id, "error", err)
		}
	}
	return nil
}

func readState(path, id string) (state capsuleState, err error) {
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, &state)
	}
	if err == nil && (state.ID != id || state.Version != stateVersion) {
		err = fmt.Errorf("it is of %q, version %d", state.ID, state.Version)
	}
	return state, err
}

// Close closes all Gateways. What is on disk stays.
func (s *Service) Close() error {
	s.work.Lock()
	defer s.work.Unlock()
	s.mu.Lock()
	all := s.capsules
	s.capsules = map[string]*served{}
	s.mu.Unlock()
	var errs []error
	for _, c := range all {
		if c.gateway != nil {
			errs = append(errs, c.gateway.Close())
		}
	}
	return errors.Join(append(errs, s.lock.Close())...)
}

// Put has a capsule served under a policy, from then on and by later Services too. It
// may be repeated, with another policy.
func (s *Service) Put(id, namespace string, policy nestbox.NetworkPolicy) error {
	if !nestbox.ValidID(nestbox.PrefixCapsule, id) || !filepath.IsAbs(namespace) {
		return nestbox.Errorf(nestbox.CodeInvalid, "no capsule has the id %.60q and the namespace %.200q", id, namespace)
	}
	if err := policy.Validate(); err != nil {
		return err
	}
	s.work.Lock()
	defer s.work.Unlock()
	c := s.capsule(id)
	state := capsuleState{stateVersion, id, namespace, policy}
	text, err := json.Marshal(state)
	if err == nil {
		err = durable.WriteFile(filepath.Join(s.dir, id+stateEnd), text, 0o600)
	}
	if err != nil {
		return err
	}
	if c != nil && c.gateway != nil && c.namespace == namespace {
		c.mu.Lock()
		c.policy = policy
		c.mu.Unlock()
		return c.gateway.Set(policy)
	}
	if c != nil && c.gateway != nil {
		if err := c.gateway.Close(); err != nil {
			s.cfg.Log.Warn("closing the egress of a capsule", "capsule", id, "error", err)
		}
	}
	c = &served{namespace: namespace, policy: policy}
	s.hold(id, c) // flows are counted from the first on
	if c.gateway, err = Open(s.cfg, id, namespace, policy); err != nil {
		s.hold(id, nil)
		return errors.Join(err, os.Remove(filepath.Join(s.dir, id+stateEnd)))
	}
	return nil
}

// Remove closes the way out of a capsule, for good. An unknown id is no error.
func (s *Service) Remove(id string) error {
	if !nestbox.ValidID(nestbox.PrefixCapsule, id) {
		return nestbox.Errorf(nestbox.CodeInvalid, "invalid capsule ID")
	}
	s.work.Lock()
	defer s.work.Unlock()
	if err := durable.Remove(filepath.Join(s.dir, id+stateEnd)); err != nil {
		return err
	}
	c := s.capsule(id)
	s.hold(id, nil)
	s.endIfIdle()
	if c == nil || c.gateway == nil {
		return nil
	}
	return c.gateway.Close()
}

// endIfIdle ends a Service without capsules and servers.
func (s *Service) endIfIdle() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.capsules) == 0 && s.watchers.Load() == 0 {
		s.end()
	}
}

// unused reports that there is no capsule.
func (s *Service) unused() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.capsules) == 0
}

func (s *Service) end() { s.endOnce.Do(func() { close(s.idle) }) }

// settings name what a Service was started with, which a server may want otherwise.
func settings(lifted []netip.Prefix) string { return fmt.Sprint(lifted) }

// Look reports on a capsule. CodeNotFound: it is not served. CodeUnavailable: it is
// shut, as its policy could not be carried out.
func (s *Service) Look(id string) (nestbox.NetworkReport, error) {
	s.work.Lock() // of the gateway
	defer s.work.Unlock()
	c := s.capsule(id)
	if c == nil {
		return nestbox.NetworkReport{}, nestbox.Errorf(nestbox.CodeNotFound, "the capsule's egress is not served")
	}
	if c.gateway == nil {
		return nestbox.NetworkReport{}, nestbox.Errorf(nestbox.CodeUnavailable, "the capsule reaches nothing: its policy could not be carried out")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	report := c.report
	report.Policy = c.policy
	report.Recent = append(slices.Clone(report.Recent), c.gateway.open()...)
	return report, nil
}

// counted notes a flow that has ended, or was refused.
func (s *Service) counted(id string, f nestbox.NetworkFlow) {
	c := s.capsule(id)
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.Verdict.Allowed {
		c.report.Allowed++
	} else {
		c.report.Refused++
	}
	c.report.Sent += f.Sent
	c.report.Received += f.Received
	if len(c.report.Recent) == maxRecent {
		c.report.Recent = slices.Delete(c.report.Recent, 0, 1)
	}
	c.report.Recent = append(c.report.Recent, f)
}

// Serve answers a Client of the same directory until ctx ends, or the last capsule and
// the last server are gone.
func (s *Service) Serve(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		first := time.NewTimer(firstServer)
		defer first.Stop()
		for {
			select {
			case <-first.C:
				s.endIfIdle()
			case <-s.idle:
				stop()
				return
			case <-ctx.Done():
				return
			}
		}
	}()
	path := filepath.Join(s.dir, socketFile)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) { // of a Service that was killed: we have the lock
		return err
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return errors.Join(err, l.Close())
	}
	server := &http.Server{Handler: s.handler(ctx), ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10}
	defer context.AfterFunc(ctx, func() { _ = server.Close() })()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func (s *Service) handler(ctx context.Context) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /alive", func(w http.ResponseWriter, r *http.Request) { // answers when it ends
		s.watchers.Add(1)
		defer s.endIfIdle()
		defer s.watchers.Add(-1)
		w.Header().Set(settingsHeader, settings(s.cfg.Never.Lifted))
		_ = http.NewResponseController(w).Flush() // the caller sees that it lives
		select {
		case <-r.Context().Done():
		case <-ctx.Done():
		}
	})
	mux.HandleFunc("POST /end", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, nil, nil)
		s.end()
	})
	mux.HandleFunc("GET /capsules/{id}", func(w http.ResponseWriter, r *http.Request) {
		report, err := s.Look(r.PathValue("id"))
		answer(w, report, err)
	})
	mux.HandleFunc("PUT /capsules/{id}", func(w http.ResponseWriter, r *http.Request) {
		var state capsuleState
		err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxState)).Decode(&state)
		if err != nil {
			err = nestbox.Errorf(nestbox.CodeInvalid, "read the state: %w", err)
		} else {
			err = s.Put(r.PathValue("id"), state.Namespace, state.Policy)
		}
		answer(w, nil, err)
	})
	mux.HandleFunc("DELETE /capsules/{id}", func(w http.ResponseWriter, r *http.Request) {
		answer(w, nil, s.Remove(r.PathValue("id")))
	})
	return mux
}

// wireError is how an error travels.
type wireError struct {
	Code    nestbox.Code
	Message string
}

func answer(w http.ResponseWriter, body any, err error) {
	status := http.StatusOK
	if err != nil {
		status, body = http.StatusInternalServerError, wireError{nestbox.CodeOf(err), cmp.Or(err.Error(), "failed")}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // the caller may be gone
}
