package client_test

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
	"github.com/nestbox/nestbox/internal/apitest"
)

// The tests in this file run against the real API, and real processes.

func newCapsule(t *testing.T) (*client.Capsule, *apitest.Server) {
	t.Helper()
	server := apitest.Start(t)
	c, err := client.New(client.Config{BaseURL: server.URL, APIKey: server.Key})
	require.NoError(t, err)
	t.Cleanup(c.CloseIdle)
	capsule, err := c.Capsules.Create(testContext(t), nestbox.CapsuleSpec{Metadata: map[string]string{"a": "b"}})
	require.NoError(t, err)
	return capsule, server
}

func TestCapsules(t *testing.T) {
	t.Parallel()
	ctx := testContext(t)
	first, server := newCapsule(t)
	require.Equal(t, nestbox.StateRunning, first.Info.State)
	require.Equal(t, nestbox.DefaultResources, first.Info.Resources)
	require.Equal(t, map[string]string{"a": "b"}, first.Info.Metadata)
	c, err := client.New(client.Config{BaseURL: server.URL + "/", APIKey: server.Key})
	require.NoError(t, err)
	t.Cleanup(c.CloseIdle)
	want := []string{first.ID}
	for range 4 {
		capsule, err := c.Capsules.Create(ctx, nestbox.CapsuleSpec{})
		require.NoError(t, err)
		want = append([]string{capsule.ID}, want...)
	}
	for _, size := range []int{0, 1, 2, 5, 6} {
		var got []string
		for capsule, err := range c.Capsules.List(ctx, client.ListCapsules{PageSize: size}) {
			require.NoError(t, err)
			got = append(got, capsule.ID)
		}
		require.ElementsMatch(t, want, got, "pages of %d", size)
	}
	require.NoError(t, first.Ping(ctx))
	require.NoError(t, c.Capsules.Ping(ctx, first.ID))
	require.NoError(t, first.Destroy(ctx))
	require.NoError(t, c.Capsules.Destroy(ctx, first.ID), "again")
	require.Equal(t, nestbox.CodeInvalidState, nestbox.CodeOf(first.Ping(ctx)))
	again, err := c.Capsules.Get(ctx, first.ID)
	require.NoError(t, err)
	require.Equal(t, nestbox.StateStopped, again.Info.State)
	h, err := c.Health(ctx)
	require.NoError(t, err)
	require.Equal(t, client.Health{Status: "ok", Version: nestbox.Version}, h)
	require.NoError(t, c.Ready(ctx))
	doc, err := c.OpenAPI(ctx)
	require.NoError(t, err)
	require.Contains(t, string(doc), "openapi: 3")
	page, err := c.Docs(ctx)
	require.NoError(t, err)
	require.Contains(t, string(page), "<html")
}

func TestErrorsOfTheAPI(t *testing.T) {
	t.Parallel()
	ctx := testContext(t)
	capsule, server := newCapsule(t)
	c, err := client.New(client.Config{BaseURL: server.URL, APIKey: "wrn_unknown"})
	require.NoError(t, err)
	t.Cleanup(c.CloseIdle)
	for err := range c.Capsules.List(ctx, client.ListCapsules{}) {
		require.Nil(t, err)
	}
	_, err = c.Capsules.Get(ctx, capsule.ID)
	var e *client.Error
	require.ErrorAs(t, err, &e)
	require.Equal(t, 401, e.Status)
	require.Equal(t, "unauthorized", e.WireCode)
	require.Equal(t, nestbox.CodeUnauthenticated, nestbox.CodeOf(err))

	_, err = capsule.Processes.Get(ctx, "nobody")
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
	_, err = capsule.Processes.Get(ctx, "../../x")
	require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err), "refused before it is sent")
	_, err = capsule.Processes.Attach(ctx, "nobody", client.Attach{})
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
	err = capsule.CommandContext(ctx, "no-such-program").Run()
	require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err))
	require.NoError(t, capsule.Destroy(ctx))
	err = capsule.CommandContext(ctx, "true").Run()
	require.Equal(t, nestbox.CodeInvalidState, nestbox.CodeOf(err))
	_, err = capsule.Exec(ctx, nestbox.ProcessSpec{Cmd: "true"})
	require.Equal(t, nestbox.CodeInvalidState, nestbox.CodeOf(err))
}

func TestExec(t *testing.T) {
	t.Parallel()
	ctx := testContext(t)
	capsule, _ := newCapsule(t)
	res, err := capsule.Exec(ctx, nestbox.ProcessSpec{
		Cmd: "sh", Args: []string{"-c", `printf '\377out'; printf "$A" >&2; pwd; exit 5`}, Cwd: "/", Env: map[string]string{"A": "err"},
	})
	require.NoError(t, err)
	require.Equal(t, "\xffout/\n", string(res.Stdout))
	require.Equal(t, "err", string(res.Stderr))
	require.Equal(t, 5, res.Exit.Code)
	require.Equal(t, nestbox.ReasonExited, res.Exit.Reason)
	require.NotZero(t, res.PID)
}

