package guesttest

import (
	"context"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// RunDial tests the Dial of what newGuest returns, against a server that it
// starts in the guest, which must have perl (a part of every Debian).
func RunDial(t *testing.T, newGuest func(t *testing.T) guest.Guest) {
	for name, test := range map[string]func(*testing.T, guest.Guest){
		"Echo":            testDialEcho,
		"HalfClose":       testDialHalfClose,
		"PeerCloses":      testDialPeerCloses,
		"Bulk":            testDialBulk,
		"ContextOfDial":   testDialContext,
		"NothingListens":  testDialNothing,
		"ManyConnections": testDialMany,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, newGuest(t))
		})
	}
}

// echoServer listens on a loopback port that it prints. It sends back what
// comes, and "bye" when the client sends no more; a client that begins with
// a "!" it leaves at once.
const echoServer = `
use IO::Socket::INET;
$| = 1; $SIG{CHLD} = 'IGNORE';
my $s = IO::Socket::INET->new(Listen => 64, LocalAddr => '127.0.0.1') or die $!;
print $s->sockport, "\n";
while (my $c = $s->accept) {
  if (fork) { close $c; next }
  close $s;
  for (my $first = 1; my $n = sysread($c, my $b, 262144); $first = 0) {
    exit if $first && $b eq '!';
    for (my $o = 0; $o < $n;) { my $w = syswrite($c, $b, $n - $o, $o); exit unless defined $w; $o += $w }
  }
  syswrite($c, "bye");
  exit;
}`

// startEcho returns the port of an echoServer, which goes with the test.
func startEcho(t *testing.T, g guest.Guest) uint16 {
	t.Helper()
	p, reader, err := g.Processes().Start(t.Context(), nestbox.ProcessSpec{Cmd: "perl", Args: []string{"-e", echoServer}}, &guest.Attach{})
	require.NoError(t, err)
	t.Cleanup(func() {
		_, err := g.Processes().Kill(context.WithoutCancel(t.Context()), nestbox.Selector{PID: p.PID}, guest.Kill{})
		require.NoError(t, err)
	})
	defer reader.Close()
	var line string
	for !strings.HasSuffix(line, "\n") {
		event, err := reader.Next(t.Context())
		require.NoError(t, err)
		require.Contains(t, []nestbox.OutputEventKind{nestbox.EventData}, event.Kind, "the server ended: %q", line)
		line += string(event.Data)
	}
	port, err := strconv.ParseUint(strings.TrimSpace(line), 10, 16)
	require.NoError(t, err)
	return uint16(port)
}

func dial(t *testing.T, g guest.Guest, port uint16) net.Conn {
	t.Helper()
	conn, err := g.Dial(t.Context(), port)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func closeWrite(t *testing.T, conn net.Conn) {
	t.Helper()
	half, ok := conn.(interface{ CloseWrite() error })
	require.True(t, ok, "a connection can be closed for writing")
	require.NoError(t, half.CloseWrite())
}

func testDialEcho(t *testing.T, g guest.Guest) {
	conn := dial(t, g, startEcho(t, g))
	buf := make([]byte, 5)
	for _, word := range []string{"hello", "again", "\x00\r\n\xff."} {
		_, err := conn.Write([]byte(word))
		require.NoError(t, err)
		_, err = io.ReadFull(conn, buf)
		require.NoError(t, err)
		require.Equal(t, word, string(buf))
	}
}

func testDialHalfClose(t *testing.T, g guest.Guest) {
	conn := dial(t, g, startEcho(t, g))
	_, err := conn.Write([]byte("last words"))
	require.NoError(t, err)
	closeWrite(t, conn)
	got, err := io.ReadAll(conn)
	require.NoError(t, err)
	require.Equal(t, "last wordsbye", string(got), "the other direction goes on")
}

func testDialPeerCloses(t *testing.T, g guest.Guest) {
	conn := dial(t, g, startEcho(t, g))
	_, err := conn.Write([]byte("!"))
	require.NoError(t, err)
	got, err := io.ReadAll(conn)
	require.NoError(t, err)
	require.Empty(t, got)
}

func testDialBulk(t *testing.T, g guest.Guest) {
	const size = 12 << 20
	conn := dial(t, g, startEcho(t, g))
	content := func() io.Reader { return io.LimitReader(rand.NewChaCha8([32]byte{2}), size) }
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(conn, content())
		sent <- err
	}()
	got, want := newHash(), newHash()
	_, err := io.CopyN(got, conn, size)
	require.NoError(t, err)
	require.NoError(t, <-sent)
	_, err = io.Copy(want, content())
	require.NoError(t, err)
	require.Equal(t, want.Sum(nil), got.Sum(nil))
}

// testDialContext requires that the context bounds the dialling only.
func testDialContext(t *testing.T, g guest.Guest) {
	port := startEcho(t, g)
	ctx, cancel := context.WithCancel(t.Context())
	conn, err := g.Dial(ctx, port)
	require.NoError(t, err)
	defer conn.Close()
	cancel()
	_, err = conn.Write([]byte("x"))
	require.NoError(t, err)
	_, err = io.ReadFull(conn, make([]byte, 1))
	require.NoError(t, err)
	_, err = g.Dial(ctx, port)
	requireCode(t, err, nestbox.CodeCanceled)
}

func testDialNothing(t *testing.T, g guest.Guest) {
	for _, port := range []uint16{1, 2} { // reserved, and served by nobody
		_, err := g.Dial(t.Context(), port)
		requireCode(t, err, nestbox.CodeUnavailable)
		require.ErrorContains(t, err, strconv.Itoa(int(port)))
	}
	_, err := g.Dial(t.Context(), 0)
	requireCode(t, err, nestbox.CodeInvalid)
}

func testDialMany(t *testing.T, g guest.Guest) {
	port := startEcho(t, g)
	const n = 50
	done := make(chan error, n)
	for range n {
		go func() {
			conn, err := g.Dial(t.Context(), port)
			if err == nil {
				defer conn.Close()
				_, err = conn.Write([]byte("hi"))
			}
			if err == nil {
				_, err = io.ReadFull(conn, make([]byte, 2))
			}
			done <- err
		}()
	}
	for range n {
		require.NoError(t, <-done)
	}
}
