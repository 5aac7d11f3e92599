package client_test

import (
	"bytes"
	"fmt"
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox/client"
)

func TestStdin(t *testing.T) {
	t.Parallel()
	s := newScript()
	c, _ := s.serve(t)
	want := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // several writes
	cmd := command(t, c)
	cmd.Stdin = bytes.NewReader(want)
	require.NoError(t, cmd.Start())
	<-s.stdinCh
	s.finish(0, "exited")
	require.NoError(t, cmd.Wait())
	_, _, got := s.state()
	require.True(t, bytes.Equal(want, got))
}

func TestPipes(t *testing.T) {
	t.Parallel()
	s := newScript()
	c, _ := s.serve(t)
	cmd := command(t, c)
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	stderr, err := cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	_, err = io.WriteString(stdin, "question")
	require.NoError(t, err)
	require.NoError(t, stdin.Close())
	<-s.stdinCh
	_, _, got := s.state()
	require.Equal(t, "question", string(got))
	s.write("stdout", []byte("answer"))
	buf := make([]byte, 6)
	_, err = io.ReadFull(stdout, buf)
	require.NoError(t, err)
	require.Equal(t, "answer", string(buf))
	s.finish(0, "exited")
	for _, r := range []io.Reader{stdout, stderr} {
		rest, err := io.ReadAll(r)
		require.NoError(t, err)
		require.Empty(t, rest)
	}
	require.NoError(t, cmd.Wait())
	_, err = stdin.Write([]byte("late"))
	require.Error(t, err)
}

// TestWaitDoesNotHangInStdin ends although standard input never does.
func TestWaitDoesNotHangInStdin(t *testing.T) {
	t.Parallel()
	s := newScript()
	c, _ := s.serve(t)
	r, w := io.Pipe()
	defer w.Close()
	cmd := command(t, c)
	cmd.Stdin = r
	require.NoError(t, cmd.Start())
	s.finish(0, "exited")
	require.NoError(t, cmd.Wait())
}

// TestLostInput closes the command's input, and tells the writer, if some of it
// may be lost.
func TestLostInput(t *testing.T) {
	t.Parallel()
	s := newScript()
	s.loseInput = true
	c, _ := s.serve(t)
	cmd := command(t, c)
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	_, err = io.WriteString(stdin, "lost")
	require.NoError(t, err)
	<-s.stdinCh
	s.finish(0, "exited")
	require.ErrorContains(t, cmd.Wait(), "may or may not")
	_, err = io.WriteString(stdin, "more")
	require.Error(t, err)
}

// TestStdinWhileTheServerIsAway waits with what surely was not sent.
func TestStdinWhileTheServerIsAway(t *testing.T) {
	t.Parallel()
	capsule, server := newCapsule(t)
	c, err := client.New(client.Config{BaseURL: server.URL, APIKey: server.Key})
	require.NoError(t, err)
	cmd := c.Capsule(capsule.ID).CommandContext(testContext(t), "cat")
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	var stdout bytes.Buffer
	cmd.Stdout = &stdout
	require.NoError(t, cmd.Start())
	require.NoError(t, capsule.Processes.WriteStdin(testContext(t), fmt.Sprint(cmd.Process.PID), []byte("before "), false))
	server.Stop()
	c.CloseIdle()
	_, err = io.WriteString(stdin, "while away ")
	require.NoError(t, err)
	server.Resume()
	_, err = io.WriteString(stdin, "after")
	require.NoError(t, err)
	require.NoError(t, stdin.Close())
	require.NoError(t, cmd.Wait())
	require.Equal(t, "before while away after", stdout.String())
}
