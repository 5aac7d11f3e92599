package hosttest

import (
	"context"
	"errors"
	"io"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

func deathCutsCalls(t *testing.T, s Subject) {
	endCutsCalls(t, s, "capsule died: ", s.Crash)
}

func destroyCutsCalls(t *testing.T, s Subject) {
	endCutsCalls(t, s, "capsule is stopped", func(t *testing.T, id string) { require.NoError(t, s.Host.Destroy(within(t), id)) })
}

// endCutsCalls has calls of every kind be under way when a capsule comes to its
// end: each says so, and so does each that comes later.
func endCutsCalls(t *testing.T, s Subject, want string, end func(t *testing.T, id string)) {
	status := create(t, s.Host)
	g, err := s.Host.Guest(within(t), status.ID)
	require.NoError(t, err)
	c := newCutCalls(t, g)
	var calls sync.WaitGroup
	for name, call := range c.all() {
		calls.Go(func() {
			for { // also what comes later
				if err := call(); err != nil {
					requireEnded(t, name, err, want)
					return
				}
			}
		})
	}
	c.underWay.Wait()
	end(t, status.ID)
	calls.Wait()
	require.NoError(t, within(t).Err())
	for name, call := range c.all() {
		requireEnded(t, name+", later", call(), want)
	}
}

func requireEnded(t *testing.T, name string, err error, want string) {
	t.Helper()
	if nestbox.CodeOf(err) != nestbox.CodeInvalidState || len(err.Error()) < len(want) || err.Error()[:len(want)] != want {
		t.Errorf("%s: %s: %v", name, nestbox.CodeOf(err), err)
	}
}

// cutCalls are calls that go on until their capsule ends.
type cutCalls struct {
	ctx      context.Context //nolint:containedctx // of the test
	g        guest.Guest
	process  nestbox.Selector
	streams  []guest.OutputReader
	file     io.Reader
	underWay sync.WaitGroup
	uploads  func() *stalled
}

const bigFile = "/var/tmp/big"

func newCutCalls(t *testing.T, g guest.Guest) *cutCalls {
	c := &cutCalls{ctx: within(t), g: g}
	// It takes no input, and no SIGTERM.
	p, own, err := g.Processes().Start(c.ctx, nestbox.ProcessSpec{
		Cmd: "sh", Args: []string{"-c", "trap '' TERM; truncate -s 1G " + bigFile + "; echo ready; sleep 1000 </dev/null & wait; wait"}, Stdin: true,
	}, &guest.Attach{})
	require.NoError(t, err)
	event, err := own.Next(c.ctx)
	require.NoError(t, err)
	require.Equal(t, "ready\n", string(event.Data))
	c.process, c.streams = nestbox.Selector{ID: p.ID}, []guest.OutputReader{own}
	for range 2 { // they share a stream
		r, err := g.Processes().Attach(c.ctx, c.process, guest.Attach{Since: nestbox.Since{Offset: event.End()}})
		require.NoError(t, err)
		c.streams = append(c.streams, r)
	}
	file, _, err := g.Files().Read(c.ctx, bigFile, 0)
	require.NoError(t, err)
	_, err = io.ReadFull(file, make([]byte, 1000))
	require.NoError(t, err)
	c.file = file
	t.Cleanup(func() {
		_ = file.Close()
		for _, r := range c.streams {
			_ = r.Close()
		}
	})
	c.underWay.Add(1)
	started := sync.OnceFunc(c.underWay.Done)
	c.uploads = func() *stalled { return &stalled{started: started, stop: make(chan struct{})} }
	return c
}

func (c *cutCalls) all() map[string]func() error {
	procs, files := c.g.Processes(), c.g.Files()
	calls := map[string]func() error{
		"ping": func() error { _, err := c.g.Ping(c.ctx); return err },
		"start": func() error {
			_, _, err := procs.Start(c.ctx, nestbox.ProcessSpec{Cmd: "true"}, nil)
			return err
		},
		"list":   func() error { _, err := procs.List(c.ctx, false); return err },
		"get":    func() error { _, err := procs.Get(c.ctx, c.process); return err },
		"wait":   func() error { _, err := procs.Wait(c.ctx, c.process); return err },
		"stdin":  func() error { return procs.WriteStdin(c.ctx, c.process, make([]byte, 1<<20), false) },
		"signal": func() error { return procs.Signal(c.ctx, c.process, syscall.SIGCONT) },
		"kill": func() error {
			_, err := procs.Kill(c.ctx, c.process, guest.Kill{Signal: syscall.SIGTERM, Grace: 2 * patience})
			return err
		},
		"attach": func() error {
			r, err := procs.Attach(c.ctx, c.process, guest.Attach{Lossless: true})
			if err == nil {
				err = r.Close()
			}
			return err
		},
		"stat":       func() error { _, err := files.Stat(c.ctx, bigFile); return err },
		"list files": func() error { _, err := files.List(c.ctx, "/etc", 1); return err },
		"remove":     func() error { return files.Remove(c.ctx, "/no/such") },
		"download":   func() error { _, err := io.Copy(io.Discard, io.LimitReader(c.file, 1<<20)); return err },
		"upload": func() error {
			_, err := files.Write(c.ctx, "/var/tmp/new", c.uploads(), guest.WriteOptions{})
			return err
		},
		"dial": func() error {
			conn, err := c.g.Dial(c.ctx, 1)
			if err == nil {
				return errors.Join(errors.New("something listens on port 1"), conn.Close())
			}
			if nestbox.CodeOf(err) == nestbox.CodeUnavailable { // as long as it runs
				return nil
			}
			return err
		},
	}
	for i, name := range []string{"own stream", "first stream", "shared stream"} {
		calls[name] = func() error { _, err := c.streams[i].Next(c.ctx); return err }
	}
	return calls
}

// stalled is content whose sender says nothing more.
type stalled struct {
	started func()
	stop    chan struct{}
	once    sync.Once
}

// Read implements io.Reader.
func (s *stalled) Read([]byte) (int, error) {
	s.started()
	<-s.stop
	return 0, errors.New("stopped")
}

// Stop implements guest.Stopper.
func (s *stalled) Stop() { s.once.Do(func() { close(s.stop) }) }
