package main

import (
	"context"
	"fmt"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

// echo measures from a key that is typed until the terminal shows it: the line
// discipline inside answers, so that it is all hops there and back.
func (b *bench) echo(ctx context.Context) error {
	c, free, err := b.capsule(ctx, 512)
	if err != nil {
		return err
	}
	defer free()
	p, err := c.Processes.Start(ctx, nestbox.ProcessSpec{Cmd: "cat", Terminal: &nestbox.Terminal{}})
	if err != nil {
		return err
	}
	stream, err := c.Processes.Attach(ctx, p.ID.String(), client.Attach{})
	if err != nil {
		return err
	}
	defer stream.Close()
	var times []time.Duration
	for range 20 * b.rounds {
		t, err := timed(func() error {
			if err := c.Processes.WriteStdin(ctx, p.ID.String(), []byte("x"), false); err != nil {
				return err
			}
			for {
				ev, err := stream.Next(ctx)
				if err != nil || ev.Kind == nestbox.EventData {
					return err
				}
			}
		})
		if err != nil {
			return err
		}
		times = append(times, t)
	}
	p50 := median(times)
	b.rows = append(b.rows, row{
		"a key typed → shown in a terminal (p50)", fmt.Sprintf("%s, p99 %s", ms(p50), ms(quantile(times, 0.99))), "-", "-", "≤ 2 ms", p50 <= 2*time.Millisecond,
	})
	return nil
}
