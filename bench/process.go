package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

// probeNumber runs the probe in a capsule and returns the number it prints,
// in nanoseconds.
func probeNumber(ctx context.Context, c *client.Capsule, what string, n int) (time.Duration, error) {
	out, err := c.CommandContext(ctx, probePath, what, strconv.Itoa(n)).Output()
	if err != nil {
		return 0, err
	}
	ns, err := strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64)
	return time.Duration(ns), err
}

// starts compares a foreground exec and a background start, through all hops,
// with fork+exec inside the same capsule.
func (b *bench) starts(ctx context.Context) error {
	c, free, err := b.capsule(ctx, 1024)
	if err != nil {
		return err
	}
	defer free()
	var exec, start, fork []time.Duration
	for range b.rounds {
		f, err := probeNumber(ctx, c, "forkexec", 10)
		if err != nil {
			return err
		}
		fork = append(fork, f)
		for range 5 {
			t, err := timed(func() error {
				_, err := c.Exec(ctx, nestbox.ProcessSpec{Cmd: "/bin/true"})
				return err
			})
			if err != nil {
				return err
			}
			exec = append(exec, t)
			var p nestbox.Process
			t, err = timed(func() (err error) {
				p, err = c.Processes.Start(ctx, nestbox.ProcessSpec{Cmd: "/bin/true"})
				return err
			})
			if err != nil {
				return err
			}
			start = append(start, t)
			if _, err := c.Processes.Wait(ctx, strconv.Itoa(p.PID)); err != nil {
				return err // the next round begins when this process is gone
			}
		}
	}
	for _, m := range []struct {
		name  string
		times []time.Duration
	}{{"foreground exec round trip (p50)", exec}, {"background start → 202 (p50)", start}} {
		added := median(m.times) - median(fork)
		b.rows = append(b.rows, row{
			m.name, ms(median(m.times)), "fork+exec inside: " + ms(median(fork)),
			fmt.Sprintf("%.2f (%+.2f ms)", ratio(median(m.times), median(fork)), float64(added)/1e6),
			"≤ +2 ms", added <= 2*time.Millisecond,
		})
	}
	return nil
}

// lineLatency measures from the moment a process writes a line, by its own
// clock, until the client has it.
func (b *bench) lineLatency(ctx context.Context) error {
	c, free, err := b.capsule(ctx, 1024)
	if err != nil {
		return err
	}
	defer free()
	lines := 20 * b.rounds
	p, err := c.Processes.Start(ctx, nestbox.ProcessSpec{Cmd: probePath, Args: []string{"stamp", strconv.Itoa(lines)}, Stdin: true})
	if err != nil {
		return err
	}
	stream, err := c.Processes.Attach(ctx, p.Tag, client.Attach{})
	if err != nil {
		return err
	}
	defer stream.Close()
	var times []time.Duration
	for range lines {
		if err := c.Processes.WriteStdin(ctx, p.Tag, []byte("\n"), false); err != nil {
			return err
		}
		ev, err := stream.Next(ctx)
		if err != nil {
			return err
		}
		arrived := time.Now().UnixNano()
		written, err := strconv.ParseInt(strings.TrimSpace(string(ev.Data)), 10, 64)
		if err != nil {
			return err
		}
		times = append(times, time.Duration(arrived-written))
	}
	b.rows = append(b.rows, row{
		"line written → client has it (p50, p99)", ms(median(times)) + ", " + ms(quantile(times, 0.99)), "—", "—",
		"p50 ≤ 2 ms", median(times) <= 2*time.Millisecond,
	})
	return nil
}

// spewMB is how much each measurement of throughput moves.
const spewMB = 256

// throughput compares reading a process's output through all hops with reading
// a pipe inside the same capsule, alternating.
func (b *bench) throughput(ctx context.Context) error {
	c, free, err := b.capsule(ctx, 1024)
	if err != nil {
		return err
	}
	defer free()
	var ours, theirs []time.Duration
	for range max(3, b.rounds/4) {
		pipe, err := probeNumber(ctx, c, "pipe", spewMB)
		if err != nil {
			return err
		}
		theirs = append(theirs, pipe)
		t, err := timed(func() error { return b.spew(ctx, c) })
		if err != nil {
			return err
		}
		ours = append(ours, t)
	}
	speed := func(d time.Duration) string { return fmt.Sprintf("%.0f MiB/s", spewMB/d.Seconds()) }
	r := ratio(median(theirs), median(ours))
	b.rows = append(b.rows, row{
		"stdout through all hops (p50)", speed(median(ours)), "pipe inside: " + speed(median(theirs)),
		fmt.Sprintf("%.2f", r), "≥ 0.50", r >= 0.5,
	})
	return nil
}

// spew starts a process that writes spewMB and reads them all, as plain bytes,
// while it does.
func (b *bench) spew(ctx context.Context, c *client.Capsule) error {
	p, err := c.Processes.Start(ctx, nestbox.ProcessSpec{Cmd: probePath, Args: []string{"spew", strconv.Itoa(spewMB)}})
	if err != nil {
		return err
	}
	logs, err := b.logs(ctx, c, p.Tag)
	if err != nil {
		return err
	}
	defer logs.Close()
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, logs, make([]byte, 1<<20))
	if err == nil && n != spewMB<<20 {
		err = fmt.Errorf("%d bytes arrived of %d", n, spewMB<<20)
	}
	return err
}

// many is how many readers, and how many processes, there are at once.
const many = 1000

