// Package cli is the client side of the nestbox command: it speaks to a server
// over HTTP, through the client package, and never to a database or a host.
//
// It may import the client package, the root package, internal/archive and
// internal/splice only, besides libraries.
package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

// IO is what the commands see of the world.
type IO struct {
	In        io.Reader
	Out       io.Writer
	Err       io.Writer
	LookupEnv func(string) (string, bool)
	// Signals begins to deliver the signals that end a program to c, but those that
	// are ignored, until stop is called. Until then a reader of Out that goes away is an
	// error of writing, and not the end of the program. nil = the real thing.
	Signals func(c chan<- os.Signal) (stop func())
}

// Exit codes of the commands' own failures. Commands that pass on the exit
// code of a process use those that docker and shells have.
const (
	exitFailure       = 1
	exitOwn           = 125
	exitNotExecutable = 126
	exitNoProgram     = 127
)

// NewCommands returns the client commands.
func NewCommands(world IO) []*cobra.Command {
	if world.Signals == nil {
		world.Signals = endingSignals
	}
	a := &app{IO: world}
	cmds := []*cobra.Command{
		newCapsule(a), newExec(a), newShell(a), newPs(a), newLogs(a), newAttach(a), newSend(a), newKill(a), newWait(a), newCopy(a), newURL(a), newPortForward(a), newPort(a), newNetwork(a), newWatch(a),
	}
	for _, cmd := range cmds {
		a.addFlags(cmd)
	}
	return cmds
}

// endingSignals is IO.Signals for real.
func endingSignals(c chan<- os.Signal) (stop func()) {
	ignored := make(chan os.Signal, 1)
	signal.Notify(ignored, syscall.SIGPIPE)
	for _, s := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT} {
		if !signal.Ignored(s) { // as nohup has it
			signal.Notify(c, s)
		}
	}
	return func() {
		signal.Stop(c)
		signal.Stop(ignored)
	}
}

// AddTo adds the client commands to a root command.
func AddTo(root *cobra.Command, world IO) { root.AddCommand(NewCommands(world)...) }

// app is what the commands share.
type app struct {
	IO
	url, key, keyFile string
	json              bool
}

func (a *app) addFlags(cmd *cobra.Command) {
	f := cmd.PersistentFlags()
	f.StringVar(&a.url, "url", "", "server to speak to (default $NESTBOX_URL, or "+client.DefaultBaseURL+")")
	f.StringVar(&a.key, "key", "", "API key (default $NESTBOX_API_KEY)")
	f.StringVar(&a.keyFile, "key-file", "", "file that holds the API key (default $NESTBOX_API_KEY_FILE)")
	f.BoolVar(&a.json, "json", false, "output for programs")
}

// Getenv returns the value of an environment variable, "" if it is not set.
func (a *app) Getenv(name string) string {
	value, _ := a.LookupEnv(name)
	return value
}

// retryFor is short: a person waits. Streams have patience of their own.
const retryFor = 2 * time.Second

// client returns a client for the flags and the environment. A flag wins over
// the environment, and a key over a file of one.
func (a *app) client() (*client.Client, error) {
	cfg := client.FromEnv(a.Getenv)
	cfg.RetryFor = retryFor
	if a.url != "" {
		cfg.BaseURL = a.url
	}
	file := a.keyFile
	if file == "" && cfg.APIKey == "" {
		file = a.Getenv("NESTBOX_API_KEY_FILE")
	}
	switch {
	case a.key != "":
		cfg.APIKey = a.key
	case file != "":
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("read the API key: %w", err)
		}
		cfg.APIKey = strings.TrimSpace(string(data))
	}
	if cfg.APIKey == "" {
		return nil, nestbox.Errorf(nestbox.CodeUnauthenticated, `no API key. Give one in one of these ways:
  export NESTBOX_API_KEY=wrn_…                    the key itself
  export NESTBOX_API_KEY_FILE=<state>/api-key     the file that nestbox up wrote
  --key wrn_…  or  --key-file <file>`)
	}
	return client.New(cfg)
}

// exitCode is an error that ends the program with a code of its own.
type exitCode struct {
	code int
	err  error // nil = nothing is printed
}

func (e *exitCode) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

func (e *exitCode) Unwrap() error { return e.err }

// ExitCode prints what is to be said about err and returns the exit code of
// the program.
func ExitCode(err error, stderr io.Writer) int {
	if err == nil {
		return 0
	}
	code := exitFailure
	var e *exitCode
	if errors.As(err, &e) {
		if code = e.code; e.err == nil {
			return code
		}
		err = e.err
	}
	fmt.Fprintf(stderr, "nestbox: %v\n", err)
	return code
}

// own gives an error of a command that passes on exit codes one that no
// process is likely to have.
func own(err error) error {
	var e *exitCode
	if err == nil || errors.As(err, &e) {
		return err
	}
	switch nestbox.DetailOf(err) {
	case nestbox.DetailNoProgram:
		return &exitCode{exitNoProgram, err}
	case nestbox.DetailNotExecutable:
		return &exitCode{exitNotExecutable, err}
	}
	return &exitCode{exitOwn, err}
}

// passesExitCode makes all failures of a command, also those of its flags and
// arguments, end with exitOwn.
func passesExitCode(cmd *cobra.Command) *cobra.Command {
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return own(err) })
	args, run := cmd.Args, cmd.RunE
	cmd.Args = func(cmd *cobra.Command, a []string) error { return own(args(cmd, a)) }
	cmd.RunE = func(cmd *cobra.Command, a []string) error { return own(run(cmd, a)) }
	return cmd
}

// exitOf is the end of a command that passes on how a process ended.
func exitOf(exit nestbox.Exit) error {
	if exit.Code == 0 {
		return nil
	}
	return &exitCode{code: exit.Code}
}
