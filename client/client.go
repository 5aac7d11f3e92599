package client

import (
	"cmp"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/nestbox/nestbox"
)

// DefaultBaseURL is where a server listens that nobody configured.
const DefaultBaseURL = "http://localhost:8080"

// Config says how to reach a server. The zero value of each field but APIKey
// has a meaning that works.
type Config struct {
	BaseURL string // without /v1; default DefaultBaseURL
	APIKey  string
	// HTTPClient makes the requests. It should have no Timeout, which would
	// cut streams. Default: one of the client's own.
	HTTPClient *http.Client
	// RetryFor is how long a request goes on trying to reach a server that
	// refuses or loses connections. Default 5 s; negative = one try.
	RetryFor time.Duration
	// ReconnectFor is how long a stream goes on trying to connect again, from
	// the moment it was cut, before it gives up. Default 5 min.
	ReconnectFor time.Duration
}

// FromEnv reads NESTBOX_URL and NESTBOX_API_KEY, or else WRENN_BASE_URL and
// WRENN_API_KEY. getenv is os.Getenv, or a test's.
func FromEnv(getenv func(string) string) Config {
	return Config{
		BaseURL: cmp.Or(getenv("NESTBOX_URL"), getenv("WRENN_BASE_URL")),
		APIKey:  cmp.Or(getenv("NESTBOX_API_KEY"), getenv("WRENN_API_KEY")),
	}
}

// Client speaks to one server with one API key.
type Client struct {
	Capsules *Capsules

	base         *url.URL
	key          string
	http         *http.Client
	retryFor     time.Duration
	reconnectFor time.Duration
}

// New makes a client. It does no I/O. CodeInvalid: the URL is none.
// CodeUnauthenticated: there is no key.
func New(cfg Config) (*Client, error) {
	raw := cmp.Or(cfg.BaseURL, DefaultBaseURL)
	base, err := url.Parse(strings.TrimRight(raw, "/"))
	if err != nil || base.Host == "" || (base.Scheme != "http" && base.Scheme != "https") {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "%q is not the URL of a server, such as %s", raw, DefaultBaseURL)
	}
	key := strings.TrimSpace(cfg.APIKey)
	if key == "" {
		return nil, nestbox.Errorf(nestbox.CodeUnauthenticated, "no API key: set NESTBOX_API_KEY, or Config.APIKey")
	}
	if strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return nil, nestbox.Errorf(nestbox.CodeUnauthenticated, "the API key contains characters that no key has")
	}
	c := &Client{
		base:         base,
		key:          key,
		http:         cfg.HTTPClient,
		retryFor:     cmp.Or(cfg.RetryFor, 5*time.Second),
		reconnectFor: cmp.Or(cfg.ReconnectFor, 5*time.Minute),
	}
	if c.http == nil {
		c.http = &http.Client{Transport: newTransport()}
	}
	c.Capsules = &Capsules{c: c}
	return c, nil
}

// newTransport keeps more connections to the one server it speaks to than
// the default transport, which has two.
func newTransport() *http.Transport {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.MaxIdleConns = 256
	t.MaxIdleConnsPerHost = 256
	return t
}

// CloseIdle closes connections that are kept for later requests.
func (c *Client) CloseIdle() { c.http.CloseIdleConnections() }

// Capsule returns a handle for a capsule whose id is known, without asking the
// server.
func (c *Client) Capsule(id string) *Capsule {
	h := &Capsule{ID: id, Info: nestbox.Capsule{ID: id}, c: c}
	h.Processes = &Processes{c: c, capsule: id}
	h.Files = &Files{c: c, capsule: id}
	h.Ports = &Ports{c: c, capsule: id}
	return h
}
