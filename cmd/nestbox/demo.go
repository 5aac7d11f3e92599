package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox/internal/demo"
	"github.com/nestbox/nestbox/internal/egress/world"
)

func newDemo() *cobra.Command {
	return &cobra.Command{
		Use:   "demo",
		Short: "Walk through the main job on this machine, then clean up",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return errors.New("nestbox demo needs root: it runs a server that makes namespaces, mounts and cgroups")
			}
			// What is around a capsule here is the same everywhere, with or without a network.
			world.InOwnNetwork()
			around, err := world.Join()
			if err == nil {
				err = around.Resolve()
			}
			if err != nil {
				return fmt.Errorf("make a world to try the network in: %w", err)
			}
			defer around.Remove()
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT)
			defer stop()
			dir, err := os.MkdirTemp("", "nestbox-demo-*")
			if err != nil {
				return err
			}
			server, err := newDemoServer(dir)
			if err != nil {
				return err
			}
			if err := demo.Run(ctx, server, cmd.OutOrStdout()); err != nil {
				return fmt.Errorf("%w\n(state and log kept in %s)", err, dir)
			}
			return os.RemoveAll(dir)
		},
	}
}

// demoServer is a `nestbox up` in a process of its own.
type demoServer struct {
	dir    string
	addr   string
	cmd    *exec.Cmd
	exited chan error
}

func newDemoServer(dir string) (*demoServer, error) {
	// Capsules run as other users and must be able to reach their files.
	if err := os.Chmod(dir, 0o711); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	return &demoServer{dir: dir, addr: l.Addr().String()}, l.Close()
}

// URL implements demo.Server.
func (s *demoServer) URL() string { return "http://" + s.addr }

// Key implements demo.Server.
func (s *demoServer) Key() (string, error) {
	key, err := os.ReadFile(filepath.Join(s.dir, "api-key"))
	return strings.TrimSpace(string(key)), err
}

// Start implements demo.Server.
func (s *demoServer) Start(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(s.dir, "server.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	// Not CommandContext: Stop and KillHard end it.
	s.cmd = exec.Command(self, "up", "--dir", s.dir, "--listen", s.addr)
	s.cmd.Stdout, s.cmd.Stderr = log, log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Ctrl-C is for the demo
	if err := s.cmd.Start(); err != nil {
		return err
	}
	s.exited = make(chan error, 1)
	cmd, exited := s.cmd, s.exited
	go func() { exited <- cmd.Wait() }()
	ctx, cancel := context.WithTimeout(ctx, startIn)
	defer cancel()
	return awaitHealth(ctx, s.URL()+"/health", s.exited, os.Stdout)
}

// KillHard implements demo.Server.
func (s *demoServer) KillHard() error {
	err := s.cmd.Process.Kill()
	<-s.exited
	s.cmd = nil
	return err
}

// Stop implements demo.Server.
func (s *demoServer) Stop(ctx context.Context) error {
	if s.cmd == nil {
		return nil
	}
	err := s.cmd.Process.Signal(syscall.SIGTERM)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	select {
	case waitErr := <-s.exited:
		return errors.Join(err, waitErr)
	case <-ctx.Done():
		return errors.Join(err, ctx.Err(), s.cmd.Process.Kill())
	}
}
