package api

import (
	"context"
	"net/http"
	"strings"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
)

// capsule is a capsule on the wire, as Wrenn has it, with disk_mb, pids_max
// and reason added.
type capsule struct {
	ID           string            `json:"id"`
	Name         string            `json:"name,omitempty"`
	Hostname     string            `json:"hostname,omitempty" doc:"As programs see it; left out = the id"`
	EnvNames     []string          `json:"env_names,omitempty" doc:"Names of what its processes have in their environment; the values are not shown"`
	Status       string            `json:"status" enum:"pending,starting,running,paused,hibernated,stopped,missing,error"`
	Reason       string            `json:"reason,omitempty" doc:"Why it is in this status, if that needs saying"`
	Template     string            `json:"template"`
	VCPUs        int               `json:"vcpus"`
	MemoryMB     int               `json:"memory_mb" doc:"MiB"`
	DiskMB       int               `json:"disk_mb" doc:"MiB of the writable layer"`
	PidsMax      int               `json:"pids_max" doc:"Most processes and threads at a time"`
	TimeoutSec   int               `json:"timeout_sec" doc:"It is destroyed after so many seconds in which nobody used it; 0 = never"`
	CreatedAt    time.Time         `json:"created_at"`
	StartedAt    *time.Time        `json:"started_at,omitempty"`
	LastActiveAt *time.Time        `json:"last_active_at,omitempty"`
	LastUpdated  time.Time         `json:"last_updated"`
	Metadata     map[string]string `json:"metadata,omitempty"`
	Network      networkPolicy     `json:"network" doc:"What it may reach outside"`
	Ports        []portSettings    `json:"ports,omitempty" doc:"Those that have settings"`
	Unresponsive *unresponsive     `json:"unresponsive,omitempty" doc:"Its daemon does not answer: something inside has stopped or replaced it, or it has no time to run"`
}

type unresponsive struct {
	Since time.Time `json:"since"`
}

func toCapsule(c nestbox.Capsule) capsule {
	state := c.State
	if state == nestbox.StateStopping {
		state = nestbox.StateStopped
	}
	var frozen *unresponsive
	if !c.UnresponsiveSince.IsZero() {
		frozen = &unresponsive{Since: c.UnresponsiveSince.UTC()}
	}
	return capsule{
		ID:           c.ID,
		Name:         c.Name,
		Hostname:     c.Hostname,
		EnvNames:     c.EnvNames,
		Status:       string(state),
		Reason:       c.Reason,
		Template:     c.Template,
		VCPUs:        c.Resources.VCPUs,
		MemoryMB:     c.Resources.MemoryMB,
		DiskMB:       c.Resources.DiskMB,
		PidsMax:      c.Resources.PidsMax,
		TimeoutSec:   c.TimeoutSec,
		CreatedAt:    seconds(c.CreatedAt),
		StartedAt:    optional(seconds(c.StartedAt)),
		LastActiveAt: optional(seconds(c.LastActiveAt)),
		LastUpdated:  seconds(c.UpdatedAt),
		Metadata:     c.Metadata,
		Network:      toPolicy(c.NetworkPolicy()),
		Ports:        portsOf(c),
		Unresponsive: frozen,
	}
}

// seconds is the precision of times in Wrenn's API.
func seconds(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }

