package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	t.Cleanup(cancel)
	return ctx
}

func command(t *testing.T, c *client.Client) *client.Cmd {
	t.Helper()
	return c.Capsule(testCapsule).CommandContext(testContext(t), "prog", "arg")
}

// TestOutputIsExactUnderRandomCuts cuts the connection, and refuses new ones,
// at random, and wants each stream back byte by byte, once.
func TestOutputIsExactUnderRandomCuts(t *testing.T) {
	t.Parallel()
	for i := range 8 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			s := newScript()
			var cuts, refusals atomic.Int64
			s.cut = func() bool { return rand.IntN(8) == 0 && cuts.Add(1) > 0 }
			if i%2 == 1 { // instead, break in the middle of frames and answers
				s.cut = func() bool { return false }
				s.budget = func() int { cuts.Add(1); return 400 + rand.IntN(20_000) }
			}
			s.refuse = func() bool { return s.known(testID) && rand.IntN(5) == 0 && refusals.Add(1) > 0 }
			var want [2]bytes.Buffer
			done := make(chan struct{})
			go func() {
				defer close(done)
				for range 60 {
					which := rand.IntN(2)
					data := make([]byte, 1+rand.IntN(3000))
					for i := range data {
						data[i] = byte(rand.IntN(256))
					}
					want[which].Write(data)
					s.write([]string{"stdout", "stderr"}[which], data)
				}
				s.finish(7, "exited")
			}()
			c, _ := s.serve(t)
			var stdout, stderr bytes.Buffer
			cmd := command(t, c)
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			err := cmd.Run()
			<-done
			var exit *client.ExitError
			require.ErrorAs(t, err, &exit)
			require.Equal(t, 7, exit.Code)
			require.Equal(t, "exit status 7", err.Error(), "nothing else went wrong")
			require.True(t, bytes.Equal(want[0].Bytes(), stdout.Bytes()), "stdout: %d bytes, want %d", stdout.Len(), want[0].Len())
			require.True(t, bytes.Equal(want[1].Bytes(), stderr.Bytes()), "stderr: %d bytes, want %d", stderr.Len(), want[1].Len())
			starts, _, _ := s.state()
			require.Equal(t, 1, starts, "a start is never repeated once it was heard")
			t.Logf("%d cuts, %d refusals", cuts.Load(), refusals.Load())
		})
	}
}

// TestRestartOfTheServer takes the server away for a while in the middle.
func TestRestartOfTheServer(t *testing.T) {
	t.Parallel()
	s := newScript()
	c, server := s.serve(t)
	stdout := newGate(len("before"))
	cmd := command(t, c)
	cmd.Stdout = stdout
	s.write("stdout", []byte("before"))
	require.NoError(t, cmd.Start())
	<-stdout.reached

	addr, handler := server.Listener.Addr().String(), server.Config.Handler
	require.NoError(t, server.Listener.Close())
	s.hangUp()
	server.CloseClientConnections()
	s.write("stdout", []byte(" while away"))
	awaitRefusal(t, c)
	second := httptest.NewUnstartedServer(handler)
	require.NoError(t, second.Listener.Close())
	second.Listener = listenAgain(t, addr)
	second.Start()
	t.Cleanup(func() { s.finish(137, "killed"); c.CloseIdle(); second.Close() })

	s.write("stdout", []byte(" after"))
	s.finish(0, "exited")
	require.NoError(t, cmd.Wait())
	require.Equal(t, "before while away after", stdout.String())
	require.Equal(t, nestbox.ReasonExited, cmd.Exit.Reason)
}

// TestGap wants lost output to be said, whichever way was chosen.
func TestGap(t *testing.T) {
	t.Parallel()
	s := newScript()
	s.write("stdout", []byte("0123456789"))
	s.drop(4)
	s.finish(0, "exited")
	c, _ := s.serve(t)

	cmd := command(t, c)
	var out bytes.Buffer
	cmd.Stdout = &out
	var gap *client.GapError
	require.ErrorAs(t, cmd.Run(), &gap)
	require.Equal(t, client.GapError{From: 0, To: 4}, *gap)
	require.Equal(t, "456789", out.String())

	cmd = command(t, c)
	var seen [][2]int64
	cmd.OnGap = func(from, to int64) { seen = append(seen, [2]int64{from, to}) }
	got, err := cmd.Output()
	require.NoError(t, err)
	require.Equal(t, "456789", string(got))
	require.Equal(t, [][2]int64{{0, 4}}, seen)
}

