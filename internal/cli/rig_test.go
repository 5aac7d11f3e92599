package cli_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nestbox/nestbox/internal/apitest"
	"github.com/nestbox/nestbox/internal/cli"
)

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		root := &cobra.Command{Use: "nestbox", SilenceUsage: true, SilenceErrors: true}
		cli.AddTo(root, cli.IO{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, LookupEnv: os.LookupEnv})
		root.SetArgs(cli.Args(os.Args[1:]))
		os.Exit(cli.ExitCode(root.Execute(), os.Stderr))
	}
	goleak.VerifyTestMain(m)
}

// asProgram makes the test binary behave as the program.
const asProgram = "NESTBOX_TEST_AS_PROGRAM"

// program returns a command line as a process of its own, with real signals.
func (s *shell) program(args ...string) *exec.Cmd {
	cmd := exec.CommandContext(s.t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	for k, v := range s.env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	return cmd
}

// patience is how long a test waits for what must happen.
const patience = 60 * time.Second

// shell runs command lines against a server of its own.
type shell struct {
	t      *testing.T
	server *apitest.Server
	env    map[string]string
	out    io.Writer // nil = what the run keeps
}

func newShell(t *testing.T) *shell {
	t.Helper()
	server := apitest.Start(t)
	return &shell{t: t, server: server, env: map[string]string{"NESTBOX_URL": server.URL, "NESTBOX_API_KEY": server.Key}}
}

// run is one command under way.
type run struct {
	t         *testing.T
	out, err  buffer
	code      int
	signals   chan<- os.Signal // set once listening is closed
	listening chan struct{}
	done      chan struct{}
}

// start starts a command line.
func (s *shell) start(in io.Reader, args ...string) *run {
	s.t.Helper()
	r := &run{t: s.t, listening: make(chan struct{}), done: make(chan struct{})}
	root := &cobra.Command{Use: "nestbox", SilenceUsage: true, SilenceErrors: true}
	root.SetArgs(cli.Args(args))
	root.SetOut(&r.out)
	root.SetErr(&r.err)
	var out io.Writer = &r.out
	if s.out != nil {
		out = s.out
	}
	cli.AddTo(root, cli.IO{
		In: in, Out: out, Err: &r.err,
		LookupEnv: func(k string) (string, bool) { v, ok := s.env[k]; return v, ok },
		Signals: func(c chan<- os.Signal) func() {
			r.signals = c
			close(r.listening)
			return func() {}
		},
	})
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	go func() {
		defer close(r.done)
		defer cancel()
		r.code = cli.ExitCode(root.ExecuteContext(ctx), &r.err)
	}()
	return r
}

// wait waits for the end of a command and checks its exit code.
func (r *run) wait(code int) *run {
	r.t.Helper()
	<-r.done
	require.Equal(r.t, code, r.code, "stdout: %s\nstderr: %s", r.out.String(), r.err.String())
	return r
}

// interrupt is a Ctrl-C.
func (r *run) interrupt() {
	r.t.Helper()
	r.signal(syscall.SIGINT)
}

func (r *run) signal(s os.Signal) {
	r.t.Helper()
	<-r.listening
	r.signals <- s
}

// sees waits until the output contains text.
func (r *run) sees(text string) { r.awaits(&r.out, text) }

// says waits until what is said beside the output contains text.
func (r *run) says(text string) { r.awaits(&r.err, text) }

func (r *run) awaits(b *buffer, text string) {
	r.t.Helper()
	require.Eventually(r.t, func() bool { return strings.Contains(b.String(), text) }, patience, 5*time.Millisecond,
		"waiting for %q", text)
}

// ok runs a command line that must succeed and returns what it printed.
func (s *shell) ok(args ...string) string {
	s.t.Helper()
	return s.start(strings.NewReader(""), args...).wait(0).out.String()
}

// fails runs a command line that must fail and returns what it said.
func (s *shell) fails(code int, args ...string) string {
	s.t.Helper()
	return s.start(strings.NewReader(""), args...).wait(code).err.String()
}

// capsule creates a capsule and returns its id.
func (s *shell) capsule() string {
	s.t.Helper()
	return strings.TrimSpace(s.ok("capsule", "create"))
}

func decode[T any](t *testing.T, text string) T {
	t.Helper()
	var v T
	dec := json.NewDecoder(strings.NewReader(text))
	require.NoError(t, dec.Decode(&v), text)
	return v
}

// buffer is a bytes.Buffer for several goroutines.
type buffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
