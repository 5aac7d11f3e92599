package egress

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"github.com/nestbox/nestbox"
)

// Lookups of the capsule, whatever server it means, are answered here: names that may
// not be reached are refused without asking anybody, and addresses that may never be
// reached are left out of answers.

const (
	lookupIn   = 3 * time.Second // per server
	maxDNS     = 4 << 10         // bytes of a question, or of an answer over UDP
	dnsIdle    = 10 * time.Second
	dnsBuffers = 1232 // bytes that an answer over UDP may have where the asker says nothing else useful
)

// serveDNS answers lookups over UDP.
func (g *Gateway) serveDNS() {
	buf, oob := make([]byte, maxDNS), make([]byte, 128)
	for {
		n, oobN, _, from, err := g.sockets.dnsUDP.ReadMsgUDPAddrPort(buf, oob)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		to, ok := originalDestination(oob[:oobN])
		if err != nil || !ok {
			continue
		}
		question := &dns.Msg{}
		if question.Unpack(buf[:n]) != nil {
			continue
		}
		select {
		case g.lookups <- struct{}{}:
		default: // a flood: the asker asks again
			continue
		}
		g.running.Go(func() {
			defer func() { <-g.lookups }()
			answer := g.answer(question)
			answer.Truncate(answerSize(question))
			if text, err := answer.Pack(); err == nil {
				_ = g.sockets.answerDNS(to.Addr(), from, text) // it asks again
			}
		})
	}
}

// answerSize is how large an answer over UDP may be (RFC 6891 section 6.2.3).
func answerSize(question *dns.Msg) int {
	if opt := question.IsEdns0(); opt != nil {
		return min(max(int(opt.UDPSize()), dns.MinMsgSize), dnsBuffers)
	}
	return dns.MinMsgSize
}

// serveDNSConn answers lookups over TCP.
func (g *Gateway) serveDNSConn(conn *net.TCPConn) {
	defer func() { _ = conn.Close() }()
	defer context.AfterFunc(g.ctx, func() { _ = conn.Close() })()
	for {
		_ = conn.SetDeadline(time.Now().Add(dnsIdle))
		var size [2]byte
		if _, err := io.ReadFull(conn, size[:]); err != nil {
			return
		}
		text := make([]byte, min(int(binary.BigEndian.Uint16(size[:])), maxDNS))
		question := &dns.Msg{}
		if _, err := io.ReadFull(conn, text); err != nil || question.Unpack(text) != nil {
			return
		}
		answer, err := g.answer(question).Pack()
		if err != nil {
			return
		}
		_ = conn.SetDeadline(time.Now().Add(dnsIdle))
		if _, err := conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...)); err != nil {
			return
		}
	}
}

// answer answers one lookup.
func (g *Gateway) answer(question *dns.Msg) *dns.Msg {
	if question.Response || question.Opcode != dns.OpcodeQuery || len(question.Question) != 1 || question.Question[0].Qclass != dns.ClassINET {
		return failure(question, dns.RcodeNotImplemented)
	}
	q := question.Question[0]
	name := strings.ToLower(strings.TrimSuffix(q.Name, "."))
	f := nestbox.NetworkFlow{Destination: nestbox.Destination{Name: name}, Protocol: nestbox.NetworkDNS, Port: dnsPort, At: time.Now()}
	f.Verdict.Allowed = g.rules.Load().MayLookUp(name)
	defer func() { g.count(f) }()
	if !f.Verdict.Allowed {
		return failure(question, dns.RcodeRefused)
	}
	switch q.Qtype {
	case dns.TypeAAAA, dns.TypeHTTPS, dns.TypeSVCB:
		// A capsule has IPv4 only; and the other two would have programs use QUIC or
		// hide the name.
		return empty(question)
	}
	answer, err := g.lookUp(question)
	if err != nil {
		refuse(&f, err)
		return failure(question, dns.RcodeServerFailure)
	}
	answer.Answer = g.reachable(answer.Answer)
	answer.Extra = g.reachable(answer.Extra)
	return answer
}

// reachable leaves out the addresses that are never reached.
func (g *Gateway) reachable(records []dns.RR) []dns.RR {
	var kept []dns.RR
	for _, r := range records {
		switch r := r.(type) {
		case *dns.A:
			if addr, ok := netip.AddrFromSlice(r.A.To4()); !ok || g.cfg.Never.Has(addr) {
				continue
			}
		case *dns.AAAA, *dns.OPT:
			continue
		}
		kept = append(kept, r)
	}
	return kept
}

// lookUp asks the host's servers, one after the other.
func (g *Gateway) lookUp(question *dns.Msg) (*dns.Msg, error) {
	ask := &dns.Msg{}
	ask.SetQuestion(question.Question[0].Name, question.Question[0].Qtype)
	ask.SetEdns0(dnsBuffers, false)
	err := errors.New("no server for names is known")
	for _, server := range g.cfg.DNS() {
		var answer *dns.Msg
		if answer, err = exchange(g.ctx, ask, server); err != nil {
			continue
		}
		out := &dns.Msg{}
		out.SetRcode(question, answer.Rcode)
		out.RecursionAvailable = true
		out.Answer, out.Ns = answer.Answer, answer.Ns
		return out, nil
	}
	return nil, err
}

// exchange asks one server, again over TCP if the answer is cut.
func exchange(ctx context.Context, ask *dns.Msg, server netip.AddrPort) (*dns.Msg, error) {
	dialer := &net.Dialer{Timeout: lookupIn}
	for _, network := range []string{"udp", "tcp"} {
		client := dns.Client{Net: network, Dialer: dialer, ReadTimeout: lookupIn, WriteTimeout: lookupIn, UDPSize: dnsBuffers}
		answer, _, err := client.ExchangeContext(ctx, ask, server.String())
		if err != nil {
			return nil, err
		}
		if !answer.Truncated {
			return answer, nil
		}
	}
	return nil, errors.New("the answer is cut, over TCP too")
}

func failure(question *dns.Msg, code int) *dns.Msg {
	return new(dns.Msg).SetRcode(question, code)
}

func empty(question *dns.Msg) *dns.Msg {
	m := new(dns.Msg).SetReply(question)
	m.RecursionAvailable = true
	return m
}

// resolver looks names up for connections that we make.
func (g *Gateway) resolver() *net.Resolver {
	var asked atomic.Uint32
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		servers := g.cfg.DNS()
		if len(servers) == 0 {
			return nil, errors.New("no server for names is known")
		}
		server := servers[int(asked.Add(1)-1)%len(servers)]
		dialer := &net.Dialer{Timeout: lookupIn}
		return dialer.DialContext(ctx, network, server.String())
	}}
}
