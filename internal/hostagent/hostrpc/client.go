package hostrpc

import (
	"context"
	"net"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"

	"github.com/nestbox/nestbox"
	hostv1 "github.com/nestbox/nestbox/gen/nestbox/host/v1"
	"github.com/nestbox/nestbox/gen/nestbox/host/v1/hostv1connect"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/guestrpc"
	"github.com/nestbox/nestbox/internal/hostagent"
	"github.com/nestbox/nestbox/internal/rpcerr"
)

// Client is a Host on another machine, or behind a socket of this one.
type Client struct {
	dial  func(ctx context.Context) (net.Conn, error)
	http  *http.Transport
	host  hostv1connect.HostServiceClient
	token string

	mu     sync.Mutex
	guests map[string]*guestrpc.Client // one each, for its idle connections
}

var _ hostagent.Host = (*Client)(nil)

// silentFor is how long a WatchDeaths stream may say nothing before its host
// is taken to be gone.
const silentFor = 3 * aliveEvery

// NewClient returns a Host that is reached over dial, which makes one
// connection to its server.
func NewClient(dial func(ctx context.Context) (net.Conn, error), token string) *Client {
	transport := &http.Transport{
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		DisableCompression: true,
		IdleConnTimeout:    time.Minute,
	}
	return &Client{
		dial:   dial,
		http:   transport,
		token:  token,
		guests: map[string]*guestrpc.Client{},
		host: hostv1connect.NewHostServiceClient(connect.NewClient(connecthttp.NewTransport(
			&http.Client{Transport: withToken{transport, token}},
			"http://host",
			connecthttp.WithReadMaxBytes(64<<20),
		))),
	}
}

// Close closes what the client holds. Guests that it lent are cut.
func (c *Client) Close() {
	c.mu.Lock()
	guests := c.guests
	c.guests = map[string]*guestrpc.Client{}
	c.mu.Unlock()
	for _, g := range guests {
		g.Close()
	}
	c.http.CloseIdleConnections()
}

// withToken adds the credential to every request.
type withToken struct {
	next  http.RoundTripper
	token string
}

// RoundTrip implements http.RoundTripper.
func (t withToken) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set(guestrpc.TokenHeader, t.token)
	return t.next.RoundTrip(r)
}

func fromWire(err error) error { return rpcerr.FromConnect(err, nestbox.CodeUnavailable) }

// Info implements Host.
func (c *Client) Info(ctx context.Context) (hostagent.Info, error) {
	res, err := c.host.Info(ctx, &hostv1.InfoRequest{})
	if err != nil {
		return hostagent.Info{}, fromWire(err)
	}
	return infoFromWire(res), nil
}

// Create implements Host.
func (c *Client) Create(ctx context.Context, id string, spec nestbox.CapsuleSpec) (hostagent.Status, error) {
	res, err := c.host.Create(ctx, &hostv1.CreateRequest{Id: id, Spec: specToWire(spec)})
	if err != nil {
		return hostagent.Status{}, fromWire(err)
	}
	return statusFromWire(res.GetStatus()), nil
}

// Destroy implements Host.
func (c *Client) Destroy(ctx context.Context, id string) error {
	if _, err := c.host.Destroy(ctx, &hostv1.DestroyRequest{Id: id}); err != nil {
		return fromWire(err)
	}
	c.dropGuest(id, nestbox.StateStopping.NotRunning(""))
	return nil
}

// Get implements Host.
func (c *Client) Get(ctx context.Context, id string) (hostagent.Status, error) {
	res, err := c.host.Get(ctx, &hostv1.GetRequest{Id: id})
	if err != nil {
		return hostagent.Status{}, fromWire(err)
	}
	return statusFromWire(res.GetStatus()), nil
}

// List implements Host.
func (c *Client) List(ctx context.Context) ([]hostagent.Status, error) {
	res, err := c.host.List(ctx, &hostv1.ListRequest{})
	if err != nil {
		return nil, fromWire(err)
	}
	out := make([]hostagent.Status, 0, len(res.GetStatuses()))
	for _, s := range res.GetStatuses() {
		out = append(out, statusFromWire(s))
	}
	return out, nil
}

// SetNetwork implements Host.
func (c *Client) SetNetwork(ctx context.Context, id string, policy nestbox.NetworkPolicy) error {
	if _, err := c.host.SetNetwork(ctx, &hostv1.SetNetworkRequest{Id: id, Policy: policyToWire(policy)}); err != nil {
		return fromWire(err)
	}
	return nil
}

// Network implements Host.
func (c *Client) Network(ctx context.Context, id string) (nestbox.NetworkReport, error) {
	res, err := c.host.Network(ctx, &hostv1.NetworkRequest{Id: id})
	if err != nil {
		return nestbox.NetworkReport{}, fromWire(err)
	}
	return reportFromWire(res), nil
}

// WatchDeaths implements Host.
func (c *Client) WatchDeaths(ctx context.Context, died func(hostagent.Status)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.host.WatchDeaths(ctx, &hostv1.WatchDeathsRequest{})
	if err != nil {
		return fromWire(err)
	}
	defer stream.Close()
	silence := time.AfterFunc(silentFor, cancel)
	defer silence.Stop()
	for {
		res, err := stream.Receive()
		if err != nil {
			return fromWire(err)
		}
		silence.Reset(silentFor)
		if res.GetStatus() != nil {
			died(statusFromWire(res.GetStatus()))
		}
	}
}

// Guest implements Host. It asks the host first, so that an unknown capsule
// is told here and not at the first use.
func (c *Client) Guest(ctx context.Context, id string) (guest.Guest, error) {
	status, err := c.Get(ctx, id)
	switch {
	case nestbox.CodeOf(err) == nestbox.CodeNotFound:
		c.dropGuest(id, nestbox.StateStopping.NotRunning(""))
		return nil, err
	case err != nil:
		return nil, err
	case status.State != hostagent.StateRunning:
		why := status.NotRunning()
		c.dropGuest(id, why)
		return nil, why
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	g, ok := c.guests[id]
	if !ok {
		g = guestrpc.NewClient(guestrpc.ClientConfig{
			Dial:   c.dial,
			Header: http.Header{guestrpc.TokenHeader: {c.token}, capsuleHeader: {id}},
		})
		c.guests[id] = g
	}
	return g, nil
}

// dropGuest closes the connections to the guest of a capsule that ended.
func (c *Client) dropGuest(id string, cause *nestbox.Error) {
	c.mu.Lock()
	g := c.guests[id]
	delete(c.guests, id)
	c.mu.Unlock()
	if g != nil {
		g.CloseBecause(cause)
	}
}
