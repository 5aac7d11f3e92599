package door

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nestbox/nestbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = time.Minute

// rig is a server behind a Door. A request whose header Team is set is of a known
// caller, and is answered when its context ends, or with Quick at once.
type rig struct {
	t    *testing.T
	door *Door
	addr string
}

func newRig(t *testing.T, cfg Config) *rig {
	t.Helper()
	d := New(cfg)
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	server := &http.Server{
		ConnContext:       d.ConnContext,
		ReadHeaderTimeout: patience,
		Handler: d.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if team := r.Header.Get("Team"); team != "" {
				release, err := Admit(r.Context(), team, r.Header.Get("Essential") != "")
				if err != nil {
					w.WriteHeader(http.StatusTooManyRequests)
					return
				}
				defer release()
				_ = http.NewResponseController(w).Flush()
				if r.Header.Get("Quick") == "" {
					<-r.Context().Done()
				}
			}
		})),
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(d.Listen(raw)) }()
	t.Cleanup(func() {
		require.NoError(t, server.Close())
		<-served
		require.Eventually(t, func() bool {
			d.mu.Lock()
			defer d.mu.Unlock()
			return d.conns == 0 && d.busy == 0 && len(d.peers) == 0 && len(d.teams) == 0 && d.waiting.Len() == 0
		}, patience, time.Millisecond, "nothing is left: %+v", d)
	})
	return &rig{t: t, door: d, addr: raw.Addr().String()}
}

// from connects from an address of the loopback.
func (r *rig) from(ip string) net.Conn {
	r.t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
	conn, err := d.DialContext(r.t.Context(), "tcp", r.addr)
	require.NoError(r.t, err)
	r.t.Cleanup(func() { _ = conn.Close() })
	require.NoError(r.t, conn.SetDeadline(time.Now().Add(patience)))
	return conn
}

// ask makes a request and returns the first line of the answer, "" if the
// connection was closed.
func ask(t *testing.T, conn net.Conn, headers string) string {
	t.Helper()
	_, _ = io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n"+headers+"\r\n")
	buf := make([]byte, 4096)
	n, _ := conn.Read(buf)
	line, _, _ := strings.Cut(string(buf[:n]), "\r\n")
	return line
}

const ok, refused = "HTTP/1.1 200 OK", "HTTP/1.1 429 Too Many Requests"

// TestNewcomersReplaceWaiting: connections that never show who calls, in whatever
// state, keep nobody out, and known callers are not cut for newcomers.
func TestNewcomersReplaceWaiting(t *testing.T) {
	t.Parallel()
	r := newRig(t, Config{MaxConns: 8, MaxPerAddress: 6, MaxPerTeam: 8, Reserve: 1})
	stream := r.from("127.0.0.1")
	require.Equal(t, ok, ask(t, stream, "Team: a\r\n"))
	var idle []net.Conn
	for i := range 50 {
		conn := r.from([]string{"127.0.0.1", "127.0.0.2"}[i%2])
		if i%3 > 0 {
			_, err := io.WriteString(conn, []string{"", "GET / HT", "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"}[i%3])
			require.NoError(t, err)
		}
		idle = append(idle, conn)
	}
	for _, ip := range []string{"127.0.0.1", "127.0.0.2", "127.0.0.3"} {
		require.Equal(t, ok, ask(t, r.from(ip), "Team: b\r\nQuick: 1\r\n"), ip)
	}
	closed := 0
	for _, conn := range idle[:40] {
		if _, err := io.ReadAll(conn); err == nil || !strings.Contains(err.Error(), "timeout") {
			closed++
		}
	}
	require.Equal(t, 40, closed, "the longest waiting are closed")
	require.NoError(t, stream.SetReadDeadline(time.Now().Add(50*time.Millisecond)))
	_, err := io.ReadAll(stream)
	require.ErrorContains(t, err, "timeout", "the stream goes on")
}

