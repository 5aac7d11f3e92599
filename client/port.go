package client

import (
	"context"
	"net/http"
	"strconv"
	"time"

	"github.com/nestbox/nestbox"
)

// Ports are the TCP ports inside one capsule.
type Ports struct {
	c       *Client
	capsule string
}

// PortURL is a URL that reaches a port inside a capsule without an API key,
// until it expires.
type PortURL struct {
	URL       string
	Token     string
	ExpiresAt time.Time
}

// URL signs a URL for a port. It works for ttl, to the second; 0 = the
// server's default of an hour.
func (p *Ports) URL(ctx context.Context, port uint16, ttl time.Duration) (PortURL, error) {
	in := struct {
		ExpiresSec int64 `json:"expires_sec,omitempty"`
	}{int64(ttl / time.Second)}
	var out struct {
		URL       string    `json:"url"`
		Token     string    `json:"token"`
		ExpiresAt time.Time `json:"expires_at"`
	}
	if err := p.c.call(ctx, http.MethodPost, p.path(port)+"/url", nil, in, &out); err != nil {
		return PortURL{}, err
	}
	return PortURL(out), nil
}

// path is the path of a port in the API.
func (p *Ports) path(port uint16) string {
	return capsulePath(p.capsule, "/ports/"+strconv.Itoa(int(port)))
}

type portSettingsBody struct {
	Port uint16 `json:"port"`
	nestbox.PortSettings
}

// List returns the settings of those ports that have some.
func (p *Ports) List(ctx context.Context) (map[uint16]nestbox.PortSettings, error) {
	var out []portSettingsBody
	if err := p.c.call(ctx, http.MethodGet, capsulePath(p.capsule, "/ports"), nil, nil, &out); err != nil {
		return nil, err
	}
	return portsByNumber(out), nil
}

func portsByNumber(list []portSettingsBody) map[uint16]nestbox.PortSettings {
	if len(list) == 0 {
		return nil
	}
	ports := make(map[uint16]nestbox.PortSettings, len(list))
	for _, s := range list {
		ports[s.Port] = s.PortSettings
	}
	return ports
}

// Get returns how a port is reached.
func (p *Ports) Get(ctx context.Context, port uint16) (nestbox.PortSettings, error) {
	var out portSettingsBody
	err := p.c.call(ctx, http.MethodGet, p.path(port), nil, nil, &out)
	return out.PortSettings, err
}

// Set replaces how a port is reached, from the next request on. CodeInvalid: settings
// cannot be meant. CodeDenied: the port is the capsule's daemon's. CodeInvalidState: the
// capsule has ended. CodeExhausted: too many ports of it have settings.
func (p *Ports) Set(ctx context.Context, port uint16, settings nestbox.PortSettings) error {
	return p.c.call(ctx, http.MethodPut, p.path(port), nil, settings, nil)
}

// Reset makes a port one of which nobody has set anything. Its errors are those of Set.
func (p *Ports) Reset(ctx context.Context, port uint16) error {
	return p.c.call(ctx, http.MethodDelete, p.path(port), nil, nil, nil)
}
