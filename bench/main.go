// Command bench measures Nestbox side by side with what it is built on, on
// this machine and in one run, and reports ratios: absolute figures of one
// machine say little about another.
//
// It starts a server of its own, and uses the public client only.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench is one run.
type bench struct {
	nestbox string // path of the binary
	probe   string // path of the program that measures inside a capsule
	dir     string
	rounds  int
	only    string // part of the names of the measurements to take; all if empty
	server  *server
	client  *client.Client
	rows    []row
}

// row is one line of the report.
type row struct {
	name     string
	ours     string // what was measured of Nestbox
	theirs   string // what it is compared with, measured in the same run
	ratio    string
	target   string
	achieved bool
}

func run(ctx context.Context, args []string) (err error) {
	if len(args) == 3 && args[0] == imageImport {
		return importHere(ctx, args[1], args[2])
	}
	b := &bench{}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.StringVar(&b.nestbox, "nestbox", "bin/nestbox", "the nestbox binary")
	flags.StringVar(&b.probe, "probe", "bin/probe", "the program that measures inside a capsule")
	flags.StringVar(&b.only, "only", "", "take only the measurements whose name contains this")
	flags.IntVar(&b.rounds, "rounds", 20, "rounds of each measurement")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if b.nestbox, err = filepath.Abs(b.nestbox); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "nestbox-bench-*"); err != nil {
		return err
	}
	if err := os.Chmod(b.dir, 0o711); err != nil { // capsules run as other users
		return err
	}
	if b.server, err = startServer(ctx, b.nestbox, b.dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.server.stop(), b.removeDir()) }()
	if b.client, err = client.New(client.Config{BaseURL: b.server.url, APIKey: b.server.key}); err != nil {
		return err
	}
	for _, m := range []struct {
		name    string
		measure func(*bench, context.Context) error
	}{
		{"cold start", (*bench).coldStart},
		{"starts", (*bench).starts},
		{"line latency", (*bench).lineLatency},
		{"throughput", (*bench).throughput},
		{"transfers", (*bench).transfers},
		{"small files", (*bench).smallTransfers},
		{"trees", (*bench).trees},
		{"1,000 readers", (*bench).readers},
		{"1,000 processes", (*bench).processes},
		{"kills", (*bench).kills},
		{"terminal", (*bench).echo},
		{"egress", (*bench).egress},
		{"saturated", (*bench).saturated},
		{"import", (*bench).importImage},
	} {
		if !strings.Contains(m.name, b.only) {
			continue
		}
		fmt.Fprintf(os.Stderr, "measuring: %s\n", m.name)
		if err := m.measure(b, ctx); err != nil {
			return errors.Join(b.report(), fmt.Errorf("%s: %w", m.name, err))
		}
	}
	return b.report()
}

func (b *bench) report() error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "WHAT\tNESTBOX\tCOMPARED WITH\tRATIO\tTARGET\t")
	for _, r := range b.rows {
		mark := "ok"
		if !r.achieved {
			mark = "MISSED"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", r.name, r.ours, r.theirs, r.ratio, r.target, mark)
	}
	return w.Flush()
}

// capsule makes a capsule with the probe in it; free destroys it.
func (b *bench) capsule(ctx context.Context, memoryMB int) (c *client.Capsule, free func(), err error) {
	c, err = b.client.Capsules.Create(ctx, nestbox.CapsuleSpec{Resources: nestbox.Resources{MemoryMB: memoryMB}})
	if err != nil {
		return nil, nil, err
	}
	free = func() { _ = c.Destroy(context.WithoutCancel(ctx)) }
	probe, err := os.Open(b.probe)
	if err != nil {
		free()
		return nil, nil, err
	}
	defer probe.Close()
	if err := c.Files.Write(ctx, probePath, probe, client.WriteOptions{Mode: 0o755}); err != nil {
		free()
		return nil, nil, err
	}
	return c, free, nil
}

// probePath is where the probe is inside a capsule.
const probePath = "/opt/probe"

// quantile returns the q-quantile (0 to 1) of times.
func quantile(times []time.Duration, q float64) time.Duration {
	sorted := slices.Sorted(slices.Values(times))
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

func median(times []time.Duration) time.Duration { return quantile(times, 0.5) }

func ms(d time.Duration) string { return fmt.Sprintf("%.2f ms", float64(d.Nanoseconds())/1e6) }

func ratio(a, b time.Duration) float64 { return float64(a) / float64(b) }

// timed runs f and returns how long it took.
func timed(f func() error) (time.Duration, error) {
	begin := time.Now()
	err := f()
	return time.Since(begin), err
}

// removeDir removes what the run left, also what runsc mounted into the root
// of the bundles that it ran.
func (b *bench) removeDir() error {
	_ = syscall.Unmount(filepath.Join(b.dir, "runsc", "null-netns"), syscall.MNT_DETACH) // not there if runsc did not run
	return os.RemoveAll(b.dir)
}
