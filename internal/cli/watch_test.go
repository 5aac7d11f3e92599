package cli_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestWatch(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	capsule := s.capsule()
	dir := filepath.Join(t.TempDir(), "d")
	require.NoError(t, os.Mkdir(dir, 0o755))
	people := s.start(nil, "watch", "-r", capsule, dir)
	programs := s.start(nil, "watch", "--json", capsule, dir)
	for _, r := range []*run{people, programs} {
		r.says("watching " + dir)
	}
	require.NoError(t, os.MkdirAll(dir+"/sub", 0o755))
	require.NoError(t, os.WriteFile(dir+"/sub/\x1b[31mred", nil, 0o644))
	people.sees("red")
	require.NoError(t, os.Rename(dir+"/sub", dir+"/n\xe9w"))
	require.NoError(t, os.RemoveAll(dir))
	for _, r := range []*run{people, programs} {
		r.wait(0)
	}
	require.Equal(t, "create    "+dir+"/sub/\n"+
		"create    "+dir+"/sub/\uFFFD[31mred\n"+
		"rename    "+dir+"/sub/ -> "+dir+"/n\uFFFDw/\n"+
		"remove    "+dir+"/n\uFFFDw/\uFFFD[31mred\n"+
		"remove    "+dir+"/n\uFFFDw/\n"+
		"remove    "+dir+"/\n", people.out.String())
	require.Equal(t, `{"type":"create","path":"`+dir+`/sub","directory":true}`+"\n"+
		`{"type":"rename","path":"`+dir+`/sub","to":"`+dir+"/n\U0010FEE9w"+`","directory":true}`+"\n"+
		`{"type":"remove","path":"`+dir+"/n\U0010FEE9w"+`","directory":true}`+"\n"+
		`{"type":"remove","path":"`+dir+`","directory":true}`+"\n", programs.out.String())

	require.Contains(t, s.fails(1, "watch", capsule, dir), "no such file or directory: "+dir)
	require.Contains(t, s.fails(1, "watch", capsule, "relative"), `path "relative" is not absolute`)
}
