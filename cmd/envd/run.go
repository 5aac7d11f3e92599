package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/durable"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/envd"
	"github.com/nestbox/nestbox/internal/guest/guestrpc"
)

const (
	// headerTimeout is how long a client has for the header of a request.
	headerTimeout = 30 * time.Second

	// idleTimeout is longer than clients keep unused connections, so that it
	// is they who close them and no request is sent into a closing one.
	idleTimeout = 5 * time.Minute

	// maxHeader bounds the header of a request.
	maxHeader = 64 << 10

	// stopTimeout bounds the killing of what still runs when envd stops.
	stopTimeout = 5 * time.Second
)

// run serves until ctx ends, or forever.
func run(ctx context.Context, cfg config, log *slog.Logger) error {
	if cfg.Hostname != "" {
		// A capsule whose image has no such place goes on without.
		if err := writeEtc("/etc", cfg.Hostname, cfg.Resolver); err != nil {
			log.Warn("cannot write files of /etc", slog.Any("err", err))
		}
	}
	machine, err := envd.New(envd.Config{Version: nestbox.Version, Log: log, Limits: envd.Limits{Pids: cfg.MaxPids}, Cgroups: cfg.Cgroups, Env: cfg.Env, User: cfg.User, Cwd: cfg.Cwd})
	if err != nil {
		return err
	}
	defer machine.Close()
	listener, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return err
	}
	// Tunnels are no longer the server's: they end with its base context.
	baseCtx, cutTunnels := context.WithCancel(context.WithoutCancel(ctx))
	defer cutTunnels()
	handler := guestrpc.NewHandler(func(*http.Request) (guest.Guest, error) { return machine, nil })
	server := &http.Server{
		Handler:           guestrpc.RequireToken(cfg.Token, handler),
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return baseCtx },
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(guestrpc.ReadAhead(listener)) }()
	if cfg.PortFile != "" {
		err = writePort(cfg.PortFile, listener.Addr())
	}
	if err == nil {
		log.Info("listening", slog.String("address", listener.Addr().String()))
		select {
		case err = <-served:
			return err
		case <-ctx.Done():
		}
	}
	killAll(context.WithoutCancel(ctx), machine, log)
	closeErr := server.Close()
	if serveErr := <-served; !errors.Is(serveErr, http.ErrServerClosed) {
		closeErr = errors.Join(closeErr, serveErr)
	}
	return errors.Join(err, closeErr)
}

// writePort writes the number of the port that envd listens on. A program that waits
// for the file never sees a part of it.
func writePort(path string, addr net.Addr) error {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return errors.New("no TCP address: " + addr.String())
	}
	return durable.WriteFile(path, []byte(strconv.Itoa(tcp.Port)+"\n"), 0o644)
}

// withSignals returns a context that SIGTERM and SIGINT end, unless envd is
// PID 1: the processes of a capsule cannot stop their own daemon, as they
// cannot send a fatal signal to any init. (The signals are caught and not
// ignored, because children would inherit that.)
func withSignals(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case s := <-signals:
				if os.Getpid() != 1 && (s == syscall.SIGTERM || s == syscall.SIGINT) {
					cancel()
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		cancel()
		<-stopped
	}
}

// killAll kills the processes that live, as the end of a capsule does.
func killAll(ctx context.Context, machine guest.Guest, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	procs, err := machine.Processes().List(ctx, false)
	if err != nil {
		log.Warn("cannot list the processes to kill", slog.Any("err", err))
		return
	}
	var kills sync.WaitGroup
	for _, p := range procs {
		kills.Go(func() {
			if _, err := machine.Processes().Kill(ctx, nestbox.Selector{PID: p.PID}, guest.Kill{}); err != nil {
				log.Warn("cannot kill a process", slog.Int("pid", p.PID), slog.Any("err", err))
			}
		})
	}
	kills.Wait()
}
