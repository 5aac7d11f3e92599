// Command envd is the daemon inside every capsule. It owns the processes that
// the API starts, and serves them, the files and the ports of the capsule to
// the host agent.
//
// It is static, has no configuration file, and runs as PID 1 of a capsule or,
// for development, as an ordinary process.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
)

func main() {
	if err := start(os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "envd:", err)
		os.Exit(1)
	}
}

// start is main with an error.
func start(args []string) error {
	cfg, err := parseConfig(args, os.Stderr)
	if err != nil {
		return err
	}
	prepareSelf()
	log := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: cfg.LogLevel}))
	ctx, stop := withSignals(context.Background())
	defer stop()
	return run(ctx, cfg, log)
}
