package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"syscall"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/hostagent"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// probeIn is how long the sandbox of a probe may take until its daemon listens:
// much longer than on any machine that can be worked with, since a platform
// that does not work may just hang.
const probeIn = 20 * time.Second

// probe boots a sandbox and removes it, so that a machine on which that cannot
// be is found out now and not by the first caller. A full disk is no reason not
// to start.
func probe(ctx context.Context, driver sandbox.Driver, images hostagent.Images, log *slog.Logger) error {
	root, err := images.Acquire(nestbox.TemplateMinimal)
	if err != nil {
		return err
	}
	defer images.Release(root.Image)
	spec := sandbox.Spec{
		ID: nestbox.NewID(nestbox.PrefixCapsule), Root: root,
		Resources: nestbox.Resources{VCPUs: 1, MemoryMB: nestbox.MinMemoryMB, DiskMB: nestbox.MinDiskMB, PidsMax: nestbox.MinPids},
		Env:       map[string]string{sandbox.EnvToken: nestbox.RandomHex(32)},
	}
	began := time.Now()
	limited, cancel := context.WithTimeout(ctx, probeIn)
	defer cancel()
	err = boot(limited, driver, spec)
	err = errors.Join(err, driver.Destroy(context.WithoutCancel(ctx), spec.ID))
	switch {
	case errors.Is(err, syscall.ENOSPC):
		log.Error("whether capsules can run is not known: the disk is full", "error", err)
		return nil
	case err != nil && limited.Err() != nil:
		return fmt.Errorf("a first sandbox did not run within %v: %w", probeIn, err)
	case err != nil:
		return fmt.Errorf("a first sandbox does not run: %w", err)
	}
	log.Debug("a first sandbox ran", "took", time.Since(began))
	return nil
}

// boot starts a sandbox and returns when its daemon listens.
func boot(ctx context.Context, driver sandbox.Driver, spec sandbox.Spec) error {
	sb, err := driver.Create(ctx, spec)
	if err != nil {
		return err
	}
	defer sb.Close()
	for {
		conn, err := sb.Dial(ctx, sandbox.EnvdPort)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-sb.Done():
			return fmt.Errorf("it ended: %s", sb.Reason())
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}