// TestExecSurvivesRestarts restarts the server while the answer is awaited.
func TestExecSurvivesRestarts(t *testing.T) {
	t.Parallel()
	ctx := testContext(t)
	capsule, server := newCapsule(t)
	type answer struct {
		res client.ExecResult
		err error
	}
	answers := make(chan answer, 1)
	go func() {
		res, err := capsule.Exec(ctx, nestbox.ProcessSpec{Cmd: "sh", Args: []string{"-c", "echo one; sleep 1; echo two; exit 7"}})
		answers <- answer{res, err}
	}()
	require.Eventually(t, func() bool {
		procs, err := capsule.Processes.List(ctx, false)
		return err == nil && len(procs) == 1 && procs[0].Output.End > 0
	}, testTimeout, 5*time.Millisecond)
	server.Restart()
	got := <-answers
	require.NoError(t, got.err)
	require.Equal(t, "one\ntwo\n", string(got.res.Stdout))
	require.Equal(t, 7, got.res.Exit.Code)
	procs, err := capsule.Processes.List(ctx, true)
	require.NoError(t, err)
	require.Len(t, procs, 1, "it was not started twice")
}

// TestCmdUnderCuts cuts all connections again and again under many commands.
func TestCmdUnderCuts(t *testing.T) {
	t.Parallel()
	ctx := testContext(t)
	capsule, server := newCapsule(t)
	const commands, lines = 8, 100
	ended := make(chan error, commands)
	for i := range commands {
		script := fmt.Sprintf("for i in $(seq %d); do echo $i; echo e$i >&2; sleep 0.01; done; exit %d", lines, i+1)
		cmd := capsule.CommandContext(ctx, "sh", "-c", script)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		require.NoError(t, cmd.Start())
		go func() { ended <- checkLines(cmd.Wait(), i+1, lines, &stdout, &stderr) }()
	}
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for left := commands; left > 0; {
		select {
		case err := <-ended:
			require.NoError(t, err)
			left--
		case <-ticker.C:
			server.Cut()
		}
	}
}

func checkLines(err error, code, lines int, stdout, stderr *bytes.Buffer) error {
	if err == nil || err.Error() != fmt.Sprintf("exit status %d", code) {
		return fmt.Errorf("want exit status %d, got: %w", code, err)
	}
	var out, errs strings.Builder
	for i := range lines {
		fmt.Fprintln(&out, i+1)
		fmt.Fprintf(&errs, "e%d\n", i+1)
	}
	if stdout.String() != out.String() || stderr.String() != errs.String() {
		return fmt.Errorf("output is not exact: %q, %q", stdout, stderr)
	}
	return nil
}

func TestProcesses(t *testing.T) {
	t.Parallel()
	ctx := testContext(t)
	capsule, _ := newCapsule(t)
	procs := capsule.Processes
	p, err := procs.Start(ctx, nestbox.ProcessSpec{Cmd: "cat", Tag: "cat", Stdin: true})
	require.NoError(t, err)
	require.Equal(t, "cat", p.Tag)
	require.NoError(t, procs.WriteStdin(ctx, "cat", []byte("hello"), true))
	ended, err := procs.Wait(ctx, "cat")
	require.NoError(t, err)
	require.Equal(t, p.PID, ended.PID)
	require.Zero(t, ended.Exit.Code)
	require.Equal(t, nestbox.ReasonExited, ended.Exit.Reason)
	require.False(t, ended.Exit.At.IsZero())
	require.EqualValues(t, 5, ended.Output.End)
	err = procs.WriteStdin(ctx, "cat", []byte("late"), false)
	require.Equal(t, nestbox.CodeInvalidState, nestbox.CodeOf(err))

	p, err = procs.Start(ctx, nestbox.ProcessSpec{Cmd: "sleep", Args: []string{"1000"}})
	require.NoError(t, err)
	require.NoError(t, procs.Signal(ctx, p.Tag, "INT"))
	ended, err = procs.Wait(ctx, p.Tag)
	require.NoError(t, err)
	require.Equal(t, "SIGINT", ended.Exit.Signal)
	require.NoError(t, procs.Kill(ctx, p.Tag, client.Kill{Signal: "TERM", Grace: time.Second}), "killing what has ended")
	live, err := procs.List(ctx, false)
	require.NoError(t, err)
	require.Empty(t, live)
	all, err := procs.List(ctx, true)
	require.NoError(t, err)
	require.Len(t, all, 2)
}

