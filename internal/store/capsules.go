package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/nestbox/nestbox"
)

const capsuleColumns = `id, team_id, host_id, template, state, reason, vcpus, memory_mb, disk_mb, pids_max,
	timeout_sec, metadata, created_at, started_at, last_active_at, updated_at`

// CreateCapsule adds a capsule that is to start on a host. The host is added
// too, if it is new. CodeConflict: the id is taken. CodeNotFound: the team does
// not exist.
func (s *Store) CreateCapsule(ctx context.Context, c nestbox.Capsule, host nestbox.HostInfo) error {
	metadata, err := json.Marshal(c.Metadata)
	if err != nil {
		return fail("create a capsule", err)
	}
	return s.change(ctx, "create a capsule", func(tx tx) error {
		if err := saveHost(ctx, tx, host); err != nil {
			return err
		}
		_, err := tx.exec(ctx, `INSERT INTO capsules (`+capsuleColumns+`) VALUES (`+marks(16)+`)`,
			c.ID, c.TeamID, host.ID, c.Template, nestbox.StateStarting, clean(c.Reason),
			c.Resources.VCPUs, c.Resources.MemoryMB, c.Resources.DiskMB, c.Resources.PidsMax,
			c.TimeoutSec, string(metadata), micros(c.CreatedAt), 0, micros(c.CreatedAt), micros(c.CreatedAt))
		return err
	})
}

// Capsule returns one capsule, in any state. CodeNotFound.
func (s *Store) Capsule(ctx context.Context, id string) (nestbox.Capsule, error) {
	c, err := scanCapsule(s.queryRow(ctx, `SELECT `+capsuleColumns+` FROM capsules WHERE id = ?`, id))
	return c, fail("read a capsule", unknownCapsule(err))
}

func unknownCapsule(err error) error { return notFound(err, "sandbox not found") }

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

// maxPageBytes bounds the metadata of a page: what it has after that comes in the
// next one.
const maxPageBytes = 1 << 20

// CapsulesOfTeam returns a page of a team's capsules, newest first, and whether
// there are more. A page may be shorter than its limit.
func (s *Store) CapsulesOfTeam(ctx context.Context, teamID string, p Page) (_ []nestbox.Capsule, more bool, err error) {
	before := int64(math.MaxInt64)
	if !p.Before.CreatedAt.IsZero() {
		before = micros(p.Before.CreatedAt)
	}
	args := []any{teamID}
	for _, state := range p.States {
		args = append(args, state)
	}
	bytes := 0
	page, err := list(ctx, s, "list capsules", func(r row) (nestbox.Capsule, error) {
		if bytes > maxPageBytes {
			return nestbox.Capsule{}, errEnough
		}
		c, err := scanCapsule(r)
		for k, v := range c.Metadata {
			bytes += len(k) + len(v)
		}
		return c, err
	}, `SELECT `+capsuleColumns+` FROM capsules
		WHERE team_id = ? AND state IN (`+marks(len(p.States))+`) AND (created_at, id) < (?, ?)
		ORDER BY created_at DESC, id DESC LIMIT ?`, append(args, before, p.Before.ID, p.Limit+1)...)
	if errors.Is(err, errEnough) {
		return page, true, nil
	}
	if len(page) > p.Limit {
		return page[:p.Limit], true, err
	}
	return page, false, err
}

// LiveCapsules returns the capsules that hold, or may hold, resources of a
// host.
func (s *Store) LiveCapsules(ctx context.Context, hostID string) ([]nestbox.Capsule, error) {
	return list(ctx, s, "list live capsules", scanCapsule, `SELECT `+capsuleColumns+` FROM capsules
		WHERE host_id = ? AND state NOT IN (?, ?)`, hostID, nestbox.StateStopped, nestbox.StateError)
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

// TouchCapsule notes that a capsule was used. One that is gone is no error.
func (s *Store) TouchCapsule(ctx context.Context, id string, at time.Time) error {
	return s.change(ctx, "touch a capsule", func(tx tx) error {
		_, err := tx.exec(ctx, `UPDATE capsules SET last_active_at = ? WHERE id = ? AND last_active_at < ?`, micros(at), id, micros(at))
		return err
	})
}

// PruneCapsules forgets capsules that came to their end before a time, the
// oldest first, at most limit of them, and returns how many they were.
func (s *Store) PruneCapsules(ctx context.Context, before time.Time, limit int) (pruned int, err error) {
	err = s.change(ctx, "prune capsules", func(tx tx) error {
		n, err := tx.exec(ctx, `DELETE FROM capsules WHERE id IN (
				SELECT id FROM capsules WHERE state IN (?, ?) AND updated_at < ? ORDER BY updated_at LIMIT ?)
			AND state IN (?, ?)`,
			nestbox.StateStopped, nestbox.StateError, micros(before), limit, nestbox.StateStopped, nestbox.StateError)
		pruned = int(n)
		return err
	})
	return pruned, err
}

func scanCapsule(r row) (c nestbox.Capsule, err error) {
	var metadata string
	var created, started, active, updated int64
	err = r.Scan(&c.ID, &c.TeamID, &c.HostID, &c.Template, &c.State, &c.Reason,
		&c.Resources.VCPUs, &c.Resources.MemoryMB, &c.Resources.DiskMB, &c.Resources.PidsMax,
		&c.TimeoutSec, &metadata, &created, &started, &active, &updated)
	if err != nil {
		return nestbox.Capsule{}, err
	}
	c.CreatedAt, c.StartedAt = fromMicros(created), fromMicros(started)
	c.LastActiveAt, c.UpdatedAt = fromMicros(active), fromMicros(updated)
	if err := json.Unmarshal([]byte(metadata), &c.Metadata); err != nil {
		return nestbox.Capsule{}, fmt.Errorf("metadata of capsule %s: %w", c.ID, err)
	}
	return c, nil
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
