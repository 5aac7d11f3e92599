package egress

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/netns"
)

// pair is who sends to whom.
type pair struct{ from, to netip.AddrPort }

// sessions are the pairs of UDP addresses that are remembered.
type sessions struct {
	mu   sync.Mutex
	open map[pair]*session
}

// session is one pair: what comes from the capsule goes out by a socket of its own,
// and answers go back by another, which has the address that the capsule sent to.
type session struct {
	flow
	out  net.Conn
	back *net.UDPConn // further packets may come by it too, once it is there
}

const (
	maxDatagram = 64 << 10
	udpBacklog  = 64 // packets that wait for their session to be made
)

// serveUDP takes the packets of the capsule.
func (g *Gateway) serveUDP() {
	buf, oob := make([]byte, maxDatagram), make([]byte, 128)
	making := make(chan struct{}, udpBacklog)
	for {
		n, oobN, _, from, err := g.sockets.udp.ReadMsgUDPAddrPort(buf, oob)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		to, ok := originalDestination(oob[:oobN])
		if err != nil || !ok {
			continue
		}
		p := pair{unmapped(from), to}
		g.udp.mu.Lock()
		s := g.udp.open[p]
		g.udp.mu.Unlock()
		if s != nil {
			g.send(s, buf[:n])
			continue
		}
		packet := append([]byte(nil), buf[:n]...)
		select {
		case making <- struct{}{}:
		default: // a flood: datagrams may be lost
			continue
		}
		g.running.Go(func() {
			defer func() { <-making }()
			if s := g.newSession(p); s != nil {
				g.send(s, packet)
			}
		})
	}
}

func (g *Gateway) send(s *session, packet []byte) {
	if !mayPass(g.speed.sent, len(packet)) {
		return
	}
	if n, err := s.out.Write(packet); err == nil {
		s.sent.Add(int64(n))
	}
}

// newSession makes the session of a pair, or returns the one that was made
// meanwhile. It returns nil if the packet is refused.
func (g *Gateway) newSession(p pair) *session {
	s := &session{flow: flow{NetworkFlow: nestbox.NetworkFlow{Destination: nestbox.Destination{Addr: p.to.Addr()}, Protocol: nestbox.NetworkUDP, Port: p.to.Port(), At: time.Now()}}}
	s.Verdict = g.judge(g.rules.Load(), s.Destination, nestbox.NetworkUDP, s.Port)
	err := error(nil)
	if s.Verdict.Allowed {
		if err = g.connect(s, p); err != nil {
			refuse(&s.NetworkFlow, err)
		}
	}
	if !s.Verdict.Allowed {
		g.count(s.NetworkFlow)
		return nil
	}
	g.udp.mu.Lock()
	if other := g.udp.open[p]; other != nil {
		g.udp.mu.Unlock()
		s.cut()
		return other
	}
	full := len(g.udp.open) >= g.cfg.Limits.UDP
	if !full {
		g.udp.open[p] = s
	}
	g.udp.mu.Unlock()
	if full {
		err = errTooMany
	} else {
		err = g.enter(&s.flow, g.cfg.Limits.TCP+g.cfg.Limits.UDP)
	}
	if err != nil {
		g.forget(p, s)
		s.cut()
		refuse(&s.NetworkFlow, err)
		g.count(s.NetworkFlow)
		return nil
	}
	g.running.Go(func() { g.answerUDP(p, s) })
	g.running.Go(func() { g.more(s) })
	return s
}

func (g *Gateway) connect(s *session, p pair) (err error) {
	if s.out, err = g.dial(g.ctx, "udp", p.to.String()); err != nil {
		return err
	}
	if s.back, err = g.sockets.connectedUDP(p.to, p.from); err != nil {
		return errors.Join(err, s.out.Close())
	}
	s.cut = func() { _ = s.out.Close(); _ = s.back.Close() }
	return nil
}

func (g *Gateway) forget(p pair, s *session) {
	g.udp.mu.Lock()
	defer g.udp.mu.Unlock()
	if g.udp.open[p] == s {
		delete(g.udp.open, p)
	}
}

// answerUDP hands answers back until none has come for a while.
func (g *Gateway) answerUDP(p pair, s *session) {
	defer g.leave(&s.flow)
	defer s.cut()
	defer g.forget(p, s)
	buf := make([]byte, maxDatagram)
	for {
		sent := s.sent.Load()
		_ = s.out.SetReadDeadline(time.Now().Add(g.cfg.Limits.Idle))
		n, err := s.out.Read(buf)
		switch {
		case err == nil && !mayPass(g.speed.received, n):
		case err == nil:
			if _, err := s.back.Write(buf[:n]); err != nil && errors.Is(err, net.ErrClosed) {
				return
			}
			s.received.Add(int64(n))
		case errors.Is(err, unix.ECONNREFUSED): // nobody is there now; the program tries again
		case isTimeout(err) && s.sent.Load() != sent: // it sends, and needs no answer
		default:
			return
		}
	}
}

// more takes the packets that the kernel gives to the socket for answers, which fits
// better than the one for all.
func (g *Gateway) more(s *session) {
	buf := make([]byte, maxDatagram)
	for {
		n, err := s.back.Read(buf)
		if err != nil {
			if errors.Is(err, unix.ECONNREFUSED) { // the program in the capsule is gone
				continue
			}
			return
		}
		g.send(s, buf[:n])
	}
}

func isTimeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}

// originalDestination returns where a packet was sent to.
func originalDestination(oob []byte) (netip.AddrPort, bool) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return netip.AddrPort{}, false
	}
	for _, m := range messages {
		if m.Header.Level == unix.SOL_IP && m.Header.Type == unix.IP_RECVORIGDSTADDR && len(m.Data) >= 8 {
			port := binary.BigEndian.Uint16(m.Data[2:4])
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte(m.Data[4:8])), port), true
		}
	}
	return netip.AddrPort{}, false
}

// connectedUDP makes a socket that has the address from, which is none of ours.
func (s *sockets) connectedUDP(from, to netip.AddrPort) (conn *net.UDPConn, err error) {
	err = netns.In(s.path, func() error {
		d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(from), Control: transparent}
		c, err := d.DialContext(context.Background(), "udp4", to.String())
		if err == nil {
			conn = c.(*net.UDPConn)
		}
		return err
	})
	return conn, err
}

// answerDNS sends an answer that comes from the address that was asked.
func (s *sockets) answerDNS(from netip.Addr, to netip.AddrPort, text []byte) error {
	oob := unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: from.As4()})
	_, _, err := s.dnsUDP.WriteMsgUDPAddrPort(text, oob, to)
	return err
}
