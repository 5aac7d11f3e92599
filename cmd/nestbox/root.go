package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/cli"
	"github.com/nestbox/nestbox/internal/config"
)

// execute runs the command line and returns the exit code.
func execute(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	root := &cobra.Command{
		Use:           "nestbox",
		Short:         "Isolated Linux machines for AI agents, with processes that stay",
		Version:       nestbox.Version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.AddCommand(newUp(), newDown(), newKey(), newDemo())
	cli.AddTo(root, cli.IO{In: stdin, Out: stdout, Err: stderr, Getenv: os.Getenv})
	return cli.ExitCode(root.ExecuteContext(ctx), stderr)
}

func newUp() *cobra.Command {
	var file string
	var detach bool
	cfg := config.DefaultUp()
	flags := config.DefaultUp()
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Run the whole of Nestbox on this machine: control plane and host agent",
		Long: `Run the whole of Nestbox on this machine: control plane and host agent in one
process. The first start makes an API key in <dir>/api-key. A later start on the
same directory takes up everything that was there: capsules and their processes
go on while no server runs.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := config.Load(&cfg, file, environ()); err != nil {
				return err
			}
			overrideChanged(cmd, &cfg, flags)
			if err := cfg.Validate(); err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return errors.New("nestbox up needs root: it makes namespaces, mounts and cgroups for its capsules")
			}
			if detach {
				return upDetached(cmd.Context(), cfg, cmd.OutOrStdout())
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT)
			defer stop()
			return runUp(ctx, cfg, newLog(cmd.ErrOrStderr(), cfg.LogLevel), func(addr net.Addr) {
				printWelcome(cmd.OutOrStdout(), cfg, addr.String(), isTerminal(os.Stdout))
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&file, "config", "", "YAML file with settings")
	f.StringVar(&flags.Dir, "dir", flags.Dir, "folder of all state")
	f.StringVar(&flags.Listen, "listen", flags.Listen, "address and port to listen on")
	f.StringVar(&flags.Domain, "domain", flags.Domain, "domain of capsule ports: http://<port>-<capsule>.<domain>:<listen port>/")
	f.StringVar(&flags.Database, "database", "", "postgres:// URL (default: SQLite in the state folder)")
	f.StringVar(&flags.Platform, "platform", flags.Platform, "gVisor platform: systrap or kvm")
	f.IntVar(&flags.MaxConnections, "max-connections", 0, "connections of clients at a time (default 2/5 of the descriptors)")
	f.IntVar(&flags.MaxConnectionsPerAddress, "max-connections-per-address", 0, "of one peer address (default 3/4 of them)")
	f.IntVar(&flags.MaxRequestsPerTeam, "max-requests-per-team", 0, "requests and streams of one team at a time (default 1/3 of them)")
	f.IntVar(&flags.MemoryLimitMB, "memory-limit-mb", 0, "what the server tries to stay below, in MiB (default 4/5 of its control group's limit, else half of the machine)")
	f.StringVar(&flags.LogLevel, "log-level", flags.LogLevel, "debug, info, warn or error")
	f.BoolVar(&detach, "detach", false, "return when the server answers, and leave it running")
	return cmd
}

// overrideChanged takes over the flags that were given: the last word over
// file and environment.
func overrideChanged(cmd *cobra.Command, cfg *config.Up, flags config.Up) {
	for name, set := range map[string]func(){
		"dir":       func() { cfg.Dir = flags.Dir },
		"listen":    func() { cfg.Listen = flags.Listen },
		"domain":    func() { cfg.Domain = flags.Domain },
		"database":  func() { cfg.Database = flags.Database },
		"platform":  func() { cfg.Platform = flags.Platform },
		"log-level": func() { cfg.LogLevel = flags.LogLevel },

		"max-connections":             func() { cfg.MaxConnections = flags.MaxConnections },
		"max-connections-per-address": func() { cfg.MaxConnectionsPerAddress = flags.MaxConnectionsPerAddress },
		"max-requests-per-team":       func() { cfg.MaxRequestsPerTeam = flags.MaxRequestsPerTeam },
		"memory-limit-mb":             func() { cfg.MemoryLimitMB = flags.MemoryLimitMB },
	} {
		if cmd.Flags().Changed(name) {
			set()
		}
	}
	cfg.Dir = absolute(cfg.Dir)
}

func newDown() *cobra.Command {
	dir := config.DefaultUp().Dir
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Stop the server of a state directory; its capsules go on",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), 30*time.Second)
			defer cancel()
			ran, err := stopServer(ctx, absolute(dir))
			if err != nil {
				return err
			}
			if !ran {
				fmt.Fprintln(cmd.OutOrStdout(), "no server was running")
				return nil
			}
			fmt.Fprintln(cmd.OutOrStdout(), "stopped; capsules go on until `nestbox capsule rm`, and the next `nestbox up` takes them up again")
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "dir", dir, "folder of all state")
	return cmd
}

func newLog(w io.Writer, level string) *slog.Logger {
	var l slog.Level
	_ = l.UnmarshalText([]byte(level)) // validated with the configuration
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: l}))
}

func environ() map[string]string {
	env := map[string]string{}
	for _, kv := range os.Environ() {
		k, v, _ := strings.Cut(kv, "=")
		env[k] = v
	}
	return env
}
