package hostagent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nestbox/nestbox"
)

// record is what is on disk of a capsule: enough to find it again, to talk to
// its envd, and to clean up after it. It is written before the sandbox is made
// and removed after the sandbox is gone.
type record struct {
	ID        string            `json:"id"`
	Template  string            `json:"template"`
	Resources nestbox.Resources `json:"resources"`
	Token     string            `json:"token"` // of its envd
	State     State             `json:"state"`
	Reason    string            `json:"reason,omitempty"`
	CreatedAt time.Time         `json:"created_at"`
}

func (r record) status() Status {
	return Status{
		Spec:      Spec{ID: r.ID, Template: r.Template, Resources: r.Resources},
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
	f, err := os.CreateTemp(rs.dir, ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails, as it should, once it is renamed
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), rs.path(r.ID)); err != nil {
		return err
	}
	return rs.sync()
}

func (rs records) remove(id string) error {
	if err := os.Remove(rs.path(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return rs.sync()
}

func (rs records) sync() error {
	d, err := os.Open(rs.dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// all reads every record. What is left of an interrupted put is removed. A
// file that is no record is an error: guessing could destroy a capsule.
func (rs records) all() ([]record, error) {
	entries, err := os.ReadDir(rs.dir)
	if err != nil {
		return nil, err
	}
	var out []record
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".new-") {
			_ = os.Remove(filepath.Join(rs.dir, e.Name()))
			continue
		}
		r, err := rs.read(strings.TrimSuffix(e.Name(), ".json"))
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

func (rs records) read(id string) (record, error) {
	data, err := os.ReadFile(rs.path(id))
	if err != nil {
		return record{}, err
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return record{}, fmt.Errorf("capsule record %s: %w", rs.path(id), err)
	}
	if r.ID != id || !nestbox.ValidID(nestbox.PrefixCapsule, id) {
		return record{}, fmt.Errorf("capsule record %s is of %q", rs.path(id), r.ID)
	}
	return r, nil
}
