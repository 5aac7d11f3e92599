package hostile

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/api"
	"github.com/nestbox/nestbox/internal/control"
	"github.com/nestbox/nestbox/internal/edge"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/envd"
	"github.com/nestbox/nestbox/internal/guest/guestrpc"
	"github.com/nestbox/nestbox/internal/hostagent"
	"github.com/nestbox/nestbox/internal/image"
	"github.com/nestbox/nestbox/internal/sandbox"
	"github.com/nestbox/nestbox/internal/store"
)

// patience bounds every wait of a test that passes.
const patience = 2 * time.Minute

// rig is a server, whole but for the sandboxes: those are sockets of this
// process, behind which a test puts what it likes.
type rig struct {
	t      *testing.T
	url    string
	key    string
	ctl    *control.Control
	driver *driver
	http   *http.Client
}

func newRig(t *testing.T) *rig {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	db, err := store.Open(t.Context(), "sqlite:"+filepath.Join(t.TempDir(), "nestbox.db"), log)
	require.NoError(t, err)
	d := &driver{t: t, boxes: map[string]*box{}}
	host, err := hostagent.Open(t.Context(), hostagent.Config{
		Dir: t.TempDir(), Driver: d, Images: images{}, Log: log,
		Info: nestbox.HostInfo{ID: nestbox.NewID(nestbox.PrefixHost)},
	})
	require.NoError(t, err)
	ctl := control.New(control.Config{Store: db, Host: host, Log: log})
	front := edge.New(edge.Config{
		Outside: edge.Outside{Domain: "localhost"}, Ports: ctl.Ports, Log: log,
		API: api.New(api.Config{Control: ctl, Log: log}),
	})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	server := &http.Server{Handler: front, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	r := &rig{
		t: t, url: "http://" + listener.Addr().String(), ctl: ctl, driver: d,
		http: &http.Client{Transport: &http.Transport{}},
	}
	t.Cleanup(func() {
		r.http.CloseIdleConnections()
		require.NoError(t, server.Close())
		require.ErrorIs(t, <-served, http.ErrServerClosed)
		front.LetGo()
		require.NoError(t, host.Close())
		require.NoError(t, db.Close())
		for _, b := range d.boxes {
			b.end()
		}
	})
	r.key = r.newKey()
	return r
}

// newKey returns the key of a new team.
func (r *rig) newKey() string {
	team, err := r.ctl.Keys.CreateTeam(r.t.Context(), "team")
	require.NoError(r.t, err)
	_, secret, err := r.ctl.Keys.Create(r.t.Context(), team.ID, "key")
	require.NoError(r.t, err)
	return secret
}

// capsule makes a capsule whose daemon is well until serve is called on its box.
func (r *rig) capsule(key string) (id string, b *box) {
	r.t.Helper()
	caller, err := r.ctl.Keys.Authenticate(r.t.Context(), key)
	require.NoError(r.t, err)
	c, err := r.ctl.Capsules.Create(r.t.Context(), caller, nestbox.CapsuleSpec{})
	require.NoError(r.t, err)
	return c.ID, r.driver.find(c.ID)
}

// answer is what came of a request.
type answer struct {
	status int // 0 = the answer broke off, or the client left
	body   string
	took   time.Duration
	err    error
}

// call makes one request. The answer's body is read up to a megabyte.
func (r *rig) call(ctx context.Context, key, method, path, body string) answer {
	began := time.Now()
	req, err := http.NewRequestWithContext(ctx, method, r.url+path, strings.NewReader(body))
	require.NoError(r.t, err)
	req.Header.Set("X-API-Key", key)
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := r.http.Do(req)
	if err != nil {
		return answer{took: time.Since(began), err: err}
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	return answer{status: res.StatusCode, body: string(text), took: time.Since(began), err: err}
}

// images is a template that nobody looks into.
type images struct{}

func (images) Names() []string { return []string{nestbox.TemplateMinimal} }

func (images) Acquire(string) (image.Root, error) { return image.Root{Dir: "/"}, nil }
func (images) Use(string)                         {}
func (images) Release(string)                     {}
func (images) Sweep()                             {}

// driver makes boxes.
type driver struct {
	t     *testing.T
	mu    sync.Mutex
	boxes map[string]*box
}

func (d *driver) Name() string                       { return "hostile" }
func (d *driver) Capabilities() []sandbox.Capability { return nil }
func (d *driver) Close() error                       { return nil }

func (d *driver) List(context.Context) ([]string, error) { return nil, nil }

func (d *driver) Open(context.Context, string) (sandbox.Sandbox, error) {
	return nil, nestbox.Errorf(nestbox.CodeNotFound, "none")
}

func (d *driver) Create(_ context.Context, spec sandbox.Spec) (sandbox.Sandbox, error) {
	b, err := newBox(spec)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.boxes[spec.ID] = b
	return b, nil
}

func (d *driver) Destroy(_ context.Context, id string) error {
	if b := d.find(id); b != nil {
		b.end()
	}
	return nil
}

func (d *driver) find(id string) *box {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.boxes[id]
}

// box is a sandbox: a listener, and whatever answers behind it.
type box struct {
	id     string
	server *http.Server
	addr   string
	done   chan struct{}
	end    func()
	quit   chan struct{} // closed when scripts are to end

	mu     sync.Mutex
	script func(*peer) // nil = a daemon that is well
}

// GuardMemory implements sandbox.Sandbox.
func (b *box) GuardMemory(context.Context, func(context.Context, int64) error) {}

// peer is one connection to a script, with the request that came.
type peer struct {
	net.Conn
	req  *http.Request
	quit <-chan struct{}
}

func newBox(spec sandbox.Spec) (*box, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	machine, err := envd.New(envd.Config{Version: "well"})
	if err != nil {
		return nil, err
	}
	well := guestrpc.RequireToken(spec.Env[sandbox.EnvToken], guestrpc.NewHandler(func(*http.Request) (guest.Guest, error) { return machine, nil }))
	b := &box{id: spec.ID, addr: listener.Addr().String(), done: make(chan struct{}), quit: make(chan struct{})}
	var running sync.WaitGroup
	b.server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		running.Add(1)
		defer running.Done()
		b.mu.Lock()
		script := b.script
		b.mu.Unlock()
		if script == nil {
			well.ServeHTTP(w, r)
			return
		}
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		gone := make(chan struct{})
		defer close(gone)
		running.Go(func() {
			select {
			case <-b.quit:
				_ = conn.Close()
			case <-gone:
			}
		})
		script(&peer{Conn: conn, req: r, quit: b.quit})
	})}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = b.server.Serve(listener)
	}()
	b.end = sync.OnceFunc(func() {
		close(b.quit)
		_ = b.server.Close()
		<-served
		running.Wait()
		_ = machine.Close()
		close(b.done)
	})
	return b, nil
}

func (b *box) serve(script func(*peer)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.script = script
}

func (b *box) ID() string            { return b.id }
func (b *box) Done() <-chan struct{} { return b.done }
func (b *box) Reason() string        { return "ended" }
func (b *box) Close() error          { return nil }

func (b *box) Dial(ctx context.Context, _ uint16) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", b.addr)
}

// usage is what this process uses.
type usage struct{ goroutines, descriptors, threads, heapMiB int }

func measure(t *testing.T) usage {
	t.Helper()
	runtime.GC()
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	count := func(dir string) int {
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		return len(entries)
	}
	return usage{runtime.NumGoroutine(), count("/proc/self/fd"), count("/proc/self/task"), int(mem.HeapAlloc >> 20)}
}

// peakHeap calls f and returns the most memory, in MiB, that the heap held
// meanwhile.
func peakHeap(f func()) int {
	done, peak := make(chan struct{}), make(chan int)
	go func() {
		most := 0
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			var mem runtime.MemStats
			runtime.ReadMemStats(&mem)
			most = max(most, int(mem.HeapInuse>>20))
			select {
			case <-tick.C:
			case <-done:
				peak <- most
				return
			}
		}
	}()
	f()
	close(done)
	return <-peak
}
