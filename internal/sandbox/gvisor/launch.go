package gvisor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/netns"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// run starts the sandbox whose bundle is written, and returns when its envd has
// been exec'ed.
func (d *Driver) run(ctx context.Context, spec sandbox.Spec, ids userns) error {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.CallTimeout)
	defer cancel()
	bundle := d.bundle(spec.ID)
	cmd := d.command(ctx, spec, "run", "--detach", "--bundle="+bundle, "--pid-file="+filepath.Join(bundle, pidFile), spec.ID)
	// runsc is in the sandbox's control group from its first instruction on, so
	// that whatever it starts is found and killed there, however this ends.
	err := netns.OnThread(func() error {
		if err := d.mountRoot(spec.Root, spec.ID, ids); err != nil {
			return err
		}
		return d.cgroup(spec.ID).Start(cmd)
	})
	if err != nil {
		return nestbox.Errorf(nestbox.CodeInternal, "start sandbox %s: %w", spec.ID, err)
	}
	return d.wait(ctx, cmd, spec.ID)
}

// command is a call of runsc. It has no environment, which gVisor's processes
// would inherit, a session of its own, so that no signal to this process's
// group reaches it, and no output: what a sandbox writes to descriptors of
// runsc would be out of all bounds.
func (d *Driver) command(ctx context.Context, spec sandbox.Spec, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, d.cfg.Runsc[0])
	cmd.Args = append([]string{"runsc"}, d.cfg.Runsc[1:]...)
	cmd.Args = append(cmd.Args, d.flags(spec)...)
	cmd.Args = append(cmd.Args, args...)
	cmd.Env = []string{}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.WaitDelay = time.Second
	return cmd
}

func (d *Driver) flags(spec sandbox.Spec) []string {
	bundle := d.bundle(spec.ID)
	flags := []string{
		"--root=" + d.runscRoot(),
		"--log=" + filepath.Join(bundle, logFile),
		"--panic-log=" + filepath.Join(bundle, panicFile),
		"--platform=" + d.cfg.Platform,
		"--network=sandbox",
		// Of a root that is a directory; for an EROFS file the annotations say it.
		fmt.Sprintf("--overlay2=root:dir=%s,size=%dm", d.layer(spec.ID), spec.Resources.DiskMB),
		"--allow-rootfs-tar-annotation",
		"--ignore-cgroups", // it is put into one that we made
		"--host-settings=ignore",
		"--in-sandbox-cgroup=v2", // by which envd knows its process trees
		"--allow-live-tcp-migration=false",
		// An open descriptor of this process, not a name: nothing to clean up.
		fmt.Sprintf("--gofer-network-namespace=/proc/%d/fd/%d", os.Getpid(), d.empty.Fd()),
	}
	if spec.Root.EROFS != "" {
		// For sudo: who is root inside is root inside only. Not where the owners of the
		// host's files may be shown as nobody, whom setuid programs would become.
		flags = append(flags, "--allow-suid")
	}
	return flags
}

// wait returns how a call of runsc ended, with what it said.
func (d *Driver) wait(ctx context.Context, cmd *exec.Cmd, id string) error {
	err := cmd.Wait()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ended(ctx, "starting sandbox "+id)
	}
	return nestbox.Errorf(nestbox.CodeInternal, "start sandbox %s: %w: %s", id, err, d.lastWords(id))
}

// lastWords returns the last error that runsc logged, one JSON object a line.
func (d *Driver) lastWords(id string) string {
	text, err := os.ReadFile(filepath.Join(d.bundle(id), logFile))
	if err != nil {
		return err.Error()
	}
	text = bytes.TrimSpace(text)
	line := text[bytes.LastIndexByte(text, '\n')+1:]
	var entry struct {
		Msg string `json:"msg"`
	}
	if json.Unmarshal(line, &entry) == nil && entry.Msg != "" {
		return strings.TrimSpace(entry.Msg)
	}
	return string(line)
}

// Exec runs a command in a sandbox through runsc and returns its output. It is
// for tests and for looking into a sandbox whose envd does not answer.
func (d *Driver) Exec(ctx context.Context, id string, argv ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.CallTimeout)
	defer cancel()
	if _, err := os.Stat(d.bundle(id)); err != nil {
		return nil, nestbox.Errorf(nestbox.CodeNotFound, "capsule not found")
	}
	cmd := d.command(ctx, sandbox.Spec{ID: id, Resources: nestbox.DefaultResources}, append([]string{"exec", id}, argv...)...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return out, nestbox.Errorf(nestbox.CodeInternal, "exec in sandbox %s: %w", id, err)
	}
	return out, err
}
