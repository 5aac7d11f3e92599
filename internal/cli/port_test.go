package cli_test

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestPort(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	id := s.capsule()
	require.Equal(t, "private; as localhost:5173\n", s.ok("port", "set", id, "5173", "--rewrite-host"))
	require.Equal(t, "public; as box.test; https; pages of https://a.test *\n",
		s.ok("port", "set", id, "80", "--public", "--rewrite-host=box.test", "--protocol", "https", "--cors-origin", "https://a.test,*"))
	require.JSONEq(t, `{"port":81,"public":false,"host_header":"","protocol":"h2c","cors_origins":[]}`,
		s.ok("port", "set", id, "81", "--protocol", "h2c", "--json"))
	require.Equal(t, "PORT  REACHED\n80    public; as box.test; https; pages of https://a.test *\n81    private; h2c\n5173  private; as localhost:5173\n", s.ok("port", "ls", id))
	require.Regexp(t, `(?m)^port +5173 private; as localhost:5173$`, s.ok("capsule", "get", id))
	for _, port := range []string{"80", "81", "5173", "1"} {
		s.ok("port", "reset", id, port)
	}
	require.JSONEq(t, `[]`, s.ok("port", "ls", id, "--json"))
	require.Contains(t, s.fails(1, "port", "set", id, "80"), "say how it is reached")
	require.Contains(t, s.fails(1, "port", "set", id, "http", "--public"), "is not a port")
	require.Contains(t, s.fails(1, "port", "set", id, "80", "--cors-origin", "a.test"), "is not an origin")
	require.Contains(t, s.fails(1, "port", "set", id, "80", "--protocol", "ftp"), "none of http, https and h2c")
	require.Contains(t, s.fails(1, "port", "set", id, "49983", "--public"), "reserved")
}