// TestPerAddress: one address does not take all that there is.
func TestPerAddress(t *testing.T) {
	t.Parallel()
	r := newRig(t, Config{MaxConns: 20, MaxPerAddress: 3, MaxPerTeam: 20, Reserve: 1})
	for range 3 {
		require.Equal(t, ok, ask(t, r.from("127.0.0.1"), "Team: a\r\n"))
	}
	require.Empty(t, ask(t, r.from("127.0.0.1"), "Team: a\r\n"), "closed at once")
	require.Equal(t, ok, ask(t, r.from("127.0.0.2"), "Team: a\r\n"))
}

// TestPerTeam: one team does not take all that there is, and can always see and
// end what it has.
func TestPerTeam(t *testing.T) {
	t.Parallel()
	r := newRig(t, Config{MaxConns: 20, MaxPerAddress: 20, MaxPerTeam: 3, Reserve: 4})
	for range 3 {
		require.Equal(t, ok, ask(t, r.from("127.0.0.1"), "Team: a\r\n"))
	}
	over := r.from("127.0.0.1")
	require.Equal(t, refused, ask(t, over, "Team: a\r\n"))
	require.Equal(t, ok, ask(t, over, "Team: a\r\nEssential: 1\r\nQuick: 1\r\n"))
	require.Equal(t, ok, ask(t, r.from("127.0.0.1"), "Team: b\r\nQuick: 1\r\n"))
}

// TestReserve: when everybody together has taken all, what is essential works
// for every team.
func TestReserve(t *testing.T) {
	t.Parallel()
	r := newRig(t, Config{MaxConns: 8, MaxPerAddress: 8, MaxPerTeam: 3, Reserve: 2})
	for _, team := range []string{"a", "a", "a", "b", "b", "b"} {
		require.Equal(t, ok, ask(t, r.from("127.0.0.1"), "Team: "+team+"\r\n"))
	}
	over := r.from("127.0.0.1")
	require.Equal(t, refused, ask(t, over, "Team: c\r\n"))
	for _, team := range []string{"a", "b", "c"} {
		require.Equal(t, ok, ask(t, over, "Team: "+team+"\r\nEssential: 1\r\nQuick: 1\r\n"), team)
	}
	require.Equal(t, ok, ask(t, over, ""), "and what needs no key")
}

// TestStrangersAnswers: an answer that a stranger does not take is not waited for;
// one of a known caller is.
func TestStrangersAnswers(t *testing.T) {
	t.Parallel()
	for name, team := range map[string]string{"stranger": "", "known": "a"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := New(Config{})
			written := make(chan error, 1)
			server := &http.Server{ConnContext: d.ConnContext, Handler: d.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if team != "" {
					release, err := Admit(r.Context(), team, false)
					if err != nil {
						t.Error(err)
						return
					}
					defer release()
				}
				var err error
				for err == nil && r.Context().Err() == nil {
					_, err = w.Write(make([]byte, 1<<20))
				}
				written <- err
			}))}
			raw, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			served := make(chan error, 1)
			go func() { served <- server.Serve(d.Listen(raw)) }()
			conn, err := net.Dial("tcp", raw.Addr().String())
			require.NoError(t, err)
			defer conn.Close()
			_, err = io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			require.NoError(t, err)
			wait := patience
			if team != "" {
				wait = strangerAnswer + 2*time.Second
			}
			select {
			case err := <-written:
				require.Empty(t, team, "cut off")
				require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			case <-time.After(wait):
				require.NotEmpty(t, team, "a stranger is waited for")
			}
			require.NoError(t, server.Close())
			<-served
		})
	}
}

func TestWithoutADoor(t *testing.T) {
	t.Parallel()
	release, err := Admit(context.Background(), "a", false)
	require.NoError(t, err)
	release()
}

func TestExhausted(t *testing.T) {
	t.Parallel()
	d := New(Config{MaxConns: 8, MaxPerAddress: 8, MaxPerTeam: 1, Reserve: 1})
	here, there := net.Pipe()
	defer there.Close()
	c := d.enter(here)
	defer c.Close()
	ctx := d.ConnContext(context.Background(), c)
	release, err := Admit(ctx, "a", false)
	require.NoError(t, err)
	_, err = Admit(ctx, "a", false)
	require.Equal(t, nestbox.CodeExhausted, nestbox.CodeOf(err))
	release()
	release()
	release, err = Admit(ctx, "a", false)
	require.NoError(t, err)
	release()
}
