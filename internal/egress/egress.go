// Package egress is the way of capsules out to the world.
//
// A Gateway stands in the outer network namespace of one capsule, where packets to
// anywhere are turned to its sockets (TPROXY, see tproxy.go), and dials from the
// namespace of this process. So there is no forwarding, no address translation and
// no bridge, and a host whose firewall forwards nothing need not be changed. It
// closes by itself: without a Gateway, nothing leaves the namespace.
//
// What may be reached is a nestbox.NetworkPolicy, and never what Never has, which is
// looked at when the connection is made, with the address that is really dialled.
//
// The package may import the root package and leaves.
package egress

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
)

// Config is what the Gateways of a host share. It must not be changed any more.
type Config struct {
	Never   Never
	Mark    uint32                  // of the sockets by which capsules reach the world; 0 = none
	DNS     func() []netip.AddrPort // servers that names are asked of; they may be anywhere
	Log     *slog.Logger
	Limits  Limits
	Counted func(id string, f nestbox.NetworkFlow) // called at the end of each flow, and for each refused one; nil = nobody counts
}

// Limits bound what one capsule may make its Gateway hold. Zero means the default.
type Limits struct {
	TCP     int           // connections; 0 = 1024
	UDP     int           // pairs of addresses; 0 = 256
	Lookups int           // at a time; 0 = 64
	Peek    time.Duration // how long a connection may take to show its name; 0 = 10 s
	Idle    time.Duration // how long a pair of UDP addresses is remembered; 0 = 60 s
	Dial    time.Duration // how long a connection may take to be made; 0 = 10 s
}

func (l Limits) withDefaults() Limits {
	orDefault(&l.TCP, 1024)
	orDefault(&l.UDP, 256)
	orDefault(&l.Lookups, 64)
	orDefault(&l.Peek, 10*time.Second)
	orDefault(&l.Idle, time.Minute)
	orDefault(&l.Dial, 10*time.Second)
	return l
}

func orDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// markBase is in the upper half of the mark of sockets with which the world is dialled
// for capsules, by which the host's own firewall may know them. Lookups have none: the
// host's name servers may be anywhere.
const markBase = 0x6e620000

// Gateway is the way out of one capsule. It is safe for concurrent use.
type Gateway struct {
	cfg     Config
	id      string
	log     *slog.Logger
	rules   atomic.Pointer[nestbox.NetworkRules]
	sockets *sockets
	speed   speed
	udp     sessions
	lookups chan struct{}

	ctx     context.Context //nolint:containedctx // until Close
	stop    context.CancelFunc
	running sync.WaitGroup

	mu    sync.Mutex
	flows map[*flow]struct{}
}

// Open stands a Gateway in the outer namespace at path, which it prepares, and serves
// the capsule from then on. CodeInvalid: the policy cannot be meant.
// CodeUnsupported: the kernel has no TPROXY.
func Open(cfg Config, id, path string, policy nestbox.NetworkPolicy) (*Gateway, error) {
	rules, err := policy.Rules()
	if err != nil {
		return nil, err
	}
	cfg.Limits = cfg.Limits.withDefaults()
	orDefault(&cfg.Log, slog.New(slog.DiscardHandler))
	s, err := openSockets(path)
	if err != nil {
		return nil, err
	}
	g := &Gateway{
		cfg: cfg, id: id, log: cfg.Log.With("capsule", id), sockets: s,
		lookups: make(chan struct{}, cfg.Limits.Lookups), flows: map[*flow]struct{}{},
		udp: sessions{open: map[pair]*session{}}, speed: newSpeed(policy),
	}
	g.rules.Store(rules)
	g.ctx, g.stop = context.WithCancel(context.Background())
	g.running.Go(func() { g.acceptTCP(s.tcp, g.serveTCP) })
	g.running.Go(func() { g.acceptTCP(s.dnsTCP, g.serveDNSConn) })
	g.running.Go(g.serveUDP)
	g.running.Go(g.serveDNS)
	return g, nil
}

