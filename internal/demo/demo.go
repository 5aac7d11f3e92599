// Package demo walks through Nestbox's main job on a real server, as a client
// of it, and says at each step what it proves.
//
// It uses the public client only.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

// Server is the server that the walk uses, and ends and starts.
type Server interface {
	Start(ctx context.Context) error
	KillHard() error // kill -9
	Stop(ctx context.Context) error
	URL() string
	Key() (string, error)
}

// walk is one run of the demo.
type walk struct {
	out     io.Writer
	server  Server
	client  *client.Client
	capsule *client.Capsule
	steps   int
	began   time.Time
}

// Run walks through the main job. Whatever happens, it destroys its capsule
// and stops the server in the end.
func Run(ctx context.Context, server Server, out io.Writer) (err error) {
	w := &walk{out: out, server: server, began: time.Now()}
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if w.capsule != nil && err != nil {
			err = errors.Join(err, w.capsule.Destroy(end))
		}
		err = errors.Join(err, server.Stop(end))
		if err == nil {
			w.say("\nDone in %.1f s: everything above really happened, and nothing of it is left.", time.Since(w.began).Seconds())
		}
	}()
	for _, step := range []struct {
		title string
		do    func(*walk, context.Context) error
	}{
		{"Start the server: one process, embedded database", (*walk).startServer},
		{"Create a capsule: an isolated Linux machine on gVisor", (*walk).createCapsule},
		{"Put a small web site into it", (*walk).upload},
		{"Start a web server in the background", (*walk).startWeb},
		{"List it", (*walk).list},
		{"Reach it from outside, through its port", (*walk).reach},
		{"Read its output", (*walk).readOutput},
		{"Leave, lose the server to kill -9, come back without losing a byte", (*walk).leaveAndComeBack},
		{"Ask for an exit code after the fact", (*walk).exitCode},
		{"Kill a process and everything it started", (*walk).killTree},
		{"Let it reach one name of the world, and no other", (*walk).network},
		{"Open a terminal, lose it, come back to it", (*walk).terminal},
		{"Watch a directory while a program and the API change it", (*walk).watch},
		{"Look around inside: nothing of this machine is there", (*walk).isolation},
		{"Destroy the capsule", (*walk).destroy},
	} {
		w.steps++
		w.say("\n%2d. %s", w.steps, step.title)
		if err := step.do(w, ctx); err != nil {
			return fmt.Errorf("step %d, %s: %w", w.steps, step.title, err)
		}
	}
	return nil
}

func (w *walk) say(format string, args ...any) { fmt.Fprintf(w.out, format+"\n", args...) }

// did reports what was done or seen.
func (w *walk) did(format string, args ...any) { w.say("    "+format, args...) }

// proves reports what that shows.
func (w *walk) proves(format string, args ...any) { w.say("    ✔ "+format, args...) }

func (w *walk) startServer(ctx context.Context) error {
	if err := w.server.Start(ctx); err != nil {
		return err
	}
	key, err := w.server.Key()
	if err != nil {
		return err
	}
	w.client, err = client.New(client.Config{BaseURL: w.server.URL(), APIKey: key})
	if err != nil {
		return err
	}
	w.did("it answers on %s", w.server.URL())
	w.proves("no other service, no registry and no configuration was needed")
	return nil
}

func (w *walk) createCapsule(ctx context.Context) (err error) {
	begin := time.Now()
	w.capsule, err = w.client.Capsules.Create(ctx, nestbox.CapsuleSpec{})
	if err != nil {
		return err
	}
	took := time.Since(begin)
	kernel, err := w.sh(ctx, "uname -sr; nproc; awk '/MemTotal/{print int($2/1024)\" MiB\"}' /proc/meminfo")
	if err != nil {
		return err
	}
	w.did("%s, ready in %d ms; inside: %s", w.capsule.ID, took.Milliseconds(), oneLine(kernel))
	w.proves("it has a kernel, processors and memory of its own: gVisor's, not this machine's")
	return nil
}

func (w *walk) destroy(ctx context.Context) error {
	if err := w.capsule.Destroy(ctx); err != nil {
		return err
	}
	if err := w.capsule.Refresh(ctx); err != nil {
		return err
	}
	if w.capsule.Info.State != nestbox.StateStopped {
		return fmt.Errorf("the capsule is %s", w.capsule.Info.State)
	}
	w.proves("its processes, namespaces, mounts, cgroups and files are gone; its record says %q", w.capsule.Info.State)
	w.capsule = nil
	return nil
}