// TestBigOutput wants more than any log keeps, byte by byte: the process waits
// for the client that started it.
func TestBigOutput(t *testing.T) {
	t.Parallel()
	capsule, _ := newCapsule(t)
	const size = 100 << 20
	cmd := capsule.CommandContext(testContext(t), "head", "-c", fmt.Sprint(size), "/dev/zero")
	var n counter
	cmd.Stdout = &n
	began := time.Now()
	require.NoError(t, cmd.Run())
	require.EqualValues(t, size, n)
	t.Logf("%.0f MB/s", size/1e6/time.Since(began).Seconds())
}

type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

func TestFiles(t *testing.T) {
	t.Parallel()
	ctx := testContext(t)
	capsule, _ := newCapsule(t)
	dir := t.TempDir()
	data := make([]byte, 20<<20)
	_, _ = rand.Read(data)
	require.NoError(t, capsule.Files.Write(ctx, dir+"/a/b c/ü", io.MultiReader(bytes.NewReader(data)), client.WriteOptions{Mode: 0o600}))
	r, err := capsule.Files.Read(ctx, dir+"/a/b c/ü")
	require.NoError(t, err)
	got, err := io.ReadAll(r)
	require.NoError(t, err)
	require.NoError(t, r.Close())
	require.True(t, bytes.Equal(data, got))
	info, err := capsule.Files.Stat(ctx, dir+"/a/b c/ü")
	require.NoError(t, err)
	require.Equal(t, "ü", info.Name)
	require.EqualValues(t, len(data), info.Size)
	require.EqualValues(t, 0o600, info.Mode)
	require.NoError(t, capsule.Files.Write(ctx, dir+"/empty", bytes.NewReader(nil), client.WriteOptions{}))
	err = capsule.Files.Write(ctx, dir+"/empty", bytes.NewReader(nil), client.WriteOptions{IfAbsent: true})
	require.Equal(t, nestbox.CodePrecondition, nestbox.CodeOf(err))
	require.NoError(t, capsule.Files.Write(ctx, dir+"/a/b c/ü", strings.NewReader("more"), client.WriteOptions{Append: true}))
	for from, want := range map[int64]string{int64(len(data)): "more", int64(len(data)) + 4: "", 1 << 40: ""} {
		r, err := capsule.Files.ReadFrom(ctx, dir+"/a/b c/ü", from)
		require.NoError(t, err)
		got, err := io.ReadAll(r)
		require.NoError(t, err)
		require.Equal(t, want, string(got))
		require.NoError(t, r.Close())
	}
	list, err := capsule.Files.List(ctx, dir, 2)
	require.NoError(t, err)
	var paths []string
	for _, e := range list {
		paths = append(paths, strings.TrimPrefix(e.Path, dir))
	}
	require.Equal(t, []string{"/a", "/a/b c", "/empty"}, paths)
	_, err = capsule.Files.Mkdir(ctx, dir+"/new/dir")
	require.NoError(t, err)
	_, err = capsule.Files.Mkdir(ctx, dir+"/new/dir")
	require.Equal(t, nestbox.CodeConflict, nestbox.CodeOf(err))
	require.NoError(t, capsule.Files.Remove(ctx, dir+"/a"))
	require.NoError(t, capsule.Files.Remove(ctx, dir+"/a"), "nothing there is no error")
	_, err = capsule.Files.Read(ctx, dir+"/a")
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
	_, err = capsule.Files.Read(ctx, dir)
	require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err))
	err = capsule.Files.Write(ctx, "relative", strings.NewReader("x"), client.WriteOptions{})
	require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err))
}

func TestPortURL(t *testing.T) {
	t.Parallel()
	capsule, _ := newCapsule(t)
	u, err := capsule.Ports.URL(testContext(t), 8000, time.Minute)
	require.NoError(t, err)
	require.NotEmpty(t, u.Token)
	require.Contains(t, u.URL, u.Token)
	require.WithinDuration(t, time.Now().Add(time.Minute), u.ExpiresAt, 30*time.Second)
}

func TestNew(t *testing.T) {
	t.Parallel()
	_, err := client.New(client.Config{})
	require.Equal(t, nestbox.CodeUnauthenticated, nestbox.CodeOf(err))
	for _, url := range []string{"localhost:8080", "ftp://x", "http://", "::"} {
		_, err = client.New(client.Config{BaseURL: url, APIKey: "k"})
		require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err), url)
	}
	_, err = client.New(client.Config{APIKey: "wrn_\nX-Evil: 1"})
	require.Equal(t, nestbox.CodeUnauthenticated, nestbox.CodeOf(err))
	env := map[string]string{"WRENN_BASE_URL": "http://w", "WRENN_API_KEY": "wk"}
	get := func(k string) string { return env[k] }
	require.Equal(t, client.Config{BaseURL: "http://w", APIKey: "wk"}, client.FromEnv(get))
	env["NESTBOX_URL"], env["NESTBOX_API_KEY"] = "http://n", "nk"
	require.Equal(t, client.Config{BaseURL: "http://n", APIKey: "nk"}, client.FromEnv(get))
}
