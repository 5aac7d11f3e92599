package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/nestbox/nestbox"
)

const capsuleColumns = `id, team_id, host_id, template, state, reason, vcpus, memory_mb, disk_mb, pids_max,
	timeout_sec, metadata, created_at, started_at, last_active_at, updated_at, network, ports, name, hostname, env_names, request_key, request_sum, image`

// CreateCapsule adds a capsule that is to start on a host. The host is added
// too, if it is new. CodeConflict: the id,
// the name or the key of its request is taken. CodeNotFound: the team does
// not exist.
func (s *Store) CreateCapsule(ctx context.Context, c nestbox.Capsule, host nestbox.HostInfo) error {
	metadata, err := json.Marshal(c.Metadata)
	if err != nil {
		return fail("create a capsule", err)
	}
	network, err := json.Marshal(c.Network)
	if err != nil {
		return fail("create a capsule", err)
	}
	env, err := json.Marshal(append([]string{}, slices.Sorted(maps.Keys(c.Env))...))
	if err != nil {
		return fail("create a capsule", err)
	}
	return s.change(ctx, "create a capsule", func(tx tx) error {
		if err := saveHost(ctx, tx, host); err != nil {
			return err
		}
		_, err := tx.exec(ctx, `INSERT INTO capsules (`+capsuleColumns+`) VALUES (`+marks(24)+`)`,
			c.ID, c.TeamID, host.ID, c.Template, nestbox.StateStarting, clean(c.Reason),
			c.Resources.VCPUs, c.Resources.MemoryMB, c.Resources.DiskMB, c.Resources.PidsMax,
			c.TimeoutSec, string(metadata), micros(c.CreatedAt), 0, micros(c.CreatedAt), micros(c.CreatedAt), string(network), "{}", c.Name, c.Hostname, string(env), c.Request.Key, c.Request.Sum, c.Image)
		return err
	})
}

// Capsule returns one capsule, in any state. CodeNotFound.
func (s *Store) Capsule(ctx context.Context, id string) (nestbox.Capsule, error) {
	c, err := scanCapsule(s.queryRow(ctx, `SELECT `+capsuleColumns+` FROM capsules WHERE id = ?`, id))
	return c, fail("read a capsule", unknownCapsule(err))
}

// CapsuleByName returns a team's capsule of a name: the live one, or else the newest.
// CodeNotFound.
func (s *Store) CapsuleByName(ctx context.Context, teamID, name string) (nestbox.Capsule, error) {
	query := `SELECT ` + capsuleColumns + ` FROM capsules WHERE team_id = ? AND name = ?
		ORDER BY CASE WHEN state IN (` + marks(len(namedStates)) + `) THEN 0 ELSE 1 END, created_at DESC, id LIMIT 1`
	c, err := scanCapsule(s.queryRow(ctx, query, append([]any{teamID, name}, anys(namedStates)...)...))
	return c, fail("read a capsule", unknownCapsule(err))
}

// CapsuleByRequest returns the capsule that a team asked for with a key. CodeNotFound.
func (s *Store) CapsuleByRequest(ctx context.Context, teamID, key string) (nestbox.Capsule, error) {
	c, err := scanCapsule(s.queryRow(ctx, `SELECT `+capsuleColumns+` FROM capsules WHERE team_id = ? AND request_key = ?`, teamID, key))
	return c, fail("read a capsule", unknownCapsule(err))
}

// FreeRequestKey lets the key of the request for a capsule be used again, if the capsule
// never ran.
func (s *Store) FreeRequestKey(ctx context.Context, id string) error {
	return s.change(ctx, "free an idempotency key", func(tx tx) error {
		_, err := tx.exec(ctx, `UPDATE capsules SET request_key = '' WHERE id = ? AND state = ? AND started_at = 0`, id, nestbox.StateError)
		return err
	})
}

