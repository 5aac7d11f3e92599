package client

import (
	"context"
	"net/http"
	"strconv"
	"time"
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
	path := capsulePath(p.capsule, "/ports/"+strconv.Itoa(int(port))+"/url")
	if err := p.c.call(ctx, http.MethodPost, path, nil, in, &out); err != nil {
		return PortURL{}, err
	}
	return PortURL(out), nil
}
