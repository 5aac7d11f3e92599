package main

import (
	"errors"
	"flag"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/nestbox/nestbox/internal/sandbox"
)

// config is what envd is told when it starts.
type config struct {
	Listen   string     // TCP address; port 0 = any
	PortFile string     // file to write the port to once envd listens; "" = none
	Cgroups  string     // mount point of cgroup v2, if there is one
	Hostname string     // to write into /etc; "" = the files there are right
	Resolver string     // address of the name server to write into /etc; "" = there is none
	MaxPids  int        // processes and threads of the capsule; 0 = no limit
	LogLevel slog.Level // of what goes to standard error
	Token    string     // required of every request; from the environment only

	Env       map[string]string // of all processes; from the environment only
	User, Cwd string            // of processes that ask for none; from the environment only
}

// errNoToken: without a token anybody in reach would own the capsule.
var errNoToken = errors.New("refusing to start without a token in " + sandbox.EnvToken)

// parseConfig reads the arguments and the environment, and removes the token
// from the latter, so that no child inherits it.
func parseConfig(args []string, output io.Writer) (config, error) {
	cfg := config{
		Listen:   net.JoinHostPort("0.0.0.0", strconv.Itoa(sandbox.EnvdPort)),
		Cgroups:  "/sys/fs/cgroup",
		LogLevel: slog.LevelWarn,
	}
	flags := flag.NewFlagSet("envd", flag.ContinueOnError)
	flags.SetOutput(output)
	flags.StringVar(&cfg.Listen, "listen", cfg.Listen, "TCP `address` to listen on")
	flags.StringVar(&cfg.PortFile, "port-file", cfg.PortFile, "`file` to write the port to once envd listens")
	flags.StringVar(&cfg.Cgroups, "cgroups", cfg.Cgroups, "`directory` of a cgroup v2 in which to make a group for each process tree, if it is one")
	flags.IntVar(&cfg.MaxPids, "max-pids", 0, "how `many` processes and threads there may be; 0 = no limit")
	flags.StringVar(&cfg.Hostname, "hostname", "", "`name` of the capsule, for hostname, hosts and resolv.conf in /etc; \"\" = leave them alone")
	flags.StringVar(&cfg.Resolver, "nameserver", "", "`address` of the name server, for /etc/resolv.conf")
	flags.TextVar(&cfg.LogLevel, "log-level", cfg.LogLevel, "log `level`: debug, info, warn or error")
	if err := flags.Parse(args); err != nil {
		return config{}, err
	}
	if flags.NArg() > 0 {
		return config{}, errors.New("envd takes no arguments: " + flags.Arg(0))
	}
	if cfg.MaxPids < 0 {
		return config{}, errors.New("--max-pids is negative")
	}
	cfg.Token = os.Getenv(sandbox.EnvToken)
	if err := os.Unsetenv(sandbox.EnvToken); err != nil {
		return config{}, err
	}
	if cfg.Token == "" {
		return config{}, errNoToken
	}
	cfg.User, cfg.Cwd = os.Getenv(sandbox.EnvUser), os.Getenv(sandbox.EnvCwd)
	for _, entry := range os.Environ() {
		name, value, _ := strings.Cut(entry, "=")
		if inner, ok := strings.CutPrefix(name, sandbox.EnvPrefix); ok && inner != "" {
			if cfg.Env == nil {
				cfg.Env = map[string]string{}
			}
			cfg.Env[inner] = value
		}
	}
	return cfg, nil
}