// namedStates are those of capsules whose names are taken, as the index of the schema
// has it.
var namedStates = []nestbox.CapsuleState{nestbox.StateStarting, nestbox.StateRunning, nestbox.StateMissing}

func unknownCapsule(err error) error { return notFound(err, "capsule not found") }

// Page is a part of a team's capsules, newest first.
type Page struct {
	States []nestbox.CapsuleState // only these
	Before Position               // only what comes after it in the list; zero = from the first
	Limit  int
}

// Position is where a capsule stands in a list.
type Position struct {
	CreatedAt time.Time
	ID        string
}

// maxPageBytes bounds the metadata and policies of a page: what it has after that comes in the
// next one.
const maxPageBytes = 1 << 20

// pageStep is how many capsules of a page are read at a time: with the most
// metadata and rules they are 12 MiB.
const pageStep = 32

// CapsulesOfTeam returns a page of a team's capsules, newest first, and whether
// there are more. A page may be shorter than its limit. What it costs depends on
// the page, not on how many capsules there are.
func (s *Store) CapsulesOfTeam(ctx context.Context, teamID string, p Page) (_ []nestbox.Capsule, more bool, err error) {
	ids, err := s.pageOfTeam(ctx, teamID, p)
	if err != nil {
		return nil, false, err
	}
	if more = len(ids) > p.Limit; more {
		ids = ids[:p.Limit]
	}
	page := make([]nestbox.Capsule, 0, len(ids))
	bytes := 0
	for chunk := range slices.Chunk(ids, pageStep) {
		found, err := s.capsulesByID(ctx, chunk)
		if err != nil {
			return nil, false, err
		}
		for _, id := range chunk {
			c, ok := found[id]
			if !ok || !slices.Contains(p.States, c.State) {
				continue // it has changed since
			}
			if bytes > maxPageBytes {
				return page, true, nil
			}
			for k, v := range c.Metadata {
				bytes += len(k) + len(v)
			}
			for _, rule := range slices.Concat(c.NetworkPolicy().Allow, c.NetworkPolicy().Deny) {
				bytes += len(rule)
			}
			for _, settings := range c.Ports {
				bytes += len(settings.HostHeader) + len(strings.Join(settings.CORSOrigins, ""))
			}
			bytes += len(strings.Join(c.EnvNames, ""))
			page = append(page, c)
		}
	}
	if len(page) == 0 && more {
		return s.CapsulesOfTeam(ctx, teamID, p)
	}
	return page, more, nil
}

// pageOfTeam returns the ids of a page, and one more if there is one.
func (s *Store) pageOfTeam(ctx context.Context, teamID string, p Page) ([]string, error) {
	query, args := pageQuery(teamID, p)
	return list(ctx, s, "list capsules", func(r row) (id string, err error) { return id, r.Scan(&id) }, query, args...)
}

// pageQuery walks along an index for each state, up to the limit.
func pageQuery(teamID string, p Page) (query string, args []any) {
	before := int64(math.MaxInt64)
	if !p.Before.CreatedAt.IsZero() {
		before = micros(p.Before.CreatedAt)
	}
	walks := make([]string, len(p.States))
	for i, state := range p.States {
		walks[i] = `SELECT * FROM (SELECT id, created_at FROM capsules
			WHERE team_id = ? AND state = ? AND (created_at, id) < (?, ?)
			ORDER BY created_at DESC, id DESC LIMIT ?) AS of_state`
		args = append(args, teamID, state, before, p.Before.ID, p.Limit+1)
	}
	return `SELECT id FROM (` + strings.Join(walks, ` UNION ALL `) + `) AS page
		ORDER BY created_at DESC, id DESC LIMIT ?`, append(args, p.Limit+1)
}