// TestUnsaidGap wants lost output to be said even if the server does not, as
// when nothing at all is left of it.
func TestUnsaidGap(t *testing.T) {
	t.Parallel()
	for _, untilClosed := range []bool{false, true} {
		for _, kept := range []int64{4, 10} {
			s := newScript()
			s.skipGaps = true
			s.write("stdout", []byte("0123456789"))
			s.drop(kept)
			s.finish(0, "exited")
			c, _ := s.serve(t)
			cmd := command(t, c)
			cmd.UntilClosed = untilClosed
			out, err := cmd.Output()
			var gap *client.GapError
			require.ErrorAs(t, err, &gap)
			require.Equal(t, client.GapError{From: 0, To: kept}, *gap)
			require.Equal(t, "0123456789"[kept:], string(out))
		}
	}
}

// TestLostStartIsFound breaks the connection after the process was started and
// before the client was told.
func TestLostStartIsFound(t *testing.T) {
	t.Parallel()
	s := newScript()
	s.beforeStart = func() bool { return true }
	s.write("stdout", []byte("hello"))
	s.finish(3, "exited")
	c, _ := s.serve(t)
	cmd := command(t, c)
	out, err := cmd.Output()
	var exit *client.ExitError
	require.ErrorAs(t, err, &exit)
	require.Equal(t, 3, exit.Code)
	require.Equal(t, "hello", string(out))
	starts, _, _ := s.state()
	require.Equal(t, 1, starts)
}

// TestLostStartOfAGivenTag cannot tell the process from another one of that
// tag, and says so.
func TestLostStartOfAGivenTag(t *testing.T) {
	t.Parallel()
	s := newScript()
	s.beforeStart = func() bool { return true }
	c, _ := s.serve(t)
	cmd := command(t, c)
	cmd.Tag = "web"
	err := cmd.Run()
	require.Equal(t, nestbox.CodeUnavailable, nestbox.CodeOf(err))
	require.ErrorContains(t, err, "may or may not")
	starts, _, _ := s.state()
	require.Equal(t, 1, starts)
}

func TestStartErrors(t *testing.T) {
	t.Parallel()
	c, _ := newScript().serve(t)
	cmd := c.Capsule(testCapsule).Command("missing")
	err := cmd.Run()
	require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err))
	require.EqualError(t, err, "missing: no such program")
	require.Error(t, cmd.Wait(), "it was not started")
	require.Nil(t, cmd.Exit)
}

// TestBrokenForGood never makes up an exit.
func TestBrokenForGood(t *testing.T) {
	t.Parallel()
	s := newScript()
	c, server := s.serve(t, func(cfg *client.Config) { cfg.ReconnectFor = 200 * time.Millisecond; cfg.RetryFor = -1 })
	stdout := newGate(1)
	cmd := command(t, c)
	cmd.Stdout = stdout
	s.write("stdout", []byte("x"))
	require.NoError(t, cmd.Start())
	<-stdout.reached
	require.NoError(t, server.Listener.Close())
	s.hangUp()
	server.CloseClientConnections()
	err := cmd.Wait()
	require.Equal(t, nestbox.CodeUnavailable, nestbox.CodeOf(err))
	require.Nil(t, cmd.Exit)
}

// TestForgottenProcess is one whose record is gone when the client is back.
func TestForgottenProcess(t *testing.T) {
	t.Parallel()
	s := newScript()
	c, _ := s.serve(t)
	stdout := newGate(1)
	cmd := command(t, c)
	cmd.Stdout = stdout
	s.write("stdout", []byte("x"))
	require.NoError(t, cmd.Start())
	<-stdout.reached
	s.mu.Lock()
	s.id, s.tag = "@8", "proc-other" // the same PID, but another process
	s.mu.Unlock()
	s.hangUp()
	err := cmd.Wait()
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
	require.Nil(t, cmd.Exit)
}

func TestEndOfContext(t *testing.T) {
	t.Parallel()
	for _, keep := range []bool{false, true} {
		t.Run(fmt.Sprintf("keep=%v", keep), func(t *testing.T) {
			t.Parallel()
			s := newScript()
			c, _ := s.serve(t)
			ctx, cancel := context.WithCancel(testContext(t))
			cmd := c.Capsule(testCapsule).CommandContext(ctx, "prog")
			cmd.KeepRunning = keep
			require.NoError(t, cmd.Start())
			cancel()
			err := cmd.Wait()
			require.ErrorIs(t, err, context.Canceled)
			_, killed, _ := s.state()
			require.Equal(t, !keep, killed)
			var exit *client.ExitError
			require.Equal(t, !keep, errors.As(err, &exit))
		})
	}
}

// TestFailingStdout ends the process, as SIGPIPE would.
func TestFailingStdout(t *testing.T) {
	t.Parallel()
	s := newScript()
	c, _ := s.serve(t)
	cmd := command(t, c)
	cmd.Stdout = failingWriter{}
	s.write("stdout", []byte("x"))
	err := cmd.Run()
	require.ErrorIs(t, err, io.ErrClosedPipe)
	_, killed, _ := s.state()
	require.True(t, killed)
	require.Equal(t, nestbox.ReasonKilled, cmd.Exit.Reason)
}

