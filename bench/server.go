package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/nestbox/nestbox/client"
)

// server is the `nestbox up` that is measured.
type server struct {
	url, key string
	cmd      *exec.Cmd
}

func startServer(ctx context.Context, bin, dir string) (*server, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(dir, "server.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	s := &server{url: "http://" + addr, cmd: exec.Command(bin, "up", "--dir", dir, "--listen", addr, "--log-level", "warn")}
	if own, err := ownAddress(); err == nil {
		s.cmd.Args = append(s.cmd.Args, "--egress-allow", own.String()+"/32")
	}
	s.cmd.Stdout, s.cmd.Stderr = log, log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	if err := s.await(ctx); err != nil {
		return nil, errors.Join(err, s.stop())
	}
	key, err := os.ReadFile(filepath.Join(dir, "api-key"))
	if err != nil {
		return nil, errors.Join(err, s.stop())
	}
	s.key = strings.TrimSpace(string(key))
	return s, nil
}

func (s *server) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		res, err := http.Get(s.url + "/health")
		if err == nil {
			res.Body.Close()
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the server does not answer: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (s *server) stop() error {
	return errors.Join(s.cmd.Process.Signal(syscall.SIGTERM), s.cmd.Wait())
}

// residentMB returns the resident memory of the server in MiB.
func (s *server) residentMB() int {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", s.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	var total, resident int
	if _, err := fmt.Sscan(string(data), &total, &resident); err != nil {
		return 0
	}
	return resident * os.Getpagesize() >> 20
}

// logs follows the output of a process as plain bytes. The process waits for
// it, as it does for the reader of a pipe.
func (b *bench) logs(ctx context.Context, c *client.Capsule, tag string) (io.ReadCloser, error) {
	url := b.server.url + "/v1/capsules/" + c.ID + "/processes/" + tag + "/logs?follow=true&lossless=true"
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("X-API-Key", b.server.key)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		return nil, errors.Join(fmt.Errorf("logs: %s", res.Status), res.Body.Close())
	}
	return res.Body, nil
}
