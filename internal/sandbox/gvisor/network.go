package gvisor

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/sandbox"
)

var _ sandbox.Networker = (*Driver)(nil)

// makeNetwork makes the network of a sandbox, with its way out.
func (d *Driver) makeNetwork(ctx context.Context, spec sandbox.Spec) error {
	if err := d.netns.Create(spec.ID); err != nil || d.cfg.Egress == nil {
		return err
	}
	if err := d.netns.Route(spec.ID); err != nil {
		return fmt.Errorf("make the way out: %w", err)
	}
	return d.cfg.Egress.Put(ctx, spec.ID, d.netns.Outer(spec.ID), spec.Network)
}

// SetNetwork implements sandbox.Networker.
func (d *Driver) SetNetwork(ctx context.Context, id string, policy nestbox.NetworkPolicy) error {
	if err := d.wayOut(id); err != nil {
		return err
	}
	return d.cfg.Egress.Put(ctx, id, d.netns.Outer(id), policy)
}

// Network implements sandbox.Networker.
func (d *Driver) Network(ctx context.Context, id string) (nestbox.NetworkReport, error) {
	if err := d.wayOut(id); err != nil {
		return nestbox.NetworkReport{}, err
	}
	return d.cfg.Egress.Look(ctx, id)
}

// wayOut reports whether a sandbox has a way out. One that was made without stays so:
// gVisor takes the routes of the namespace over when it starts. Its resolv.conf tells.
func (d *Driver) wayOut(id string) error {
	if _, err := os.Stat(d.netns.Outer(id)); err != nil {
		return nestbox.Errorf(nestbox.CodeNotFound, "no sandbox has a network by the id %.60q", id)
	}
	text, err := os.ReadFile(filepath.Join(d.bundle(id), "resolv.conf"))
	if d.cfg.Egress == nil || err != nil || string(text) != d.resolvConf() {
		return nestbox.Errorf(nestbox.CodeUnsupported, "the capsule has no way out: the host had none when it was made")
	}
	return nil
}
