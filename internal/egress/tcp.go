package egress

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/nestbox/nestbox"
)

// acceptTCP serves connections until the listener is closed. Those beyond the limit
// are refused at once.
func (g *Gateway) acceptTCP(l net.Listener, serve func(*net.TCPConn)) {
	var open atomic.Int64
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // no descriptors are left, for example
			g.log.Warn("accepting a connection of a capsule", "error", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-g.ctx.Done():
			}
			continue
		}
		c := conn.(*net.TCPConn)
		if open.Add(1) > int64(g.cfg.Limits.TCP) {
			open.Add(-1)
			reset(c)
			continue
		}
		g.running.Go(func() {
			defer open.Add(-1)
			serve(c)
		})
	}
}

// reset closes a connection so that its peer sees that it was refused.
func reset(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	_ = c.Close()
}

// The ports of protocols that show a name.
const (
	httpPort  = 80
	httpsPort = 443
)

// serveTCP carries one connection of the capsule.
func (g *Gateway) serveTCP(in *net.TCPConn) {
	defer reset(in) // after a good end it is closed already
	to := in.LocalAddr().(*net.TCPAddr).AddrPort()
	f := &flow{NetworkFlow: nestbox.NetworkFlow{Destination: nestbox.Destination{Addr: to.Addr().Unmap()}, Protocol: nestbox.NetworkTCP, Port: to.Port(), At: time.Now()}}
	rules := g.rules.Load()
	var ahead []byte
	if rules.ByName() && (f.Port == httpPort || f.Port == httpsPort) {
		f.Name, ahead = g.peek(in, f.Port)
	}
	f.Verdict = g.judge(rules, f.Destination, nestbox.NetworkTCP, f.Port)
	f.byName = f.Verdict.ByName
	if !f.Verdict.Allowed {
		g.count(f.NetworkFlow)
		return
	}
	address := to.String()
	if f.byName {
		address = net.JoinHostPort(f.Name+".", strconv.Itoa(int(f.Port))) // the dot: no search list
	}
	out, err := g.dial(g.ctx, "tcp", address)
	if err != nil {
		refuse(&f.NetworkFlow, err)
		g.count(f.NetworkFlow)
		return
	}
	defer func() { _ = out.Close() }()
	ctx, stop := context.WithCancel(g.ctx)
	defer stop()
	f.cut = func() { stop(); reset(in); reset(out) }
	if err := g.enter(f, g.cfg.Limits.TCP+g.cfg.Limits.UDP); err != nil {
		refuse(&f.NetworkFlow, err)
		reset(out)
		g.count(f.NetworkFlow)
		return
	}
	defer g.leave(f)
	g.carry(ctx, f, in, out.(*net.TCPConn), ahead)
}

// refuse notes why a flow that the policy allows cannot be.
func refuse(f *nestbox.NetworkFlow, err error) {
	f.Verdict.Allowed, f.Reason = false, "the destination cannot be reached"
	var timeout net.Error
	var dns *net.DNSError
	switch {
	case errors.Is(err, errNever):
		f.Reason = errNever.Error()
	case errors.Is(err, errTooMany):
		f.Reason = errTooMany.Error()
	case errors.As(err, &dns):
		f.Reason = "the name cannot be looked up"
	case errors.As(err, &timeout) && timeout.Timeout():
		f.Reason = "the destination does not answer"
	}
}

// carry copies between the capsule and the world until both ways have ended, or one
// has failed.
func (g *Gateway) carry(ctx context.Context, f *flow, in, out *net.TCPConn, ahead []byte) {
	for _, c := range []*net.TCPConn{in, out} { // however this process ends, it is no good end of what was sent
		_ = c.SetLinger(0)
	}
	if _, err := out.Write(ahead); err != nil {
		return
	}
	f.sent.Store(int64(len(ahead)))
	back := make(chan error, 1)
	go func() {
		err := copyTo(ctx, in, out, &f.received, g.speed.received)
		if err != nil {
			f.cut()
		}
		back <- err
	}()
	err := g.showName(f, in, out)
	if err == nil {
		err = copyTo(ctx, out, in, &f.sent, g.speed.sent)
	}
	if err != nil {
		f.cut()
	}
	if <-back == nil && err == nil { // in good order
		for _, c := range []*net.TCPConn{in, out} {
			_ = c.SetLinger(-1)
			_ = c.Close()
		}
	}
}

// showName sends on the beginning of a connection of whose name nothing depends, and
// notes the name that it shows: nobody waits for it.
func (g *Gateway) showName(f *flow, in, out *net.TCPConn) error {
	if f.Name != "" || f.Port != httpPort && f.Port != httpsPort {
		return nil
	}
	buf := make([]byte, 4<<10)
	n, err := in.Read(buf)
	if n == 0 || err != nil {
		if errors.Is(err, io.EOF) {
			return nil // as the next Read says
		}
		return err
	}
	if name := shownName(bytes.NewReader(buf[:n]), f.Port); name != "" {
		f.shown.Store(&name)
	}
	n, err = out.Write(buf[:n])
	f.sent.Add(int64(n))
	return err
}

// addrOf returns the address of a socket's end.
func addrOf(a net.Addr) netip.AddrPort {
	switch a := a.(type) {
	case *net.TCPAddr:
		return unmapped(a.AddrPort())
	case *net.UDPAddr:
		return unmapped(a.AddrPort())
	}
	return netip.AddrPort{}
}

func unmapped(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
