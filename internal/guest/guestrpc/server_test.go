package guestrpc

import (
	"context"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testToken = "the token of the tests"

// patience is how long a test waits for what must happen.
const patience = 60 * time.Second

// server is a Guest served over TCP.
type server struct {
	addr string
	http *http.Server
}

// serve serves g until the test ends.
func serve(t testing.TB, g guest.Guest) *server { return serveAlive(t, g, aliveEvery) }

func serveAlive(t testing.TB, g guest.Guest, alive time.Duration) *server {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	handler := newHandler(func(*http.Request) (guest.Guest, error) { return g, nil }, alive)
	var running sync.WaitGroup
	counted := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		running.Add(1)
		defer running.Done()
		handler.ServeHTTP(w, r)
	})
	s := &server{http: &http.Server{
		Handler:           RequireToken(testToken, counted),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: patience,
	}}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s.addr = listener.Addr().String()
	done := make(chan error, 1)
	go func() { done <- s.http.Serve(listener) }()
	t.Cleanup(func() {
		cancel()
		require.NoError(t, s.http.Close())
		require.ErrorIs(t, <-done, http.ErrServerClosed)
		running.Wait() // a handler that does not end is a leak
	})
	return s
}

func (s *server) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", s.addr)
}

// client returns a Client of s that is closed with the test.
func (s *server) client(t testing.TB) *Client { return newTestClient(t, s.dial) }

func newTestClient(t testing.TB, dial func(context.Context) (net.Conn, error)) *Client {
	t.Helper()
	c := NewClient(ClientConfig{Dial: dial, Header: http.Header{TokenHeader: {testToken}}})
	t.Cleanup(c.Close)
	return c
}

// scripted is a Guest whose methods are given by a test. Those that are not
// panic.
type scripted struct {
	ping   func(context.Context) (guest.Info, error)
	dialTo func(context.Context, uint16) (net.Conn, error)
	start  func(context.Context, nestbox.ProcessSpec, *guest.Attach) (nestbox.Process, guest.OutputReader, error)
	attach func(context.Context, nestbox.Selector, guest.Attach) (guest.OutputReader, error)
	procs  []nestbox.Process
	wait   func(context.Context, nestbox.Selector) (nestbox.Process, error)
	stdin  func(context.Context, nestbox.Selector, []byte, bool) error
	signal func(context.Context, nestbox.Selector, syscall.Signal) error
	read   func(context.Context, string) (io.ReadCloser, nestbox.FileInfo, error)
	write  func(context.Context, string, io.Reader, guest.WriteOptions) (nestbox.FileInfo, error)
	list   func(context.Context, string, int) ([]nestbox.FileInfo, error)
	watch  func(context.Context, string, bool) (guest.FileWatch, error)
	pack   func(context.Context, string, io.Writer, func() error) ([]string, error)
}

func (s *scripted) Ping(ctx context.Context) (guest.Info, error) {
	if s.ping == nil {
		return guest.Info{Features: guest.Features()}, nil
	}
	return s.ping(ctx)
}

func (s *scripted) Processes() guest.Processes { return scriptedProcesses{s} }

func (s *scripted) Files() guest.Files { return scriptedFiles{s} }

func (s *scripted) Dial(ctx context.Context, port uint16) (net.Conn, error) {
	return s.dialTo(ctx, port)
}

type scriptedProcesses struct{ s *scripted }

func (p scriptedProcesses) Start(ctx context.Context, spec nestbox.ProcessSpec, attach *guest.Attach) (nestbox.Process, guest.OutputReader, error) {
	return p.s.start(ctx, spec, attach)
}

func (p scriptedProcesses) List(context.Context, bool) ([]nestbox.Process, error) {
	return p.s.procs, nil
}

func (p scriptedProcesses) Get(context.Context, nestbox.Selector) (nestbox.Process, error) {
	return nestbox.Process{}, nestbox.Errorf(nestbox.CodeUnsupported, "not scripted")
}

func (p scriptedProcesses) Wait(ctx context.Context, sel nestbox.Selector) (nestbox.Process, error) {
	return p.s.wait(ctx, sel)
}

