package api

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
)

type portURLBody struct {
	ExpiresSec int `json:"expires_sec,omitempty" minimum:"0" doc:"How long the address works; 0 = 1 hour, at most 7 days"`
}

type portURLInput struct {
	PortPath
	Body *portURLBody
}

type portURL struct {
	URL       string    `json:"url,omitempty" doc:"Works in a browser without a key"`
	Query     string    `json:"query,omitempty" doc:"What to add to an address of the port to be let in"`
	Token     string    `json:"token"`
	ExpiresAt time.Time `json:"expires_at"`
}

type portURLOutput struct {
	Body portURL
}

func (s *server) registerPorts() {
	register(s, operation{
		id: "signPortURL", method: http.MethodPost, path: "/v1/capsules/{id}/ports/{port}/url", tag: "Ports",
		summary: "Get an address for a port inside a capsule",
		about: "Ports are private unless they are set to be public: they are reached with an API key, or with such an address until it expires. " +
			"It is one that works where the client is: with a host name of the port's own, or a path (`/v1/capsules/{id}/ports/{port}/proxy/…`). Nothing needs to listen yet.",
		request: portURLBody{ExpiresSec: 3600},
		answer: portURL{
			URL:   "http://8080-cl-0123456789abcdefghijklmno.localhost:8080/?token=AAAA",
			Query: "token=AAAA", Token: "AAAA", ExpiresAt: exampleCapsule().CreatedAt,
		},
		errors: []int{http.StatusNotFound, http.StatusConflict},
	}, s.signPortURL)
}

func (s *server) signPortURL(ctx context.Context, caller control.Caller, in *portURLInput) (*portURLOutput, error) {
	port, err := parsePort(in.Port)
	if err != nil {
		return nil, err
	}
	var ttl time.Duration
	if in.Body != nil {
		if in.Body.ExpiresSec > 7*24*3600 {
			return nil, nestbox.Errorf(nestbox.CodeInvalid, "body.expires_sec: must be at most %d (7 days)", 7*24*3600)
		}
		ttl = time.Duration(in.Body.ExpiresSec) * time.Second
	}
	signed, err := s.control.Ports.Sign(ctx, caller, in.ID, port, ttl)
	if err != nil {
		return nil, err
	}
	out := &portURLOutput{Body: portURL{Token: signed.Token, ExpiresAt: seconds(signed.Expires)}}
	if s.cfg.PortURL != nil {
		out.Body.URL = s.cfg.PortURL(ctx, signed.Capsule, port, signed.Token)
		if u, err := url.Parse(out.Body.URL); err == nil {
			out.Body.Query = u.RawQuery
		}
	}
	return out, nil
}

// parsePort reads a port in its one canonical form: 02280 and +2280 must not
// be other names of a port that is checked as 2280.
func parsePort(text string) (uint16, error) {
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 || strconv.FormatUint(n, 10) != text {
		return 0, nestbox.Errorf(nestbox.CodeInvalid, "%.40q is not a port: 1 to 65535, without leading zeros", text)
	}
	return uint16(n), nil
}
