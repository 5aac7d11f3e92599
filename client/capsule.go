package client

import (
	"context"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/nestbox/nestbox"
)

// Capsules are the capsules of the key's team.
type Capsules struct{ c *Client }

// Capsule is a handle for one capsule.
type Capsule struct {
	ID        string
	Info      nestbox.Capsule // as the server last told this handle; only ID if it was never asked
	Processes *Processes
	Files     *Files
	Ports     *Ports

	c *Client
}

// Create makes a capsule and returns when it runs. It is never repeated by
// itself: CodeUnavailable may mean that the capsule was made all the same. Zero
// values of spec mean the server's defaults.
func (s *Capsules) Create(ctx context.Context, spec nestbox.CapsuleSpec) (*Capsule, error) {
	var out capsuleBody
	if err := s.c.call(ctx, http.MethodPost, "/v1/capsules", nil, createBodyOf(spec), &out); err != nil {
		return nil, err
	}
	return s.c.capsuleOf(out), nil
}

// CreateOnce is Create that is repeated when there is no answer: of all requests with one
// key one makes a capsule and all return it, as long as the server remembers it, in
// whatever state it is then. A create that failed leaves its key free. CodeConflict: the
// key was used for another spec. Without a key it is Create.
func (s *Capsules) CreateOnce(ctx context.Context, key string, spec nestbox.CapsuleSpec) (*Capsule, error) {
	if key == "" { // nothing would keep a second one from being made
		return s.Create(ctx, spec)
	}
	res, err := s.c.send(ctx, request{
		method: http.MethodPost, path: "/v1/capsules", json: createBodyOf(spec),
		header: http.Header{"Idempotency-Key": {key}}, repeatable: true,
	})
	if err != nil {
		return nil, err
	}
	var out capsuleBody
	if err := decode(res, &out); err != nil {
		return nil, err
	}
	return s.c.capsuleOf(out), nil
}

// ListCapsules says what to list.
type ListCapsules struct {
	All      bool              // also those that stopped or failed
	Metadata map[string]string // only those that have all of it
	PageSize int               // capsules in one request; 0 = as many as the server gives
}

// List goes through the capsules, newest first, one page at a time. It ends
// after the first error.
func (s *Capsules) List(ctx context.Context, opts ListCapsules) iter.Seq2[*Capsule, error] {
	return func(yield func(*Capsule, error) bool) {
		q := url.Values{}
		if opts.All {
			q.Set("all", "true")
		}
		for k, v := range opts.Metadata {
			q.Add("metadata", k+"="+v)
		}
		if opts.PageSize > 0 {
			q.Set("limit", strconv.Itoa(opts.PageSize))
		}
		for {
			page, next, err := s.page(ctx, q)
			if err != nil {
				yield(nil, err)
				return
			}
			for _, b := range page {
				if !yield(s.c.capsuleOf(b), nil) {
					return
				}
			}
			if next == "" || next == q.Get("cursor") {
				return
			}
			q.Set("cursor", next)
		}
	}
}

func (s *Capsules) page(ctx context.Context, q url.Values) ([]capsuleBody, string, error) {
	res, err := s.c.send(ctx, request{method: http.MethodGet, path: "/v1/capsules", query: q})
	if err != nil {
		return nil, "", err
	}
	var page []capsuleBody
	if err := decode(res, &page); err != nil {
		return nil, "", err
	}
	return page, res.Header.Get("X-Next-Cursor"), nil
}

// Get returns the capsule with this id or name, also one that stopped.
func (s *Capsules) Get(ctx context.Context, id string) (*Capsule, error) {
	h := s.c.Capsule(id)
	if err := h.Refresh(ctx); err != nil {
		return nil, err
	}
	return h, nil
}

// Destroy ends a capsule and everything in it. Destroying it again is no error.
func (s *Capsules) Destroy(ctx context.Context, id string) error {
	return s.c.Capsule(id).Destroy(ctx)
}

// Ping counts as activity of a running capsule.
func (s *Capsules) Ping(ctx context.Context, id string) error {
	return s.c.Capsule(id).Ping(ctx)
}

// Refresh asks the server for the capsule's present Info. It must not be
// called while another goroutine reads Info.
func (h *Capsule) Refresh(ctx context.Context) error {
	var out capsuleBody
	if err := h.c.call(ctx, http.MethodGet, h.path(""), nil, nil, &out); err != nil {
		return err
	}
	h.Info = out.domain()
	return nil
}

