package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

// How the server is saturated: half by strangers, half by a caller.
const (
	halfOpen    = 10_000
	slowUploads = 1_000
)

// saturated measures what others do while strangers and a caller hold all that
// the server lets them hold.
func (b *bench) saturated(ctx context.Context) error {
	c, free, err := b.capsule(ctx, 512)
	if err != nil {
		return err
	}
	defer free()
	other, freeOther, err := b.capsule(ctx, 512) // of the caller that saturates
	if err != nil {
		return err
	}
	defer freeOther()
	quiet, err := b.work(ctx, c)
	if err != nil {
		return err
	}
	address := strings.TrimPrefix(b.server.url, "http://")
	conns, err := hold(ctx, address, halfOpen, "GET /v1/capsules HTTP/1.1\r\nHost: x\r\nX-A: ")
	defer closeAll(conns)
	if err != nil {
		return err
	}
	uploads, err := hold(ctx, address, slowUploads, "PUT /v1/capsules/"+other.ID+"/files?path=/tmp/f HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\nX-API-Key: "+b.server.key+"\r\n\r\nx")
	defer closeAll(uploads)
	if err != nil {
		return err
	}
	busy, err := b.work(ctx, c)
	if err != nil {
		return err
	}
	r := ratio(quantile(busy, 0.99), quantile(quiet, 0.99))
	b.rows = append(b.rows, row{
		fmt.Sprintf("/health and exec, %d half-open and %d slow uploads beside (p99)", halfOpen, slowUploads),
		ms(quantile(busy, 0.99)), "alone: " + ms(quantile(quiet, 0.99)), fmt.Sprintf("%.2f", r), "answered", true,
	})
	return nil
}

// work asks for /health and runs a command, again and again.
func (b *bench) work(ctx context.Context, c *client.Capsule) (times []time.Duration, err error) {
	for range 5 * b.rounds {
		t, err := timed(func() error {
			res, err := http.Get(b.server.url + "/health")
			if err != nil {
				return err
			}
			if err := res.Body.Close(); err != nil {
				return err
			}
			_, err = c.Exec(ctx, nestbox.ProcessSpec{Cmd: "/bin/true"})
			return err
		})
		if err != nil {
			return nil, err
		}
		times = append(times, t)
	}
	return times, nil
}

// hold opens n connections that send text and then nothing.
func hold(ctx context.Context, address string, n int, text string) ([]net.Conn, error) {
	var mu sync.Mutex
	var conns []net.Conn
	var firstErr error
	var opening sync.WaitGroup
	const atOnce = 50
	for range atOnce {
		opening.Go(func() {
			for range n / atOnce {
				conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
				mu.Lock()
				if err == nil {
					conns = append(conns, conn)
				} else if firstErr == nil {
					firstErr = err
				}
				mu.Unlock()
				if err == nil {
					_, _ = io.WriteString(conn, text) // the server may have closed it
				}
			}
		})
	}
	opening.Wait()
	return conns, firstErr
}

func closeAll(conns []net.Conn) {
	for _, c := range conns {
		_ = c.Close()
	}
}
