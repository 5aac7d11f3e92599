package hostagent

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/durable"
)

// record is what is on disk of a capsule: enough to find it again, to talk to
// its envd, and to clean up after it. It is written before the sandbox is made
// and removed after the sandbox is gone.
type record struct {
	Version   int                 `json:"version"` // recordVersion
	ID        string              `json:"id"`
	Spec      nestbox.CapsuleSpec `json:"spec"`
	Image     string              `json:"image"` // that it was started from; "" = from before this was kept
	Token     string              `json:"token"` // of its envd
	State     State               `json:"state"`
	Reason    string              `json:"reason,omitempty"`
	CreatedAt time.Time           `json:"created_at"`
}

// recordVersion is the version of the form of records. One without a version
// has its template and resources beside the rest.
const recordVersion = 1

func (r record) status() Status {
	return Status{
		ID:        r.ID,
		State:     r.State,
		Reason:    r.Reason,
		CreatedAt: r.CreatedAt,
	}
}

// records is the folder of records, one file per capsule.
type records struct{ dir string }

func openRecords(dir string) (records, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return records{}, fmt.Errorf("make the folder of capsule records: %w", err)
	}
	return records{dir: dir}, nil
}

func (rs records) path(id string) string { return filepath.Join(rs.dir, id+".json") }

// put replaces a record so that a crash leaves the old one or the new one,
// and returns when it would survive a power cut.
func (rs records) put(r record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return durable.WriteFile(rs.path(r.ID), data, 0o600)
}

func (rs records) remove(id string) error { return durable.Remove(rs.path(id)) }

// all reads every record, and returns why others cannot be read, by the id in
// their names. Those are left as they are: guessing could destroy a capsule. What is
// left of an interrupted put is removed.
func (rs records) all() (read []record, unread map[string]error, err error) {
	entries, err := os.ReadDir(rs.dir)
	if err != nil {
		return nil, nil, err
	}
	unread = map[string]error{}
	for _, e := range entries {
		if durable.Leftover(e.Name()) {
			_ = os.Remove(filepath.Join(rs.dir, e.Name()))
			continue
		}
		id := strings.TrimSuffix(e.Name(), ".json")
		if r, err := rs.read(id); err == nil {
			read = append(read, r)
		} else {
			unread[id] = err
		}
	}
	return read, unread, nil
}

func (rs records) read(id string) (record, error) {
	data, err := os.ReadFile(rs.path(id))
	if err != nil {
		return record{}, err
	}
	var r struct {
		record
		Template  string            // of version 0
		Resources nestbox.Resources // of version 0
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return record{}, fmt.Errorf("capsule record %s: %w", rs.path(id), err)
	}
	if r.Version > recordVersion {
		return record{}, fmt.Errorf("capsule record %s has version %d, which only a later Nestbox can read", rs.path(id), r.Version)
	}
	if r.Version == 0 {
		r.Version, r.Spec = recordVersion, nestbox.CapsuleSpec{Template: r.Template, Resources: r.Resources}
	}
	if r.ID != id || !nestbox.ValidID(nestbox.PrefixCapsule, id) {
		return record{}, fmt.Errorf("capsule record %s is of %q", rs.path(id), r.ID)
	}
	return r.record, nil
}
