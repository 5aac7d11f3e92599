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
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/cli"
	"github.com/nestbox/nestbox/internal/config"
)

// execute runs the command line and returns the exit code.
func execute(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer stop()
	root := &cobra.Command{
		Use:           "nestbox",
		Short:         "Isolated Linux machines for AI agents, with processes that stay",
		Version:       nestbox.Version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetArgs(cli.Args(args))
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.AddCommand(newUp(), newDown(), newDoctor(), newKey(), newDemo(), newEgress())
	cli.AddTo(root, cli.IO{In: stdin, Out: stdout, Err: stderr, LookupEnv: os.LookupEnv})
	return cli.ExitCode(root.ExecuteContext(ctx), stderr)
}

func newUp() *cobra.Command {
	var detach bool
	settings := newSettings()
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Run the whole of Nestbox on this machine: control plane and host agent",
		Long: `Run the whole of Nestbox on this machine: control plane and host agent in one
process. The first start makes an API key in <dir>/api-key. A later start on the
same directory takes up everything that was there: capsules and their processes
go on while no server runs.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := settings.load(cmd)
			if err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return errors.New("nestbox up needs root: it makes namespaces, mounts and cgroups for its capsules")
			}
			if pid, addr, err := holder(cfg.Dir); err == nil && pid != 0 {
				return alreadyUp(cmd.OutOrStdout(), cfg, addr)
			}
			if detach {
				return upDetached(cmd.Context(), cfg, argsOf(cmd, "detach", "database"), cmd.OutOrStdout())
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT)
			defer stop()
			return runUp(ctx, cfg, newLog(cmd.ErrOrStderr(), cfg.LogLevel), func(addr net.Addr) {
				printWelcome(cmd.OutOrStdout(), cfg, addr.String(), "up: ", isTerminal(os.Stdout))
			})
		},
	}
	settings.addFlags(cmd.Flags())
	cmd.Flags().BoolVar(&detach, "detach", false, "return when the server answers, and leave it running")
	return cmd
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