func (p scriptedProcesses) Locate(context.Context, nestbox.Selector, nestbox.Since, nestbox.Stream) (int64, error) {
	return 0, nestbox.Errorf(nestbox.CodeUnsupported, "not scripted")
}

func (p scriptedProcesses) Tree(context.Context) ([]nestbox.SystemProcess, error) {
	return nil, nestbox.Errorf(nestbox.CodeUnsupported, "not scripted")
}

func (p scriptedProcesses) Attach(ctx context.Context, sel nestbox.Selector, attach guest.Attach) (guest.OutputReader, error) {
	return p.s.attach(ctx, sel, attach)
}

func (p scriptedProcesses) WriteStdin(ctx context.Context, sel nestbox.Selector, data []byte, eof bool) error {
	return p.s.stdin(ctx, sel, data, eof)
}

func (p scriptedProcesses) Resize(context.Context, nestbox.Selector, int, int) error {
	return nestbox.Errorf(nestbox.CodeUnsupported, "not scripted")
}

func (p scriptedProcesses) Signal(ctx context.Context, sel nestbox.Selector, sig syscall.Signal) error {
	return p.s.signal(ctx, sel, sig)
}

func (p scriptedProcesses) Kill(context.Context, nestbox.Selector, guest.Kill) (nestbox.Process, error) {
	return nestbox.Process{}, nestbox.Errorf(nestbox.CodeUnsupported, "not scripted")
}

func (p scriptedProcesses) KillBiggest(context.Context, int64) (guest.Victim, error) {
	return guest.Victim{}, nestbox.Errorf(nestbox.CodeUnsupported, "not scripted")
}

type scriptedFiles struct{ s *scripted }

func (f scriptedFiles) Read(ctx context.Context, path string, _ int64) (io.ReadCloser, nestbox.FileInfo, error) {
	return f.s.read(ctx, path)
}

func (f scriptedFiles) Write(ctx context.Context, path string, r io.Reader, opts guest.WriteOptions) (nestbox.FileInfo, error) {
	return f.s.write(ctx, path, r, opts)
}

func (f scriptedFiles) Stat(context.Context, string) (nestbox.FileInfo, error) {
	return nestbox.FileInfo{}, nestbox.Errorf(nestbox.CodeUnsupported, "not scripted")
}

func (f scriptedFiles) List(ctx context.Context, path string, depth int) ([]nestbox.FileInfo, error) {
	return f.s.list(ctx, path, depth)
}

func (f scriptedFiles) Mkdir(context.Context, string) (nestbox.FileInfo, error) {
	return nestbox.FileInfo{}, nestbox.Errorf(nestbox.CodeUnsupported, "not scripted")
}

func (f scriptedFiles) Remove(context.Context, string) error {
	return nestbox.Errorf(nestbox.CodeUnsupported, "not scripted")
}

// aProcess is a record that can be of a process.
func aProcess() nestbox.Process {
	return nestbox.Process{ID: 1, PID: 7, Tag: "t", Cmd: "cmd", StartedAt: time.Now().UTC()}
}

// aFile is what can be of a file.
func aFile() nestbox.FileInfo {
	return nestbox.FileInfo{Name: "f", Path: "/f", Type: nestbox.FileTypeFile}
}

func anExit() *nestbox.Exit {
	return &nestbox.Exit{Reason: nestbox.ReasonExited, At: time.Now().UTC()}
}

func (f scriptedFiles) Watch(ctx context.Context, path string, recursive bool) (guest.FileWatch, error) {
	return f.s.watch(ctx, path, recursive)
}

func (f scriptedFiles) Pack(ctx context.Context, path string, _ guest.PackOptions, w io.Writer, begin func() error) ([]string, error) {
	return f.s.pack(ctx, path, w, begin)
}

func (f scriptedFiles) Unpack(_ context.Context, _ string, r io.Reader, _ guest.UnpackOptions) (nestbox.Unpacked, error) {
	n, err := io.Copy(io.Discard, r)
	return nestbox.Unpacked{Bytes: n}, err
}
