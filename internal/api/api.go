// Package api is the HTTP face of Nestbox: JSON operations, file transfers,
// output streams over WebSocket, Server-Sent Events and plain HTTP, and the
// OpenAPI document that is made from the same Go types. Paths, bodies and error
// codes of what Wrenn's API also has are Wrenn's; what goes beyond it is added.
//
// Wire types live here and nowhere else. The package may import
// internal/control, the guest contract and the root package; never the store,
// a driver or generated code.
package api

import (
	"bytes"
	"context"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humachi"
	"github.com/go-chi/chi/v5"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/meter"
	"github.com/nestbox/nestbox/internal/spool"
)

// Config is what the API is made of. Zero limits mean the defaults.
type Config struct {
	Control *control.Control
	Log     *slog.Logger
	Version string // of the server, shown by /health

	// PortURL makes the address of a port inside a capsule that carries a
	// signed token. nil = no address is given, only the token.
	// It is made for the client whose request ctx is of.
	PortURL func(ctx context.Context, id string, port uint16, token string) string

	MaxJSONBytes   int64         // of a JSON request; 0 = 8 MiB
	MaxUploadBytes int64         // of files/write, and of what is spooled; 0 = 100 MiB
	MaxSpools      int           // uploads spooled at a time; 0 = 16
	SpoolDir       string        // for uploads whose file comes before its path, and for answers; "" = os.TempDir
	MaxSpoolBytes  int64         // of answers on disk, of which those of one team are a quarter; 0 = 1 GiB
	MaxMemory      int64         // that requests may make the server hold; 0 = 512 MiB
	MaxTeamMemory  int64         // of it those of one team; 0 = a quarter
	PingInterval   time.Duration // between pings on a WebSocket; 0 = 20 s
	EventInterval  time.Duration // between comments in Server-Sent Events; 0 = 15 s
	PongTimeout    time.Duration // a WebSocket peer that showed no life for so long is gone; 0 = 2 min
	AuthTimeout    time.Duration // for the first message of a WebSocket without a key; 0 = 5 s
	BodyTimeout    time.Duration // for a whole JSON body, and for each read of an upload; 0 = 1 min
}

func (c Config) withDefaults() Config {
	orDefault(&c.Log, slog.New(slog.DiscardHandler))
	orDefault(&c.MaxJSONBytes, 8<<20)
	orDefault(&c.MaxUploadBytes, 100<<20)
	orDefault(&c.MaxSpools, 16)
	orDefault(&c.SpoolDir, os.TempDir())
	orDefault(&c.MaxSpoolBytes, 1<<30)
	orDefault(&c.MaxMemory, 512<<20)
	orDefault(&c.MaxTeamMemory, c.MaxMemory/4)
	orDefault(&c.PingInterval, 20*time.Second)
	orDefault(&c.EventInterval, 15*time.Second)
	orDefault(&c.PongTimeout, 2*time.Minute)
	orDefault(&c.AuthTimeout, 5*time.Second)
	orDefault(&c.BodyTimeout, time.Minute)
	return c
}

func orDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// New returns the handler of the whole API. It starts no goroutine; each
// request waits for those that it starts. Streams have no time limit, so the
// http.Server must have no ReadTimeout and no WriteTimeout. They end with the
// server's base context.
func New(cfg Config) http.Handler { return newServer(cfg).root }

// server is the state that the handlers share.
type server struct {
	cfg     Config
	control *control.Control
	log     *slog.Logger
	root    chi.Router
	json    huma.API      // operations that take JSON, and an API key
	raw     huma.API      // operations that read their body themselves, and take an API key
	open    huma.API      // operations that need no key, or ask for it themselves
	spools  chan struct{} // one token for each upload that is spooled
	buffers sync.Pool     // *bytes.Buffer, of frames
	answers *spool.Pool   // what is collected before it can be sent
	memory  *meter.Meter
}

func newServer(cfg Config) *server {
	cfg = cfg.withDefaults()
	configureHuma()
	s := &server{
		cfg:     cfg,
		control: cfg.Control,
		log:     cfg.Log,
		root:    chi.NewRouter(),
		spools:  make(chan struct{}, cfg.MaxSpools),
		answers: spool.NewPool(cfg.SpoolDir, cfg.MaxSpoolBytes, cfg.MaxSpoolBytes/4),
		memory:  meter.New(cfg.MaxMemory, cfg.MaxTeamMemory),
		buffers: sync.Pool{New: func() any { return new(bytes.Buffer) }},
	}
	s.root.Use(s.observe)
	s.root.NotFound(s.notFound)
	s.root.MethodNotAllowed(s.methodNotAllowed)
	doc := newDocument() // the three share one
	keyed := s.root.With(s.authenticate)
	s.open = humachi.New(s.root, doc)
	s.raw = humachi.New(keyed, doc)
	s.json = humachi.New(keyed.With(s.readJSON), doc)
	for _, api := range []huma.API{s.open, s.raw, s.json} {
		api.UseMiddleware(s.checkQuery)
	}
	s.registerMeta()
	s.registerCapsules()
	s.registerExec()
	s.registerProcesses()
	s.registerStreams()
	s.registerFiles()
	s.registerWatch()
	s.registerTransfers()
	s.registerArchive()
	s.registerPorts()
	s.registerPortSettings()
	s.registerForward()
	s.registerNetwork()
	return s
}

// CapsulePath is what every path about one capsule has in it. Types that are
// embedded in inputs have exported names, since huma sees no others.
type CapsulePath struct {
	ID string `path:"id" doc:"The capsule's id or name" example:"cl-0123456789abcdefghijklmno"`
}

// idOf returns the id of a capsule that a path names, maybe by its name.
func (s *server) idOf(ctx context.Context, caller control.Caller, id string) (string, error) {
	if !nestbox.ValidCapsuleName(id) {
		return id, nil
	}
	c, err := s.control.Capsules.Get(ctx, caller, id)
	return c.ID, err
}

// ProcessPath is what every path about one process has in it.
type ProcessPath struct {
	CapsulePath
	Selector string `path:"selector" doc:"A process id, such as @7; all digits: a PID; anything else: a tag. A PID or a tag means the newest process that has it" example:"web"`
}

// files returns the files of the capsule, for an operation on path.
func (s *server) files(ctx context.Context, caller control.Caller, id, path string) (guest.Files, error) {
	if err := nestbox.ValidatePath(path); err != nil {
		return nil, err
	}
	g, err := s.control.Capsules.Guest(ctx, caller, id)
	if err != nil {
		return nil, err
	}
	return g.Files(), nil
}
