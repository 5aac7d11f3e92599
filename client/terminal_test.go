package client_test

import (
	"bytes"
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
)

func TestTerminal(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	capsule, _ := newCapsule(t)
	in, keyboard := io.Pipe()
	var screen bytes.Buffer
	cmd := capsule.CommandContext(ctx, "sh", "-c", `until [ "$(stty size)" = "11 21" ]; do sleep 0.05; done; read -r line; echo "<$line>"; exit 4`)
	cmd.Terminal, cmd.Stdin, cmd.Stdout = &nestbox.Terminal{Rows: 10, Cols: 20}, in, &screen
	require.NoError(t, cmd.Start())
	require.NoError(t, cmd.Process.Resize(ctx, 11, 21))
	_, err := keyboard.Write([]byte("typed\r"))
	require.NoError(t, err)
	require.NoError(t, keyboard.Close())
	require.Error(t, cmd.Wait())
	require.Equal(t, 4, cmd.Exit.Code)
	require.Contains(t, screen.String(), "<typed>\r\n")

	p, err := capsule.Processes.Get(ctx, cmd.Process.ID.String())
	require.NoError(t, err)
	require.Equal(t, &nestbox.Terminal{Rows: 11, Cols: 21, Term: "xterm-256color"}, p.Terminal)
	require.Equal(t, p.Output.End, p.Output.Pty)
	require.Equal(t, nestbox.CodeInvalidState, nestbox.CodeOf(capsule.Processes.Resize(ctx, cmd.Process.ID.String(), 1, 1)))

	res, err := capsule.Exec(ctx, nestbox.ProcessSpec{Cmd: "tty", Terminal: &nestbox.Terminal{}})
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(string(res.Stdout), "/dev/pts/"), "%s", res.Stdout)
}