// Set replaces the policy. Flows that the new one denies are cut, others go on.
func (g *Gateway) Set(policy nestbox.NetworkPolicy) error {
	rules, err := policy.Rules()
	if err != nil {
		return err
	}
	g.rules.Store(rules)
	g.speed.set(policy)
	g.mu.Lock()
	defer g.mu.Unlock()
	for f := range g.flows {
		if v := g.judge(rules, f.Destination, f.Protocol, f.Port); !v.Allowed || v.ByName != f.byName {
			f.cut()
		}
	}
	return nil
}

// Close ends all flows, and lets nothing out any more.
func (g *Gateway) Close() error {
	g.stop()
	err := g.sockets.close()
	g.mu.Lock()
	for f := range g.flows {
		f.cut()
	}
	g.mu.Unlock()
	g.running.Wait()
	return err
}

// quicPort is where HTTP/3 is, whose names are not looked at.
const quicPort = 443

// judge decides a flow.
func (g *Gateway) judge(rules *nestbox.NetworkRules, d nestbox.Destination, p nestbox.NetworkProtocol, port uint16) nestbox.Verdict {
	if p == nestbox.NetworkUDP && port == quicPort && rules.ByName() {
		return nestbox.Verdict{Rule: "names are decided, and QUIC does not show them"}
	}
	return rules.Decide(d)
}

// count tells of a flow that has ended, or was refused.
func (g *Gateway) count(f nestbox.NetworkFlow) {
	if g.cfg.Counted != nil {
		g.cfg.Counted(g.id, f)
	}
}

// flow is one that goes on.
type flow struct {
	nestbox.NetworkFlow
	byName         bool
	cut            func()
	sent, received atomic.Int64
	shown          atomic.Pointer[string] // the name, if nothing is decided by it; nil = none was seen
}

// now returns the flow as it is so far.
func (f *flow) now() nestbox.NetworkFlow {
	so := f.NetworkFlow
	so.Sent, so.Received = f.sent.Load(), f.received.Load()
	if shown := f.shown.Load(); shown != nil {
		so.Name = *shown
	}
	return so
}

// open returns the flows that go on, the oldest first, and of many the last.
func (g *Gateway) open() []nestbox.NetworkFlow {
	g.mu.Lock()
	all := make([]nestbox.NetworkFlow, 0, len(g.flows))
	for f := range g.flows {
		so := f.now()
		so.Open = true
		all = append(all, so)
	}
	g.mu.Unlock()
	slices.SortFunc(all, func(a, b nestbox.NetworkFlow) int { return a.At.Compare(b.At) })
	return all[max(0, len(all)-maxRecent):]
}

// enter registers a flow, if there is room and it is still allowed.
func (g *Gateway) enter(f *flow, most int) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.ctx.Err() != nil:
		return errClosed
	case len(g.flows) >= most:
		return errTooMany
	case !g.judge(g.rules.Load(), f.Destination, f.Protocol, f.Port).Allowed:
		return errors.New("the policy was changed meanwhile")
	}
	g.flows[f] = struct{}{}
	return nil
}

func (g *Gateway) leave(f *flow) {
	g.mu.Lock()
	delete(g.flows, f)
	g.mu.Unlock()
	g.count(f.now())
}

var (
	errClosed  = errors.New("the gateway is closed")
	errTooMany = errors.New("the capsule has too many connections")
)

// dial makes a connection to the world. Of a name every address is tried that may be
// reached.
func (g *Gateway) dial(ctx context.Context, network, address string) (net.Conn, error) {
	d := net.Dialer{
		Timeout:  g.cfg.Limits.Dial,
		Resolver: g.resolver(),
		Control: func(_, address string, c syscall.RawConn) error {
			to, err := netip.ParseAddrPort(address)
			if err != nil {
				return err
			}
			if g.cfg.Never.Has(to.Addr()) {
				return errNever
			}
			return mark(c, g.cfg.Mark)
		},
	}
	return d.DialContext(ctx, network, address)
}

func mark(c syscall.RawConn, mark uint32) error {
	if mark == 0 {
		return nil
	}
	var result error
	err := c.Control(func(fd uintptr) { result = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark)) })
	return errors.Join(err, result)
}
