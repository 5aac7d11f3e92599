package cli_test

import (
	"bytes"
	"io"
	"net"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestPortForward sends to a server of this machine, which is the capsule's too, through
// several connections, restarts of the server in between.
func TestPortForward(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	done := make(chan struct{})
	go func() { // answers with all that it got
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			all, _ := io.ReadAll(conn)
			_, _ = conn.Write(all)
			_ = conn.Close()
		}
	}()
	port := strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
	r := s.start(nil, "port-forward", id, port+":0")
	r.sees("to port " + port)
	local := regexp.MustCompile(`127\.0\.0\.1:\d+`).FindString(r.out.String())
	through := func() (string, error) {
		conn, err := net.Dial("tcp", local)
		require.NoError(t, err)
		defer conn.Close()
		sent := bytes.Repeat([]byte("through the tunnel "), 20_000)
		_, err = conn.Write(sent)
		if err != nil {
			return "", err
		}
		_ = conn.(*net.TCPConn).CloseWrite()
		got, err := io.ReadAll(conn)
		if bytes.Equal(sent, got) {
			return "whole", err
		}
		return string(got), err
	}
	for range 3 {
		for range 5 {
			got, err := through()
			require.NoError(t, err)
			require.Equal(t, "whole", got)
		}
		s.server.Restart()
		require.Eventually(t, func() bool { got, err := through(); return err == nil && got == "whole" }, patience, 10*time.Millisecond)
	}
	require.NoError(t, l.Close())
	<-done
	conn, err := net.Dial("tcp", local)
	require.NoError(t, err)
	got, _ := io.ReadAll(conn)
	require.Empty(t, got, "it is closed")
	_ = conn.Close()
	r.says("port " + port + ": ")
	r.interrupt()
	r.wait(0)
	_, err = net.Dial("tcp", local)
	require.Error(t, err)
	for _, arg := range []string{"0", "x", "1:x", "70000", "1:2:3", ":1"} {
		require.Contains(t, s.fails(1, "port-forward", id, arg), "is not a port")
	}
	require.Contains(t, s.fails(1, "port-forward", id), "which port?")
}