func optional(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

type createCapsuleBody struct {
	Template   string            `json:"template,omitempty" doc:"What to start from; empty = minimal"`
	Name       string            `json:"name,omitempty" doc:"One that stands for the id in all paths: 1 to 63 of a-z, 0-9 and -, and no other live capsule's of the team"`
	Hostname   string            `json:"hostname,omitempty" doc:"As programs see it; empty = the id"`
	Envs       map[string]string `json:"envs,omitempty" doc:"Environment of all processes, as far as they do not say otherwise; at most 256. Names are shown again, values never"`
	VCPUs      int               `json:"vcpus,omitempty" doc:"0 or less = 1"`
	MemoryMB   int               `json:"memory_mb,omitempty" doc:"MiB; 0 or less = 512"`
	DiskMB     int               `json:"disk_mb,omitempty" doc:"MiB of the writable layer; 0 or less = 5120"`
	PidsMax    int               `json:"pids_max,omitempty" doc:"Most processes and threads at a time; 0 or less = 4096"`
	TimeoutSec int               `json:"timeout_sec,omitempty" doc:"It is destroyed, within 15 s, after so many seconds without a request to it, an open stream or a connection to a port; what its programs do by themselves does not count. 0 or less = never"`
	Metadata   map[string]string `json:"metadata,omitempty" doc:"The caller's own notes, shown again; at most 64"`
	Network    *networkBody      `json:"network,omitempty" doc:"What it may reach outside; left out = what the operator has for all"`
}

// spec reads the body, where it says nothing about the network with byDefault.
func (b createCapsuleBody) spec(byDefault nestbox.NetworkPolicy) nestbox.CapsuleSpec {
	var network *nestbox.NetworkPolicy
	if b.Network != nil {
		network = new(b.Network.policy(byDefault))
	}
	return nestbox.CapsuleSpec{
		Network:    network,
		Template:   b.Template,
		Name:       b.Name,
		Hostname:   b.Hostname,
		Env:        b.Envs,
		Resources:  nestbox.Resources{VCPUs: b.VCPUs, MemoryMB: b.MemoryMB, DiskMB: b.DiskMB, PidsMax: b.PidsMax},
		TimeoutSec: max(b.TimeoutSec, 0),
		Metadata:   b.Metadata,
	}
}

type createCapsuleInput struct {
	IdempotencyKey string `header:"Idempotency-Key" doc:"Asking again with the same key makes nothing and answers with the same capsule, as long as it is remembered; a create that failed leaves the key free"`

	Body *createCapsuleBody
}

type createdOutput struct {
	Replayed string `header:"Idempotent-Replayed" doc:"true: the capsule was made by an earlier request with the same key"`
	Body     capsule
}

type capsuleOutput struct {
	Body capsule
}

type listCapsulesInput struct {
	All      bool     `query:"all" doc:"Also those that are stopped or failed"`
	Metadata []string `query:"metadata,explode" doc:"Only those that have this in their metadata, as key=value; given more than once, all of it" example:"env=prod"`
	Limit    int      `query:"limit" minimum:"0" maximum:"1000" doc:"At most so many; 0 = 1000"`
	Cursor   string   `query:"cursor" doc:"X-Next-Cursor of the page before"`
}

type listCapsulesOutput struct {
	NextCursor string    `header:"X-Next-Cursor" doc:"Cursor of the next page, if there is one"`
	Body       []capsule `nullable:"false"`
}

func exampleCapsule() capsule {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	return capsule{
		ID: "cl-0123456789abcdefghijklmno", Status: "running", Template: "minimal",
		VCPUs: 1, MemoryMB: 512, DiskMB: 5120, PidsMax: 4096,
		Network:   examplePolicy(),
		CreatedAt: at, StartedAt: &at, LastActiveAt: &at, LastUpdated: at,
	}
}

func (s *server) registerCapsules() {
	const tag = "Capsules"
	register(s, operation{
		id: "createCapsule", method: http.MethodPost, path: "/v1/capsules", tag: tag,
		summary: "Create a capsule",
		about:   "Answers when the capsule runs and takes commands. If the client goes away meanwhile, the capsule is made all the same.",
		status:  http.StatusCreated,
		request: createCapsuleBody{Template: "minimal", VCPUs: 1, MemoryMB: 512},
		answer:  exampleCapsule(),
		errors:  []int{http.StatusNotFound, http.StatusConflict, http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable},
	}, s.createCapsule)
	register(s, operation{
		id: "listCapsules", method: http.MethodGet, path: "/v1/capsules", tag: tag,
		summary: "List capsules, newest first",
		about:   "A page may be shorter than its limit, also empty, and have a next one: with `metadata` at most 5000 capsules are looked at for it.",
		answer:  []capsule{exampleCapsule()},
	}, s.listCapsules)
	register(s, operation{
		id: "getCapsule", method: http.MethodGet, path: "/v1/capsules/{id}", tag: tag,
		summary: "Get a capsule", about: "Also one that is stopped.",
		answer: exampleCapsule(),
		errors: []int{http.StatusNotFound},
	}, s.getCapsule)
	register(s, operation{
		id: "destroyCapsule", method: http.MethodDelete, path: "/v1/capsules/{id}", tag: tag,
		summary: "Destroy a capsule", about: "Works from every status and may be repeated.",
		status: http.StatusNoContent,
		errors: []int{http.StatusNotFound, http.StatusBadGateway, http.StatusServiceUnavailable},
	}, func(ctx context.Context, caller control.Caller, in *CapsulePath) (*nothing, error) {
		return nil, s.control.Capsules.Destroy(ctx, caller, in.ID)
	})
	register(s, operation{
		id: "pingCapsule", method: http.MethodPost, path: "/v1/capsules/{id}/ping", tag: tag,
		summary: "Mark a capsule as in use", about: "Restarts the time after which it is destroyed if nobody uses it.",
		status: http.StatusNoContent,
		errors: []int{http.StatusNotFound, http.StatusConflict},
	}, func(ctx context.Context, caller control.Caller, in *CapsulePath) (*nothing, error) {
		return nil, s.control.Capsules.Ping(ctx, caller, in.ID)
	})
}

func (s *server) createCapsule(ctx context.Context, caller control.Caller, in *createCapsuleInput) (*createdOutput, error) {
	var body createCapsuleBody
	if in.Body != nil {
		body = *in.Body
	}
	c, again, err := s.control.Capsules.CreateOnce(ctx, caller, in.IdempotencyKey, body.spec(s.control.Capsules.DefaultNetwork()))
	if err != nil {
		return nil, err
	}
	out := &createdOutput{Body: toCapsule(c)}
	if again {
		out.Replayed = "true"
	}
	return out, nil
}

func (s *server) listCapsules(ctx context.Context, caller control.Caller, in *listCapsulesInput) (*listCapsulesOutput, error) {
	wanted, err := parseMetadata(in.Metadata)
	if err != nil {
		return nil, err
	}
	list, next, err := s.control.Capsules.List(ctx, caller, control.ListCapsules{All: in.All, Metadata: wanted, Limit: in.Limit, Cursor: in.Cursor})
	if err != nil {
		return nil, err
	}
	out := &listCapsulesOutput{NextCursor: next, Body: make([]capsule, 0, len(list))}
	for _, c := range list {
		out.Body = append(out.Body, toCapsule(c))
	}
	return out, nil
}

// parseMetadata reads what a list is to have.
func parseMetadata(pairs []string) (map[string]string, error) {
	wanted := map[string]string{}
	for _, pair := range pairs {
		key, value, found := strings.Cut(pair, "=")
		if before, twice := wanted[key]; !found || key == "" || twice && before != value {
			return nil, nestbox.Errorf(nestbox.CodeInvalid, "query.metadata: %.80q is not key=value, each key once", pair)
		}
		wanted[key] = value
	}
	return wanted, nil
}

func (s *server) getCapsule(ctx context.Context, caller control.Caller, in *CapsulePath) (*capsuleOutput, error) {
	c, err := s.control.Capsules.Look(ctx, caller, in.ID)
	if err != nil {
		return nil, err
	}
	return &capsuleOutput{Body: toCapsule(c)}, nil
}
