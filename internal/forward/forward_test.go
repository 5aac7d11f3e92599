package forward_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/forward"
	"github.com/nestbox/nestbox/internal/splice"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// begin returns a session to what dial makes.
func begin(t *testing.T, memory forward.Memory, dial func(context.Context) (net.Conn, error)) (*forward.Session, func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan struct{})
	go func() {
		defer close(served)
		conn, err := l.Accept()
		if err == nil {
			_ = forward.Serve(ctx, conn, memory, dial)
		}
	}()
	conn, err := net.Dial("tcp", l.Addr().String())
	require.NoError(t, err)
	s, err := forward.NewSession(conn)
	require.NoError(t, err)
	t.Cleanup(func() {
		_ = s.Close()
		cancel()
		<-served
		_ = l.Close()
	})
	return s, cancel
}

// echo answers with all it got, once that has ended.
func echo(t *testing.T) func(context.Context) (net.Conn, error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var group sync.WaitGroup
	group.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			group.Go(func() {
				defer conn.Close()
				all, err := io.ReadAll(conn)
				if err == nil {
					_, _ = conn.Write(all)
				}
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		group.Wait()
	})
	return func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
	}
}

func TestManyHalfClosed(t *testing.T) {
	t.Parallel()
	s, _ := begin(t, nil, echo(t))
	var group sync.WaitGroup
	for i := range forward.MaxConnections {
		group.Go(func() {
			conn, err := s.Dial(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			sent := bytes.Repeat([]byte{byte(i)}, 300_000+i)
			if _, err := conn.Write(sent); err != nil {
				t.Error(err)
			}
			if err := splice.CloseWrite(conn); err != nil {
				t.Error(err)
			}
			got, err := io.ReadAll(conn)
			if err != nil || !bytes.Equal(sent, got) {
				t.Errorf("%d bytes of %d, %v", len(got), len(sent), err)
			}
		})
	}
	group.Wait()
}

func TestNothingListens(t *testing.T) {
	t.Parallel()
	s, _ := begin(t, nil, func(context.Context) (net.Conn, error) {
		return nil, nestbox.Errorf(nestbox.CodeUnavailable, "nothing listens on port 5432")
	})
	for range 3 {
		_, err := s.Dial(t.Context())
		require.EqualError(t, err, "nothing listens on port 5432")
		require.Equal(t, nestbox.CodeUnavailable, nestbox.CodeOf(err))
	}
	require.False(t, s.Closed())
}

// TestReset: what one side cuts off fails on the other, rather than ends.
func TestReset(t *testing.T) {
	t.Parallel()
	peers := make(chan net.Conn, 1)
	s, stop := begin(t, nil, func(context.Context) (net.Conn, error) {
		ours, theirs := net.Pipe()
		peers <- theirs
		return ours, nil
	})
	conn, err := s.Dial(t.Context())
	require.NoError(t, err)
	peer := <-peers
	require.NoError(t, conn.Close())
	_, err = peer.Read(make([]byte, 1))
	require.Error(t, err)
	conn, err = s.Dial(t.Context())
	require.NoError(t, err)
	peer = <-peers
	stop() // the server ends
	_, err = io.ReadAll(conn)
	require.Error(t, err)
	_, err = peer.Read(make([]byte, 1))
	require.Error(t, err)
	require.Eventually(t, s.Closed, time.Minute, time.Millisecond)
	_, err = s.Dial(t.Context())
	require.Equal(t, nestbox.CodeUnavailable, nestbox.CodeOf(err))
}

func TestDialEndsWithContext(t *testing.T) {
	t.Parallel()
	s, _ := begin(t, nil, func(ctx context.Context) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := s.Dial(ctx)
	require.Equal(t, nestbox.CodeCanceled, nestbox.CodeOf(err))
}

type noMemory struct{}

func (noMemory) Take(int) error { return errors.New("there is none") }
func (noMemory) Give(int)       {}

func TestMemoryIsAsked(t *testing.T) {
	t.Parallel()
	s, _ := begin(t, noMemory{}, echo(t))
	_, err := s.Dial(t.Context())
	require.Error(t, err)
	require.False(t, strings.Contains(err.Error(), "yamux panic"))
}