// Destroy ends the capsule and everything in it. Destroying it again is no
// error.
func (h *Capsule) Destroy(ctx context.Context) error {
	res, err := h.c.send(ctx, request{method: http.MethodDelete, path: h.path(""), repeatable: true})
	if err != nil {
		return err
	}
	return decode(res, nil)
}

// Ping counts as activity of the running capsule.
func (h *Capsule) Ping(ctx context.Context) error {
	return h.c.call(ctx, http.MethodPost, h.path("/ping"), nil, nil, nil)
}

func (h *Capsule) path(rest string) string { return capsulePath(h.ID, rest) }

func capsulePath(id, rest string) string { return "/v1/capsules/" + url.PathEscape(id) + rest }

func (c *Client) capsuleOf(b capsuleBody) *Capsule {
	h := c.Capsule(b.ID)
	h.Info = b.domain()
	return h
}

type createCapsuleBody struct {
	Template   string            `json:"template,omitempty"`
	Name       string            `json:"name,omitempty"`
	Hostname   string            `json:"hostname,omitempty"`
	Envs       map[string]string `json:"envs,omitempty"`
	VCPUs      int               `json:"vcpus,omitempty"`
	MemoryMB   int               `json:"memory_mb,omitempty"`
	DiskMB     int               `json:"disk_mb,omitempty"`
	PidsMax    int               `json:"pids_max,omitempty"`
	TimeoutSec int               `json:"timeout_sec,omitempty"`
	Metadata   map[string]string `json:"metadata,omitempty"`

	Network *nestbox.NetworkPolicy `json:"network,omitempty"`
}

func createBodyOf(s nestbox.CapsuleSpec) createCapsuleBody {
	return createCapsuleBody{
		Template:   s.Template,
		Name:       s.Name,
		Hostname:   s.Hostname,
		Envs:       s.Env,
		VCPUs:      s.Resources.VCPUs,
		MemoryMB:   s.Resources.MemoryMB,
		DiskMB:     s.Resources.DiskMB,
		PidsMax:    s.Resources.PidsMax,
		TimeoutSec: s.TimeoutSec,
		Metadata:   s.Metadata,
		Network:    s.Network,
	}
}

type capsuleBody struct {
	ID           string            `json:"id"`
	Name         string            `json:"name"`
	Hostname     string            `json:"hostname"`
	EnvNames     []string          `json:"env_names"`
	Status       string            `json:"status"`
	Reason       string            `json:"reason"`
	Template     string            `json:"template"`
	VCPUs        int               `json:"vcpus"`
	MemoryMB     int               `json:"memory_mb"`
	DiskMB       int               `json:"disk_mb"`
	PidsMax      int               `json:"pids_max"`
	TimeoutSec   int               `json:"timeout_sec"`
	Metadata     map[string]string `json:"metadata"`
	CreatedAt    time.Time         `json:"created_at"`
	StartedAt    time.Time         `json:"started_at"`
	LastActiveAt time.Time         `json:"last_active_at"`
	LastUpdated  time.Time         `json:"last_updated"`
	Unresponsive struct {
		Since time.Time `json:"since"`
	} `json:"unresponsive"`

	Network *nestbox.NetworkPolicy `json:"network"`
	Ports   []portSettingsBody     `json:"ports"`
}

func (b capsuleBody) domain() nestbox.Capsule {
	return nestbox.Capsule{
		ID: b.ID,
		CapsuleSpec: nestbox.CapsuleSpec{
			Template:   b.Template,
			Name:       b.Name,
			Hostname:   b.Hostname,
			Resources:  nestbox.Resources{VCPUs: b.VCPUs, MemoryMB: b.MemoryMB, DiskMB: b.DiskMB, PidsMax: b.PidsMax},
			TimeoutSec: b.TimeoutSec,
			Metadata:   b.Metadata,
			Network:    b.Network,
		},
		State:        nestbox.CapsuleState(b.Status),
		Reason:       b.Reason,
		CreatedAt:    b.CreatedAt,
		StartedAt:    b.StartedAt,
		LastActiveAt: b.LastActiveAt,
		UpdatedAt:    b.LastUpdated,
		Ports:        portsByNumber(b.Ports),
		EnvNames:     b.EnvNames,

		UnresponsiveSince: b.Unresponsive.Since,
	}
}
