package envd_test

import (
	"io"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/envd"
)

func TestDefaultsOfProcesses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, os.Chmod(dir, 0o755))
	e, err := envd.New(envd.Config{User: "65534:65534", Cwd: "/usr", Env: map[string]string{"GREETING": "hello", "PATH": "/usr/bin:/bin"}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, e.Close()) })
	const say = `echo $(id -u):$(id -g) $PWD $GREETING`
	for want, spec := range map[string]nestbox.ProcessSpec{
		"65534:65534 /usr hello\n": {},
		"0:0 /usr hello\n":         {User: "root"},
		"65534:65534 / hi\n":       {Cwd: "/", Env: map[string]string{"GREETING": "hi"}},
	} {
		spec.Cmd, spec.Args = "sh", []string{"-c", say}
		require.Equal(t, want, output(t, e, spec))
	}

	gone, err := envd.New(envd.Config{Cwd: "/no/such/place"})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, gone.Close()) })
	_, _, err = gone.Processes().Start(t.Context(), nestbox.ProcessSpec{Cmd: "true"}, nil)
	require.ErrorContains(t, err, `cwd "/no/such/place" does not exist`)
}

// output runs a process to its end.
func output(t *testing.T, g guest.Guest, spec nestbox.ProcessSpec) string {
	t.Helper()
	_, reader, err := g.Processes().Start(t.Context(), spec, &guest.Attach{Lossless: true})
	require.NoError(t, err)
	defer reader.Close()
	var text []byte
	for {
		event, err := reader.Next(t.Context())
		if err == io.EOF {
			return string(text)
		}
		require.NoError(t, err)
		text = append(text, event.Data...)
	}
}
