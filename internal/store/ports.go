package store

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/nestbox/nestbox"
)

// SetPort replaces the settings of a port of a live capsule; zero ones are forgotten.
// Those of other ports that are replaced at the same time stay. CodeNotFound.
// CodeInvalidState: it is not live. CodeExhausted: too many ports have some.
func (s *Store) SetPort(ctx context.Context, id string, port uint16, settings nestbox.PortSettings) error {
	const what = "change a port's settings"
	for {
		var before string
		var state nestbox.CapsuleState
		err := s.queryRow(ctx, `SELECT ports, state FROM capsules WHERE id = ?`, id).Scan(&before, &state)
		if err != nil {
			return fail(what, unknownCapsule(err))
		}
		if !state.Live() || state == nestbox.StateStopping {
			return state.NotRunning("")
		}
		after, err := withPort(before, port, settings)
		if err != nil {
			return fail(what, err)
		}
		var changed int64
		err = s.change(ctx, what, func(tx tx) (err error) {
			changed, err = tx.exec(ctx, `UPDATE capsules SET ports = ? WHERE id = ? AND ports = ?`, after, id, before)
			return err
		})
		if err != nil || changed > 0 {
			return err
		}
	}
}

func withPort(text string, port uint16, settings nestbox.PortSettings) (string, error) {
	ports := map[uint16]nestbox.PortSettings{}
	if err := json.Unmarshal([]byte(text), &ports); err != nil {
		return "", fmt.Errorf("settings of ports: %w", err)
	}
	ports[port] = settings
	if settings.IsZero() {
		delete(ports, port)
	}
	if len(ports) > nestbox.MaxPortSettings {
		return "", nestbox.Errorf(nestbox.CodeExhausted, "at most %d ports of a capsule have settings", nestbox.MaxPortSettings)
	}
	data, err := json.Marshal(ports)
	return string(data), err
}