// readers measures how long it takes until each of 1,000 readers of one
// process has all it wrote, against one reader.
func (b *bench) readers(ctx context.Context) error {
	c, free, err := b.capsule(ctx, 1024)
	if err != nil {
		return err
	}
	defer free()
	one, err := b.fanOut(ctx, c, 1)
	if err != nil {
		return err
	}
	before := b.server.residentMB()
	all, err := b.fanOut(ctx, c, many)
	if err != nil {
		return err
	}
	b.rows = append(b.rows, row{
		"1,000 readers of one process: all have 64 KiB", ms(all) + fmt.Sprintf(", server +%d MiB", b.server.residentMB()-before),
		"one reader: " + ms(one), fmt.Sprintf("%.1f", ratio(all, one)), "≤ 400 ms, +64 MiB", all <= 400*time.Millisecond && b.server.residentMB()-before <= 64,
	})
	return nil
}

// fanOut attaches n readers to a process that waits for a line, then lets it
// write 64 KiB and end, and returns when every reader has all of it.
func (b *bench) fanOut(ctx context.Context, c *client.Capsule, n int) (time.Duration, error) {
	p, err := c.Processes.Start(ctx, nestbox.ProcessSpec{
		Cmd: "/bin/sh", Args: []string{"-c", "read x; head -c 65536 /dev/zero"}, Stdin: true,
	})
	if err != nil {
		return 0, err
	}
	var attached, done sync.WaitGroup
	errs := make(chan error, n)
	for range n {
		attached.Add(1)
		done.Add(1)
		go func() {
			defer done.Done()
			logs, err := b.logs(ctx, c, p.Tag)
			attached.Done()
			if err != nil {
				errs <- err
				return
			}
			defer logs.Close()
			if got, err := io.Copy(io.Discard, logs); err != nil || got != 65536 {
				errs <- errors.Join(fmt.Errorf("%d bytes arrived", got), err)
			}
		}()
	}
	attached.Wait()
	t, err := timed(func() error {
		err := c.Processes.WriteStdin(ctx, p.Tag, []byte("\n"), false)
		done.Wait()
		return err
	})
	close(errs)
	return t, errors.Join(err, <-errs)
}

// processes measures starting 1,000 processes that stay, and listing them.
func (b *bench) processes(ctx context.Context) error {
	c, free, err := b.capsule(ctx, 4096)
	if err != nil {
		return err
	}
	defer free()
	before, err := envdKB(ctx, c)
	if err != nil {
		return err
	}
	begin := time.Now()
	for i := range many {
		if _, err := c.Processes.Start(ctx, nestbox.ProcessSpec{Cmd: "/bin/sleep", Args: []string{"1000"}, Tag: fmt.Sprintf("s%d", i)}); err != nil {
			return fmt.Errorf("process %d: %w", i, err)
		}
	}
	took := time.Since(begin)
	after, err := envdKB(ctx, c)
	if err != nil {
		return err
	}
	var list []nestbox.Process
	listed, err := timed(func() (err error) {
		list, err = c.Processes.List(ctx, false)
		return err
	})
	if err != nil {
		return err
	}
	b.rows = append(b.rows, row{
		"1,000 live processes in one capsule",
		fmt.Sprintf("%.1f ms each to start, list of %d in %s", took.Seconds(), len(list), ms(listed)),
		fmt.Sprintf("envd grows by %d KiB each", (after-before)/many), "—", "all live", len(list) == many,
	})
	return nil
}

// kills measures killing 50 and 800 trees at once.
func (b *bench) kills(ctx context.Context) error {
	c, free, err := b.capsule(ctx, 4096)
	if err != nil {
		return err
	}
	defer free()
	var each [2]time.Duration
	for i, n := range []int{50, 800} {
		took, err := killAtOnce(ctx, c, n)
		if err != nil {
			return fmt.Errorf("%d trees: %w", n, err)
		}
		each[i] = took / time.Duration(n)
	}
	b.rows = append(b.rows, row{
		"kill 800 trees at once", ms(each[1]) + " each",
		"50 at once: " + ms(each[0]) + " each", fmt.Sprintf("%.2f", ratio(each[1], each[0])),
		"≤ 5 ms each", each[1] <= 5*time.Millisecond,
	})
	return nil
}

// killAtOnce starts n trees of two processes and kills them all at once.
func killAtOnce(ctx context.Context, c *client.Capsule, n int) (time.Duration, error) {
	ids := make([]string, n)
	for i := range ids {
		p, err := c.Processes.Start(ctx, nestbox.ProcessSpec{Cmd: "/bin/sh", Args: []string{"-c", "sleep 1000 & wait"}})
		if err != nil {
			return 0, err
		}
		ids[i] = p.ID.String()
	}
	errs := make(chan error, n)
	took, _ := timed(func() error {
		var done sync.WaitGroup
		for _, id := range ids {
			done.Go(func() { errs <- c.Processes.Kill(ctx, id, client.Kill{}) })
		}
		done.Wait()
		return nil
	})
	close(errs)
	for err := range errs {
		if err != nil {
			return 0, err
		}
	}
	return took, nil
}

// envdKB returns the resident memory of envd in KiB.
func envdKB(ctx context.Context, c *client.Capsule) (int, error) {
	out, err := c.CommandContext(ctx, "/usr/bin/awk", "/VmRSS/{print $2}", "/proc/1/status").Output()
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(out)))
}
