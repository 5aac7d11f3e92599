package client

import (
	"context"
	"io"
	"net/http"

	"github.com/nestbox/nestbox"
)

// Health is what a server says of itself.
type Health struct {
	Status  string `json:"status"` // "ok"
	Version string `json:"version"`
}

// Health asks whether the server answers.
func (c *Client) Health(ctx context.Context) (Health, error) {
	var h Health
	err := c.call(ctx, http.MethodGet, "/health", nil, nil, &h)
	return h, err
}

// Ready asks whether the server can do its work. CodeUnavailable: its database or its
// host does not answer.
func (c *Client) Ready(ctx context.Context) error {
	return c.call(ctx, http.MethodGet, "/ready", nil, nil, nil)
}

// OpenAPI returns the OpenAPI document of the server's API, as YAML.
func (c *Client) OpenAPI(ctx context.Context) ([]byte, error) { return c.page(ctx, "/openapi.yaml") }

// Docs returns the same as a page for a browser.
func (c *Client) Docs(ctx context.Context) ([]byte, error) { return c.page(ctx, "/docs") }

const maxPage = 16 << 20

func (c *Client) page(ctx context.Context, path string) ([]byte, error) {
	res, err := c.send(ctx, request{method: http.MethodGet, path: path})
	if err != nil {
		return nil, err
	}
	defer closeBody(res.Body)
	data, err := io.ReadAll(io.LimitReader(res.Body, maxPage))
	if err != nil {
		return nil, nestbox.Errorf(nestbox.CodeUnavailable, "the answer was cut off: %w", err)
	}
	return data, nil
}
