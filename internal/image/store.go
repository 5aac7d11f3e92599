package image

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/nestbox/nestbox"
)

// Store is a directory of templates. It is safe for concurrent use.
type Store struct {
	minimal Root
}

// NewStore opens the store in dir, which it makes if need be, and builds the
// built-in template from this machine's own programs, unless it is there
// already. ca are certificates (PEM) that are added to those that programs trust. It
// needs root: files in a template have owners.
func NewStore(dir string, ca []byte) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the template directory: %w", err)
	}
	if err := removeUnfinished(dir); err != nil {
		return nil, fmt.Errorf("clear the template directory: %w", err)
	}
	minimal, err := buildMinimal(dir, "/", ca)
	if err != nil {
		return nil, fmt.Errorf("build the template %s: %w", nestbox.TemplateMinimal, err)
	}
	return &Store{minimal: minimal}, nil
}

// Resolve returns the root of a template. CodeNotFound: there is none of that
// name.
func (s *Store) Resolve(name string) (Root, error) {
	if name != nestbox.TemplateMinimal {
		return Root{}, nestbox.Errorf(nestbox.CodeNotFound, "template not found")
	}
	return s.minimal, nil
}

// Names returns the names of the templates.
func (s *Store) Names() []string { return []string{nestbox.TemplateMinimal} }

const unfinished = "building-"

func removeUnfinished(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), unfinished) {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
