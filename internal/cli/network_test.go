package cli_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestNetwork(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	for _, ask := range []struct{ flags, want string }{
		{"", "none"}, // the server's default
		{"--internet", "internet"},
		{"--no-network", "none"},
		{"--deny 203.0.113.0/24", "deny 203.0.113.0/24; all else"},
		{"--allow example.com,*.example.com --egress-mbps 5", "allow example.com *.example.com; nothing else; 5 Mbit/s"},
		{"--allow example.com --deny 0.0.0.0/0 --internet", "allow example.com; deny 0.0.0.0/0; all else"},
	} {
		id := strings.TrimSpace(s.ok(append([]string{"capsule", "create"}, strings.Fields(ask.flags)...)...))
		require.Equal(t, ask.want+"\n", s.ok("network", id), ask.flags)
		require.Regexp(t, `(?m)^network +`+strings.ReplaceAll(ask.want, "*", `\*`)+"$", s.ok("capsule", "get", id))
		if ask.flags != "" {
			require.Equal(t, ask.want+"\n", s.ok(append([]string{"network", "set", id}, strings.Fields(ask.flags)...)...))
		}
	}
	id := s.capsule()
	require.JSONEq(t, `{"internet":false,"allow":["example.com"]}`, s.ok("network", "set", id, "--allow", "example.com", "--json"))
	require.Equal(t, `TIME                  VERDICT  PROTOCOL  TO                              RULE  SENT  RECEIVED  NOTE
2026-01-02T03:04:05Z  refused  tcp       refused.test:443 (203.0.113.1)  *     0     0`+"\n",
		trimLines(anonymous(s.ok("network", "log", id))))
	require.Equal(t, "refused", decode[struct{ Recent []struct{ Verdict string } }](t, s.ok("network", "log", "--refused", id, "--json")).Recent[0].Verdict)

	require.Contains(t, s.fails(1, "network", "set", id), "say what it may reach")
	require.Contains(t, s.fails(1, "network", "set", id, "--no-network", "--allow", "x.test"), "goes with none of")
	require.Contains(t, s.fails(1, "network", "set", id, "--allow", "not a name"), "network.allow")
	require.Contains(t, s.fails(1, "capsule", "create", "--egress-mbps", "5"), "beside it")
}

func trimLines(text string) string {
	lines := strings.Split(text, "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return strings.Join(lines, "\n")
}