// capsulesByID returns those of the ids that are of capsules.
func (s *Store) capsulesByID(ctx context.Context, ids []string) (map[string]nestbox.Capsule, error) {
	rows, err := list(ctx, s, "list capsules", scanCapsule,
		`SELECT `+capsuleColumns+` FROM capsules WHERE id IN (`+marks(len(ids))+`)`, anys(ids)...)
	found := make(map[string]nestbox.Capsule, len(rows))
	for _, c := range rows {
		found[c.ID] = c
	}
	return found, err
}

// LiveCapsules returns the capsules that hold, or may hold, resources of a
// host.
func (s *Store) LiveCapsules(ctx context.Context, hostID string) ([]nestbox.Capsule, error) {
	query, args := liveQuery(hostID)
	return list(ctx, s, "list live capsules", scanCapsule, query, args...)
}

func liveQuery(hostID string) (query string, args []any) {
	return `SELECT ` + capsuleColumns + ` FROM capsules WHERE host_id = ? AND state IN (` + marks(len(liveStates)) + `)`,
		append([]any{hostID}, anys(liveStates)...)
}

// liveStates are those that are Live, one by one, for an index to find them
// among those that have ended.
var liveStates = []nestbox.CapsuleState{nestbox.StateStarting, nestbox.StateRunning, nestbox.StateMissing, nestbox.StateStopping}

func anys[T any](list []T) []any {
	out := make([]any, len(list))
	for i, v := range list {
		out[i] = v
	}
	return out
}

// Transition moves a capsule along nestbox.Transitions, in one guarded update:
// of several that try at the same time as many succeed as the table allows. A
// reason that is not empty replaces the stored one; a capsule that runs has
// none.
//
// CodeNotFound: no such capsule. CodeInvalidState: its state does not allow
// the trigger; the capsule is then returned as it is.
func (s *Store) Transition(ctx context.Context, id string, trigger nestbox.Trigger, at time.Time, reason string) (c nestbox.Capsule, err error) {
	tr, err := transition(trigger)
	if err != nil {
		return c, err
	}
	set := `state = ?, updated_at = ?`
	args := []any{tr.To, micros(at)}
	if reason != "" || tr.To == nestbox.StateRunning {
		set += `, reason = ?`
		args = append(args, clean(reason))
	}
	if trigger == nestbox.TriggerStarted {
		set += `, started_at = ?, last_active_at = ?`
		args = append(args, micros(at), micros(at))
	}
	args = append(args, id)
	for _, from := range tr.From {
		args = append(args, from)
	}
	err = s.change(ctx, "change a capsule's state", func(tx tx) (err error) {
		c, err = scanCapsule(tx.queryRow(ctx, `UPDATE capsules SET `+set+`
			WHERE id = ? AND state IN (`+marks(len(tr.From))+`) RETURNING `+capsuleColumns, args...))
		if !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		c, err = scanCapsule(tx.queryRow(ctx, `SELECT `+capsuleColumns+` FROM capsules WHERE id = ?`, id))
		if err != nil {
			return unknownCapsule(err)
		}
		return nestbox.Errorf(nestbox.CodeInvalidState, "cannot apply %s to a capsule that is %s", trigger, c.State)
	})
	return c, err
}

// transition finds a trigger's row in the table; each trigger has one.
func transition(t nestbox.Trigger) (nestbox.Transition, error) {
	i := slices.IndexFunc(nestbox.Transitions, func(tr nestbox.Transition) bool { return tr.Trigger == t })
	if i < 0 {
		return nestbox.Transition{}, nestbox.Errorf(nestbox.CodeInternal, "store: unknown trigger %q", t)
	}
	return nestbox.Transitions[i], nil
}

