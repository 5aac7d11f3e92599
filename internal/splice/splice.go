// Package splice joins two connections.
//
// It may import the standard library only.
package splice

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
)

// Both copies between a and b until both directions have ended, one of them
// has failed, or ctx ends, and closes both.
func Both(ctx context.Context, a, b net.Conn) {
	closeBoth := func() {
		_ = a.Close()
		_ = b.Close()
	}
	defer closeBoth()
	defer context.AfterFunc(ctx, closeBoth)()
	var ways sync.WaitGroup
	for _, way := range [...]struct{ dst, src net.Conn }{{a, b}, {b, a}} {
		ways.Go(func() {
			if err := forwardBytes(way.dst, way.src); err != nil {
				closeBoth()
			}
		})
	}
	ways.Wait()
}

// The buffer of one direction: it grows while reads fill it, since
// large reads are what makes bulk fast inside a sandbox, and most connections
// are small.
const (
	minBuffer = 16 << 10
	maxBuffer = 512 << 10
)

// forwardBytes copies src to dst until src ends, and then tells dst so.
func forwardBytes(dst, src net.Conn) error {
	buf := make([]byte, minBuffer)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return CloseWrite(dst)
		case err != nil:
			return err
		case n == len(buf) && n < maxBuffer:
			buf = make([]byte, 2*n)
		}
	}
}

// CloseWrite ends the sending side of a connection, or all of one that has no sides.
func CloseWrite(c net.Conn) error {
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Close()
}
