package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox/internal/config"
)

// printWelcome tells how to reach the server: address, key and three commands
// to paste. Where nobody looks, and what is printed may be kept as a log, the
// key is left out.
func printWelcome(w io.Writer, cfg config.Up, addr, how string, looks bool) {
	path := filepath.Join(cfg.Dir, "api-key")
	key, err := os.ReadFile(path)
	if err != nil {
		fmt.Fprintf(w, "nestbox answers on %s (the API key cannot be read: %v)\n", addressOf(cfg, addr), err)
		return
	}
	if !looks {
		key = []byte("$(cat " + path + ")")
	}
	self, err := os.Executable()
	if err != nil {
		self = "nestbox"
	}
	fmt.Fprintf(w, `
nestbox is %[5]s %[1]s   (API reference: %[1]s/docs)
API key:        %[2]s   (kept in %[3]s)

Paste these:

  export NESTBOX_URL=%[1]s NESTBOX_API_KEY=%[2]s
  C=$(%[4]s capsule create) && %[4]s exec -d --tag web "$C" -- python3 -m http.server 8000 && %[4]s ps "$C"
  curl -sf --retry 5 "$(%[4]s url "$C" 8000)"

`, addressOf(cfg, addr), strings.TrimSpace(string(key)), path, self, how)
}

// alreadyUp is `nestbox up` where a server is up already.
func alreadyUp(w io.Writer, cfg config.Up, addr string) error {
	if addr == "" {
		return fmt.Errorf("a server is being started in %s already", cfg.Dir)
	}
	printWelcome(w, cfg, addr, "already up at", isTerminal(os.Stdout))
	return nil
}

// addressOf returns the URL of a server that listens on addr.
func addressOf(cfg config.Up, addr string) string {
	if u, err := cfg.Public(); err == nil && u != nil {
		return u.String()
	}
	return localURL(cfg, addr)
}

// localURL is how programs of this machine reach it.
func localURL(cfg config.Up, addr string) string {
	if cfg.TLSCert != "" {
		return "https://" + reachable(addr)
	}
	return "http://" + reachable(addr)
}

// reachable turns a listen address into one that a client on this machine can
// connect to.
func reachable(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	if ip := net.ParseIP(host); ip == nil || ip.IsUnspecified() {
		host = "localhost"
	}
	return net.JoinHostPort(host, port)
}

func absolute(path string) string {
	abs, err := filepath.Abs(path)
	if err != nil {
		return path
	}
	return abs
}

// startIn bounds how long a detached server may take until it answers: finding
// hundreds of capsules again takes a while.
const startIn = 2 * time.Minute

// upDetached starts `nestbox up` in a session of its own and returns when it
// answers.
func upDetached(ctx context.Context, cfg config.Up, args []string, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, startIn)
	defer cancel()
	if err := secureStateDir(cfg.Dir); err != nil {
		return err
	}
	logPath := filepath.Join(cfg.Dir, "server.log")
	logFile, err := os.OpenFile(logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer logFile.Close()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// Not CommandContext: the server is to outlive this process.
	cmd := exec.Command(self, args...)
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.Env = append(os.Environ(), "NESTBOX_DATABASE="+cfg.Database) // a password has no place in a command line
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	fmt.Fprintf(out, "starting the server (log: %s) ", logPath)
	if err := awaitHealth(ctx, localURL(cfg, cfg.Listen)+"/health", ended, out); err != nil {
		return fmt.Errorf("%w; the last lines of %s:\n%s", err, logPath, lastLines(logPath, 10))
	}
	fmt.Fprintln(out, "ok")
	printWelcome(out, cfg, cfg.Listen, "up: ", true)
	return nil
}

// argsOf are those that run cmd again with the flags that were given to it, but for
// the ones left out.
func argsOf(cmd *cobra.Command, leftOut ...string) []string {
	args := []string{cmd.Name()}
	cmd.Flags().Visit(func(f *pflag.Flag) {
		if slices.Contains(leftOut, f.Name) {
			return
		}
		values := []string{f.Value.String()}
		if list, ok := f.Value.(pflag.SliceValue); ok {
			values = list.GetSlice()
		}
		for _, v := range values {
			args = append(args, "--"+f.Name+"="+v)
		}
	})
	return args
}

// awaitHealth returns when url answers 200, with a dot of progress now and
// then.
func awaitHealth(ctx context.Context, url string, ended <-chan error, out io.Writer) error {
	for try := 0; ; try++ {
		select {
		case err := <-ended:
			return errors.Join(errors.New("the server ended"), err)
		case <-ctx.Done():
			return fmt.Errorf("the server does not answer: %w", ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
		if healthy(ctx, url) {
			return nil
		}
		if try%20 == 19 {
			fmt.Fprint(out, ".")
		}
	}
}

func healthy(ctx context.Context, url string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return false
	}
	// It is asked whether our server answers, which shows by no name that is known here.
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}} //nolint:gosec // see above
	defer transport.CloseIdleConnections()
	res, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return false
	}
	defer res.Body.Close()
	return res.StatusCode == http.StatusOK
}

func lastLines(path string, n int) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// isTerminal reports whether f is a terminal.
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
