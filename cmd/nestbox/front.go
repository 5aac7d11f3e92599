package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/api"
	"github.com/nestbox/nestbox/internal/certfile"
	"github.com/nestbox/nestbox/internal/config"
	"github.com/nestbox/nestbox/internal/control"
	"github.com/nestbox/nestbox/internal/door"
	"github.com/nestbox/nestbox/internal/edge"
)

// Limits of the HTTP server. There is none on how long an answer may take:
// streams live as long as their readers.
const (
	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	maxHeader     = 32 << 10
	drainFor      = 3 * time.Second

	// A connection of HTTP/2 on which nothing comes is asked whether it lives, since
	// it may have streams on it that wait for long.
	pingAfter = 30 * time.Second
	pingTakes = 15 * time.Second

	// maxStreams of a connection at a time is what RFC 9113, 6.5.2 has as the least.
	maxStreams = 100
)

// front is how the server meets its clients.
type front struct {
	cfg     config.Up
	outside edge.Outside
	tls     *certfile.Pair // nil = it speaks plain HTTP
	log     *slog.Logger
}

func newFront(cfg config.Up, log *slog.Logger) (*front, error) {
	f := &front{cfg: cfg, log: log}
	var err error
	if f.outside.Base, err = cfg.Public(); err != nil {
		return nil, err
	}
	if f.outside.Trusted, err = cfg.Proxies(); err != nil {
		return nil, err
	}
	f.outside.Domain, f.outside.Everywhere = cfg.PortDomain()
	if cfg.TLSCert != "" {
		f.tls, err = certfile.Open(cfg.TLSCert, cfg.TLSKey, log)
	}
	return f, err
}

// server returns the HTTP server: versions 1 and 2, in clear too, which gRPC needs.
func (f *front) server(ctx context.Context, handler http.Handler, entrance *door.Door) *http.Server {
	server := &http.Server{
		Handler:           entrance.Handler(handler),
		ConnContext:       entrance.ConnContext,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(f.log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		Protocols:         new(http.Protocols),
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams, SendPingTimeout: pingAfter, PingTimeout: pingTakes},
	}
	server.Protocols.SetHTTP1(true)
	if f.tls != nil {
		server.Protocols.SetHTTP2(true)
		server.TLSConfig = f.tls.Config()
	} else {
		server.Protocols.SetUnencryptedHTTP2(true)
	}
	return server
}

// serve answers requests until ctx ends, then gives those under way a moment.
func (f *front) serve(ctx context.Context, ctl *control.Control, listener net.Listener) error {
	apiHandler := api.New(api.Config{Control: ctl, Log: f.log, Version: nestbox.Version, PortURL: f.outside.PortURL})
	requests, hangUp := context.WithCancelCause(context.WithoutCancel(ctx))
	defer hangUp(nil)
	inside := edge.New(edge.Config{Outside: f.outside, Ports: ctl.Ports, API: apiHandler, Origins: f.cfg.CORSOrigins, Log: f.log, Life: requests})
	defer inside.LetGo()
	ctl.Ports.OnEnding(inside.Ending)

	entrance := door.New(door.Config{
		MaxConns: f.cfg.MaxConnections, MaxPerAddress: f.cfg.MaxConnectionsPerAddress, MaxPerTeam: f.cfg.MaxRequestsPerTeam,
	})
	server := f.server(requests, inside, entrance)
	stopped := make(chan error, 1)
	go func() {
		<-ctx.Done()
		f.log.Info("stopping: requests under way have a moment to end, capsules go on", "seconds", drainFor.Seconds())
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainFor)
		defer cancel()
		err := server.Shutdown(drain)
		// What still runs are streams, and commands in the foreground: they resume later.
		hangUp(nestbox.Errorf(nestbox.CodeUnavailable, "the server is stopping"))
		if errors.Is(err, context.DeadlineExceeded) {
			err = server.Close()
		}
		stopped <- err
	}()
	f.log.Info("listening", "address", listener.Addr().String(), "tls", f.tls != nil)
	bounded := entrance.Listen(listener)
	answer := func() error { return server.Serve(bounded) }
	if f.tls != nil {
		answer = func() error { return server.ServeTLS(bounded, "", "") }
	}
	if err := answer(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-stopped
}