func TestOutputKeepsStderr(t *testing.T) {
	t.Parallel()
	s := newScript()
	s.write("stderr", []byte(strings.Repeat("e", 100_000)))
	s.write("stdout", []byte("out"))
	s.finish(2, "exited")
	c, _ := s.serve(t)
	out, err := command(t, c).Output()
	var exit *client.ExitError
	require.ErrorAs(t, err, &exit)
	require.Equal(t, "out", string(out))
	require.Len(t, exit.Stderr, 64<<10)
	both, err := command(t, c).CombinedOutput()
	require.Error(t, err)
	require.Len(t, both, 100_003)
}

// TestAttachAnywhere attaches at any offset, in any state of the log, with any
// cuts, and wants exactly what is there from that offset.
func TestAttachAnywhere(t *testing.T) {
	t.Parallel()
	s := newScript()
	s.tag = "web"
	c, _ := s.serve(t)
	var all []byte
	for i := range 50 {
		data := bytes.Repeat([]byte{byte(i)}, 1+i%7)
		all = append(all, data...)
		s.write([]string{"stdout", "stderr"}[i%2], data)
	}
	s.finish(0, "exited")
	rapid.Check(t, func(t *rapid.T) {
		since := rapid.Int64Range(0, int64(len(all))).Draw(t, "since")
		tail := rapid.Int64Range(0, int64(len(all))+10).Draw(t, "tail")
		ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
		defer cancel()
		how := client.Attach{Since: nestbox.Since{Offset: since, Tail: tail}, UntilExit: rapid.Bool().Draw(t, "untilExit")}
		stream, err := c.Capsule(testCapsule).Processes.Attach(ctx, "web", how)
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close()
		want := all[since:]
		if since == 0 && tail > 0 {
			want = all[max(0, int64(len(all))-tail):]
		}
		got, kinds := drain(ctx, t, stream)
		if !bytes.Equal(got, want) {
			t.Fatalf("got %d bytes, want %d", len(got), len(want))
		}
		if how.UntilExit != (kinds == "exit ") || !how.UntilExit && kinds != "exit closed " {
			t.Fatalf("ended with %q", kinds)
		}
	})
}

func drain(ctx context.Context, t *rapid.T, stream *client.Stream) (data []byte, kinds string) {
	for {
		ev, err := stream.Next(ctx)
		if errors.Is(err, io.EOF) {
			return data, kinds
		}
		if err != nil {
			t.Fatal(err)
		}
		if ev.Kind == nestbox.EventData {
			data = append(data, ev.Data...)
		} else {
			kinds += string(ev.Kind) + " "
		}
	}
}

func TestLogs(t *testing.T) {
	t.Parallel()
	s := newScript()
	s.tag = "web"
	c, _ := s.serve(t)
	s.write("stdout", []byte("one "))
	s.write("stderr", []byte("two "))
	procs := c.Capsule(testCapsule).Processes
	read := func(opts client.LogOptions) (string, error) {
		r, err := procs.Logs(testContext(t), "web", opts)
		require.NoError(t, err)
		defer r.Close()
		data, err := io.ReadAll(r)
		return string(data), err
	}
	for want, opts := range map[string]client.LogOptions{
		"one two ": {},
		"two ":     {Stream: nestbox.Stderr},
		"o ":       {Since: nestbox.Since{Tail: 2}},
		"wo ":      {Since: nestbox.Since{Offset: 5}},
		"":         {Since: nestbox.Since{Now: true}},
	} {
		got, err := read(opts)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	s.drop(4)
	_, err := read(client.LogOptions{Since: nestbox.Since{Offset: 1}})
	var gap *client.GapError
	require.ErrorAs(t, err, &gap)
	require.Equal(t, client.GapError{From: 1, To: 4}, *gap)
	s.write("stdout", []byte("three"))
	s.finish(0, "exited")
	got, err := read(client.LogOptions{Follow: true})
	require.NoError(t, err)
	require.Equal(t, "two three", got)
}

func TestWait(t *testing.T) {
	t.Parallel()
	s := newScript()
	s.tag = "web"
	var refusals atomic.Int64
	s.refuse = func() bool { return refusals.Add(1) <= 5 }
	c, _ := s.serve(t)
	go s.finish(9, "exited")
	p, err := c.Capsule(testCapsule).Processes.Wait(testContext(t), "web")
	require.NoError(t, err)
	require.Equal(t, 9, p.Exit.Code)
	_, err = c.Capsule(testCapsule).Processes.Wait(testContext(t), "other")
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
}
