package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox/internal/config"
	"github.com/nestbox/nestbox/internal/egress"
	"github.com/nestbox/nestbox/internal/sandbox/gvisor"
)

// newEgress is the egress process, which `nestbox up` starts and which goes on when the
// server is gone.
func newEgress() *cobra.Command {
	var dir string
	var lifted []string
	cmd := &cobra.Command{
		Use:    "egress",
		Short:  "Serve the way of a host's capsules out to the world",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ranges, err := config.Up{EgressAllow: lifted}.Lifted()
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM)
			defer stop()
			err = egress.Run(ctx, dir, ranges, newLog(cmd.ErrOrStderr(), "info"))
			if errors.Is(err, egress.ErrServed) {
				return nil // somebody else was quicker
			}
			return err
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "folder of its state")
	cmd.Flags().StringSliceVar(&lifted, "egress-allow", nil, "private ranges that capsules may reach")
	return cmd
}

// startEgress has an egress process run as long as the server does, and returns the
// client of it; nil if this machine cannot have a way out, and need not by default.
func startEgress(ctx context.Context, cfg config.Up, log *slog.Logger, undo *closers) (gvisor.Egress, error) {
	if err := egress.Probe(); err != nil {
		if cfg.Egress == config.EgressOpen { // it was there when the machine was examined
			return nil, err
		}
		return nil, nil
	}
	lifted, err := cfg.Lifted()
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(runDir(cfg.Dir), "egress")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	client := egress.NewClient(dir)
	ctx, stop := context.WithCancel(ctx)
	var kept sync.WaitGroup
	kept.Go(func() {
		client.Keep(ctx, log, lifted, func() *exec.Cmd { return egressCommand(self, dir, filepath.Join(cfg.Dir, "egress.log"), lifted, log) })
	})
	undo.add(func() error {
		stop()
		kept.Wait()
		client.Close()
		return nil
	})
	return client, nil
}

// egressCommand is a process that outlives this one, and gets no secret of it.
func egressCommand(self, dir, logFile string, lifted []netip.Prefix, log *slog.Logger) *exec.Cmd {
	cmd := exec.Command(self, "egress", "--dir", dir)
	for _, p := range lifted {
		cmd.Args = append(cmd.Args, "--egress-allow", p.String())
	}
	cmd.Env = []string{}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		log.Warn("the egress process has no log", "error", fmt.Errorf("open %s: %w", logFile, err))
		return cmd
	}
	cmd.Stderr = out // and closed with this process, or by the collector
	return cmd
}
