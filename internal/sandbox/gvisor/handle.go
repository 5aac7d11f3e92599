package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/cgroup"
	"github.com/nestbox/nestbox/internal/durable"
	"github.com/nestbox/nestbox/internal/pidfd"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// handle is what a later Driver needs to take up a running sandbox. A sandbox
// without one never ran, as far as anybody was told.
type handle struct {
	Sentry   pidfd.Process
	Gofer    pidfd.Process
	MemoryMB int
}

const (
	handleFile  = "record.json"
	destroyFile = "destroy" // is there from the beginning of Destroy on
)

// writeHandle records the sandbox that runsc just started.
func (d *Driver) writeHandle(spec sandbox.Spec) error {
	rec := handle{MemoryMB: spec.Resources.MemoryMB}
	var state struct {
		GoferPID int `json:"goferPid"`
		Sandbox  struct {
			PID int `json:"pid"`
		} `json:"sandbox"`
	}
	text, err := os.ReadFile(filepath.Join(d.runscRoot(), runscName(spec.ID)+"state"))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, &state); err != nil {
		return err
	}
	for _, p := range []struct {
		pid  int
		into *pidfd.Process
	}{{state.Sandbox.PID, &rec.Sentry}, {state.GoferPID, &rec.Gofer}} {
		if *p.into, err = pidfd.Lookup(p.pid); err != nil {
			return err
		}
	}
	if text, err = json.Marshal(rec); err != nil {
		return err
	}
	path := filepath.Join(d.bundle(spec.ID), handleFile)
	return durable.WriteFile(path, text, 0o600)
}

func (d *Driver) readHandle(id string) (handle, error) {
	var rec handle
	text, err := os.ReadFile(filepath.Join(d.bundle(id), handleFile))
	if errors.Is(err, fs.ErrNotExist) {
		return rec, nestbox.Errorf(nestbox.CodeNotFound, "there is no trace of the sandbox, as after a restart of its host")
	}
	if err == nil {
		err = json.Unmarshal(text, &rec)
	}
	if err != nil {
		return rec, nestbox.Errorf(nestbox.CodeInternal, "read the handle of sandbox %s: %w", id, err)
	}
	return rec, nil
}

// instance is the group above those of this Driver's sandboxes.
func (d *Driver) instance() *cgroup.Group { return d.cgroups.Group(d.instancePath()) }

func (d *Driver) cgroup(id string) *cgroup.Group {
	return d.cgroups.Group(d.instancePath() + "/" + id)
}

func (d *Driver) instancePath() string { return "nestbox/" + url.PathEscape(d.cfg.RunDir) }

// removeTime bounds a removal whose context does not, and egressIn the wait for an
// egress process.
const (
	removeTime = time.Minute
	egressIn   = 2 * time.Second
)

// remove removes every trace of a sandbox, whatever there is of it, the
// directory last. It may be repeated.
func (d *Driver) remove(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, removeTime)
	defer cancel()
	if err := d.removeAll(ctx, id); err != nil {
		return nestbox.Errorf(nestbox.CodeInternal, "remove sandbox %s: %w", id, err)
	}
	return nil
}

func (d *Driver) removeAll(ctx context.Context, id string) error {
	bundle, group := d.bundle(id), d.cgroup(id)
	err := durable.WriteFile(filepath.Join(bundle, destroyFile), nil, 0o600)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	killed, err := group.Kill(ctx)
	if err != nil {
		return err
	}
	if rec, err := d.readHandle(id); err == nil {
		killed = append(killed, rec.Sentry.PID, rec.Gofer.PID)
	}
	for _, pid := range killed {
		pidfd.Reap(pid)
	}
	if d.cfg.Egress != nil {
		soon, cancel := context.WithTimeout(ctx, egressIn)
		err := d.cfg.Egress.Remove(soon, id)
		cancel()
		if err != nil { // the sandbox is dead, and the next egress process sees that its namespace is gone
			d.cfg.Log.Warn("closing the egress of a sandbox", "capsule", id, "error", err)
		}
	}
	if err := d.netns.Remove(id); err != nil {
		return err
	}
	for _, pattern := range []string{runscName(id) + "*", runscSocket(id)} {
		if err := removeMatching(filepath.Join(d.runscRoot(), pattern)); err != nil {
			return err
		}
	}
	if err := group.Remove(ctx); err != nil {
		return err
	}
	// Its file has no name, unless the start was killed in the middle.
	if err := os.RemoveAll(d.layer(id)); err != nil {
		return err
	}
	if err := d.uids.release(bundle); err != nil {
		return err
	}
	// Before the mark of Destroy: see destroyed.
	if err := os.Remove(filepath.Join(bundle, handleFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(bundle)
}

// destroyed reports that Destroy has at least begun with a sandbox that ran.
func (d *Driver) destroyed(id string) bool {
	if _, err := os.Stat(filepath.Join(d.bundle(id), destroyFile)); err == nil {
		return true
	}
	// The mark may have gone again, with the rest.
	_, err := os.Stat(filepath.Join(d.bundle(id), handleFile))
	return err != nil
}

func removeMatching(pattern string) error {
	paths, err := filepath.Glob(pattern)
	if err != nil {
		return err
	}
	for _, path := range paths {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// runscName is what the names of runsc's own files of a sandbox begin with.
func runscName(id string) string { return id + "_sandbox:" + id + "." }

func runscSocket(id string) string { return "runsc-" + id + ".sock" }

func (d *Driver) listBundles() ([]string, error) {
	return names(d.bundles(), func(name string) string { return name })
}

// listLayers finds what a reboot, which takes the bundles away, leaves.
func (d *Driver) listLayers() ([]string, error) {
	return names(d.layers(), func(name string) string { return name })
}

func (d *Driver) listRunsc() ([]string, error) {
	return names(d.runscRoot(), func(name string) string {
		if rest, ok := strings.CutPrefix(name, "runsc-"); ok {
			return strings.TrimSuffix(rest, ".sock")
		}
		id, _, _ := strings.Cut(name, "_sandbox:")
		return id
	})
}

func names(dir string, id func(string) string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	ids := make([]string, 0, len(entries))
	for _, e := range entries {
		ids = append(ids, id(e.Name()))
	}
	return ids, err
}