// PruneCapsules forgets capsules that came to their end before a time, at most
// limit of them, and returns how many they were.
func (s *Store) PruneCapsules(ctx context.Context, before time.Time, limit int) (pruned int, err error) {
	query, args := oldQuery(before, limit)
	ids, err := list(ctx, s, "prune capsules", func(r row) (id string, err error) { return id, r.Scan(&id) }, query, args...)
	if err != nil || len(ids) == 0 {
		return 0, err
	}
	err = s.change(ctx, "prune capsules", func(tx tx) error {
		n, err := tx.exec(ctx, `DELETE FROM capsules WHERE id IN (`+marks(len(ids))+`) AND state NOT IN (`+marks(len(liveStates))+`)`,
			append(anys(ids), anys(liveStates)...)...) // one may be in destruction since
		pruned = int(n)
		return err
	})
	return pruned, err
}

func oldQuery(before time.Time, limit int) (query string, args []any) {
	return `SELECT id FROM capsules WHERE state IN (?, ?) AND updated_at < ? LIMIT ?`,
		[]any{nestbox.StateStopped, nestbox.StateError, micros(before), limit}
}

func scanCapsule(r row) (c nestbox.Capsule, err error) {
	var metadata, network, ports, env string
	var created, started, active, updated int64
	err = r.Scan(&c.ID, &c.TeamID, &c.HostID, &c.Template, &c.State, &c.Reason,
		&c.Resources.VCPUs, &c.Resources.MemoryMB, &c.Resources.DiskMB, &c.Resources.PidsMax,
		&c.TimeoutSec, &metadata, &created, &started, &active, &updated, &network, &ports, &c.Name, &c.Hostname, &env, &c.Request.Key, &c.Request.Sum, &c.Image)
	if err != nil {
		return nestbox.Capsule{}, err
	}
	c.CreatedAt, c.StartedAt = fromMicros(created), fromMicros(started)
	c.LastActiveAt, c.UpdatedAt = fromMicros(active), fromMicros(updated)
	if err := json.Unmarshal([]byte(metadata), &c.Metadata); err != nil {
		return nestbox.Capsule{}, fmt.Errorf("metadata of capsule %s: %w", c.ID, err)
	}
	if err := json.Unmarshal([]byte(network), &c.Network); err != nil {
		return nestbox.Capsule{}, fmt.Errorf("network of capsule %s: %w", c.ID, err)
	}
	if env != "[]" { // as of most
		if err := json.Unmarshal([]byte(env), &c.EnvNames); err != nil {
			return nestbox.Capsule{}, fmt.Errorf("environment of capsule %s: %w", c.ID, err)
		}
	}
	if ports == "{}" { // as of most
		return c, nil
	}
	if err := json.Unmarshal([]byte(ports), &c.Ports); err != nil {
		return nestbox.Capsule{}, fmt.Errorf("ports of capsule %s: %w", c.ID, err)
	}
	return c, nil
}

// SetNetwork replaces what a running capsule may reach. CodeNotFound. CodeInvalidState:
// it does not run.
func (s *Store) SetNetwork(ctx context.Context, id string, policy nestbox.NetworkPolicy, at time.Time) (c nestbox.Capsule, err error) {
	text, err := json.Marshal(policy)
	if err != nil {
		return nestbox.Capsule{}, fail("change a capsule's network", err)
	}
	err = s.change(ctx, "change a capsule's network", func(tx tx) (err error) {
		c, err = scanCapsule(tx.queryRow(ctx, `UPDATE capsules SET network = ?, updated_at = ?
			WHERE id = ? AND state = ? RETURNING `+capsuleColumns, string(text), micros(at), id, nestbox.StateRunning))
		if !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		c, err = scanCapsule(tx.queryRow(ctx, `SELECT `+capsuleColumns+` FROM capsules WHERE id = ?`, id))
		if err != nil {
			return unknownCapsule(err)
		}
		return c.State.NotRunning(c.Reason)
	})
	return c, err
}

// maxReason bounds what is kept of a reason, in bytes.
const maxReason = 1024

// clean makes any text one that both databases keep: bounded, UTF-8, no NUL.
func clean(s string) string {
	s = strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "")
	if len(s) > maxReason {
		s = strings.ToValidUTF8(s[:maxReason], "")
	}
	return s
}
